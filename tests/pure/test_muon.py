"""Muon in batches: near to the exact iteration and to the stock class, however it is stacked."""

import copy

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Muon

from shardopt.algos import muon
from shardopt.algos.muon import EXACTNESS, TOLERANCE, BatchedMuon
from tests.twins import assert_same

SHAPES = [(40, 40), (24, 96), (96, 24), (24, 96), (30, 31), (1, 7), (5, 1), (40, 40), (3, 200)]
COEFFICIENTS = (3.4445, -4.775, 2.0315)


def matrices(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, dtype=dtype, generator=generator)) for s in shapes]


def far_apart(rows, columns):
    """A matrix whose singular values go down to 1e-7 of the largest."""
    u, s, v = torch.linalg.svd(matrices((rows, columns))[0].detach().double(), full_matrices=False)
    return ((u * torch.logspace(0, -7, len(s), dtype=torch.float64)) @ v).float()


def exact(matrix, steps=5):
    """The iteration in fp64."""
    a, b, c = COEFFICIENTS
    x = matrix.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def updates(optimizer_class, gradients, **options):
    """What one step moves each parameter by, from zero."""
    parameters = [Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer_class(parameters, lr=1.0, **options).step()
    return [parameter.detach() for parameter in parameters]


def tolerance(shape):
    return TOLERANCE if min(shape) >= 24 else 0.1


def apart(ours, theirs):
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "far apart"])
def test_an_update_is_that_of_the_exact_iteration(shape, kind, steps):
    gradient = far_apart(*shape) if kind == "far apart" else matrices(shape)[0].detach()
    (ours,) = updates(BatchedMuon, [gradient], ns_steps=steps, adjust_lr_fn="original")
    rows, columns = shape
    expected = -exact(gradient, steps) * max(1, rows / columns) ** 0.5
    assert apart(ours, expected) < EXACTNESS


OPTIONS = [
    {},
    {"nesterov": False},
    {"momentum": 0.5, "weight_decay": 0.3},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"ns_steps": 3, "eps": 1e-3},
    {"ns_coefficients": (2.0, -1.5, 0.5)},
    {"ns_steps": 0},
    {"lr": torch.tensor(0.05)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_stays_within_the_tolerance_of_the_stock_class(options):
    ours, theirs = matrices(*SHAPES), matrices(*SHAPES)
    options = {"lr": 0.05, **options}
    batched, stock = BatchedMuon(ours, **options), Muon(theirs, **options)
    for step in range(3):
        before = [p.detach().clone() for p in theirs]
        for one, other in zip(ours, theirs, strict=True):
            one.data.copy_(other)
            one.grad = matrices(one.shape, seed=10 + step)[0].detach()
            other.grad = one.grad.clone()
        batched.step()
        stock.step()
        for one, other, start in zip(ours, theirs, before, strict=True):
            decayed = start.double() * (1 - float(options["lr"]) * stock.defaults["weight_decay"])
            assert apart(one.detach() - decayed, other.detach().double() - decayed) < tolerance(
                one.shape
            )
    assert_same(batched.state_dict(), stock.state_dict())


@pytest.mark.parametrize("stack_numel", [1, 5000, 1 << 24])
def test_an_update_does_not_depend_on_what_shares_its_stack(stack_numel, monkeypatch):
    gradients = [g.detach() for g in matrices(*SHAPES)]
    alone = [updates(BatchedMuon, [gradient])[0] for gradient in gradients]
    monkeypatch.setattr(muon, "STACK_NUMEL", stack_numel)
    for order in (gradients, gradients[::-1]):
        together = updates(BatchedMuon, order)
        for one, other in zip(
            together if order is gradients else together[::-1], alone, strict=True
        ):
            assert apart(one, other.double()) < 1e-4


def test_stacks_are_bounded(monkeypatch):
    seen = []
    iterate = muon.zeroth_power
    monkeypatch.setattr(muon, "STACK_NUMEL", 5000)
    monkeypatch.setattr(
        muon, "zeroth_power", lambda stack, *rest: seen.append(stack.shape) or iterate(stack, *rest)
    )
    updates(BatchedMuon, [g.detach() for g in matrices(*[(24, 96)] * 4, (96, 24), (80, 90))])
    assert sorted(seen) == [(1, 24, 96), (1, 80, 90), (2, 24, 96), (2, 24, 96)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_iterated_in_fp32_too(dtype):
    gradients = [g.detach() for g in matrices(*SHAPES, dtype=dtype)]
    for ours, theirs in zip(updates(BatchedMuon, gradients), updates(Muon, gradients), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert apart(ours, theirs.double()) < tolerance(ours.shape)


def test_a_zero_gradient_moves_nothing():
    for ours in updates(BatchedMuon, [torch.zeros(4, 6), torch.zeros(0, 4)]):
        assert not ours.any()


def test_state_of_either_continues_in_the_other():
    parameters = matrices(*SHAPES)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    batched = BatchedMuon(parameters, lr=0.1)
    batched.step()
    twins = copy.deepcopy(parameters)
    stock = Muon(twins, lr=0.1)
    stock.load_state_dict(batched.state_dict())
    assert_same(stock.state_dict(), batched.state_dict())


def test_what_the_stock_class_refuses_is_refused():
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        BatchedMuon([Parameter(torch.ones(3))])
    parameter = Parameter(torch.ones(2, 2, dtype=torch.complex64))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="does not support complex"):
        BatchedMuon([parameter]).step()


def test_a_parameter_without_a_gradient_is_left_alone():
    first, second = matrices((4, 5), (4, 5))
    before = first.detach().clone()
    second.grad = torch.ones_like(second)
    optimizer = BatchedMuon([first, second])
    assert optimizer.step(lambda: 7.0) == 7.0
    assert torch.equal(first, before) and list(optimizer.state) == [second]
