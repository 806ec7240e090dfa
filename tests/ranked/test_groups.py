"""Groups: given in every way torch takes them, empty ones too, and added at any time."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Muon

from shardopt import ShardedOptimizer
from shardopt.errors import AgreementError, UnsupportedError
from tests.pairs import Pair, WholeAdamW, comparable, four, pair, random_gradient, random_parameters
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same

CLASSES = [AdamW, SGD, Adagrad, Adafactor, WholeAdamW]
every_class = pytest.mark.parametrize("optimizer_class", CLASSES, ids=lambda c: c.__name__)


def names(count, first=0):
    return [f"layer{number}.weight" for number in range(first, first + count)]


# -- what the constructor takes --------------------------------------------------------------------


def a_generator(parameters):
    return (parameter for parameter in parameters)


def a_tuple(parameters):
    return tuple(parameters)


def named(parameters):
    return zip(names(4), parameters, strict=True)


def two_groups(parameters):
    return [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.05}]


def groups_of_generators(parameters):
    return ({"params": iter(half), "lr": 0.05} for half in (parameters[:3], parameters[3:]))


def groups_of_one_tensor(parameters):
    return [{"params": parameter} for parameter in parameters]


def named_groups(parameters):
    both = list(named(parameters))
    return [{"params": iter(both[:1])}, {"params": both[1:], "weight_decay": 0.1}]


def empty_groups(parameters):
    empty = {"params": [], "lr": 3.0}
    return [empty, {"params": parameters[:2]}, dict(empty), {"params": parameters[2:]}, dict(empty)]


WAYS = [
    a_generator,
    a_tuple,
    named,
    two_groups,
    groups_of_generators,
    groups_of_one_tensor,
    named_groups,
    empty_groups,
]


@on_ranks(1, 2, 3, slow=[3])
@every_class
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_parameters_are_taken_in_every_way_of_torch(way, optimizer_class):
    trained = pair(four, optimizer_class, way)
    trained.assert_is_shared_out()
    trained.train(3)
    assert trained.optimizer.param_groups[0].keys() == trained.plain.param_groups[0].keys()


@on_ranks(1, 2, 3, slow=[3])
def test_names_show_in_the_state_dict_and_in_errors():
    trained = pair(four, AdamW, named).train(1)
    assert trained.optimizer.state_dict()["param_groups"][0]["param_names"] == names(4)
    trained.ours[2].data = trained.ours[2].data.double()
    with pytest.raises(RuntimeError, match=r"'layer2\.weight': expected \(40, 40\) torch\.float32"):
        trained.optimizer.step()


@on_ranks(1, 2, 3, slow=[3])
@every_class
def test_an_optimizer_may_begin_with_nothing_but_empty_groups(optimizer_class):
    trained = pair(list, optimizer_class, lambda _: [{"params": []}, {"params": [], "lr": 0.1}])
    trained.train(2)
    add_group(trained, (70, 33), (5,))
    trained.train(2)
    assert [len(group["params"]) for group in trained.optimizer.param_groups] == [0, 0, 2]


@on_ranks(1, 2)
def test_no_groups_at_all_are_refused_as_by_torch():
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        ShardedOptimizer([], AdamW)


@on_ranks(1, 2)
def test_sets_are_refused_since_they_have_no_order():
    for make in (set, lambda p: [{"params": set(p)}]):
        with pytest.raises(TypeError, match="organized in ordered collections"):
            ShardedOptimizer(make(four()), AdamW)


@on_ranks(1, 2)
def test_a_bare_tensor_is_refused():
    with pytest.raises(TypeError, match="an iterable of Tensors or dicts"):
        ShardedOptimizer(four()[0], AdamW)


# -- groups that come later ------------------------------------------------------------------------


def add_group(trained: Pair, *shapes, **options) -> None:
    for parameters, optimizer in trained.both():
        new = random_parameters(*shapes)
        parameters += new
        optimizer.add_param_group({"params": new, **options})


@on_ranks(1, 2, 3, slow=[3])
@every_class
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_group_may_be_added_at_any_time(optimizer_class, steps):
    trained = pair(four, optimizer_class).train(steps)
    add_group(trained, (33, 90), (), lr=0.05)
    trained.train(2)
    add_group(trained)
    add_group(trained, (1,), (3,), (64, 64), weight_decay=0.1)
    trained.train(2)
    trained.assert_is_shared_out()
    assert [len(group["params"]) for group in trained.optimizer.param_groups] == [4, 2, 0, 3]


@on_ranks(1, 2, 3, slow=[3])
@every_class
@pytest.mark.parametrize("steps", [0, 1])
def test_an_added_parameter_without_a_gradient_has_no_state(optimizer_class, steps):
    """Not Adagrad's either, whose others have some from the beginning: as in torch."""
    trained = pair(four, optimizer_class).train(steps)
    add_group(trained, (33, 90), (7,))
    if steps == 0:  # without communication
        ours, theirs = trained.optimizer.state_dict(), trained.plain.state_dict()
        assert_same(comparable(ours), comparable(theirs))
    trained.assert_same()
    trained.ours, trained.optimizer = copy.deepcopy((trained.ours, trained.optimizer))
    trained.assert_same()
    trained.train(2, missing=[4])
    trained.train(2)


@on_ranks(1, 2, 3, slow=[3])
def test_what_added_groups_begin_with_is_known_without_communication():
    """A class makes the state of the groups that it is constructed with."""
    optimizer = ShardedOptimizer(four(), AdamW, bucket_cap_mb=SMALL_BUCKETS)
    for shape in ((33, 90), (9, 8)):
        parameters = random_parameters(shape)
        optimizer.add_param_group({"params": parameters, "optimizer_class": Adagrad})
    before = comparable(optimizer.state_dict())
    assert list(before["state"]) == [4]
    optimizer.consolidate_state_dict(to=None)
    assert_same(comparable(optimizer.state_dict()), before)


@on_ranks(1, 2, 3, slow=[3])
def test_matrices_are_added_for_muon_and_nothing_else():
    trained = pair(lambda: random_parameters((70, 33), (9, 8)), Muon).train(1)
    add_group(trained, (33, 40))
    trained.train(2)
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        trained.optimizer.add_param_group({"params": random_parameters((5,))})
    trained.train(1)


@on_ranks(1, 2, 3, slow=[3])
def test_a_group_is_added_by_name():
    trained = pair(four, AdamW, named).train(1)
    for parameters, optimizer in trained.both():
        new = random_parameters((50, 50))
        parameters += new
        optimizer.add_param_group({"params": zip(names(1, first=4), new, strict=True)})
    trained.train(2)


@on_ranks(1, 2, 3, slow=[3])
def test_a_group_takes_the_kernel_that_suits_it():
    """The fused kernel takes no complex parameters; the first group keeps it."""
    optimizer = ShardedOptimizer(four(), AdamW)
    optimizer.add_param_group({"params": random_parameters((5,), dtype=torch.complex64)})
    assert [group["fused"] for group in optimizer.optim.param_groups] == [True, None]
    assert [group["fused"] for group in optimizer.param_groups] == [None, None]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = random_gradient(parameter, 0)
    optimizer.step()


# -- a refused group leaves no trace ---------------------------------------------------------------


def a_known_parameter(trained):
    return {"params": [trained.ours[0]]}


def a_result_of_an_operation(trained):
    return {"params": [trained.ours[0] * 2]}


def a_set(trained):
    return {"params": {Parameter(torch.ones(2))}}


def no_dict(trained):
    return [Parameter(torch.ones(2))]


def no_tensor(trained):
    return {"params": [1.0]}


def no_names_where_others_have(trained):
    return {"params": [("a", Parameter(torch.ones(2)))]}


def a_view_of_a_known_parameter(trained):
    return {"params": [Parameter(trained.ours[0].data[:5])]}


def one_without_memory(trained):
    return {"params": [Parameter(torch.ones(2, device="meta"))]}


REFUSED = {
    a_known_parameter: (ValueError, "appear in more than one parameter group"),
    a_result_of_an_operation: (ValueError, "can't optimize a non-leaf Tensor"),
    a_set: (TypeError, "organized in ordered collections"),
    no_dict: (TypeError, "optimizer can only optimize Tensors, but one of the params is list"),
    no_tensor: (TypeError, "optimizer can only optimize Tensors"),
    no_names_where_others_have: (ValueError, "with names"),
    a_view_of_a_known_parameter: (UnsupportedError, "share memory"),
    one_without_memory: (UnsupportedError, "tensor with memory"),
}
every_refused = pytest.mark.parametrize("refused", REFUSED, ids=lambda way: way.__name__)


@on_ranks(1, 2, 3, slow=[3])
@every_refused
def test_a_refused_group_leaves_no_trace(refused):
    trained = pair(four).train(1)
    before = copy.deepcopy(comparable(trained.optimizer.state_dict()))
    error, message = REFUSED[refused]
    with pytest.raises(error, match=message):
        trained.optimizer.add_param_group(refused(trained))
    trained.optimizer.consolidate_state_dict(to=None)
    assert_same(comparable(trained.optimizer.state_dict()), before)
    trained.train(2)
    add_group(trained, (33, 90))
    trained.train(2)


@on_ranks(2, 3, slow=[3])
@every_refused
def test_a_group_that_one_rank_refuses_is_added_nowhere(refused, rank):
    """Every rank raises; the parameters of the others stay where they are."""
    trained = pair(four).train(1)
    new = random_parameters((50, 50))
    before = new[0].data_ptr()
    group = refused(trained) if rank == 1 else {"params": new}
    error, message = REFUSED[refused] if rank == 1 else (AgreementError, "rank 1 failed where")
    with pytest.raises(error, match=message):
        trained.optimizer.add_param_group(group)
    assert len(trained.optimizer.param_groups) == 1 and new[0].data_ptr() == before
    trained.train(2)


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("what", ["shape", "value", "lr", "number"])
def test_a_group_that_differs_between_ranks_is_added_nowhere(what, rank):
    trained = pair(four).train(1)
    new, options = [nn.Parameter(torch.ones(50, 50))], {}
    if rank == 1:
        options = {"lr": 0.5} if what == "lr" else {}
        new = {
            "shape": [nn.Parameter(torch.ones(50, 51))],
            "value": [nn.Parameter(torch.zeros(50, 50))],
            "number": [*new, nn.Parameter(torch.ones(3))],
        }.get(what, new)
    with pytest.raises(AgreementError, match=r"ranks differ in .*rank 1 has .*, rank 0 has "):
        trained.optimizer.add_param_group({"params": new, **options})
    assert len(trained.optimizer.param_groups) == 1
    trained.train(1)
    add_group(trained, (33, 90))
    trained.train(2)
