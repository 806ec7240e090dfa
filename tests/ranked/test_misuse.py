"""What a user may do to an optimizer of torch, done to ours: right, or named, never ignored."""

import pickle
import warnings
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW

from shardopt import ShardedOptimizer
from shardopt.algos import register
from shardopt.comm import SoloCollectives
from shardopt.errors import AgreementError, ParameterError, StaleStateError, UnsupportedError
from tests.ranks import on_ranks
from tests.third_party import Lion
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model, train


def sharded(model, optimizer_class=SGD, **options):
    options = {"lr": 0.1, "kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, **options}
    return ShardedOptimizer(model.parameters(), optimizer_class, **options)


def two_groups():
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    return model, ShardedOptimizer(groups, SGD, lr=0.1, bucket_cap_mb=SMALL_BUCKETS)


EDITS = {
    "reversed": lambda groups: groups.reverse(),
    "appended to": lambda groups: groups[1]["params"].append(nn.Parameter(torch.ones(3))),
    "shortened": lambda groups: groups[1]["params"].pop(),
    "replaced in": lambda groups: groups[1]["params"].__setitem__(0, nn.Parameter(torch.ones(3))),
    "deleted from": lambda groups: groups.pop(),
}


@on_ranks(1, 2)
@pytest.mark.parametrize("edit", EDITS)
def test_groups_edited_by_hand_are_named(edit):
    _, optimizer = two_groups()
    EDITS[edit](optimizer.param_groups)
    group = 0 if edit == "reversed" else 1
    with pytest.raises(ParameterError, match=rf"from group {group} on; use add_param_group"):
        optimizer.step()


@on_ranks(1, 2, 3)
def test_assigning_an_empty_state_starts_anew():
    ours, theirs = make_model(), make_model()
    optimizer, twin = sharded(ours, momentum=0.9), SGD(theirs.parameters(), 0.1, momentum=0.9)
    train(ours, optimizer, 0, 2)
    train(theirs, twin, 0, 2)
    optimizer.consolidate_state_dict(to=None)
    optimizer.state = defaultdict(dict)
    twin.state = defaultdict(dict)
    train(ours, optimizer, 2, 4)
    train(theirs, twin, 2, 4)
    assert_same_parameters(ours, theirs)


@on_ranks(2)
def test_the_snapshot_does_not_outlive_a_change_by_hand():
    model = make_model()
    optimizer = sharded(model, momentum=0.9)
    train(model, optimizer, 0, 1)
    optimizer.consolidate_state_dict(to=None)
    optimizer.state.clear()
    with pytest.raises(StaleStateError):
        optimizer.state_dict()


@on_ranks(2, 3)
def test_state_cannot_be_written_where_it_does_not_lie():
    model = make_model()
    optimizer = sharded(model, momentum=0.9)
    train(model, optimizer, 0, 1)
    held = set(optimizer.state)
    elsewhere = [parameter for parameter in model.parameters() if parameter not in held]
    for parameter in elsewhere:
        with pytest.raises(TypeError):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros(1)
        with pytest.raises(KeyError, match="this rank holds no part"):
            optimizer.state[parameter] = {}


@on_ranks(1, 2)
def test_a_model_that_is_shared_with_other_processes_trains_on():
    ours, theirs = make_model(), make_model()
    optimizer, twin = sharded(ours), SGD(theirs.parameters(), 0.1)
    train(ours, optimizer, 0, 1)
    ours.share_memory()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(ours, optimizer, 1, 3)
    train(theirs, twin, 0, 3)
    assert_same_parameters(ours, theirs)
    assert "no longer shared with other processes" in str(caught[0].message)


@on_ranks(2, 3)
def test_an_incomplete_state_on_one_rank_is_refused(rank):
    """As after ``consolidate_state_dict(to=0)`` and loading on every rank without ``from_``."""
    model = make_model()
    optimizer = sharded(model, momentum=0.9)
    train(model, optimizer, 0, 1)
    optimizer.consolidate_state_dict(to=0)
    other = sharded(make_model(), momentum=0.9)
    with pytest.raises(AgreementError, match=r"saved momentum_buffer of parameter 0.*from_=0"):
        other.load_state_dict(optimizer.state_dict())
    if rank == 1:
        optimizer.optim.state.clear()
    with pytest.raises(AgreementError, match=r"ranks differ in the state of .*from_="):
        optimizer.consolidate_state_dict(to=0)


@on_ranks(2, 3)
def test_options_that_differ_are_never_saved(rank):
    model = make_model()
    optimizer = sharded(model)
    train(model, optimizer, 0, 1)
    if rank == 1:
        optimizer.param_groups[0]["lr"] = 7.0
    with pytest.raises(AgreementError, match=r"group 0, lr: rank 1 has 7\.0, rank 0 has 0\.1"):
        optimizer.consolidate_state_dict(to=0)


@on_ranks(1, 2)
def test_a_group_added_with_duplicates_warns_once():
    _, optimizer = two_groups()
    twice = nn.Parameter(torch.ones(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.add_param_group({"params": [twice, twice]})
    assert len(caught) == 1 and "duplicate parameters" in str(caught[0].message)


class Joined(SGD):
    """Joins the parameters of each group, so it cannot do without any."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            torch.cat([parameter.flatten() for parameter in group["params"]])


class Grown(SGD):
    """Makes a group of its own."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


class Measured(SGD):
    """Looks at the values of its parameters, which stand-ins without memory do not have."""

    def __init__(self, params, lr=0.1):
        params = list(params)
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        self.total = float(sum(p.numel() * float(p[:1].isnan().any()) for p in groups[0]["params"]))
        super().__init__(params, lr)


@on_ranks(2)
def test_a_class_that_fails_over_its_part_fails_on_every_rank(rank):
    """One rank has no part of the second group."""
    first = nn.Parameter(torch.ones(64, 64))
    with pytest.raises((ValueError, AgreementError), match="non-empty list"):
        groups = [{"params": [first]}, {"params": [nn.Parameter(torch.ones(2))]}]
        ShardedOptimizer(groups, Joined)
    parameters = [nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    optimizer = ShardedOptimizer(parameters, Joined)
    with pytest.raises((ValueError, AgreementError), match="non-empty list"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == len(optimizer.optim.param_groups) == 1
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_same([p.detach() for p in parameters], [torch.ones(64, 64) - 0.1] * 2)


@on_ranks(1, 2)
def test_a_class_that_looks_at_values_is_taken_and_one_that_makes_groups_is_not():
    model = make_model()
    train(model, ShardedOptimizer(model.parameters(), Measured), 0, 1)
    with pytest.raises(UnsupportedError, match="makes 2 groups out of 1"):
        ShardedOptimizer(make_model().parameters(), Grown)


@on_ranks(2, 3)
def test_frozen_integers_travel_too():
    parameters = [
        nn.Parameter(torch.ones(100).to(dtype), requires_grad=dtype.is_floating_point)
        for dtype in (torch.float32, torch.int16, torch.bool, torch.uint8)
    ]
    optimizer = ShardedOptimizer(parameters, SGD, lr=0.1)
    parameters[0].grad = torch.ones(100)
    optimizer.step()
    assert parameters[1].eq(1).all() and parameters[2].all()


@on_ranks(1, 2)
def test_another_default_device_changes_nothing():
    model = make_model()
    with torch.device("meta"):
        optimizer = sharded(model, AdamW)
    train(model, optimizer, 0, 1)
    with torch.device("meta"):
        optimizer.consolidate_state_dict(to=None)
    saved = optimizer.state_dict()["state"]
    assert {value.device.type for state in saved.values() for value in state.values()} == {"cpu"}


@on_ranks(2)
def test_a_load_hook_that_fails_on_one_rank_fails_on_all(rank):
    optimizer = sharded(make_model())

    def hook(optimizer, state_dict):
        raise KeyError("mine")

    if rank == 0:
        optimizer.register_load_state_dict_pre_hook(hook)
    error = KeyError if rank == 0 else AgreementError
    with pytest.raises(error, match="mine"):
        optimizer.load_state_dict(SGD(make_model().parameters(), 0.1).state_dict())


class Picky(SGD):
    """Refuses to load where it holds the vector of 53."""

    def load_state_dict(self, state_dict):
        if any(p.shape == (53,) for group in self.param_groups for p in group["params"]):
            raise KeyError("not here")
        super().load_state_dict(state_dict)


@on_ranks(2)
def test_a_class_that_cannot_load_on_one_rank_fails_on_all():
    saved = SGD(make_model().parameters(), 0.1).state_dict()
    with pytest.raises((KeyError, AgreementError), match="not here"):
        sharded(make_model(), Picky).load_state_dict(saved)


class Unpicklable:
    def __reduce__(self):
        raise pickle.PicklingError("not me")


@on_ranks(2)
def test_state_that_cannot_be_sent_fails_on_all(rank):
    saved = SGD(make_model().parameters(), 0.1, momentum=0.9).state_dict()
    saved["state"] = {0: {"odd": Unpicklable()}}
    optimizer = sharded(make_model(), momentum=0.9)
    with pytest.raises((pickle.PicklingError, AgreementError), match="not me"):
        optimizer.load_state_dict(saved if rank == 0 else None, from_=0)


class UndeclaredLion(Lion):
    """Declared element-wise, with the name of its state misspelt."""


register(UndeclaredLion, per_element=["exp_average"])


@on_ranks(1, 2, 3)
def test_state_declared_by_a_wrong_name_is_never_saved(world_size):
    model = make_model()
    optimizer = sharded(model, UndeclaredLion)
    train(model, optimizer, 0, 1)
    if world_size == 1:  # nothing is cut
        optimizer.consolidate_state_dict()
        return
    error = UnsupportedError, AgreementError
    with pytest.raises(error, match=r"state 'exp_avg' of .*\['exp_average', 'exp_avg'\]"):
        optimizer.consolidate_state_dict(to=0)


@on_ranks(1, 2)
def test_another_class_s_state_is_named_as_such():
    saved = make_model()
    theirs = SGD(saved.parameters(), 0.1, momentum=0.9)
    train(saved, theirs, 0, 1)
    with pytest.raises(ValueError, match=r"state 'momentum_buffer' .*another class than AdamW"):
        sharded(make_model(), AdamW).load_state_dict(theirs.state_dict())


@on_ranks(2)
def test_constructed_before_the_ranks_is_refused(monkeypatch):
    """As before ``init_process_group``: it would train, unsharded, without a word."""
    model = make_model()
    with monkeypatch.context() as early:
        early.setattr(dist, "is_initialized", lambda: False)
        optimizer = sharded(model)
    with pytest.raises(UnsupportedError, match=r"after torch\.distributed\.init_process_group"):
        train(model, optimizer, 0, 1)
    train(model, sharded(model, process_group=SoloCollectives()), 0, 1)


@on_ranks(1, 2)
def test_a_state_dict_pre_hook_may_consolidate():
    """Then a tool that knows only ``state_dict()`` can save, if it calls it on every rank."""
    ours, theirs = make_model(), make_model()
    optimizer, twin = sharded(ours, AdamW), AdamW(theirs.parameters(), 0.1)
    optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.consolidate_state_dict(None))
    for steps in ((0, 1), (1, 3)):
        train(ours, optimizer, *steps)
        train(theirs, twin, *steps)
        assert_same(optimizer.state_dict()["state"], twin.state_dict()["state"])
