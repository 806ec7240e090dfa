"""Two axes: ranks that split the state, times ranks that hold the same shard of it.

::

    mesh (2, 3)       shard 0   shard 1   shard 2
    replica 0         rank 0    rank 1    rank 2      reduce-scatter, all-gather: along a row
    replica 1         rank 3    rank 4    rank 5      mean of a shard: along a column

A gradient is reduced within a row first, so that what travels along the column, often between
hosts, is one shard.

[Note: Turns] The column's half of a reduction can start when the row's has ended, which each rank
sees at another time; but launch order is law. So those of all optimizers over the same mesh take
turns, in the order in which the rows' halves started, on a channel on which nothing else travels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from shardopt.comm.collectives import Collectives, Handle, Reduced, Reduction, Work


class MeshCollectives(Collectives):
    """Shards along one axis, the same shards along the other.

    Args:
        shard: the ranks of this row.
        replicate: the ranks of this column.
        means: these on a channel for the columns' halves of reductions alone. Without one, or on an
            accelerator, where to wait is to put in order, a half starts when it is waited for.
    """

    def __init__(
        self, shard: Collectives, replicate: Collectives, means: Collectives | None = None
    ):
        self._shard, self._replicate, self._means = shard, replicate, means
        self._turns = _TURNS.setdefault((means or replicate).channel, deque())
        self.rank, self.world_size = shard.rank, shard.world_size
        self.replica = replicate.rank
        self.wire_device = shard.wire_device
        self.gathers_up_to = shard.gathers_up_to

    @property
    def channel(self) -> object:
        """See the base class. A row of one rank starts nothing, so there it is the column's."""
        column = self._means or self._replicate
        return (self._shard if self.world_size > 1 else column).channel

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

    def all_gather(self, bucket: Tensor, borders: Sequence[int]) -> Work:
        """See the base class."""
        return self._shard.all_gather(bucket, borders)

    def reduce_scatter(self, bucket: Tensor, borders: Sequence[int], out: Tensor) -> Reduction:
        """See the base class. See [Note: Turns] for when the column takes its mean."""
        row = self._shard.reduce_scatter(bucket, borders, out)
        early = self._means is not None and out.device.type == "cpu"
        mean = _MeanOfMeans(row, self._means or self._replicate, out, self._turns, early)
        _take_turns(self._turns)
        return mean

    def all_to_all(
        self, send: Tensor, send_sizes: Sequence[int], out: Tensor, out_sizes: Sequence[int]
    ) -> Work:
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
    """The mean over a column of the means over its rows, in halves that need no more room."""

    def __init__(
        self,
        row: Reduction,
        column: Collectives,
        out: Tensor,
        turns: deque[_MeanOfMeans],
        early: bool,
    ):
        self._row, self._column, self._out, self._early = row, column, out, early
        self.rows: Tensor | None = None
        self._under_way, self._next = row, deque([self._reduce, self._gather])
        self._turns = turns
        turns.append(self)

    def is_done(self) -> bool:
        """See ``Reduction``; never put off where the column's half starts in ``wait``."""
        _take_turns(self._turns)
        return not self._early or self not in self._turns

    def wait(self) -> None:
        """See ``Reduction``. Who has gone on with it may have done so on another stream."""
        _take_turns(self._turns, until=self)
        self._under_way.wait()

    def is_ready(self) -> bool:
        """Whether ``go_on`` may be called at any time, and does not wait."""
        return self._early and self._under_way.is_done()

    def go_on(self) -> bool:
        """Start what comes after what is under way; returns whether there is more."""
        self._under_way.wait()
        if not self._next:
            return False
        self._under_way = self._next[0]()
        self._next.popleft()  # not if it could not start
        return True

    def _reduce(self) -> Reduction:
        self.rows = self._row.rows
        world_size, numel = self._column.world_size, self._out.numel()
        self._borders = [numel * part // world_size for part in range(world_size + 1)]
        low, high = self._borders[self._column.rank : self._column.rank + 2]
        self._part, self._mine = torch.empty_like(self._out[low:high]), self._out[low:high]
        return self._column.reduce_scatter(self._out, self._borders, self._part)

    def _gather(self) -> Reduction:
        self._mine.copy_(self._part)
        return Reduced(self._column.all_gather(self._out, self._borders), self._out)


_TURNS: WeakKeyDictionary[object, deque[_MeanOfMeans]] = WeakKeyDictionary()


def _take_turns(turns: deque[_MeanOfMeans], until: _MeanOfMeans | None = None) -> None:
    """Go on with what has ended, or to the end of one, with waiting."""
    while turns and (turns[0].is_ready() or until in turns):
        if not turns[0].go_on():
            turns.popleft()
