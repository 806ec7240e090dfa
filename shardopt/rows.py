"""Parameters that are cut between rows: only rows that are touched travel, in both directions.

=====================  ====================================================================
``exchange_rows``      rows of each rank's gradient, to the rank that owns them
``gather_rows``        rows that their owners have updated, to every rank
=====================  ====================================================================

As in TorchRec's row-wise sharded tables, traffic follows the rows that are touched and not the size
of the table. How many rows come from each rank is said first, in one small message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from shardopt.comm.collectives import Collectives, Handle, Together
from shardopt.shard import Shard
from shardopt.sparse import rows_in

Rows = tuple[Tensor, Tensor]  # numbers (n,) of int64, and values (n, ...)


def gather_rows(shard: Shard, number: int, gradient_of: Callable[[int], Tensor | None]) -> Handle:
    """Start to bring every rank the rows of a bucket that this step has updated. Collective.

    Args:
        shard: whose bucket.
        number: of the bucket, which is cut between rows.
        gradient_of: parameter index -> the sparse gradient that has updated this rank's segment.
    """
    collectives = shard.collectives.shard_axis
    bucket, buffer = shard.layout.buckets[number], shard.buffers.buckets[number]
    numbers = {slot.parameter: torch.empty(0, dtype=torch.int64) for slot in bucket.slots}
    for segment in bucket.segments(collectives.rank):
        gradient = gradient_of(segment.parameter)
        if gradient is not None:
            row_numel = shard.layout.parameters[segment.parameter].row_numel
            first = segment.offset // max(row_numel, 1)
            numbers[segment.parameter] = rows_in(gradient) + first
    counts = torch.tensor([len(rows) for rows in numbers.values()], device="cpu")
    per_slot = collectives.all_gather_rows(counts).T.tolist()
    arrivals: list[Handle] = []
    for slot, from_each in zip(bucket.slots, per_slot, strict=True):
        table = shard.buffers.slot_of(buffer, slot)
        for source, count in enumerate(from_each):
            if count:
                mine = numbers[slot.parameter] if source == collectives.rank else None
                arrivals.append(_RowsOf(collectives, source, table, mine, count))
    return Together(arrivals)


class _RowsOf:
    """Rows of a table on their way from one rank to all others."""

    def __init__(
        self,
        collectives: Collectives,
        source: int,
        table: Tensor,  # (rows, ...)
        mine: Tensor | None,  # (count,) of int64, on the source
        count: int,
    ):
        self._table, self._is_source = table, mine is not None
        self._numbers = torch.empty(count, dtype=torch.int64, device=table.device)
        self._values = table.new_empty(count, *table.shape[1:])
        if mine is not None:
            self._numbers.copy_(mine)
            torch.index_select(table, 0, self._numbers, out=self._values)
        parts = (self._numbers, self._values)
        self._handles = [collectives.broadcast(part, source) for part in parts]

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()
        if not self._is_source:
            self._table.index_copy_(0, self._numbers, self._values)


def exchange_rows(
    collectives: Collectives, tables: Sequence[Sequence[Rows]]
) -> list[list[Rows]]:  # for each table, what came from each rank
    """Bring rows to the ranks they are meant for. Collective, and blocks.

    Args:
        collectives: the ranks among which rows travel.
        tables: for each table, what goes to each rank; dtype, device and the shape of a row are
            the same on every rank.
    """
    counts = torch.tensor([len(numbers) for table in tables for numbers, _ in table], device="cpu")
    shape = collectives.world_size, len(tables), collectives.world_size
    counted = collectives.all_gather_rows(counts).view(shape)  # source, table, destination
    return [
        _swap(collectives, table, counted[:, number, collectives.rank].tolist())
        for number, table in enumerate(tables)
    ]


def _swap(collectives: Collectives, table: Sequence[Rows], from_each: list[int]) -> list[Rows]:
    """Rows of one table, of which so many come from each rank."""
    received, handles = [], []
    for parts in zip(*table, strict=True):  # the numbers, then the values
        row_shape = parts[0].shape[1:]
        out = parts[0].new_empty(sum(from_each), *row_shape)
        to_each = [part.numel() for part in parts]
        sizes = [count * math.prod(row_shape) for count in from_each]
        handles.append(collectives.all_to_all(torch.cat(parts), to_each, out, sizes))
        received.append(out.split(from_each))
    for handle in handles:
        handle.wait()
    return list(zip(*received, strict=True))


def cut_rows(
    rows: Rows,  # numbers in ascending order
    borders: Sequence[int],  # world_size + 1 row numbers
) -> list[Rows]:
    """Rows by the part of the table they lie in, counted from its first row."""
    numbers, values = rows
    cuts = torch.searchsorted(numbers, torch.tensor(borders, device=numbers.device)).tolist()
    return [
        (numbers[low:high] - first, values[low:high])
        for (low, high), first in zip(pairwise(cuts), borders, strict=False)
    ]
