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
from collections.abc import Iterator, Sequence
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
    """The part of one parameter that lies in one shard; ``offset`` counts from its first element."""

    parameter: int
    start: int  # in the bucket
    offset: int  # in the parameter
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
    """All buckets of an optimizer, proved on construction: aligned, in bounds, disjoint, complete."""

    parameters: tuple[ParameterSpec, ...]
    world_size: int
    buckets: tuple[Bucket, ...]
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

    def place(self, parameter: int) -> tuple[int, Slot]:
        """Number of the bucket that holds ``parameter``, and its slot there."""
        return self._places[parameter]

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
                    + ("" if segment.whole else f"[{segment.offset}:{segment.offset + segment.numel}]")
                    for segment in bucket.segments(rank)
                )
                lines.append(f"  rank {rank} [{bucket.borders[rank]}, {bucket.borders[rank + 1]})  {held}")
        return "\n".join(lines)


def plan_layout(
    parameters: Sequence[ParameterSpec],
    atoms: Atom | Sequence[Atom],  # one for all, or one to a parameter
    *,
    world_size: int,
    bucket_bytes: int,
    extend: Layout | None = None,
) -> Layout:
    """Place ``parameters`` into buckets of about ``bucket_bytes`` and cut these into shards.

    A bucket is closed when the next parameter would take it over ``bucket_bytes``; a parameter
    larger than that has a bucket of its own. With ``extend`` the new parameters get buckets of
    their own after that layout's, which stay as they are.
    """
    parameters = tuple(parameters)
    atoms = (atoms,) * len(parameters) if isinstance(atoms, Atom) else tuple(atoms)
    known = extend.parameters if extend else ()
    everything = known + parameters
    loads = [0] * world_size
    if extend:
        for rank in range(world_size):
            loads[rank] = sum(
                everything[segment.parameter].cost
                for bucket in extend.buckets
                for segment in bucket.segments(rank)
                if segment.whole
            )
    first = len(known)
    tensors = [first + i for i, atom in enumerate(atoms) if atom is Atom.TENSOR]
    owners = _balance(tensors, everything, loads)
    buckets = []
    for (dtype, device, atom), members in _fill(everything, atoms, first, bucket_bytes):
        if atom is Atom.TENSOR:
            slots, borders = _cut_between_tensors(members, everything, owners, world_size)
        else:
            slots, end = _lay_end_to_end(members, everything)
            cut = _cut_evenly if atom is Atom.ELEMENT else _cut_between_rows
            borders = cut(slots, end, everything, world_size)
        buckets.append(Bucket(dtype, device, atom, slots, borders))
    return Layout(everything, world_size, (extend.buckets if extend else ()) + tuple(buckets))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _extent(numel: int) -> int:
    """Elements a slot takes up. A zero-size parameter takes some, so that one shard holds it."""
    return _round_up(max(numel, 1), SLOT_ALIGNMENT)


def _fill(parameters, atoms, first, bucket_bytes):
    """Yield ``(dtype, device, atom), [parameter, ...]`` for each bucket, in order of closing."""
    open_buckets: dict[tuple, tuple[list[int], int]] = {}
    done = []
    for index in reversed(range(first, len(parameters))):
        spec = parameters[index]
        key = (spec.dtype, spec.device, atoms[index - first])
        size = _extent(spec.numel) * spec.dtype.itemsize
        members, used = open_buckets.get(key, ([], 0))
        if members and used + size > bucket_bytes:
            done.append((key, members))
            members, used = [], 0
        open_buckets[key] = ([*members, index], used + size)
    return done + [(key, members) for key, (members, _) in open_buckets.items()]


def _lay_end_to_end(members, parameters, start=0):
    slots = []
    for index in members:
        slots.append(Slot(index, start, parameters[index].numel))
        start += _extent(parameters[index].numel)
    return tuple(slots), start


def _cut_evenly(slots, end, parameters, world_size):
    shard = _round_up(-(-end // world_size), SHARD_ALIGNMENT)
    return tuple(shard * rank for rank in range(world_size + 1))


def _cut_between_rows(slots, end, parameters, world_size):
    """Borders on the row borders nearest to an even cut."""
    borders = [0]
    for rank in range(1, world_size):
        even = end * rank // world_size
        slot = max((s for s in slots if s.start <= even), key=lambda s: s.start)
        row = max(parameters[slot.parameter].row_numel, 1)
        next_start = slot.start + _extent(slot.numel)
        inside = slot.start + round((even - slot.start) / row) * row
        border = inside if inside < slot.stop else next_start
        borders.append(max(border, borders[-1]))
    return (*borders, end)


def _balance(tensors, parameters, loads):
    """Owner of each whole parameter: the costliest first, to the rank with the least so far."""
    owners = {}
    for index in sorted(tensors, key=lambda i: (-parameters[i].cost, i)):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += parameters[index].cost
    return owners


def _cut_between_tensors(members, parameters, owners, world_size):
    slots, borders = (), [0]
    for rank in range(world_size):
        mine = [index for index in members if owners[index] == rank]
        placed, end = _lay_end_to_end(mine, parameters, borders[-1])
        slots += placed
        borders.append(_round_up(end, SHARD_ALIGNMENT))
    return slots, tuple(borders)


def _prove(bucket: Bucket, layout: Layout) -> None:
    """Assert what everything else relies on; a failure is a bug of the planner, not of a user."""
    borders = bucket.borders
    assert len(borders) == layout.world_size + 1 and borders[0] == 0, "borders are not world_size + 1"
    assert all(low <= high for low, high in pairwise(borders)), "borders run backwards"
    if bucket.atom is Atom.ELEMENT:
        shard = borders[1]
        assert shard % SHARD_ALIGNMENT == 0, "a shard is not aligned"
        assert borders == tuple(shard * r for r in range(len(borders))), "shards are not even"
    assert all(s.start % SLOT_ALIGNMENT == 0 for s in bucket.slots), "a slot is not aligned"
    assert all(a.stop <= b.start for a, b in pairwise(bucket.slots)), "slots overlap"
    for slot in bucket.slots:
        spec = layout.parameters[slot.parameter]
        assert (spec.numel, spec.dtype) == (slot.numel, bucket.dtype), "a slot does not fit its parameter"
        assert slot.stop <= bucket.numel, "a slot is out of bounds"
        inside = [border - slot.start for border in borders if slot.start < border < slot.stop]
        assert not inside or bucket.atom is not Atom.TENSOR, "a border cuts a whole parameter"
        if bucket.atom is Atom.ROW:
            assert not any(offset % spec.row_numel for offset in inside), "a border cuts a row"
