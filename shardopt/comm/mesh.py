"""Two axes: ranks that split the state, times ranks that hold the same shard of it.

::

    mesh (2, 3)       shard 0   shard 1   shard 2
    replica 0         rank 0    rank 1    rank 2      reduce-scatter, all-gather: along a row
    replica 1         rank 3    rank 4    rank 5      mean of a shard: along a column

A gradient is reduced within a row first, so that what travels along the column, often between
hosts, is one shard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardopt.comm.collectives import Collectives, Handle, Reduction


class MeshCollectives(Collectives):
    """Shards along one axis, the same shards along the other.

    Args:
        shard: the ranks of this row.
        replicate: the ranks of this column.
    """

    def __init__(self, shard: Collectives, replicate: Collectives):
        self._shard, self._replicate = shard, replicate
        self.rank, self.world_size = shard.rank, shard.world_size
        self.replica = replicate.rank
        self.wire_device = shard.wire_device
        self.gathers_up_to = shard.gathers_up_to

    @property
    def channel(self) -> object:
        """See the base class."""
        return self._shard.channel

    @property
    def num_ranks(self) -> int:
        """See the base class."""
        return self._shard.world_size * self._replicate.world_size

    @property
    def shard_axis(self) -> Collectives:
        """See the base class."""
        return self._shard

    @property
    def replicate_axis(self) -> Collectives:
        """See the base class."""
        return self._replicate

    def aside(self, use: str) -> MeshCollectives:
        """See the base class."""
        return MeshCollectives(self._shard.aside(use), self._replicate.aside(use))

    def all_gather(self, bucket: Tensor, borders: Sequence[int]) -> Handle:
        """See the base class."""
        return self._shard.all_gather(bucket, borders)

    def reduce_scatter(self, bucket: Tensor, borders: Sequence[int], out: Tensor) -> Reduction:
        """See the base class. The column takes its mean when the row's is waited for."""
        return _MeanOfMeans(self._shard.reduce_scatter(bucket, borders, out), self._replicate, out)

    def all_to_all(
        self, send: Tensor, send_sizes: Sequence[int], out: Tensor, out_sizes: Sequence[int]
    ) -> Handle:
        """See the base class."""
        return self._shard.all_to_all(send, send_sizes, out, out_sizes)

    def all_gather_rows(self, row: Tensor) -> Tensor:
        """Every rank's row, replica by replica."""
        rows = self._shard.all_gather_rows(row)
        return self._replicate.all_gather_rows(rows.flatten()).view(-1, row.numel())

    def sum_rows(self, row: Tensor) -> Tensor:
        """Over rows of the mesh, then over columns."""
        return self._replicate.sum_rows(self._shard.sum_rows(row))

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        """The ``source`` of the first replica overwrites all others."""
        self._replicate.broadcast(tensor, 0).wait()
        return self._shard.broadcast(tensor, source)

    def send(self, tensor: Tensor, to: int) -> Handle:
        """See the base class."""
        return self._shard.send(tensor, to)

    def receive(self, tensor: Tensor, source: int) -> Handle:
        """See the base class."""
        return self._shard.receive(tensor, source)


class _MeanOfMeans:
    """The mean over a column of the means over its rows, in two halves that need no more room."""

    def __init__(self, reduction: Reduction, replicate: Collectives, out: Tensor):
        self._reduction, self._replicate, self._out = reduction, replicate, out
        self.rows: Tensor | None = None

    def is_done(self) -> bool:
        """Never put off: the column's half starts in ``wait``, in one order on every rank."""
        return True

    def wait(self) -> None:
        self._reduction.wait()
        self.rows = self._reduction.rows
        column, numel = self._replicate, self._out.numel()
        borders = [numel * part // column.world_size for part in range(column.world_size + 1)]
        mine = slice(borders[column.rank], borders[column.rank + 1])
        part = torch.empty_like(self._out[mine])
        column.reduce_scatter(self._out, borders, part).wait()
        self._out[mine].copy_(part)
        column.all_gather(self._out, borders).wait()
