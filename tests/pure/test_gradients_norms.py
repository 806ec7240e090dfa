"""Norms of gradients in parts: equal to torch's on the whole, however it is cut."""

from __future__ import annotations

import math

import pytest
import torch

from shardopt.gradients.norms import (
    all_finite,
    clip_factor,
    first_nonfinite,
    norm_order,
    power_sum,
    total_norm,
)

CPU = torch.device("cpu")
ORDERS = [0.5, 1.0, 2.0, 3.5, math.inf]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def tensors(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_equals_torchs_however_it_is_cut(order, dtype):
    whole = tensors(1000, 1, 77, dtype=dtype)
    parts = [part for tensor in whole for part in tensor.split(31)]
    wide = [tensor.to(torch.complex128 if dtype.is_complex else torch.float64) for tensor in whole]
    right = torch.linalg.vector_norm(torch.cat(wide), order)
    for ranks in ([whole], [parts], [parts[:5], [], parts[5:]]):
        powers = torch.stack([power_sum(held, order, CPU) for held in ranks])
        assert powers.dtype is torch.float64
        torch.testing.assert_close(total_norm(powers, order), right, rtol=2e-6, atol=0)


def test_of_several_dtypes_and_of_nothing():
    mixed = [*tensors(50), *tensors(0), *tensors(60, dtype=torch.float64)]
    mixed += tensors(70, dtype=torch.bfloat16)
    right = torch.linalg.vector_norm(torch.cat([tensor.double() for tensor in mixed]))
    torch.testing.assert_close(
        total_norm(power_sum(mixed, 2.0, CPU)[None], 2.0), right, rtol=1e-6, atol=0
    )
    for order in ORDERS:
        for held in ([], [torch.zeros(0)], [torch.zeros(0), torch.zeros(3)]):
            assert total_norm(power_sum(held, order, CPU)[None], order) == 0


def test_sixteen_bits_do_not_overflow():
    many = torch.full((100_000,), 100.0, dtype=torch.float16)
    norm = total_norm(power_sum([many], 2.0, CPU)[None], 2.0)
    torch.testing.assert_close(float(norm), 100.0 * math.sqrt(100_000), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(order, value):
    """On whichever rank it is."""
    bad = torch.tensor([1.0, value, 2.0])
    powers = torch.stack([power_sum([torch.ones(3)], order, CPU), power_sum([bad], order, CPU)])
    assert not total_norm(powers, order).isfinite()
    assert not total_norm(powers.flip(0), order).isfinite()


def test_first_nonfinite():
    good, bad, worse = torch.ones(4), torch.tensor([1.0, -math.inf]), torch.tensor([math.nan])
    cases = [
        ([], 0),
        ([good], 0),
        ([good, torch.zeros(0)], 0),
        ([bad], 1),
        ([good, worse, bad], 2),
        ([torch.zeros(0), good, good.bfloat16(), bad.double()], 4),
        ([torch.tensor([complex(0, math.nan)])], 1),
    ]
    for held, number in cases:
        assert first_nonfinite(held, CPU) == number, held


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_all_finite_sees_every_element(dtype):
    """Those that vectors of a kernel hold, and those of its tail; the largest ones are finite."""
    largest = torch.finfo(dtype).max
    for numel in (0, 1, 2, 17, 100):
        held = torch.full((numel,), largest).to(dtype)
        held[::2] *= -1
        assert all_finite(held)
        for place in range(numel):
            for value in (math.inf, -math.inf, math.nan):
                spoilt = held.clone()
                spoilt[place] = complex(0, value) if dtype.is_complex else value
                assert not all_finite(spoilt)


def test_clip_factor_is_torchs():
    for total in (0.0, 0.5, 1.0, 7.0, math.inf, math.nan):
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.ones(1)
        torch.nn.utils.clip_grads_with_norm_([parameter], 1.0, torch.tensor(total))
        ours = clip_factor(torch.tensor(total), 1.0)
        torch.testing.assert_close(ours[None], parameter.grad, equal_nan=True, rtol=0, atol=0)


def test_orders():
    assert [norm_order(order) for order in (1, 2.0, "inf", math.inf)] == [1, 2, math.inf, math.inf]
    for order in (0, -2, math.nan, "nan"):
        with pytest.raises(ValueError, match="norm_type: expected a positive number or inf"):
            norm_order(order)
