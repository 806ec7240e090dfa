"""Deciding a layout: which parameters share a bucket, and where its shards are cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardopt.layout.values import (
    SHARD_ALIGNMENT,
    SLOT_ALIGNMENT,
    Atom,
    Bucket,
    Layout,
    ParameterSpec,
    Slot,
)

ELEMENT_CAP = 1.25  # of the even share of whole parameters' elements


def plan_layout(
    parameters: Sequence[ParameterSpec],
    atoms: Atom | Sequence[Atom],  # one for all, or one to a parameter
    *,
    world_size: int,
    bucket_bytes: int,
    extend: Layout | None = None,
) -> Layout:
    """Place ``parameters`` into buckets of about ``bucket_bytes`` and cut these into shards.

    Whole parameters go to ranks by cost, but no rank gets more than ``ELEMENT_CAP`` times the even
    share of their elements, which is what state takes, as long as another has room.

    A bucket is closed when the next parameter would take it over ``bucket_bytes``; a parameter
    larger than that has a bucket of its own. With ``extend`` the new parameters get buckets of
    their own after that layout's, which stay as they are.
    """
    parameters = tuple(parameters)
    atoms = (atoms,) * len(parameters) if isinstance(atoms, Atom) else tuple(atoms)
    known = extend.parameters if extend else ()
    everything = known + parameters
    first = len(known)
    tensors = [first + i for i, atom in enumerate(atoms) if atom is Atom.TENSOR]
    owners = _balance(tensors, everything, [_whole(extend, rank) for rank in range(world_size)])
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


Specs = Sequence[ParameterSpec]
Key = tuple[torch.dtype, int, Atom]


def _fill(
    parameters: Specs, atoms: Sequence[Atom], first: int, bucket_bytes: int
) -> list[tuple[Key, list[int]]]:
    """The kind and the parameters of each bucket, in order of closing."""
    open_buckets: dict[Key, tuple[list[int], int]] = {}
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


def _lay_end_to_end(
    members: Sequence[int], parameters: Specs, start: int = 0
) -> tuple[tuple[Slot, ...], int]:
    slots = []
    for index in members:
        slots.append(Slot(index, start, parameters[index].numel))
        start += _extent(parameters[index].numel)
    return tuple(slots), start


def _cut_evenly(
    slots: Sequence[Slot], end: int, parameters: Specs, world_size: int
) -> tuple[int, ...]:
    shard = _round_up(-(-end // world_size), SHARD_ALIGNMENT)
    return tuple(shard * rank for rank in range(world_size + 1))


def _cut_between_rows(
    slots: Sequence[Slot], end: int, parameters: Specs, world_size: int
) -> tuple[int, ...]:
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


def _whole(layout: Layout | None, rank: int) -> list[ParameterSpec]:
    """What ``rank`` holds of a layout because it was placed there whole."""
    return [
        layout.parameters[segment.parameter]
        for bucket in (layout.buckets if layout else ())
        if layout and bucket.atom is Atom.TENSOR
        for segment in bucket.segments(rank)
    ]


def _balance(
    tensors: Sequence[int],
    parameters: Specs,
    held: Sequence[Specs],  # by rank: whole parameters that have their place
) -> dict[int, int]:
    """Owner of each whole parameter: the costliest first, to the rank with the least cost so far.

    A rank that would exceed the cap of elements is passed over; where all would, the one with the
    fewest elements gets it.
    """
    costs = [sum(spec.cost for spec in specs) for specs in held]
    numels = [sum(spec.numel for spec in specs) for specs in held]
    cap = ELEMENT_CAP * (sum(numels) + sum(parameters[i].numel for i in tensors)) / len(held)
    owners = {}
    for index in sorted(tensors, key=lambda i: (-parameters[i].cost, i)):
        spec = parameters[index]
        fitting = [rank for rank, numel in enumerate(numels) if numel + spec.numel <= cap]
        if fitting:
            owner = min(fitting, key=lambda rank: costs[rank])
        else:
            owner = min(range(len(held)), key=lambda rank: (numels[rank], costs[rank]))
        owners[index] = owner
        costs[owner] += spec.cost
        numels[owner] += spec.numel
    return owners


def _cut_between_tensors(
    members: Sequence[int], parameters: Specs, owners: dict[int, int], world_size: int
) -> tuple[tuple[Slot, ...], tuple[int, ...]]:
    slots: tuple[Slot, ...] = ()
    borders = [0]
    for rank in range(world_size):
        mine = [index for index in members if owners[index] == rank]
        placed, end = _lay_end_to_end(mine, parameters, borders[-1])
        slots += placed
        borders.append(_round_up(end, SHARD_ALIGNMENT))
    return slots, tuple(borders)
