"""Clipping over all ranks: the norm, what it leaves, and each parameter once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, AdamW

from shardopt import Guards, ShardedOptimizer
from shardopt.errors import GradientError
from tests.ranked.test_gradients import KINDS, UNUSED, WAYS, Twins, every_kind, every_way, random
from tests.ranked.test_gradients_lifecycle import ZEROS
from tests.ranked.test_gradients_models import complexes, from_points, in_order, odd, tied
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same_parameters, make_model

ORDERS = [1, 2.0, 3.5, "inf"]
CLASSES = {"AdamW": AdamW, "whole parameters": Adafactor}
clip_of_torch = torch.nn.utils.clip_grad_norm_


def clip_both(twins: Twins, passes: tuple[int, ...], max_norm: float, order) -> torch.Tensor:
    """Ours after its backward; the twin on its means. Returns the norm, which is the same."""
    ours = twins.optimizer.clip_grad_norm_(max_norm, order)
    parameters = list(twins.theirs.parameters())
    for parameter, mean in zip(parameters, twins.means(*passes), strict=True):
        parameter.grad = mean
    full = [parameter for parameter in parameters if parameter.numel()]  # torch refuses the empty
    theirs = clip_of_torch(full, max_norm, order)
    assert ours.shape == () and ours.isfinite() and ours > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, check_dtype=False)
    return ours


def assert_close_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@on_ranks(1, 2, 3)
@every_way
@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_equals_torchs_on_the_mean(kind, order, rank, world_size):
    """A norm that is above the limit, and one that is below it; SGD shows the scale."""
    twins = Twins(kind, rank, world_size).build(optimizer_class=SGD, lr=1.0)
    for step, share in enumerate([0.1, 0.9, 1.5]):
        passes = (2 * step, 2 * step + 1)
        twins.backward(*passes)
        rows = torch.cat([mean.flatten() for mean in twins.means(*passes)])
        total = torch.linalg.vector_norm(rows.double(), float(order))
        norm = clip_both(twins, passes, float(total * share), order)
        torch.testing.assert_close(norm.double(), total, rtol=1e-5, atol=0)
        twins.optimizer.step()
        twins.plain.step()
        assert_close_parameters(twins.ours, twins.theirs)


MODELS = {
    "tied": (tied, in_order),
    "odd shapes": (odd, from_points),
    "complex": (complexes, from_points),
}


@on_ranks(1, 3)
@every_way
@pytest.mark.parametrize("order", [1, 2, 3.5, math.inf])
@pytest.mark.parametrize("name", MODELS)
def test_each_element_counts_once(kind, name, order, rank, world_size):
    make, loss = MODELS[name]
    twins = Twins(kind, rank, world_size, loss).build(make, SGD, lr=1.0)
    twins.backward(0)
    clip_both(twins, (0,), 0.01, order)
    twins.optimizer.step()
    twins.plain.step()
    assert_close_parameters(twins.ours, twins.theirs)


@on_ranks(2, 3)
@every_way
@pytest.mark.parametrize("whole", CLASSES)
def test_whole_parameters_and_absent_ones(kind, whole, rank, world_size):
    """Ranks differ in what they hold, and in which gradients they have."""

    def loss(model: nn.Module, seed: int, rank: int):
        x = random(8, 61, seed=seed, rank=rank)
        layers = [model[0], model[2], model[4]] if rank else [model[0]]
        for layer in layers:
            x = layer(x)
        return x.square().mean()

    twins = Twins(kind, rank, world_size, loss)
    twins.build(optimizer_class=CLASSES[whole], ours={"guards": UNUSED})
    twins.backward(0)
    clip_both(twins, (0,), 1e9, 2)
    twins.optimizer.step()
    twins.plain.step()
    assert_same_parameters(twins.ours, twins.theirs)  # a factor of exactly 1


@on_ranks(1, 2)
@every_way
def test_again_and_again(kind, rank, world_size):
    """Each call sees what the one before has left."""
    twins = Twins(kind, rank, world_size).build(optimizer_class=SGD, lr=1.0)
    twins.backward(0)
    for parameter, mean in zip(twins.theirs.parameters(), twins.means(0), strict=True):
        parameter.grad = mean
    parameters = list(twins.theirs.parameters())
    for call in [(1e-2, 2), (5e-3, 2), (1e9, 1), (1e-3, math.inf)]:
        ours, theirs = twins.optimizer.clip_grad_norm_(*call), clip_of_torch(parameters, *call)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    twins.optimizer.clip_grad_value_(2e-4)
    torch.nn.utils.clip_grad_value_(parameters, 2e-4)
    ours, theirs = twins.optimizer.clip_grad_norm_(1.0), clip_of_torch(parameters, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    twins.optimizer.step()
    twins.plain.step()
    assert_close_parameters(twins.ours, twins.theirs)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kind", [kind for kind in WAYS if kind != "local"])
def test_the_next_backward_adds_to_what_is_clipped(kind, rank, world_size):
    """As in torch."""
    twins = Twins(kind, rank, world_size).build(optimizer_class=SGD, lr=1.0)
    twins.backward(0)
    twins.optimizer.clip_grad_norm_(1e-3)
    twins.backward(1)
    norm = twins.optimizer.clip_grad_norm_(1e9)
    means = [twins.means(seed) for seed in range(2)]
    scale = 1e-3 / torch.nn.utils.get_total_norm(means[0])
    both = [first * scale + second for first, second in zip(*means, strict=True)]
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(both), rtol=1e-5, atol=0)
    with twins.optimizer.no_sync():
        twins.backward(2)
    twins.optimizer.step()
    for parameter, mean, last in zip(twins.theirs.parameters(), both, twins.means(2), strict=True):
        parameter.grad = mean + last
    twins.plain.step()
    assert_close_parameters(twins.ours, twins.theirs)


CLIPS = {
    "norm": lambda optimizer: optimizer.clip_grad_norm_(1e-3),
    "value": lambda optimizer: optimizer.clip_grad_value_(1e-3),
}
ADDS = {
    "a backward": lambda twins: twins.backward(1),
    "several": lambda twins: twins.backward(1, 2),
    "a backward that sends nothing": lambda twins: paused_backward(twins, 1),
    "one of a part": lambda twins: twins.ours[4](torch.ones(1, 37)).sum().backward(),
    "one by hand": lambda twins: setattr(twins.ours[4].bias, "grad", torch.ones(1)),
}


def paused_backward(twins: Twins, seed: int) -> None:
    with twins.optimizer.no_sync():
        twins.backward(seed)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("add", ADDS)
def test_adding_to_what_is_clipped_is_refused_where_grad_stays(clip, add, rank, world_size):
    """What ``.grad`` holds was not clipped, and all of it would be sent again."""
    twins = Twins("local", rank, world_size).build()
    twins.step(0)
    twins.backward(0)
    CLIPS[clip](twins.optimizer)
    ADDS[add](twins)
    words = r"on rank 0 a backward\(\) .*optimizer.zero_grad\(\), and clip after the last"
    for call in (twins.optimizer.step, lambda: CLIPS[clip](twins.optimizer)):
        with pytest.raises(GradientError, match=words):
            call()
    assert_same_parameters(twins.ours, twins.theirs)
    twins.optimizer.zero_grad()
    twins.step(3)
    twins.assert_same_state()


@on_ranks(1, 2)
@every_kind
@pytest.mark.parametrize("zero", [*ZEROS, "by hand, None", "by hand, zeros"])
@pytest.mark.parametrize("paused", [False, True])
def test_what_is_clipped_and_then_forgotten_is_no_matter(kind, zero, paused, rank, world_size):
    """By hand only where there is a gradient to put away."""
    twins = Twins(kind, rank, world_size).build()
    twins.backward(0)
    twins.optimizer.clip_grad_norm_(1e-3)
    if zero in ZEROS:
        ZEROS[zero](twins)
    elif kind == "sharded":
        return
    for parameter in twins.ours.parameters() if zero.startswith("by hand") else ():
        if zero.endswith("None"):
            parameter.grad = None
        else:
            parameter.grad.zero_()
    (paused_backward if paused else Twins.backward)(twins, 1)
    twins.backward(2)
    twins.optimizer.step()
    twins.follow(1, 2)


@on_ranks(1, 2, 3)
@every_way
def test_values(kind, rank, world_size):
    twins = Twins(kind, rank, world_size).build(optimizer_class=SGD, lr=1.0)
    twins.backward(0)
    twins.optimizer.clip_grad_value_(1e-3)
    twins.optimizer.step()
    for parameter, mean in zip(twins.theirs.parameters(), twins.means(0), strict=True):
        parameter.grad = mean
    largest = max(parameter.grad.abs().max() for parameter in twins.theirs.parameters())
    assert largest > 1e-3
    torch.nn.utils.clip_grad_value_(twins.theirs.parameters(), 1e-3)
    twins.plain.step()
    assert_same_parameters(twins.ours, twins.theirs)


@on_ranks(1, 2, 3)
def test_replicated_gradients_too(rank, world_size):
    """Every rank has the whole mean in ``.grad``, and scales it there."""
    ours, theirs = tied(), tied()
    optimizer = ShardedOptimizer(
        ours.parameters(), SGD, kernel="torch", bucket_cap_mb=SMALL_BUCKETS, lr=1.0
    )
    plain = SGD(theirs.parameters(), lr=1.0)
    for step, order in enumerate([1, 2, 3.5, math.inf]):
        for model in (ours, theirs):
            model.zero_grad()
            in_order(model, step, 0).backward()
        norms = (
            optimizer.clip_grad_norm_(1e-3, order),
            clip_of_torch(theirs.parameters(), 1e-3, order),
        )
        torch.testing.assert_close(*norms, rtol=0, atol=0)
        optimizer.step()
        plain.step()
        assert_same_parameters(ours, theirs)
    for model in (ours, theirs):
        in_order(model, 9, 0).backward()
    optimizer.clip_grad_value_(1e-4)
    torch.nn.utils.clip_grad_value_(theirs.parameters(), 1e-4)
    optimizer.step()
    plain.step()
    assert_same_parameters(ours, theirs)


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["replicated", *KINDS])
@pytest.mark.parametrize("order", [0, -1, "two"])
def test_an_order_that_is_none(kind, order, rank, world_size):
    optimizer = ShardedOptimizer(make_model().parameters(), SGD, gradients=kind, lr=1.0)
    with pytest.raises(ValueError):
        optimizer.clip_grad_norm_(1.0, order)


@on_ranks(1, 2)
@every_way
def test_an_infinite_norm(kind, rank, world_size):
    """Refused if wanted; else everything becomes zero or NaN, as in torch."""
    twins = Twins(kind, rank, world_size).build(optimizer_class=SGD, lr=1.0)
    twins.ours[4].bias.register_hook(lambda gradient: gradient * math.inf)
    twins.backward(0)
    with pytest.raises(GradientError, match=r"order 2.0 .* inf.*error_if_nonfinite"):
        twins.optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert twins.optimizer.clip_grad_norm_(1.0) == math.inf
    twins.optimizer.step()
    assert twins.ours[4].bias.isnan().all()
    assert_same_parameters(twins.ours[0], twins.theirs[0])


@on_ranks(2)
@every_kind
def test_nothing_to_clip(kind, rank, world_size):
    """No gradient anywhere, or no element on a rank."""
    twins = Twins(kind, rank, world_size).build()
    assert twins.optimizer.clip_grad_norm_(1.0) == 0
    twins.optimizer.clip_grad_value_(1.0)
    twins.optimizer.step()
    assert_same_parameters(twins.ours, twins.theirs)
    small = Parameter(torch.ones(3))
    optimizer = ShardedOptimizer([small], SGD, gradients=kind, lr=1.0)
    (small * (rank + 1)).sum().backward()
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), torch.tensor(1.5 * 3**0.5))


@on_ranks(2)
@every_kind
def test_sixteen_bit_norms_are_taken_in_float32(kind, rank, world_size):
    """The sum of squares, 1e7, is beyond what 16 bits hold."""
    parameter = Parameter(torch.zeros(100_000, dtype=torch.float16))
    optimizer = ShardedOptimizer([parameter], SGD, gradients=kind, kernel="torch", lr=1.0)
    (parameter * 10.0).sum().backward()
    norm = optimizer.clip_grad_norm_(1.0)
    assert norm.dtype is torch.float32
    torch.testing.assert_close(norm, torch.tensor(10.0 * 100_000**0.5))
    optimizer.step()
    torch.testing.assert_close(
        parameter.detach(), torch.full_like(parameter, -1 / 100_000**0.5), rtol=1e-2, atol=0
    )


@on_ranks(2)
@every_kind
@pytest.mark.parametrize("nonfinite", ["ignore", "skip"])
def test_a_step_after_clipping_asks_the_others_nothing(kind, nonfinite, rank, world_size):
    """One exchange a step, whether it clips or not."""
    guards = Guards(nonfinite=nonfinite)
    twins = Twins(kind, rank, world_size).build(ours={"guards": guards})
    asked = []
    ask = twins.optimizer.collectives.all_gather_rows
    twins.step(0)
    twins.optimizer.collectives.all_gather_rows = lambda row: asked.append(row) or ask(row)
    try:
        twins.step(1)
        assert len(asked) == 1
        twins.backward(2)
        twins.optimizer.clip_grad_norm_(1e-3)
        twins.optimizer.step()
        assert len(asked) == 2
    finally:
        del twins.optimizer.collectives.all_gather_rows


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["replicated", *KINDS])
def test_called_like_torchs_it_says_how(kind):
    optimizer = ShardedOptimizer([nn.Parameter(torch.ones(2))], SGD, gradients=kind)
    with pytest.raises(TypeError, match=r"max_norm: expected a number, got generator; .*no param"):
        optimizer.clip_grad_norm_((parameter for parameter in []), 1.0)


@on_ranks(1, 2)
def test_the_norm_of_a_large_bucket_is_exact_to_seven_digits():
    """One fp32 sum over it would be off by 2e-4."""
    parameter = nn.Parameter(torch.zeros(4_000_000))
    optimizer = ShardedOptimizer([parameter], SGD, gradients="sharded")
    gradient = torch.rand(4_000_000, generator=torch.Generator().manual_seed(0))
    (parameter * gradient).sum().backward()
    expected = gradient.double().norm().float()
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), expected, rtol=3e-7, atol=0)
