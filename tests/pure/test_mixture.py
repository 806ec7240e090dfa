"""One optimizer over several classes, without ranks."""

import copy

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, AdamW, Muon

from shardopt.algos.mixture import Mixture, class_name, instance_of, joined
from shardopt.algos.registry import algorithms_for
from tests.mixtures import (
    ADAMW,
    as_plain,
    groups_of,
    make_model,
    side_by_side,
    taken_out,
    train,
)
from tests.pairs import random_gradient, random_parameters
from tests.twins import assert_same, assert_same_parameters


class Demanding(SGD):
    """A class with an option that has no default."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)


def mixture(model) -> Mixture:
    return instance_of(AdamW, groups_of(model), ADAMW)


def parts(saved) -> dict:
    names = {AdamW: None, Muon: "torch.optim.Muon"}
    return {its_class: as_plain(taken_out(saved, name)) for its_class, name in names.items()}


def test_a_class_alone_stays_itself():
    assert type(instance_of(AdamW, random_parameters((3,)), {})) is AdamW
    assert type(instance_of(AdamW, [{"params": random_parameters((3,))}], {})) is AdamW


def test_a_mixture_steps_each_class_on_its_groups():
    ours, theirs = make_model(), make_model()
    optimizer, plain = mixture(ours), side_by_side(theirs)
    train(ours, optimizer, first=0, last=3)
    train(theirs, *plain.values(), first=0, last=3)
    assert_same_parameters(ours, theirs)
    for its_class, state in parts(optimizer.state_dict()).items():
        assert_same(state, as_plain(plain[its_class].state_dict()))


def test_a_mixture_loads_what_it_saved():
    ours, theirs = make_model(), make_model()
    optimizer, other = mixture(ours), mixture(theirs)
    train(ours, optimizer, first=0, last=2)
    train(theirs, other, first=0, last=2)
    fresh = mixture(theirs)
    fresh.load_state_dict(copy.deepcopy(other.state_dict()))
    train(ours, optimizer, first=2, last=4)
    train(theirs, fresh, first=2, last=4)
    assert_same_parameters(ours, theirs)
    assert_same(fresh.state_dict(), optimizer.state_dict())


def test_what_is_changed_in_the_groups_reaches_the_classes():
    model = make_model()
    optimizer = mixture(model)
    before = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, first=0, last=1)
    assert_same_parameters(model, before)


def test_the_closure_is_called_once():
    calls = []
    optimizer = mixture(make_model())
    assert optimizer.step(lambda: calls.append(torch.is_grad_enabled()) or 3.0) == 3.0
    assert calls == [True]


def test_a_required_option_is_taken_from_the_group():
    group = {"params": random_parameters((3,)), "optimizer_class": Demanding, "lr": 0.5}
    optimizer = instance_of(AdamW, [group], {})
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match="lr"):
        del group["lr"]
        instance_of(AdamW, [group], {})


def test_a_constructor_sees_the_options_of_the_group():
    group = {"params": random_parameters((3,)), "optimizer_class": Adagrad}
    optimizer = instance_of(AdamW, [{**group, "initial_accumulator_value": 2.0}], {})
    assert [state["sum"].tolist() for state in optimizer.state.values()] == [[2.0] * 3]
    with pytest.raises(ValueError, match="Invalid learning rate"):
        instance_of(AdamW, [{**group, "lr": -1.0}], {})


def test_a_class_joins_a_known_optimizer_which_keeps_its_state():
    first, second, third = random_parameters((4, 3), (5, 3), (6, 3))
    known = SGD([first], lr=0.1, momentum=0.9)
    first.grad = random_gradient(first, 0)
    known.step()
    state = known.state[first]
    group = {"params": [second], "optimizer_class": Adagrad}
    mixed = joined(known, instance_of(SGD, [group], {"lr": 0.1}), {"lr": 0.1, "momentum": 0.9})
    mixed = joined(mixed, SGD([third], lr=0.2, momentum=0.5), {"lr": 0.1, "momentum": 0.9})
    assert mixed.state[first] is state and "sum" in mixed.state[second]
    assert [group["lr"] for group in mixed.param_groups] == [0.1, 0.01, 0.2]
    for parameter in (first, second, third):
        parameter.grad = random_gradient(parameter, 1)
    mixed.step()
    assert set(mixed.state) == {first, second, third}


def test_a_parameter_in_two_groups_is_refused():
    parameter = Parameter(torch.ones(3, 3))
    groups = [{"params": [parameter]}, {"params": [parameter], "optimizer_class": Muon}]
    with pytest.raises(ValueError, match="more than one parameter group"):
        instance_of(AdamW, groups, {})


def test_a_class_has_the_name_under_which_it_is_found():
    """Not that of the module where one version of torch defines it."""
    assert class_name(Muon) == "torch.optim.Muon" and class_name(AdamW) == "torch.optim.AdamW"
    assert class_name(Demanding) == f"{__name__}.Demanding"


def test_what_is_known_of_each_group():
    parameters = random_parameters((3, 3), (3,))
    groups = [{"params": parameters[:1], "optimizer_class": Muon}, {"params": parameters[1:]}]
    assert [a.optimizer_class for a in algorithms_for(groups, AdamW)] == [Muon, AdamW]
    assert [a.optimizer_class for a in algorithms_for(parameters, AdamW)] == [AdamW]
