"""Every row of the bank on 1, 2 and 3 ranks, against the class itself, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Muon

from shardopt import ShardedOptimizer
from tests.bank import BANK, DEFAULTS, LEFT_TO_AUTO, ON_CPU, ON_GPU, REAL_ONLY, Case
from tests.bank_runs import (
    PRESENCE,
    SAVED_AT,
    STEPS,
    Training,
    assert_alive,
    assert_same_parameters,
    assert_same_training,
    assert_sharded,
    presences,
    set_gradients,
    start,
)
from tests.ranks import on_ranks
from tests.twins import assert_same


def check(case: Case, presence: str, rank: int, **where) -> None:
    """Ours equals the plain twin: while training, when saved, and however it goes on."""
    ours = start(case, "torch", **where)
    twin = start(case, **where)
    assert_sharded(ours)
    for training in (ours, twin):
        training.run(presence, 0, SAVED_AT)
    our_state = assert_same_training(ours, twin, f"{presence}, trained")
    state = twin.saved()
    resumed = twin.go_on(state)
    continued = {
        "our state in plain torch": twin.go_on(our_state),
        "plain torch's state in ours": go_on_with(state, ours, presence, rank),
    }
    for training in (ours, twin, resumed, *continued.values()):
        training.run(presence, SAVED_AT, STEPS)
    assert_same_parameters(ours, twin, f"{presence}, trained on")
    for name, training in continued.items():
        assert_same_training(training, resumed, f"{presence}, {name}")
    assert_alive(ours, presence)


def go_on_with(state: dict, ours: Training, presence: str, rank: int) -> Training:
    """Load on every rank, or from rank 0: half of the patterns each."""
    if list(PRESENCE).index(presence) % 2 == 0:
        return ours.go_on(state)
    return ours.go_on(state if rank == 0 else None, from_=0)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", ON_CPU)
def test_equals_the_class(name, rank):
    """Options, presence, state and reload both ways; the kernel is the user's own choice."""
    case = BANK[name]
    for presence in presences(case):
        check(case, presence, rank)


def check_auto(case: Case, *, dtype=torch.float32, device="cpu") -> None:
    """Ours is the class with ``fused=True`` where it may choose, and its groups do not show it.

    Muon has a kernel of ours, which is near to the class: ``test_muon.py``.
    """
    if case.optimizer_class is Muon:
        return
    fused = case.fuses(torch.device(device).type, dtype)
    where = {"dtype": dtype, "device": device}
    asked = {"fused": True} if fused else {}
    ours, twin = start(case, "auto", **where), start(case, **where, **asked)
    for training in (ours, twin):
        training.run("come and go", 0, SAVED_AT)
    chosen = [group.get("fused") for group in ours.optimizer.optim.param_groups]
    assert chosen == [True if fused else case.options.get("fused")] * 2
    twin_resumed = twin.go_on(twin.saved(), **asked)
    expected = twin.saved()
    if fused:
        for group in expected["param_groups"]:
            group["fused"] = None
    state = ours.saved()
    assert_same(state, expected, "auto, trained: state_dict")
    resumed = ours.go_on(state, kernel="auto")
    for training in (ours, twin, resumed, twin_resumed):
        training.run("come and go", SAVED_AT, STEPS)
    assert_same_parameters(ours, twin, "auto, trained on")
    assert_same_parameters(resumed, twin_resumed, "auto, resumed")
    assert_alive(ours, "come and go")


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", LEFT_TO_AUTO)
def test_auto_is_the_fused_class(name):
    check_auto(BANK[name])


@pytest.mark.slow
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "complex64"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_equals_the_class_in_other_dtypes(name, dtype, rank):
    """Torch's fused kernel takes no complex parameters, so ``"auto"`` leaves these to the class."""
    case, dtype = BANK[name], getattr(torch, dtype)
    if dtype.is_complex and case.optimizer_class in REAL_ONLY:
        pytest.skip(f"torch: {name} does not support complex parameters")
    check(case, "come and go", rank, dtype=dtype)
    check_auto(case, dtype=dtype)


@on_ranks(also_on_gpu=True)
@pytest.mark.parametrize("name", ON_GPU)
def test_equals_the_class_on_gpu(name, rank, device):
    case = BANK[name]
    check(case, "come and go", rank, device=device)
    check_auto(case, device=device)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_scales_the_velocity_not_the_gradient(nesterov):
    """The documentation of SGD has two forms of momentum. They part when the lr changes.

    Torch's: ``v = momentum * v + g; p -= lr * v``. Sutskever's: ``v = momentum * v + lr * g;
    p -= v``. ``run`` halves the lr at step 2.
    """
    case = BANK["SGD momentum=0.9 nesterov" if nesterov else "SGD momentum=0.9"]
    ours, twin = start(case, "torch"), start(case)
    for until in (2, STEPS):
        for training in (ours, twin):
            training.run("all always", 0 if until == 2 else 2, until)
        assert_same_parameters(ours, twin, f"{until} steps")
        other = sutskever(case, until)
        same = [
            torch.allclose(a, b, rtol=1e-6, atol=1e-7)
            for a, b in zip(ours.parameters, other, strict=True)
        ]
        assert all(same) if until == 2 else not any(same)


def sutskever(case: Case, steps: int) -> list[torch.Tensor]:
    """Parameters after ``steps`` steps of the form of momentum that torch does not have."""
    training = start(case)
    velocity = [torch.zeros_like(parameter) for parameter in training.parameters]
    lrs = [group["lr"] for group in training.optimizer.param_groups for _ in group["params"]]
    decays = [g["weight_decay"] for g in training.optimizer.param_groups for _ in g["params"]]
    momentum = case.options["momentum"]
    for step in range(steps):
        set_gradients(training.parameters, step, "all always")
        for parameter, v, lr, decay in zip(training.parameters, velocity, lrs, decays, strict=True):
            lr = lr if step < 2 else lr / 2
            gradient = parameter.grad + decay * parameter.detach()
            v.mul_(momentum).add_(lr * gradient)
            move = lr * gradient + momentum * v if case.options.get("nesterov") else v
            parameter.data.sub_(move)
    return training.parameters


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_a_network_in_ddp(kernel, rank, world_size):
    """Real training, each rank on its own part of the batch, as with the plain class."""
    networks = [DistributedDataParallel(network()) for _ in range(2)]
    parameters = [list(each.parameters()) for each in networks]
    options = {"lr": 0.01, "weight_decay": 0.1}
    ours = ShardedOptimizer(parameters[0], AdamW, kernel=kernel, bucket_cap_mb=0.02, **options)
    twin = AdamW(parameters[1], **options, fused=kernel == "auto" or None)
    batch = torch.randn(16, 24, generator=torch.Generator().manual_seed(rank))
    held = sum(tensor.numel() for tensor in ours.optim.param_groups[0]["params"])
    assert held == NETWORK_NUMEL if world_size == 1 else 0 < held < NETWORK_NUMEL
    losses = []
    for step in range(6):
        for each, optimizer in zip(networks, (ours, twin), strict=True):
            optimizer.zero_grad()
            loss = (each(batch) - batch.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert_same(parameters[0], parameters[1], f"step {step}")
    assert losses[-1] < losses[0]
    ours.consolidate_state_dict(to=None)
    assert_same(ours.state_dict()["state"], twin.state_dict()["state"])


NETWORK_NUMEL = 24 * 64 + 64 + 64 * 40 + 40 + 40 + 1


def network() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 1)
    )
