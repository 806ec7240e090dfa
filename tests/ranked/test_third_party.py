"""Optimizer classes from PyPI: one element-wise, and one with ``train`` and ``eval``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Adagrad, AdamW, Optimizer

from shardopt import ShardedOptimizer
from shardopt.algos import register
from shardopt.errors import AgreementError, StaleStateError
from tests.bank import SECOND, Case
from tests.each_rank import KINDS, loss_of, mean_gradients
from tests.ranked.test_bank import check
from tests.ranks import on_ranks
from tests.third_party import Scaling
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model, train

lion_pytorch = pytest.importorskip("lion_pytorch")
schedulefree = pytest.importorskip("schedulefree")

Lion, AdamWScheduleFree = lion_pytorch.Lion, schedulefree.AdamWScheduleFree
register(Lion, per_element=["exp_avg"])
register(AdamWScheduleFree, per_element=["z", "exp_avg_sq"])


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("options", [{}, {"lr": 0.02, "weight_decay": 0.1}], ids=str)
def test_lion_is_cut_and_equals_the_class(options, rank, monkeypatch):
    """As every row of the bank."""
    monkeypatch.setitem(SECOND, Lion, {"lr": 0.01, "betas": (0.8, 0.95)})
    check(Case(Lion, options), "come and go", rank)


# -- schedule-free ---------------------------------------------------------------------------------


class Unknown(AdamWScheduleFree):
    """Not registered, so that its parameters are placed whole."""


OPTIONS = {"lr": 0.05, "warmup_steps": 3, "weight_decay": 0.01}


def groups_of(model: nn.Module) -> list[dict]:
    first, *rest = model.parameters()
    return [{"params": [first]}, {"params": rest, "betas": (0.8, 0.99)}]


def sharded(model: nn.Module, optimizer_class: type[Optimizer] = AdamWScheduleFree, **options):
    options = {"bucket_cap_mb": SMALL_BUCKETS, **OPTIONS, **options}
    return ShardedOptimizer(groups_of(model), optimizer_class, **options)


def plain(model: nn.Module) -> Optimizer:
    return AdamWScheduleFree(groups_of(model), **OPTIONS)


def saved(optimizer: Optimizer) -> dict:
    """The full state, of its own; a collective when sharded."""
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.consolidate_state_dict(to=None)
    return copy.deepcopy(optimizer.state_dict())


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("optimizer_class", [AdamWScheduleFree, Unknown])
@pytest.mark.parametrize("foreach", [True, False])
def test_schedule_free_is_the_class(optimizer_class, foreach):
    """Train, look, train on, save; all bits."""
    ours, theirs = make_model(), make_model()
    optimizer = sharded(ours, optimizer_class, foreach=foreach)
    twin = AdamWScheduleFree(groups_of(theirs), **OPTIONS, foreach=foreach)
    looks = []
    for first in (0, 3, 5):
        for each in (optimizer, twin):
            each.train()
        for model, each in ((ours, optimizer), (theirs, twin)):
            train(model, each, first, first + 3)
        assert_same_parameters(ours, theirs)
        trained = ours[0].weight.detach().clone()
        for each in (optimizer, twin):
            each.eval()
        assert_same_parameters(ours, theirs)
        assert not torch.equal(ours[0].weight, trained)  # at the average, which is elsewhere
        looks.append(ours[0].weight.detach().clone())
        assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]
        assert_same(saved(optimizer), saved(twin))
    assert not torch.equal(looks[0], looks[1])


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("from_", [None, 0])
@pytest.mark.parametrize("at", ["train", "eval"])
def test_schedule_free_goes_on_from_a_file(at, from_, rank):
    """From ours in plain, and from plain in ours, saved in either mode."""
    ours, theirs = make_model(), make_model()
    pairs = [(ours, sharded(ours)), (theirs, plain(theirs))]
    for model, optimizer in pairs:
        optimizer.train()
        train(model, optimizer, 0, 3)
        getattr(optimizer, at)()
    states = [saved(optimizer) for _, optimizer in pairs]
    assert_same(*states)
    resumed = copy.deepcopy(ours), copy.deepcopy(theirs)
    again = sharded(resumed[0]), plain(resumed[1])
    again[0].load_state_dict(states[1] if from_ is None or rank == from_ else None, from_=from_)
    again[1].load_state_dict(states[0])
    pairs += zip(resumed, again, strict=True)
    for model, optimizer in pairs:
        optimizer.train()
        train(model, optimizer, 3, 6)
        optimizer.eval()
        assert_same_parameters(model, ours)
        assert_same(saved(optimizer), saved(pairs[0][1]))


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("kind", KINDS)
def test_schedule_free_with_gradients_of_each_rank(kind, rank, world_size):
    """And with ``overlap_forward``: whoever looks after ``eval`` sees all of it."""
    ours, theirs = make_model(), make_model()
    optimizer, twin = sharded(ours, gradients=kind), plain(theirs)
    optimizer.overlap_forward(ours)
    for step in range(6):
        for each in (optimizer, twin):
            each.train()
        gradients = mean_gradients(theirs, step, world_size)
        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient
        loss_of(ours, step, rank).backward()
        for each in (optimizer, twin):
            each.step()
            if step % 2:
                each.eval()
        assert_same_parameters(ours, theirs)


# -- the methods a class has of its own ------------------------------------------------------------


def scaling(parameters, optimizer_class: type[Optimizer] = Scaling) -> ShardedOptimizer:
    return ShardedOptimizer(parameters, optimizer_class)


@on_ranks(1, 2, 3, slow=[3])
def test_only_what_the_class_has_is_there():
    """As accelerate and others ask: ``hasattr(optimizer, "train")``."""
    parameters = [Parameter(torch.ones(3, 3))]
    assert hasattr(sharded(make_model()), "train")
    assert hasattr(sharded(make_model()), "eval")
    optimizer = scaling(parameters)
    assert hasattr(optimizer, "scale")
    for name in ("train", "eval", "_hidden", "handler", "Scale"):
        assert not hasattr(optimizer, name), name
    assert not hasattr(scaling(parameters, AdamW), "train")
    with pytest.raises(AttributeError, match="'ShardedOptimizer' object has no attribute 'eval'"):
        optimizer.eval()
    with pytest.raises(
        AttributeError, match="'lrs', nor has AdamW a method of this name"
    ) as caught:
        _ = scaling(parameters, AdamW).lrs
    assert caught.value.name == "lrs"
    assert scaling(parameters, AdamW).optim.defaults["lr"] == 1e-3


@on_ranks(1, 2, 3, slow=[3])
def test_a_method_changes_parameters_options_and_state():
    parameters = [Parameter(torch.ones(3, 3)), Parameter(torch.full((5,), 2.0))]
    optimizer = scaling(parameters)
    assert optimizer.num_groups() == 1
    optimizer.param_groups[0]["lr"] = 0.5  # the class sees what the user has set
    assert optimizer.scale(0.5) is optimizer
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert [float(parameter.detach().unique()) for parameter in parameters] == [0.5, 1.0]
    optimizer.consolidate_state_dict(to=None)
    assert optimizer.state_dict()["state"] == {0: {"factor": 0.5}, 1: {"factor": 0.5}}


@on_ranks(2, 3, slow=[3])
def test_a_copy_from_before_a_method_is_stale():
    optimizer = scaling([Parameter(torch.ones(3, 3))])
    optimizer.consolidate_state_dict(to=None)
    optimizer.state_dict()
    optimizer.scale(2.0)
    with pytest.raises(StaleStateError):
        optimizer.state_dict()


@on_ranks(1, 2, 3, slow=[3])
def test_a_graph_from_before_a_method_is_stale():
    parameter = Parameter(torch.ones(3, 3))
    optimizer = scaling([parameter])
    loss = parameter.square().sum()
    optimizer.scale(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_ranks(2, 3, slow=[3])
def test_ranks_that_call_different_methods_are_told(rank):
    optimizer = scaling([Parameter(torch.ones(3, 3))])
    with pytest.raises(AgreementError, match=r"the method called: .*'num_groups'.* alike"):
        optimizer.num_groups() if rank == 1 else optimizer.scale(1.0)
    with pytest.raises(AgreementError, match=r"its arguments: .*2\.0"):
        optimizer.scale(2.0 if rank == 1 else 1.0)
    assert optimizer.num_groups() == 1


@on_ranks(1, 2, 3, slow=[3])
def test_what_a_method_raises_on_one_rank_is_raised_on_all(rank, world_size):
    optimizer = scaling([Parameter(torch.ones(3, 3))])
    last = world_size - 1
    optimizer.optim.fails = rank == last
    expected, words = (
        (ValueError, "^no factor 3") if rank == last else (AgreementError, "no factor 3")
    )
    with pytest.raises(expected, match=words):
        optimizer.scale(3.0)
    optimizer.optim.fails = False
    assert optimizer.scale(1.0) is optimizer


@on_ranks(1, 2, 3, slow=[3])
def test_methods_of_a_class_that_a_group_names():
    """The other groups stay as they are."""
    first, second = Parameter(torch.ones(3, 3)), Parameter(torch.ones(5))
    groups = [{"params": [first]}, {"params": [second], "optimizer_class": Scaling}]
    optimizer = ShardedOptimizer(groups, Adagrad, lr=0.1)
    optimizer.scale(0.5)
    assert [float(p.detach().unique()) for p in (first, second)] == [1.0, 0.5]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    with pytest.raises(AttributeError, match="nor has Adagrad and Scaling a method"):
        optimizer.eval()
