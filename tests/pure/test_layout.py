"""The layout: what holds for any set of parameters, tried on many random ones."""

import math
import random
from itertools import pairwise

import pytest
import torch

from shardopt.layout import (
    SHARD_ALIGNMENT,
    SLOT_ALIGNMENT,
    Atom,
    Layout,
    ParameterSpec,
    plan_layout,
)

WORLD_SIZES = range(1, 9)
SEEDS = range(12)
MIB = 1 << 20

every_atom = pytest.mark.parametrize("atom", Atom)
every_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)


def spec(shape, dtype=torch.float32, device=0, name="p", cost=None) -> ParameterSpec:
    cost = math.prod(shape) if cost is None else cost
    return ParameterSpec(name=name, shape=shape, dtype=dtype, device=device, cost=cost)


def random_specs(seed: int) -> list[ParameterSpec]:
    """Up to 20 parameters of all sorts: 0-dim, zero-size, small, with long rows, large."""
    rng = random.Random(seed)
    shapes = [(), (0,), (3, 0), (0, 3), (1,), (63,), (64,), (65,), (7, 11), (2, 3000), (900, 5)]
    dtypes = [torch.float32, torch.bfloat16, torch.complex128]
    return [
        spec(
            rng.choice([*shapes, (rng.randrange(1, 200), rng.randrange(1, 99))]),
            rng.choice(dtypes),
            rng.randrange(2),
            name=f"p{number}",
        )
        for number in range(rng.randrange(1, 20))
    ]


def plan_it(specs, atom=Atom.ELEMENT, world_size=2, bucket_bytes=MIB, extend=None) -> Layout:
    return plan_layout(specs, atom, world_size=world_size, bucket_bytes=bucket_bytes, extend=extend)


def random_layouts(atom: Atom, world_size: int):
    for seed in SEEDS:
        yield plan_it(random_specs(seed), atom, world_size, bucket_bytes=16 << (seed % 12))


def segments_of(layout: Layout, parameter: int):
    """Rank and segment of each part of a parameter."""
    return [
        (rank, segment)
        for bucket in layout.buckets
        for rank in range(layout.world_size)
        for segment in bucket.segments(rank)
        if segment.parameter == parameter
    ]


# -- what always holds -----------------------------------------------------------------------------


@every_atom
@every_world_size
def test_every_element_lies_in_exactly_one_segment(atom, world_size):
    for layout in random_layouts(atom, world_size):
        for index, parameter in enumerate(layout.parameters):
            found = [segment for _, segment in segments_of(layout, index)]
            assert found, "no rank has it"
            elements = [e for s in found for e in range(s.offset, s.offset + s.numel)]
            assert elements == list(range(parameter.numel))
            assert all(segment.whole == (len(found) == 1) for segment in found)
        total = sum(parameter.numel for parameter in layout.parameters)
        assert sum(layout.numel(rank) for rank in range(world_size)) == total


@every_atom
@every_world_size
def test_a_zero_size_parameter_belongs_to_one_rank(atom, world_size):
    num_seen = 0
    for layout in random_layouts(atom, world_size):
        for index, parameter in enumerate(layout.parameters):
            if parameter.numel == 0:
                num_seen += 1
                ((_, segment),) = segments_of(layout, index)
                assert segment.whole and segment.numel == 0
    assert num_seen > 10


@every_atom
@every_world_size
def test_segments_lie_in_their_slot_and_shard(atom, world_size):
    for layout in random_layouts(atom, world_size):
        for number, bucket in enumerate(layout.buckets):
            for rank in range(world_size):
                for segment in bucket.segments(rank):
                    place, slot = layout.place(segment.parameter)
                    assert (place, segment.start) == (number, slot.start + segment.offset)
                    low, high = bucket.borders[rank : rank + 2]
                    assert low <= segment.start <= segment.start + segment.numel <= high


@every_atom
@every_world_size
def test_slots_are_aligned_and_apart(atom, world_size):
    for layout in random_layouts(atom, world_size):
        for bucket in layout.buckets:
            assert all(slot.start % SLOT_ALIGNMENT == 0 for slot in bucket.slots)
            assert all(one.stop <= next_one.start for one, next_one in pairwise(bucket.slots))
            assert bucket.slots[-1].stop <= bucket.numel


@every_atom
def test_a_layout_is_a_value(atom):
    for seed in SEEDS:
        one, same = (plan_it(random_specs(seed), atom, 3) for _ in range(2))
        assert one == same and one is not same
        assert hash(one) == hash(same) and str(one) == str(same)
        assert one != plan_it(random_specs(seed), atom, 4)


# -- where each atom is cut ------------------------------------------------------------------------


@every_world_size
def test_element_shards_are_even(world_size):
    for layout in random_layouts(Atom.ELEMENT, world_size):
        for bucket in layout.buckets:
            (length,) = {high - low for low, high in pairwise(bucket.borders)}
            assert length % SHARD_ALIGNMENT == 0
            # No longer than an even cut needs.
            assert (length - SHARD_ALIGNMENT) * world_size < bucket.slots[-1].stop + SLOT_ALIGNMENT


@every_world_size
def test_row_borders_lie_between_rows(world_size):
    num_cuts = 0
    for layout in random_layouts(Atom.ROW, world_size):
        for bucket in layout.buckets:
            for slot in bucket.slots:
                row = layout.parameters[slot.parameter].row_numel
                inside = [b - slot.start for b in bucket.borders if slot.start < b < slot.stop]
                assert all(offset % row == 0 for offset in inside)
                num_cuts += len(inside)
    assert num_cuts or world_size == 1


def test_rows_are_shared_out_evenly():
    table = plan_it([spec((1000, 64))], Atom.ROW, 3)
    rows = [table.numel(rank) / 64 for rank in range(3)]
    assert sorted(rows) == [333, 333, 334]


def test_a_row_is_never_cut_however_long():
    layout = plan_it([spec((1, 5000)), spec((3, 2000))], Atom.ROW, 4)
    assert [layout.numel(rank) for rank in range(4)] == [2000, 4000, 0, 5000]


@every_world_size
def test_tensors_are_never_cut(world_size):
    for layout in random_layouts(Atom.TENSOR, world_size):
        for index in range(len(layout.parameters)):
            ((_, segment),) = segments_of(layout, index)
            assert segment.whole


@every_world_size
def test_tensors_are_balanced_by_cost(world_size):
    """No rank has more than the least loaded one and one tensor: the bound of largest-first."""
    for seed in SEEDS:
        rng = random.Random(seed)
        specs = [spec((8,), cost=rng.randrange(1, 10_000)) for _ in range(40)]
        layout = plan_it(specs, Atom.TENSOR, world_size, bucket_bytes=1024)
        loads = [0] * world_size
        for index, parameter in enumerate(specs):
            ((rank, _),) = segments_of(layout, index)
            loads[rank] += parameter.cost
        assert max(loads) <= 1.05 * sum(loads) / world_size
        assert max(loads) - min(loads) <= max(parameter.cost for parameter in specs)


# -- buckets ---------------------------------------------------------------------------------------


@every_atom
def test_buckets_fill_in_reverse_order_of_registration(atom):
    layout = plan_it([spec((100,)) for _ in range(6)], atom, 1, bucket_bytes=128 * 4 * 2)
    order = [[slot.parameter for slot in bucket.slots] for bucket in layout.buckets]
    assert order == [[5, 4], [3, 2], [1, 0]]


@every_atom
def test_a_bucket_holds_what_fits_and_no_less(atom):
    """Except for one parameter that is larger than a bucket: it has its own."""
    limit = 4096
    specs = [spec((size,)) for size in (5000, 64, 300, 300, 300, 1000, 25, 64, 2000, 3)]
    layout = plan_it(specs, atom, 1, bucket_bytes=limit)

    def used(slots):
        return sum(-(-slot.numel // SLOT_ALIGNMENT) * SLOT_ALIGNMENT * 4 for slot in slots)

    for bucket in layout.buckets:
        assert used(bucket.slots) <= limit or len(bucket.slots) == 1
    for bucket, next_bucket in pairwise(layout.buckets):
        assert used([*bucket.slots, next_bucket.slots[0]]) > limit
    assert any(used(bucket.slots) > limit for bucket in layout.buckets)


@every_atom
def test_a_bucket_has_one_dtype_and_one_device(atom):
    num_kinds = 0
    for seed in SEEDS:
        specs = random_specs(seed)
        layout = plan_it(specs, atom, 3, bucket_bytes=1 << 30)
        kinds = [(bucket.dtype, bucket.device) for bucket in layout.buckets]
        assert sorted(kinds, key=str) == sorted({(s.dtype, s.device) for s in specs}, key=str)
        num_kinds = max(num_kinds, len(kinds))
        for bucket in layout.buckets:
            members = [specs[slot.parameter] for slot in bucket.slots]
            assert {(s.dtype, s.device) for s in members} == {(bucket.dtype, bucket.device)}
    assert num_kinds > 3


def test_parameters_of_one_layout_may_have_atoms_of_their_own():
    atoms = [Atom.ELEMENT, Atom.TENSOR, Atom.ROW, Atom.ELEMENT]
    layout = plan_it([spec((50, 90)) for _ in atoms], atoms, 2)
    for index, atom in enumerate(atoms):
        number, _ = layout.place(index)
        assert layout.buckets[number].atom is atom
    assert len(segments_of(layout, 1)) == 1 and len(segments_of(layout, 2)) == 2


@every_atom
def test_there_may_be_more_ranks_than_elements(atom):
    layout = plan_it([spec(()), spec((2,)), spec((0,))], atom, 8)
    held = sorted((layout.numel(rank) for rank in range(8)), reverse=True)
    assert held[:3] == ([3, 0, 0] if atom is Atom.ELEMENT else [2, 1, 0])


def test_no_parameters_make_no_buckets():
    assert plan_it([], world_size=3).buckets == ()


# -- more parameters, later ------------------------------------------------------------------------


@every_atom
@every_world_size
def test_extend_keeps_what_is_there(atom, world_size):
    for seed in SEEDS:
        specs = random_specs(seed)
        half = len(specs) // 2
        known = plan_it(specs[:half], atom, world_size)
        layout = plan_it(specs[half:], atom, world_size, extend=known)
        assert layout.parameters == tuple(specs)
        assert layout.buckets[: len(known.buckets)] == known.buckets
        new = {slot.parameter for b in layout.buckets[len(known.buckets) :] for slot in b.slots}
        assert new == set(range(half, len(specs)))


def test_extend_balances_with_the_load_that_is_there():
    known = plan_it([spec((900,)), spec((100,)), spec((100,))], Atom.TENSOR, 3)
    (busy,) = (rank for rank in range(3) if known.numel(rank) == 900)
    layout = plan_it([spec((400,)), spec((400,))], Atom.TENSOR, 3, extend=known)
    assert layout.numel(busy) == 900
    assert sorted(layout.numel(rank) for rank in range(3)) == [500, 500, 900]


# -- against whole parameters ----------------------------------------------------------------------


def test_one_large_embedding_is_shared_out_evenly():
    """ZeroRedundancyOptimizer, which places whole parameters: 64,000 against 4,160."""
    model = {"embedding": (1000, 64), "weight": (64, 64), "bias": (64,)}
    specs = [spec(shape, name=name) for name, shape in model.items()]
    whole = plan_it(specs, Atom.TENSOR)
    assert [whole.numel(rank) for rank in range(2)] == [64_000, 4_160]
    even = plan_it(specs, Atom.ELEMENT)
    assert [even.numel(rank) for rank in range(2)] == [34_816, 33_344]
