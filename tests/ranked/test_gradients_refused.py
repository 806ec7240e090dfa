"""What must not train on: refused on every rank, by name, with nothing updated."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardopt import Guards, ShardedOptimizer
from shardopt.errors import AgreementError, GradientError, ParameterError, UnsupportedError
from tests.ranked.test_gradients import UNUSED, Twins, every_kind, every_way, random
from tests.ranks import on_ranks
from tests.twins import assert_same, assert_same_parameters, make_model


def refuses(error: type[Exception], *words: str):
    """All ``words``, in order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


# -- missing ---------------------------------------------------------------------------------------


def skips_a_layer(model: nn.Module, seed: int, rank: int) -> torch.Tensor:
    """The second layer's bias takes no part, on rank 0; on the others it does."""
    x = model[1](model[0](random(8, 61, seed=seed, rank=rank)))
    x = x @ model[2].weight.T + (model[2].bias if rank else 0)
    return model[4](model[3](x)).square().mean()


@on_ranks(1, 2, 3)
@every_way
def test_a_missing_gradient_is_named_on_every_rank(kind, rank, world_size):
    twins = Twins(kind, rank, world_size, skips_a_layer).build()
    twins.backward(0)
    with refuses(GradientError, "rank 0", "'2.bias'", "find_unused_parameters=True"):
        twins.optimizer.step()
    assert_same_parameters(twins.ours, twins.theirs)
    twins.assert_same_state()
    twins.optimizer.zero_grad()
    twins.loss = lambda model, seed, rank: skips_a_layer(model, seed, 1)
    twins.step(1)


@on_ranks(1, 2, 3)
@every_way
def test_unused_parameters_where_they_are_meant(kind, rank, world_size):
    """Present on any rank is present; on none (in a world of one), it is left alone."""
    twins = Twins(kind, rank, world_size, skips_a_layer).build(ours={"guards": UNUSED})
    twins.step(0)
    twins.step(1, 2)
    twins.assert_same_state()
    assert (twins.theirs[2].bias.grad is None) is (world_size == 1)


# -- not finite ------------------------------------------------------------------------------------


def make_guarded(kind: str, nonfinite: str, rank: int, world_size: int) -> Twins:
    guards = Guards(nonfinite=nonfinite)
    return Twins(kind, rank, world_size).build(ours={"guards": guards, "bucket_cap_mb": 0.01})


def spoilt(twins: Twins, seed: int, culprit: int, value: float) -> None:
    """A backward in which one element of one gradient of one rank is not finite."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[7] = value
        return gradient

    with twins.ours[2].weight.register_hook(spoil if twins.rank == culprit else lambda g: g):
        twins.backward(seed)


@on_ranks(1, 2, 3)
@every_way
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("clips", [False, True])
def test_what_is_not_finite_raises(kind, value, clips, rank, world_size):
    twins = make_guarded(kind, "raise", rank, world_size)
    twins.step(0)
    spoilt(twins, 1, culprit=world_size - 1, value=value)
    call = (lambda: twins.optimizer.clip_grad_norm_(1.0)) if clips else twins.optimizer.step
    for _ in range(2):
        with refuses(GradientError, "'2.weight'", f"rank {world_size - 1}", "not finite"):
            call()
    assert_same_parameters(twins.ours, twins.theirs)
    twins.optimizer.zero_grad()
    twins.step(2)
    twins.assert_same_state()


@on_ranks(1, 2, 3)
@every_way
def test_what_is_not_finite_skips(kind, rank, world_size):
    """State, parameters and step counts stay; gradients are used up."""
    twins = make_guarded(kind, "skip", rank, world_size)
    twins.step(0)
    spoilt(twins, 1, culprit=0, value=float("inf"))
    twins.optimizer.step()
    assert_same_parameters(twins.ours, twins.theirs)
    twins.assert_same_state()
    assert [parameter.grad for parameter in twins.ours.parameters()] == [None] * 6
    twins.step(2)
    twins.assert_same_state()


@on_ranks(2)
@every_way
def test_what_is_not_finite_is_ignored_as_in_torch(kind, rank, world_size):
    twins = make_guarded(kind, "ignore", rank, world_size)
    spoilt(twins, 0, culprit=1, value=float("nan"))
    twins.optimizer.step()
    assert int(twins.ours[2].weight.isnan().sum()) == 1
    assert twins.ours[0].weight.isfinite().all()


@on_ranks(2)
@every_way
def test_what_is_forgotten_may_be_anything(kind, rank, world_size):
    """A NaN that ``model.zero_grad`` (local) or ``optimizer.zero_grad`` has cleared is none."""
    twins = make_guarded(kind, "raise", rank, world_size)
    spoilt(twins, 0, culprit=1, value=float("nan"))
    (twins.ours if kind == "local" else twins.optimizer).zero_grad()
    twins.step(1)


@on_ranks(1, 2)
def test_a_sum_of_finite_means_is_looked_at_too(rank, world_size):
    twins = make_guarded("sharded", "raise", rank, world_size)
    big = [torch.full_like(p, 3e38) for p in twins.ours.parameters()]
    for _ in range(2):
        sum((p * b).sum() for p, b in zip(twins.ours.parameters(), big, strict=True)).backward()
    with refuses(GradientError, "is not finite"):
        twins.optimizer.step()


# -- agreement -------------------------------------------------------------------------------------


@on_ranks(2, 3)
@every_way
@pytest.mark.parametrize("clips", [False, True])
def test_another_learning_rate_on_one_rank(kind, clips, rank, world_size):
    twins = Twins(kind, rank, world_size).build()
    twins.step(0)
    twins.backward(1)
    group = twins.optimizer.param_groups[0]
    group["lr"] = 0.5 if rank == 1 else 0.01
    call = (lambda: twins.optimizer.clip_grad_norm_(1.0)) if clips else twins.optimizer.step
    with refuses(AgreementError, "group 0, lr: rank 1 has 0.5, rank 0 has 0.01"):
        call()
    assert_same_parameters(twins.ours, twins.theirs)
    group["lr"] = 0.01
    twins.optimizer.step()  # the gradients are still there
    twins.follow(1)


@on_ranks(2, 3)
@every_way
@pytest.mark.parametrize("odd", ["skips", "repeats", "goes through one more"])
def test_another_number_of_steps_on_one_rank(kind, odd, rank, world_size):
    """A step left out, one too many, and a backward too many."""
    twins = Twins(kind, rank, world_size).build()
    twins.step(0)
    last = rank == world_size - 1
    twins.backward(1)
    if odd == "goes through one more" and last:
        twins.backward(2)
    if odd == "repeats":
        twins.optimizer.step()
        twins.follow(1)
    with refuses(AgreementError, "the number of backward passes", f"rank {world_size - 1} has"):
        if odd == ("skips" if last else "repeats"):
            twins.backward(2)
        twins.optimizer.step()
    assert_same_parameters(twins.ours, twins.theirs)
    with refuses(GradientError, "zero_grad()"):
        twins.optimizer.step()
    twins.optimizer.zero_grad()
    twins.step(3)
    twins.assert_same_state()


CALLS = {
    "step and clip_grad_norm_": (
        "what is called",
        lambda o: o.step(),
        lambda o: o.clip_grad_norm_(1.0),
    ),
    "norm_type": (
        "what is called",
        lambda o: o.clip_grad_norm_(1.0),
        lambda o: o.clip_grad_norm_(1.0, norm_type=1),
    ),
    "max_norm": (
        "max_norm",
        lambda o: o.clip_grad_norm_(1.0),
        lambda o: o.clip_grad_norm_(2.0),
    ),
    "step and clip_grad_value_": (
        "clip_value",
        lambda o: o.step(),
        lambda o: o.clip_grad_value_(1.0),
    ),
    "clip_value": (
        "clip_value",
        lambda o: o.clip_grad_value_(1.0),
        lambda o: o.clip_grad_value_(2.0),
    ),
}


@on_ranks(2, 3)
@every_way
@pytest.mark.parametrize("name", CALLS)
def test_another_call_on_one_rank(kind, name, rank, world_size):
    fact, most, odd = CALLS[name]
    twins = Twins(kind, rank, world_size).build()
    twins.step(0)
    twins.backward(1)
    with refuses(AgreementError, f"ranks differ in {fact}", "rank 1 has", "rank 0 has"):
        (odd if rank == 1 else most)(twins.optimizer)
    assert_same_parameters(twins.ours, twins.theirs)
    twins.optimizer.step()
    twins.follow(1)


@on_ranks(2, 3)
@every_way
@pytest.mark.parametrize("cap", [25.0, 1e-4])
def test_trained_on_some_ranks_only(kind, cap, rank, world_size):
    """Alone in its bucket or not."""
    twins = Twins(kind, rank, world_size).build(ours={"bucket_cap_mb": cap, "guards": UNUSED})
    twins.step(0)
    twins.ours[2].weight.requires_grad_(rank != 1)
    twins.backward(1)
    with refuses(AgreementError, "requires_grad of parameter '2.weight'", "rank 1 has False"):
        twins.optimizer.step()
    assert_same_parameters(twins.ours, twins.theirs)
    twins.ours[2].weight.requires_grad_(True)
    twins.optimizer.zero_grad()
    twins.step(2)


# -- under DistributedDataParallel -----------------------------------------------------------------


class Wrapped(DistributedDataParallel):
    pass


@on_ranks(2)
@every_kind
@pytest.mark.parametrize("wrap", [DistributedDataParallel, Wrapped])
def test_under_ddp_the_remedy_is_named(wrap, kind, rank, world_size):
    remedy = ("DistributedDataParallel", "replicated")
    model = wrap(make_model())
    with refuses(UnsupportedError, *remedy):
        ShardedOptimizer(model.parameters(), torch.optim.AdamW, gradients=kind)
    twins = Twins(kind, rank, world_size).build()
    before = copy.deepcopy(twins.ours.state_dict())
    late = wrap(twins.ours)
    with refuses(UnsupportedError, *remedy):
        late(random(8, 61, seed=0, rank=rank)).square().mean().backward()
        twins.optimizer.step()
    assert_same(dict(twins.ours.state_dict()), dict(before))


@on_ranks(2)
@every_kind
@pytest.mark.parametrize("steps_before", [0, 1])
def test_ddp_that_comes_late_is_named_by_clipping_too(kind, steps_before, rank, world_size):
    twins = Twins(kind, rank, world_size).build()
    for seed in range(steps_before):
        twins.step(seed)
    late = DistributedDataParallel(twins.ours)
    late(random(8, 61, seed=0, rank=rank)).square().mean().backward()
    with refuses(UnsupportedError, "DistributedDataParallel", "replicated"):
        twins.optimizer.clip_grad_norm_(1.0)


# -- parameters that no model has any more ---------------------------------------------------------


@on_ranks(1, 2, 3)
@every_way
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("part", ["all", "the last layer"])
def test_a_model_with_other_parameters_is_told(kind, clips, part, rank, world_size):
    """It would train what nobody looks at."""
    twins = Twins(kind, rank, world_size).build()
    module = twins.ours if part == "all" else twins.ours[4]
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    twins.backward(0)
    name = "0.weight" if part == "all" else "4.weight"
    call = (lambda: twins.optimizer.clip_grad_norm_(1.0)) if clips else twins.optimizer.step
    for _ in range(2):
        with refuses(ParameterError, f"'{name}' has no gradient", "assign=True", "assign=False"):
            call()
