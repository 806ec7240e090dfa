"""Muon under ``kernel="auto"``: batched on every rank, as near to the class as it says."""

import copy

import pytest
from torch.optim import AdamW, Muon

from shardopt import ShardedOptimizer
from shardopt.algos.muon import BatchedMuon
from tests.mixtures import make_model, matrices, mixed, train
from tests.pairs import random_gradient, random_parameters
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters

SHAPES = (48, 48), (24, 96), (96, 24), (24, 96), (64, 64), (48, 48), (40, 30)


def sharded(parameters, kernel="auto"):
    return ShardedOptimizer(
        parameters, Muon, lr=0.05, kernel=kernel, bucket_cap_mb=SMALL_BUCKETS, weight_decay=0.0
    )


def give_gradients(parameters, step):
    for index, parameter in enumerate(parameters):
        parameter.grad = random_gradient(parameter, 100 * step + index)


def apart(ours, theirs):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


@on_ranks(1, 2, 3)
def test_a_step_is_that_of_the_batched_class_in_one_process():
    """Up to rounding: a rank's stacks hold its own matrices of one bucket."""
    ours, theirs = random_parameters(*SHAPES), random_parameters(*SHAPES)
    optimizer, plain = sharded(ours), BatchedMuon(theirs, lr=0.05, weight_decay=0.0)
    assert type(optimizer.optim) is BatchedMuon
    for step in range(3):
        for parameters, each in ((ours, optimizer), (theirs, plain)):
            give_gradients(parameters, step)
            each.step()
    detached = [[p.detach() for p in parameters] for parameters in (ours, theirs)]
    assert apart(*detached) < 1e-4
    optimizer.consolidate_state_dict(to=None)
    assert_same(optimizer.state_dict(), plain.state_dict())  # momenta are not iterated


@on_ranks(1, 2, 3)
def test_kernel_torch_is_the_stock_class_and_takes_on_the_state():
    ours, theirs = random_parameters(*SHAPES), random_parameters(*SHAPES)
    optimizer = sharded(ours)
    give_gradients(ours, 0)
    optimizer.step()
    optimizer.consolidate_state_dict(to=None)
    stock, plain = sharded(theirs, "torch"), Muon(theirs, lr=0.05, weight_decay=0.0)
    assert type(stock.optim) is Muon
    for each in (stock, plain):
        each.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    stock.consolidate_state_dict(to=None)
    assert_same(stock.state_dict(), plain.state_dict())


@on_ranks(2)
@pytest.mark.parametrize("main", [AdamW, Muon])
def test_groups_show_the_stock_class(main):
    model = make_model()
    if main is AdamW:
        optimizer = mixed(model, kernel="auto")
    else:
        groups = [{"params": matrices(model), "optimizer_class": Muon}]
        optimizer = ShardedOptimizer(groups, main, lr=0.01)
    train(model, optimizer, first=0, last=2)
    named = [group.get("optimizer_class") for group in optimizer.param_groups]
    assert set(named) == {"torch.optim.Muon", *({None} if main is AdamW else ())}
    optimizer.consolidate_state_dict(to=None)
    optimizer.load_state_dict(optimizer.state_dict())
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, first=2, last=3)
    train(twin_model, twin, first=2, last=3)
    assert_same_parameters(model, twin_model)
