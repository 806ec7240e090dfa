"""Where every parameter lies: buckets, slots, shards and segments, as plain integers.

[Note: Vocabulary]

========== =====================================================================================
parameter  a tensor of the user's model
bucket     one contiguous 1-D buffer, of one dtype on one device, holding whole parameters end
           to end; the unit of communication
slot       where a parameter lies in its bucket: ``[start, start + numel)``
shard      the part of a bucket that one rank owns and updates: ``[borders[r], borders[r + 1])``
segment    the part of one parameter that lies in one shard
atom       what a shard border may not cut: an ELEMENT, a ROW or a whole TENSOR
========== =====================================================================================

Four parameters, ``A (5, 3)``, ``B (6,)``, ``C (2, 2)``, ``D ()``, on three ranks, drawn as if
nothing were aligned::

    bucket 0   | D | C C C C | B B B B B B | A A A A A A A A A A A A A A A | . |
    element      0   1     4   5         10  11                         25  26
    rank 0 [ 0, 9)  D, C, B[0:4]     rank 1 [ 9,18)  B[4:6], A[0:7]     rank 2 [18,27)  A[7:15]

In truth a slot starts on a multiple of ``SLOT_ALIGNMENT`` and a shard of ``Atom.ELEMENT`` is a
multiple of ``SHARD_ALIGNMENT``, so a parameter is only ever cut on 64-element borders: kernels
vectorise, and torch's fused CPU kernels, which compute their tails otherwise, give the same bits
wherever a shard is cut. Gaps and padding are never updated, counted or saved.

Buckets fill in reverse order of registration, about the order in which backward produces
gradients. The layout is a pure function of its arguments and needs no process group, so every
rank computes the same one, and tools and tests use it without ranks.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch

SLOT_ALIGNMENT = 64
SHARD_ALIGNMENT = 1024


class Atom(enum.Enum):
    """What a shard border may not cut."""

    ELEMENT = "element"
    ROW = "row"
    TENSOR = "tensor"


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """What the layout needs to know of a parameter.

    Args:
        name: for messages only.
        shape: the parameter's shape.
        dtype: its dtype; a bucket holds one.
        device: ordinal of its device among the devices this rank uses, in order of appearance.
            Not the device itself, which may differ between ranks.
        cost: estimated cost of its update, in any one unit; balances ``Atom.TENSOR``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: int = 0
    cost: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row_numel(self) -> int:
        """Number of elements of one row: of one step along dim 0."""
        return math.prod(self.shape[1:]) if self.shape else 1


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its bucket."""

    parameter: int  # index into Layout.parameters
    start: int
    numel: int

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.numel


@dataclass(frozen=True)
class Segment:
    """The part of one parameter that lies in one shard."""

    parameter: int
    start: int  # in the bucket
    offset: int  # in the parameter, from its first element
    numel: int
    whole: bool  # the shard holds all of the parameter


@dataclass(frozen=True)
class Bucket:
    """One buffer: its slots in order, and the borders between its shards."""

    dtype: torch.dtype
    device: int
    atom: Atom
    slots: tuple[Slot, ...]
    borders: tuple[int, ...]  # world_size + 1 of them; rank r owns [borders[r], borders[r + 1])

    @property
    def numel(self) -> int:
        """Elements of the buffer, gaps and padding included."""
        return self.borders[-1]

    @property
    def gaps(self) -> Iterator[tuple[int, int]]:
        """What no slot covers: ``[start, stop)`` of each gap, the padding at the end included."""
        stops = [0, *(slot.stop for slot in self.slots)]
        starts = [*(slot.start for slot in self.slots), self.numel]
        return ((stop, start) for stop, start in zip(stops, starts, strict=True) if stop < start)

    def segments(self, rank: int) -> Iterator[Segment]:
        """The segments of ``rank``'s shard, in order. A zero-size slot belongs to one rank too."""
        low, high = self.borders[rank], self.borders[rank + 1]
        for slot in self.slots:
            start, stop = max(slot.start, low), min(slot.stop, high)
            if start < stop or (slot.numel == 0 and low <= slot.start < high):
                numel = max(stop - start, 0)
                yield Segment(slot.parameter, start, start - slot.start, numel, numel == slot.numel)


@dataclass(frozen=True)
class Layout:
    """All buckets of an optimizer, proved: aligned, in bounds, disjoint, complete.

    Attributes:
        by_rows: indices of the parameters that are cut between rows.
    """

    parameters: tuple[ParameterSpec, ...]
    world_size: int
    buckets: tuple[Bucket, ...]
    by_rows: frozenset[int] = field(init=False, repr=False, compare=False, hash=False)
    _places: dict[int, tuple[int, Slot]] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        places: dict[int, tuple[int, Slot]] = {}
        for number, bucket in enumerate(self.buckets):
            _prove(bucket, self)
            for slot in bucket.slots:
                assert slot.parameter not in places, f"parameter {slot.parameter} has two slots"
                places[slot.parameter] = (number, slot)
        assert sorted(places) == list(range(len(self.parameters))), "a parameter has no slot"
        object.__setattr__(self, "_places", places)
        rows = (bucket.slots for bucket in self.buckets if bucket.atom is Atom.ROW)
        object.__setattr__(self, "by_rows", frozenset(s.parameter for slots in rows for s in slots))

    def place(self, parameter: int) -> tuple[int, Slot]:
        """Number of the bucket that holds ``parameter``, and its slot there."""
        return self._places[parameter]

    def atom_of(self, parameter: int) -> Atom:
        """What a shard border may not cut of a parameter."""
        return self.buckets[self._places[parameter][0]].atom

    def shape_of(self, segment: Segment) -> tuple[int, ...]:
        """Shape of a segment: of its whole parameter, of some rows of it, or of elements."""
        spec = self.parameters[segment.parameter]
        if segment.whole:
            return spec.shape
        if segment.parameter in self.by_rows:
            return (segment.numel // spec.row_numel, *spec.shape[1:])
        return (segment.numel,)

    def row_borders(self, parameter: int) -> tuple[int, ...]:  # world_size + 1
        """The first row of each rank's part of a parameter, and one past its last row."""
        number, slot = self._places[parameter]
        row_numel = max(self.parameters[parameter].row_numel, 1)
        inside = (min(max(b, slot.start), slot.stop) for b in self.buckets[number].borders)
        return tuple((border - slot.start) // row_numel for border in inside)

    def numel(self, rank: int) -> int:
        """Parameter elements that ``rank`` updates, without gaps and padding."""
        return sum(segment.numel for bucket in self.buckets for segment in bucket.segments(rank))

    def __str__(self) -> str:
        lines = []
        for number, bucket in enumerate(self.buckets):
            lines.append(
                f"bucket {number}: {bucket.numel} x {bucket.dtype}, device {bucket.device}, "
                f"cut at {bucket.atom.value}s"
            )
            for rank in range(self.world_size):
                held = ", ".join(
                    self.parameters[segment.parameter].name
                    + (
                        ""
                        if segment.whole
                        else f"[{segment.offset}:{segment.offset + segment.numel}]"
                    )
                    for segment in bucket.segments(rank)
                )
                lines.append(
                    f"  rank {rank} [{bucket.borders[rank]}, {bucket.borders[rank + 1]})  {held}"
                )
        return "\n".join(lines)


def _prove(bucket: Bucket, layout: Layout) -> None:
    """Assert what everything else relies on; a failure is a bug of the planner, not of a user."""
    borders = bucket.borders
    assert len(borders) == layout.world_size + 1 and borders[0] == 0, (
        "borders are not world_size + 1"
    )
    assert all(low <= high for low, high in pairwise(borders)), "borders run backwards"
    if bucket.atom is Atom.ELEMENT:
        shard = borders[1]
        assert shard % SHARD_ALIGNMENT == 0, "a shard is not aligned"
        assert borders == tuple(shard * r for r in range(len(borders))), "shards are not even"
    assert all(s.start % SLOT_ALIGNMENT == 0 for s in bucket.slots), "a slot is not aligned"
    assert all(a.stop <= b.start for a, b in pairwise(bucket.slots)), "slots overlap"
    for slot in bucket.slots:
        spec = layout.parameters[slot.parameter]
        assert (spec.numel, spec.dtype) == (slot.numel, bucket.dtype), (
            "a slot does not fit its parameter"
        )
        assert slot.stop <= bucket.numel, "a slot is out of bounds"
        inside = [border - slot.start for border in borders if slot.start < border < slot.stop]
        assert not inside or bucket.atom is not Atom.TENSOR, "a border cuts a whole parameter"
        if bucket.atom is Atom.ROW:
            assert not any(offset % spec.row_numel for offset in inside), "a border cuts a row"
