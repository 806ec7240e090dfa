"""Copies of the optimizer, with and without the model, train on by themselves."""

import copy

import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW
from torch.optim.lr_scheduler import StepLR

from tests.pairs import Pair, WholeAdamW, four, pair, random_parameters
from tests.ranks import on_ranks
from tests.twins import assert_same

RULES = {
    "AdamW": {"optimizer_class": AdamW},
    "SGD": {"optimizer_class": SGD, "momentum": 0.9},
    "Adagrad": {"optimizer_class": Adagrad},
    "whole AdamW": {"optimizer_class": WholeAdamW},
    "fused AdamW": {"optimizer_class": AdamW, "kernel": "auto"},
}


def in_two_groups(parameters):
    return [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.05}]


def copied(trained: Pair) -> Pair:
    halves = [copy.deepcopy(half) for half in trained.both()]
    (ours, optimizer), (theirs, plain) = halves
    return Pair(ours, theirs, optimizer, plain, trained.num_steps)


def snapshot(trained: Pair):
    trained.optimizer.consolidate_state_dict(to=None)
    return copy.deepcopy((trained.ours, trained.optimizer.state_dict()))


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rule", RULES)
def test_a_copy_of_parameters_and_optimizer_trains_on_like_the_original(rule, steps):
    trained = pair(four, arrange=in_two_groups, **RULES[rule]).train(steps)
    twin = copied(trained)
    twin.assert_same()
    before = snapshot(trained)
    twin.train(2)
    after = snapshot(trained)
    assert_same([p.detach() for p in after[0]], [p.detach() for p in before[0]])
    assert_same(after[1], before[1])
    trained.train(2)
    assert_same([p.detach() for p in trained.ours], [p.detach() for p in twin.ours])


@on_ranks(1, 2, 3, slow=[3])
def test_a_copy_goes_its_own_way():
    trained = pair(four).train(1)
    twin = copied(trained)
    for _, optimizer in twin.both():
        optimizer.param_groups[0]["lr"] = 1.0
        optimizer.add_param_group({"params": random_parameters((30,))})
    for parameters, optimizer in twin.both():
        parameters += optimizer.param_groups[1]["params"]
    twin.train(2)
    trained.train(2)
    assert len(trained.optimizer.param_groups) == 1


@on_ranks(1, 2, 3, slow=[3])
def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own():
    trained = pair(four).train(1)
    twin = copy.deepcopy(trained.optimizer)
    copies = twin.param_groups[0]["params"]
    before = [parameter.detach().clone() for parameter in trained.ours]
    for parameter in copies:
        parameter.grad = torch.ones_like(parameter)
    twin.step()
    assert_same([p.detach() for p in trained.ours], before)
    assert not any(map(torch.equal, copies, before))


@on_ranks(1, 2, 3, slow=[3])
def test_an_optimizer_with_a_scheduler_is_copied():
    trained = pair(four).train(1)
    schedulers = [StepLR(optimizer, 1, gamma=0.5) for _, optimizer in trained.both()]
    trained.train(1)
    for scheduler in schedulers:
        scheduler.step()
    twin = copied(trained)
    assert twin.optimizer.param_groups[0]["lr"] == 0.005
    twin.train(2)
    trained.train(1)


class Remembering(SGD):
    """Keeps state of no parameter, as LBFGS-like classes do."""

    def step(self, closure=None):
        self.state["all"] = {"calls": self.state.get("all", {"calls": 0})["calls"] + 1}
        return super().step(closure)


@on_ranks(1, 2, 3, slow=[3])
def test_state_of_no_parameter_is_copied():
    trained = pair(four, Remembering).train(2)
    twin = copied(trained)
    assert twin.optimizer.optim.state["all"] == {"calls": 2}
    twin.step()
    assert trained.optimizer.optim.state["all"] == {"calls": 2}
