"""Boxes against what torch's own indexing says of the same elements."""

import itertools
import random

import pytest
import torch

from shardopt.checkpoint.boxes import (
    Box,
    boxes_of_range,
    cut,
    order_of,
    overlapping,
    slices,
    stretch,
    strides_of,
)
from shardopt.checkpoint.reader import runs

SHAPES = [
    (),
    (1,),
    (7,),
    (3, 4),
    (1, 5),
    (5, 1),
    (2, 3, 4),
    (3, 1, 2, 2),
    (2, 2, 3, 2, 2),
    (4, 1, 1),
]


def index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))


def some_box(rng: random.Random, shape: tuple[int, ...], within: Box | None = None) -> Box:
    """A box with at least one element; inside another one, if given."""
    offsets, sizes = [], []
    for low, size in zip((within or Box.whole(shape)).offsets, (within or Box.whole(shape)).sizes,
                         strict=True):  # fmt: skip
        start = rng.randrange(size)
        offsets.append(low + start)
        sizes.append(rng.randint(1, size - start))
    return Box(tuple(offsets), tuple(sizes))


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_of_a_range_hold_its_elements_in_order_and_are_few(shape):
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        boxes = list(boxes_of_range(shape, start, stop))
        held = torch.cat([numbers[index(box)].reshape(-1) for box in boxes])
        assert held.tolist() == list(range(start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        for box in boxes:  # each of which is a range again
            part = numbers[index(box)].reshape(-1).tolist()
            assert part == list(range(part[0], part[0] + box.numel))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_empty_range_has_no_box_unless_the_tensor_is_empty(shape):
    assert list(boxes_of_range(shape, 1, 1)) == []
    assert list(boxes_of_range((0, 3), 0, 0)) == [Box((0, 0), (0, 3))]


def test_as_many_boxes_as_promised_are_needed():
    assert len(list(boxes_of_range((4, 4, 4), 1, 63))) == 5


@pytest.mark.parametrize("seed", range(200))
def test_the_overlap_of_two_boxes_is_what_both_hold(seed):
    rng = random.Random(seed)
    shape = rng.choice([shape for shape in SHAPES if shape])
    one, other = some_box(rng, shape), some_box(rng, shape)
    marks = torch.zeros(shape, dtype=torch.int)
    marks[index(one)] += 1
    marks[index(other)] += 1
    overlap = one.overlap(other)
    assert overlap == other.overlap(one)
    expected = torch.zeros(shape, dtype=torch.int)
    if overlap is not None:
        assert overlap.numel > 0
        expected[index(overlap)] = 1
    assert torch.equal(marks == 2, expected == 1)


@pytest.mark.parametrize("seed", range(200))
def test_runs_copy_the_part_between_boxes_in_any_memory_order(seed):
    rng = random.Random(seed)
    shape = rng.choice([shape for shape in SHAPES if shape])
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    held, wanted = some_box(rng, shape), some_box(rng, shape)
    part = held.overlap(wanted)
    if part is None:
        held, part = wanted, wanted
    order = rng.sample(range(len(shape)), len(shape))
    stored = whole[index(held)].permute(order).contiguous()
    strides = [stored.stride(order.index(dim)) for dim in range(len(shape))]
    source, out = stored.view(-1), torch.full((wanted.numel,), -1)
    for start, place, length in runs(part, held, wanted, tuple(strides)):
        out[place : place + length] = source[start : start + length]
    expected = torch.full(wanted.sizes, -1)
    local = Box(tuple(p - w for p, w in zip(part.offsets, wanted.offsets, strict=True)), part.sizes)
    expected[index(local)] = whole[index(part)]
    assert torch.equal(out.view(wanted.sizes), expected)


def test_a_part_that_lies_alike_on_both_sides_is_one_run():
    whole, rows = Box.whole((4, 3, 5)), Box((1, 0, 0), (2, 3, 5))
    assert list(runs(whole, whole, whole, (15, 5, 1))) == [(0, 0, 60)]
    assert list(runs(rows, whole, rows, (15, 5, 1))) == [(15, 0, 30)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [1, 2, 5, 1000])
def test_a_cut_box_is_in_order_and_no_slice_is_too_large(shape, most):
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    slices = list(cut(Box.whole(shape), most))
    assert max(box.numel for box in slices) <= most
    held = torch.cat([numbers[index(box)].reshape(-1) for box in slices])
    assert torch.equal(held, numbers.view(-1))


def test_a_permuted_box_holds_the_same_elements():
    numbers = torch.arange(24).view(2, 3, 4)
    box, order = Box((1, 0, 2), (1, 2, 2)), (2, 0, 1)
    permuted = numbers.permute(order)[index(box.permuted(order))]
    assert torch.equal(permuted, numbers[index(box)].permute(order))


def in_order(shape, order):
    """The numbers of elements as they lie in memory, shaped as the tensor."""
    numbers = torch.arange(torch.Size(shape).numel())
    return numbers.as_strided(shape, strides_of(shape, order))


@pytest.mark.parametrize("shape", SHAPES)
def test_strides_and_orders_are_those_of_torch(shape):
    assert strides_of(shape) == torch.empty(shape).stride()
    assert order_of(shape, torch.empty(shape).stride()) is None
    for order in itertools.permutations(range(len(shape))):
        permuted = torch.empty([shape[dim] for dim in order])
        tensor = permuted.permute([order.index(dim) for dim in range(len(shape))])
        assert strides_of(shape, order) == tensor.stride()
        again = strides_of(shape, order_of(shape, tensor.stride()))
        where = zip(shape, again, tensor.stride(), strict=True)
        assert all(mine == theirs for size, mine, theirs in where if size > 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stretch_lies_end_to_end_in_any_memory_order(shape):
    for order in [None, *itertools.permutations(range(len(shape)))]:
        numbers = in_order(shape, order)
        dims = order or range(len(shape))
        for start in range(0, numbers.numel(), 3):
            for stop in (start + 1, numbers.numel()):
                boxes = list(stretch(shape, order, start, stop))
                held = [numbers[index(box)].permute(list(dims)).reshape(-1) for box in boxes]
                assert torch.cat(held).tolist() == list(range(start, stop))


@pytest.mark.parametrize("shape", SHAPES)
def test_slices_lie_end_to_end_one_after_the_other(shape):
    for order in [None, *itertools.permutations(range(len(shape)))]:
        numbers = in_order(shape, order)
        for most in (1, 4, 100):
            boxes = list(slices(Box.whole(shape), order, most))
            held = [numbers[index(b)].permute(list(order or range(len(shape)))) for b in boxes]
            assert torch.cat([h.reshape(-1) for h in held]).tolist() == list(range(numbers.numel()))
            assert all(box.numel <= most for box in boxes)


@pytest.mark.parametrize("seed", range(60))
def test_boxes_that_overlap_are_found(seed):
    rng = random.Random(seed)
    shape = rng.choice(SHAPES[1:])
    boxes = [some_box(rng, shape) for _ in range(rng.randint(1, 6))]
    pairs = [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlap(pair[1])]
    found = overlapping(boxes)
    assert bool(found) == bool(pairs)
    assert found is None or found[0].overlap(found[1])


def test_only_boxes_with_elements_overlap():
    whole = Box.whole(())
    assert overlapping([]) is None and overlapping([whole]) is None
    assert overlapping([whole, whole]) == (whole, whole)
    assert overlapping([Box((0,), (0,)), Box((0,), (3,)), Box((1,), (0,))]) is None


def test_a_box_says_where_it_is():
    assert str(Box((2, 0), (3, 4))) == "[2:5, 0:4]"
