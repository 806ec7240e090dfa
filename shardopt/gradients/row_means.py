"""Mean gradients of the parameters that are cut by rows: sparse, and never dense on the way.

Each rank sends the rows of its gradient to their owners, who sum them in rank order. Nothing is
sent from hooks: how much there is to send is known when backward has ended, so all that
parameters of this kind have in ``.grad`` is exchanged when the ranks agree on a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardopt.gradients.kept import Noted
from shardopt.gradients.norms import all_finite
from shardopt.rows import Rows, cut_rows, exchange_rows
from shardopt.shard import Shard
from shardopt.sparse import sparse_rows


class RowMeans:
    """This rank's rows of the mean gradients.

    Args:
        shard: the parameters.
        adds: whether what has been exchanged is freed, and means add up; otherwise ``.grad``
            stays, and each exchange takes the place of the one before.
        looks: whether to look for what is not finite.

    Attributes:
        present: indices of parameters with a gradient of this rank in the means.
        nonfinite: a parameter whose mean is not finite and the rank that brought it, if known.
    """

    def __init__(self, shard: Shard, *, adds: bool, looks: bool):
        self._shard, self._adds, self._looks = shard, adds, looks
        self._means: dict[int, Tensor] = {}  # by parameter: sparse, shaped as its segment
        self._sent = Noted()
        self.present: set[int] = set()
        self.nonfinite: tuple[int, int] | None = None

    def has_more(self) -> bool:
        """Whether there are gradients that the means do not know of, or some have gone."""
        return any(self._is_new(index) for index in self._shard.layout.by_rows)

    def _is_new(self, index: int) -> bool:
        gradient = self._shard.parameters[index].grad
        changes = self._sent.num_changes(index, gradient)
        return changes > 0 and (gradient is not None or index in self._sent)

    def clear(self) -> None:
        """Forget all means."""
        self._means.clear()
        self._sent.forget()
        self.present.clear()
        self.nonfinite = None

    def tensors(self) -> list[Tensor]:
        """The values of the means, each ``(touched rows, ...)``."""
        return [mean._values() for _, mean in sorted(self._means.items())]

    def of(self, index: int) -> Tensor | None:
        """The mean gradient of a parameter's segment: sparse, shaped as the segment."""
        return self._means.get(index)

    @torch.no_grad()
    def exchange(self) -> None:
        """Send the rows of every gradient to their owners. Collective."""
        if not self._adds:
            self.clear()
        layout, collectives = self._shard.layout, self._shard.collectives
        indices = sorted(layout.by_rows)
        tables = [cut_rows(self._rows_of(i), layout.row_borders(i)) for i in indices]
        received = exchange_rows(collectives.shard_axis, tables)
        sums = [_sum(from_each) for from_each in received]
        divisor, column = collectives.world_size, collectives.replicate_axis
        if column is not None:
            divisor *= column.world_size
            copies = exchange_rows(column, [[rows] * column.world_size for rows in sums])
            sums = [_sum(from_each) for from_each in copies]
        for index, rows, from_each in zip(indices, sums, received, strict=True):
            self._add(index, rows, divisor)
            self._look(index, from_each)
            self._mark_as_sent(index)

    def _rows_of(self, index: int) -> Rows:
        """What this rank's gradient has, in order of rows."""
        parameter = self._shard.parameters[index]
        if parameter.grad is None:
            nothing = torch.empty(0, dtype=torch.int64, device=parameter.device)
            return nothing, parameter.detach()[:0]
        gradient = parameter.grad.coalesce()
        return gradient.indices()[0], gradient.values()

    def _add(self, index: int, rows: Rows, divisor: int) -> None:
        """Add what has come to the mean of this rank's segment, if it has one."""
        if index not in self._shard.segments:
            return
        segment = self._shard.segments[index][1]
        values = (rows[1] / divisor).to(segment.dtype)
        mean = sparse_rows(rows[0], values, segment.shape, coalesced=True)
        before = self._means.get(index)
        self._means[index] = mean if before is None else (before + mean).coalesce()

    def _look(self, index: int, from_each: list[Rows]) -> None:
        """Note which parameter's mean is not finite, and from which rank of this row it comes."""
        if not self._looks or self.nonfinite or index not in self._means:
            return
        if not all_finite(self._means[index]._values()):
            bad = [rank for rank, (_, v) in enumerate(from_each) if not all_finite(v)]
            first = self._shard.collectives.replica * len(from_each)
            self.nonfinite = index, first + bad[0] if bad else -1

    def _mark_as_sent(self, index: int) -> None:
        parameter = self._shard.parameters[index]
        if parameter.grad is None:
            return
        self.present.add(index)
        if self._adds:
            parameter.grad = None
        else:
            self._sent.note(index, parameter.grad)


def _sum(from_each: list[Rows]) -> Rows:
    """The sum over ranks, in their order, in fp32 where elements have 16 bits; rows in order."""
    numbers = torch.cat([numbers for numbers, _ in from_each]).unique()
    values = from_each[0][1]
    small = values.is_floating_point() and values.itemsize < 4
    dtype = torch.float32 if small else values.dtype
    total = values.new_zeros(len(numbers), *values.shape[1:], dtype=dtype)
    for rows, added in from_each:  # each row at most once
        total.index_add_(0, torch.searchsorted(numbers, rows), added.to(dtype))
    return numbers, total
