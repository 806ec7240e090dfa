"""What ranks compare: fingerprints of tensors, texts of values, and the words of an error."""

import math
import random

import pytest
import torch
from torch import nn

from shardopt.comm import SoloCollectives
from shardopt.errors import AgreementError
from shardopt.guard import agree, agree_on_gradients, all_or_none, describe, fingerprint

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def values(dtype: torch.dtype, shape=(3, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.bool:
        return torch.randn(shape, generator=generator) > 0
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    return (torch.randn(shape, generator=generator) * 8).to(dtype)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of ``tensor`` as integers, a view."""
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return flat.view(-1).view(BITS[flat.dtype.itemsize])


# -- fingerprints ----------------------------------------------------------------------------------


@every_dtype
def test_equal_tensors_have_equal_fingerprints(dtype):
    tensor = values(dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone()) != 0


@every_dtype
def test_any_flipped_bit_is_noticed(dtype):
    tensor = values(dtype)
    bits, seen = bits_of(tensor), {fingerprint(tensor)}
    num_bits = 1 if dtype is torch.bool else 8 * bits.element_size()
    for index in range(bits.numel()):
        for bit in range(num_bits):
            mask = torch.tensor(1 << bit if bit < 63 else -(1 << 63)).to(bits.dtype)
            bits[index] ^= mask
            seen.add(fingerprint(tensor))
            bits[index] ^= mask
    assert len(seen) == 1 + bits.numel() * num_bits


@every_dtype
def test_elements_that_change_places_are_noticed(dtype):
    tensor = values(dtype)
    flat, original = tensor.view(-1), fingerprint(tensor)
    rng, num_swaps = random.Random(0), 0
    for _ in range(200):
        one, other = rng.sample(range(flat.numel()), 2)
        if flat[one] != flat[other]:
            swapped = flat.clone()
            swapped[one], swapped[other] = flat[other], flat[one]
            assert fingerprint(swapped) != original
            num_swaps += 1
    assert num_swaps > 50


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_signs_and_powers_of_two_are_noticed(dtype):
    """What sums of bits times weights miss: differences that are multiples of a power of two."""
    tensor = values(dtype)
    assert fingerprint(-tensor) != fingerprint(tensor)
    far_apart = torch.ones(8192, dtype=dtype)
    prints = set()
    for place in (0, 1, 2, 1024, 2048, 4096, 8191):
        for value in (-1.0, 2.0, 0.5):
            changed = far_apart.clone()
            changed[place] = value
            prints.add(fingerprint(changed))
    assert len(prints) == 7 * 3


def test_zeros_of_another_length_or_sign_are_noticed():
    tensors = [torch.zeros(n) for n in (0, 1, 2, 3, 100)] + [-torch.zeros(3)]
    assert len({fingerprint(tensor) for tensor in tensors}) == len(tensors)


def test_a_fingerprint_is_never_zero():
    """Zero stands for a gradient that is missing."""
    assert fingerprint(torch.zeros(0)) != 0
    assert fingerprint(torch.zeros(5)) != 0


def test_nan_has_a_fingerprint_of_its_bits():
    tensor = torch.tensor([1.0, math.nan, math.inf])
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) != fingerprint(torch.tensor([1.0, math.inf, math.nan]))


def test_strides_do_not_matter():
    image = values(torch.float32, (2, 3, 4, 5))
    assert fingerprint(image.to(memory_format=torch.channels_last)) == fingerprint(image)
    assert fingerprint(image[:, ::2]) == fingerprint(image[:, ::2].clone())


def test_lazy_conjugates_and_negatives_are_resolved():
    tensor = values(torch.complex64)
    assert tensor.conj().is_conj() and tensor.conj().imag.is_neg()
    assert fingerprint(tensor.conj()) == fingerprint(tensor.conj().resolve_conj())
    assert fingerprint(tensor.conj()) != fingerprint(tensor)
    assert fingerprint(tensor.conj().imag) == fingerprint(-tensor.imag)


def test_a_sparse_tensor_has_the_fingerprint_of_its_entries():
    """However they are ordered, and without its dense form."""

    def sparse(rows, *values, size=1 << 40):
        indices, entries = torch.tensor([rows]), torch.tensor(values, dtype=torch.float32)
        return torch.sparse_coo_tensor(indices, entries, (size,), check_invariants=False)

    one = fingerprint(sparse([2, 5], 1, 3))
    assert one == fingerprint(sparse([5, 2], 3, 1)) == fingerprint(sparse([5, 2, 5], 1, 1, 2))
    others = [sparse([2, 6], 1, 3), sparse([2, 5], 3, 1), sparse([2, 5], 1, 4), sparse([2], 1)]
    assert len({one, *map(fingerprint, others)}) == 5


def test_long_tensors_are_hashed_in_chunks(monkeypatch):
    tensor = values(torch.float32, (1000,))
    whole = fingerprint(tensor)
    monkeypatch.setattr("shardopt.guard._CHUNK", 64)
    assert fingerprint(tensor) == whole


def test_a_parameter_that_requires_grad_is_no_trouble():
    assert fingerprint(nn.Parameter(torch.ones(3))) == fingerprint(torch.ones(3))


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        ("a", "'a'"),
        (None, "None"),
        (torch.tensor(0.5), "tensor(0.5, torch.float32)"),
        (torch.tensor([1, 2]), "tensor([1, 2], torch.int64)"),
        ((0.9, torch.tensor(1)), "(0.9, tensor(1, torch.int64))"),
        ([0.9, 0.99], "(0.9, 0.99)"),
        ({"a": [1], "b": None}, "{'a': (1), 'b': None}"),
        (AgreementError, "<class 'shardopt.errors.AgreementError'>"),
    ],
    ids=repr,
)
def test_describe(value, text):
    assert describe(value) == text


def test_describe_tells_neighbouring_numbers_apart():
    assert describe(0.1) != describe(math.nextafter(0.1, 1))
    assert describe(torch.tensor(0.1)) != describe(torch.tensor(0.1).nextafter(torch.tensor(1.0)))


def test_describe_has_no_memory_addresses():
    """Which differ between ranks that brought the same."""
    assert describe(object()) == "builtins.object"
    assert describe(test_describe) == "builtins.function"
    assert describe({"hook": [object()]}) == "{'hook': (builtins.object)}"


# -- errors ----------------------------------------------------------------------------------------


class Chorus(SoloCollectives):
    """Ranks of which this process is the first; the others say what they are told to say.

    A rank is one of the optimizer's messages after another: the rows that it gathers.
    """

    def __init__(self, *others: list[list[int]]):
        self.world_size = 1 + len(others)
        self._others = [iter(rows) for rows in others]

    def all_gather_rows(self, row):
        rows = [torch.tensor(next(other), dtype=row.dtype) for other in self._others]
        width = max(row.numel(), *(other.numel() for other in rows))
        out = torch.zeros(self.world_size, width, dtype=row.dtype)
        for place, other in zip(out, [row, *rows], strict=True):
            place[: other.numel()] = other
        return out


def rank_with_facts(text: str) -> list[list[int]]:
    """What a rank sends in ``agree`` when its facts differ: a digest, a length, a text."""
    return [[42], [len(text)], list(text.encode())]


def disagreement(mine: dict[str, object], *others: str) -> str:
    with pytest.raises(AgreementError) as error:
        agree(Chorus(*map(rank_with_facts, others)), mine, "do this")
    return str(error.value)


def test_one_rank_always_agrees_with_itself():
    agree(SoloCollectives(), {"lr": 0.1}, "do this")
    agree_on_gradients(SoloCollectives(), ["a"], [nn.Parameter(torch.ones(2))])


def test_the_error_names_the_fact_the_rank_and_both_values():
    message = disagreement({"a": 1, "lr": 0.1}, "a\t1\nlr\t0.2")
    assert message == "ranks differ in lr: rank 1 has 0.2, rank 0 has 0.1; do this"


def test_the_odd_rank_is_the_one_that_differs_from_most():
    message = disagreement({"lr": 0.2}, "lr\t0.1", "lr\t0.1")
    assert message == "ranks differ in lr: rank 0 has 0.2, rank 1 has 0.1; do this"


def test_where_it_is_even_rank_0_is_right():
    message = disagreement({"lr": 0.1}, "lr\t0.2", "lr\t0.2", "lr\t0.1")
    assert message == "ranks differ in lr: rank 1 has 0.2, rank 2 has 0.2, rank 0 has 0.1; do this"


def test_many_odd_ranks_are_counted():
    message = disagreement({"a": 0}, *["a\t0"] * 6, *[f"a\t{n}" for n in range(1, 6)])
    assert "rank 10 has 4 (and 1 more ranks differ), rank 0 has 0" in message


def test_a_fact_that_a_rank_lacks_is_nothing():
    assert "ranks differ in b: rank 1 has nothing, rank 0 has 2" in disagreement(
        {"a": 1, "b": 2}, "a\t1"
    )
    assert "ranks differ in b: rank 1 has 2, rank 0 has nothing" in disagreement(
        {"a": 1}, "a\t1\nb\t2"
    )


def test_facts_in_another_order_differ():
    message = disagreement({"a": 1, "b": 2}, "b\t2\na\t1")
    assert message == "ranks bring the same facts in another order; do this"


def test_only_the_first_difference_is_told():
    message = disagreement({"a": 1, "b": 2}, "a\t9\nb\t9")
    assert "ranks differ in a" in message and "b" not in message.removeprefix("ranks differ in a")


def test_a_value_of_several_lines_stays_one_fact():
    message = disagreement({"layout": "one\ntwo"}, "layout\tone three")
    assert "rank 1 has one three, rank 0 has 'one two'" in message.replace("\\n", " ")


def test_gradients_are_named_with_their_hashes_and_a_remedy():
    names, parameters = ["a", "b"], [nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[0].grad, hash_a = torch.ones(2), fingerprint(torch.ones(2))
    parameters[1].grad, hash_b = torch.zeros(2), fingerprint(torch.zeros(2))
    with pytest.raises(AgreementError) as error:
        agree_on_gradients(Chorus([[hash_a, 7]], [[hash_a, hash_b]]), names, parameters)
    assert (
        "ranks differ in the gradient of parameter 'b': rank 1 has hash 0000000000000007, "
        in str(error.value)
    )
    assert "DistributedDataParallel" in str(error.value)
    with pytest.raises(
        AgreementError, match="the gradient of parameter 'a': rank 1 has none, rank 0 "
    ):
        agree_on_gradients(Chorus([[0, hash_b]]), names, parameters)


def test_a_block_that_fails_here_raises_its_own_error():
    with pytest.raises(ZeroDivisionError), all_or_none(SoloCollectives()):
        print(1 / 0)
    others = [[0], [0], []]
    with pytest.raises(ZeroDivisionError), all_or_none(Chorus(others)):
        print(1 / 0)


def test_a_block_that_fails_elsewhere_raises_here_too():
    text = "ValueError: lr is bad"
    with (
        pytest.raises(AgreementError, match="rank 1 failed where this one did not: ValueError: lr"),
        all_or_none(Chorus([[1], [len(text)], list(text.encode())])),
    ):
        pass
