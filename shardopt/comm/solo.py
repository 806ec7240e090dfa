"""A world of one: the null object that spares the optimizer every branch on world size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardopt.comm.collectives import Collectives, Done, Handle, Reduction, Work


class SoloCollectives(Collectives):
    """One rank that holds everything; nothing ever moves."""

    rank = 0
    world_size = 1
    wire_device = torch.device("cpu")

    def all_gather(self, bucket: Tensor, borders: Sequence[int]) -> Work:
        """Nothing to gather."""
        return Done()

    def reduce_scatter(self, bucket: Tensor, borders: Sequence[int], out: Tensor) -> Reduction:
        """The mean of one is itself."""
        out.copy_(bucket)
        return _Copied(bucket[None])

    def all_to_all(
        self, send: Tensor, send_sizes: Sequence[int], out: Tensor, out_sizes: Sequence[int]
    ) -> Work:
        """What goes to the one rank comes from it."""
        out.copy_(send)
        return Done()

    def all_gather_rows(self, row: Tensor) -> Tensor:
        """The one row."""
        return row.detach().cpu()[None]

    def sum_rows(self, row: Tensor) -> Tensor:
        """The sum of one is itself."""
        return row.detach().cpu()

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        """Nothing to send."""
        return Done()

    def send(self, tensor: Tensor, to: int) -> Handle:
        """There is nobody to send to."""
        raise AssertionError("a world of one has no other rank")

    def receive(self, tensor: Tensor, source: int) -> Handle:
        """There is nobody to receive from."""
        raise AssertionError("a world of one has no other rank")


class _Copied(Done):
    def __init__(self, rows: Tensor):
        self.rows: Tensor | None = rows

    def is_done(self) -> bool:
        """It has been from the beginning."""
        return True
