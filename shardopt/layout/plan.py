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


def _balance(tensors: Sequence[int], parameters: Specs, loads: list[int]) -> dict[int, int]:
    """Owner of each whole parameter: the costliest first, to the rank with the least so far."""
    owners = {}
    for index in sorted(tensors, key=lambda i: (-parameters[i].cost, i)):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += parameters[index].cost
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
