"""Boxes of an n-d tensor, and where their elements lie end to end. Integers only; no torch.

A flat range of a tensor's elements is at most ``2 ndim - 1`` boxes, of which each is a range again:
some first dims fixed, one dim a range, the rest whole. Where two of those overlap, they overlap in
a third, so that what one world size has written any other reads without a byte too many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple


class Box(NamedTuple):
    """A part of a tensor: ``sizes`` elements from ``offsets`` on, by dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def permuted(self, order: Sequence[int]) -> Box:
        """The same with dims in another order: dim ``i`` is what was ``order[i]``."""
        return Box(tuple(self.offsets[d] for d in order), tuple(self.sizes[d] for d in order))

    def unpermuted(self, order: Sequence[int]) -> Box:
        """What ``permuted`` was given."""
        return self.permuted(sorted(range(len(order)), key=order.__getitem__))

    def overlap(self, other: Box) -> Box | None:
        """The part that lies in both, if any does."""
        offsets, sizes = [], []
        pairs = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        for mine, my_size, theirs, their_size in pairs:
            low, high = max(mine, theirs), min(mine + my_size, theirs + their_size)
            if low >= high:
                return None
            offsets.append(low)
            sizes.append(high - low)
        return Box(tuple(offsets), tuple(sizes))

    def __str__(self) -> str:
        ranges = (f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True))
        return f"[{', '.join(ranges)}]"


def strides_of(sizes: Sequence[int], order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Strides of a dense tensor whose dims lie in ``order``, outermost first; row-major if none."""
    strides, stride = [0] * len(sizes), 1
    for dim in reversed(dims_in(order, len(sizes))):
        strides[dim] = stride
        stride *= sizes[dim]
    return tuple(strides)


def dims_in(order: Sequence[int] | None, ndim: int) -> Sequence[int]:
    """All dims in ``order``, in their own if there is none."""
    return range(ndim) if order is None else order


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The fewest boxes, in order, that hold elements ``[start, stop)`` of a row-major tensor."""
    if start == 0 and stop == math.prod(shape):
        yield Box.whole(shape)
        return
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    rest = math.prod(shape[1:])
    first, low = divmod(start, rest)
    last, high = divmod(stop, rest)
    if first == last:
        yield from _within(first, shape, low, high)
        return
    if low:
        yield from _within(first, shape, low, rest)
        first += 1
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield Box((first, *zeros), (last - first, *shape[1:]))
    if high:
        yield from _within(last, shape, 0, high)


def _within(index: int, shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes of a range that lies in one slice along dim 0."""
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((index, *box.offsets), (1, *box.sizes))


def cut(box: Box, max_numel: int) -> Iterator[Box]:
    """The box in slices of at most so many elements along its first dim that has more than one."""
    if box.numel <= max_numel:
        yield box
        return
    dim = next(dim for dim, size in enumerate(box.sizes) if size > 1)
    step = max(1, max_numel * box.sizes[dim] // box.numel)
    for low in range(0, box.sizes[dim], step):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim] += low
        sizes[dim] = min(step, box.sizes[dim] - low)
        yield from cut(Box(tuple(offsets), tuple(sizes)), max_numel)


def stretch(
    shape: Sequence[int], order: Sequence[int] | None, start: int, stop: int
) -> Iterator[Box]:
    """The boxes of elements ``[start, stop)`` of a tensor, as they lie in memory."""
    dims = dims_in(order, len(shape))
    for box in boxes_of_range([shape[dim] for dim in dims], start, stop):
        yield box.unpermuted(dims)


def slices(box: Box, order: Sequence[int] | None, max_numel: int) -> Iterator[Box]:
    """``cut`` along the outermost dim in memory: elements of each slice lie end to end."""
    dims = dims_in(order, len(box.sizes))
    for part in cut(box.permuted(dims), max_numel):
        yield part.unpermuted(dims)


def overlapping(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that have an element in common, if there are any.

    Only those are compared that overlap along the dim in which boxes differ most.
    """
    boxes = [box for box in boxes if box.numel]
    if len(boxes) < 2:
        return None
    dims = range(len(boxes[0].offsets))
    if not dims:
        return boxes[0], boxes[1]
    dim = max(dims, key=lambda dim: len({box.offsets[dim] for box in boxes}))
    boxes.sort(key=lambda box: box.offsets[dim])
    for place, one in enumerate(boxes):
        for other in boxes[place + 1 :]:
            if other.offsets[dim] >= one.offsets[dim] + one.sizes[dim]:
                break
            if one.overlap(other):
                return one, other
    return None


def order_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Dims from outermost to innermost, of a dense tensor; ``None`` if that is their order.

    Dims of one element lie anywhere, and stay where they are.
    """
    if all(one >= other for one, other in pairwise(strides)):
        return None
    wide = [dim for dim, size in enumerate(shape) if size != 1]
    by_stride = iter(sorted(wide, key=lambda dim: -strides[dim]))
    order = tuple(next(by_stride) if size != 1 else dim for dim, size in enumerate(shape))
    return None if order == tuple(range(len(shape))) else order
