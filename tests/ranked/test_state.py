"""The state in torch's form: consolidated, served, loaded, at any world size."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW

from shardopt import ShardedOptimizer
from shardopt.errors import AgreementError, StaleStateError, UnsupportedError
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model, train


def sharded(model, optimizer_class=AdamW, process_group=None, **options):
    options = {"lr": 0.01, "kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, **options}
    return ShardedOptimizer(model.parameters(), optimizer_class, process_group, **options)


def trained(optimizer_class=AdamW, steps=3, process_group=None, **options):
    """A sharded model with its optimizer, and the plain twin."""
    ours, theirs = make_model(), make_model()
    optimizer = sharded(ours, optimizer_class, process_group, **options)
    of_class = {key: value for key, value in options.items() if key != "kernel"}
    twin = optimizer_class(theirs.parameters(), **{"lr": 0.01, **of_class})
    train(ours, optimizer, 0, steps)
    train(theirs, twin, 0, steps)
    return ours, optimizer, theirs, twin


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("target", [0, -1, None])
def test_consolidated_state_equals_torch(target, rank, world_size):
    _, optimizer, _, twin = trained()
    to = target if target != -1 else world_size - 1
    optimizer.consolidate_state_dict(to)
    ours, theirs = optimizer.state_dict(), twin.state_dict()
    assert_same(ours["param_groups"], theirs["param_groups"])
    if to in (None, rank) or world_size == 1:
        assert_same(ours["state"], theirs["state"])
        assert all(value.device.type == "cpu" for value in ours["state"][0].values())
        steps = [state["step"].data_ptr() for state in ours["state"].values()]
        assert len(set(steps)) == len(steps)  # each parameter its own
    else:
        assert ours["state"] == {}


@on_ranks(2, 3)
def test_the_snapshot_is_dropped_when_the_state_changes(rank):
    model, optimizer, _, _ = trained()
    with pytest.raises(StaleStateError, match=r"consolidate_state_dict\(to=0\) on every rank"):
        optimizer.state_dict()
    optimizer.consolidate_state_dict(to=None)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    train(model, optimizer, 3, 4)
    assert_same(saved, before)  # what was handed out is a copy
    with pytest.raises(StaleStateError):
        optimizer.state_dict()
    optimizer.load_state_dict(saved)
    with pytest.raises(StaleStateError):
        optimizer.state_dict()
    optimizer.consolidate_state_dict(to=None)
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5  # groups are always live
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(StaleStateError):
        optimizer.state_dict()


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("optimizer_class", [AdamW, Adagrad, SGD, Adafactor])
def test_before_any_step_the_state_is_what_the_class_starts_with(optimizer_class):
    _, optimizer, _, twin = trained(optimizer_class, steps=0)
    calls = count_messages(optimizer)
    assert_same(optimizer.state_dict(), twin.state_dict())
    assert calls == []
    optimizer.consolidate_state_dict(to=None)
    assert_same(optimizer.state_dict(), twin.state_dict())


def count_messages(optimizer):
    """The list to which every communication of the optimizer is added from now on."""
    calls = []
    for name in ("all_gather", "all_gather_rows", "broadcast", "send", "receive"):
        method = getattr(optimizer.collectives, name)

        def counted(*args, _method=method, _name=name):
            calls.append((_name, args[0].numel() * args[0].dtype.itemsize))
            return _method(*args)

        setattr(optimizer.collectives, name, counted)
    return calls


@on_ranks(2, 3)
def test_ranks_that_consolidate_differently_are_named(rank, world_size):
    _, optimizer, _, _ = trained()
    with pytest.raises(AgreementError, match=r"consolidate_state_dict\(to=\).*rank 1 has 1"):
        optimizer.consolidate_state_dict(to=1 if rank == 1 else 0)
    with pytest.raises(ValueError, match=f"to: expected a rank from 0 to {world_size - 1}"):
        optimizer.consolidate_state_dict(to=world_size)
    optimizer._snapshot._changes += rank == 1  # as if it had stepped once more
    with pytest.raises(AgreementError, match="number of steps and loads: rank 1 has 4"):
        optimizer.consolidate_state_dict()
    if rank == 1:
        optimizer._snapshot._changes -= 1
    optimizer.consolidate_state_dict()  # the ranks are still in step


@on_ranks(4)
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 4), (4, 1), (1, 3)])
@pytest.mark.parametrize("optimizer_class", [AdamW, Adafactor])
def test_any_world_size_continues_any_other(before, after, optimizer_class, rank, tmp_path):
    old, new = (dist.new_group(list(range(size))) for size in (before, after))
    if rank < before:
        model, optimizer, theirs, twin = trained(optimizer_class, process_group=old)
        optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved, tmp_path / "saved.pt")
    dist.barrier()
    if rank >= after:
        return
    theirs = make_model()
    twin = optimizer_class(theirs.parameters(), lr=0.01)
    train(theirs, twin, 0, 3)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert_same(saved["optimizer"], twin.state_dict())
    model = make_model()
    model.load_state_dict(saved["model"])
    optimizer = sharded(model, optimizer_class, new, bucket_cap_mb=25)  # other buckets too
    optimizer.load_state_dict(saved["optimizer"] if rank == 0 else None, from_=0)
    train(model, optimizer, 3, 6)
    train(theirs, twin, 3, 6)
    assert_same_parameters(model, theirs)
    optimizer.consolidate_state_dict(to=None)
    assert_same(optimizer.state_dict(), twin.state_dict())


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("from_", [None, 0, -1])
def test_loading_clones_and_never_changes_the_callers_dict(from_, rank, world_size):
    _, _, theirs, twin = trained()
    source = world_size - 1 if from_ == -1 else from_
    saved = copy.deepcopy(twin.state_dict())
    model = make_model()
    model.load_state_dict(theirs.state_dict())
    optimizer = sharded(model, lr=123.0)
    hers = saved if source in (None, rank) else None
    optimizer.load_state_dict(hers, from_=source)
    assert optimizer.param_groups[0]["lr"] == 0.01
    train(model, optimizer, 3, 5)
    assert_same(saved, twin.state_dict())
    for state in saved["state"].values():  # and what happens to it later does not matter
        for value in state.values():
            value.fill_(float("nan"))
    saved["param_groups"][0]["lr"] = float("nan")
    train(model, optimizer, 5, 6)
    train(theirs, twin, 3, 6)
    assert_same_parameters(model, theirs)


def broken_states(saved):
    """What is wrong -> a state that has it wrong."""

    def changed(change):
        state = copy.deepcopy(saved)
        change(state)
        return state

    return {
        r"different number of parameter groups: expected 1, got 0": changed(
            lambda s: s["param_groups"].pop()
        ),
        r"doesn't match the size .*6 parameters, got 5": changed(
            lambda s: s["param_groups"][0]["params"].pop()
        ),
        r"'exp_avg' of parameter 2 .*expected shape \(37, 53\), got \(53, 37\)": changed(
            lambda s: s["state"][2].update(exp_avg=s["state"][2]["exp_avg"].T.contiguous())
        ),
        r"'step' of parameter 0 .*expected shape \(\), got \(2,\)": changed(
            lambda s: s["state"][0].update(step=torch.zeros(2))
        ),
        r"'momentum_buffer' of parameter 1 ": changed(
            lambda s: s["state"][1].update(momentum_buffer=torch.zeros(53))
        ),
        r"state for parameter 77, which no group lists": changed(
            lambda s: s["state"].update({77: {}})
        ),
        r"expected a state_dict with 'state' and 'param_groups', got int": 5,
    }


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("from_", [None, 0])
def test_what_does_not_fit_is_refused_on_every_rank(from_, rank):
    model, optimizer, theirs, twin = trained()
    for message, state in broken_states(twin.state_dict()).items():
        if rank == 0 or from_ is None:
            with pytest.raises((ValueError, TypeError), match=message):
                optimizer.load_state_dict(state, from_)
        else:
            with pytest.raises(AgreementError, match=f"rank 0 failed.*{message}"):
                optimizer.load_state_dict(None, from_)
    train(model, optimizer, 3, 5)  # nothing was lost
    train(theirs, twin, 3, 5)
    assert_same_parameters(model, theirs)


@on_ranks(2, 3)
def test_ranks_that_load_different_states_are_named(rank):
    _, optimizer, theirs, twin = trained()
    early = copy.deepcopy(twin.state_dict())
    train(theirs, twin, 3, 4)
    with pytest.raises(AgreementError, match=r"saved step of parameter 0: rank 1 has .*4\.0"):
        optimizer.load_state_dict(twin.state_dict() if rank == 1 else early)
    with pytest.raises(AgreementError, match=r"load_state_dict\(from_=\): rank 1 has None"):
        optimizer.load_state_dict(early, from_=None if rank == 1 else 0)
    with pytest.raises((TypeError, AgreementError), match=r"expected a state_dict.*from_="):
        optimizer.load_state_dict(early if rank == 0 else None)
    optimizer.load_state_dict(early)


@on_ranks(2, 3)
def test_tensors_are_never_pickled(rank, monkeypatch):
    sizes = []
    dumps = pickle.dumps
    monkeypatch.setattr(
        pickle, "dumps", lambda *a, **k: sizes.append(len(dumps(*a, **k))) or dumps(*a, **k)
    )
    with torch.random.fork_rng():
        model = nn.Linear(512, 512)
    model.load_state_dict({"weight": torch.ones(512, 512), "bias": torch.ones(512)})
    optimizer = ShardedOptimizer(model.parameters(), AdamW, bucket_cap_mb=0.3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    calls = count_messages(optimizer)
    optimizer.consolidate_state_dict(to=0)
    moved = sum(size for name, size in calls if name in ("send", "receive"))
    optimizer.load_state_dict(optimizer.state_dict() if rank == 0 else None, from_=0)
    assert sizes and max(sizes) < 4096
    assert moved > 100_000  # while the state itself is a thousand times that


@on_ranks(1, 2, 3)
def test_consolidating_sends_each_byte_of_the_state_once(rank, world_size):
    _, optimizer, _, twin = trained()
    calls = count_messages(optimizer)
    optimizer.consolidate_state_dict(to=0)
    sent = torch.tensor([sum(size for name, size in calls if name == "send")])
    if world_size > 1:
        dist.all_reduce(sent)
    whole = sum(
        v.numel() * v.dtype.itemsize
        for s in twin.state_dict()["state"].values()
        for v in s.values()
    )
    held = sum(
        value.numel() * value.dtype.itemsize
        for state in optimizer.optim.state.values()
        for value in state.values()
    )
    held_by_target = torch.tensor([held if rank == 0 else 0])
    if world_size > 1:
        dist.all_reduce(held_by_target)
    assert int(sent) == whole - int(held_by_target)
    assert world_size == 1 or int(sent) > 0


class Nested(torch.optim.Optimizer):
    """A class shardopt does not know, with every kind of state."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        self.state["calls"] = {"count": self.state.get("calls", {}).get("count", 0) + 1}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["number"] = state.get("number", 0) + 1
                history = state.setdefault("history", [torch.zeros_like(parameter)])
                history.append(parameter.grad * history[-1].norm() + parameter.grad)
                state["factors"] = {"row": history[-1].sum(), "shape": tuple(parameter.shape)}
                parameter.sub_(history[-1] + state["factors"]["row"], alpha=group["lr"] * 1e-3)


@on_ranks(1, 2, 3)
def test_a_class_we_do_not_know_keeps_any_state(rank):
    model, optimizer, theirs, twin = trained(Nested)
    optimizer.consolidate_state_dict(to=None)
    saved = optimizer.state_dict()
    assert_same(
        {key: saved["state"][key] for key in sorted(saved["state"], key=str)},
        {key: twin.state_dict()["state"][key] for key in sorted(saved["state"], key=str)},
    )
    again = sharded(model, Nested)
    again.load_state_dict(saved if rank == 0 else None, from_=0)
    train(model, again, 3, 5)
    train(theirs, twin, 3, 5)
    assert_same_parameters(model, theirs)


class Sparse(Nested):
    """A class whose state of the first parameter cannot be moved as it is."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim == 2 and parameter.shape[0] == 37:
                    self.state[parameter]["sparse"] = torch.eye(3).to_sparse()


@on_ranks(2, 3)
def test_state_that_cannot_travel_is_refused_on_every_rank():
    model = make_model()
    optimizer = sharded(model, Sparse)
    optimizer.step()
    held = [state for state in optimizer.optim.state.values() if "sparse" in state]
    expected = (UnsupportedError, "expected dense") if held else (AgreementError, "rank . failed")
    with pytest.raises(expected[0], match=expected[1]):
        optimizer.consolidate_state_dict(to=0)
    optimizer.optim.state.clear()
    optimizer.consolidate_state_dict(to=0)


@on_ranks(1, 2, 3)
def test_state_of_a_parameter_that_never_had_a_gradient_stays_absent(rank):
    parameters, twins = ([nn.Parameter(torch.ones(40, 40)) for _ in range(4)] for _ in range(2))
    optimizer = ShardedOptimizer(parameters, AdamW, bucket_cap_mb=0.01, kernel="torch")
    twin = AdamW(twins)
    for mine, other in zip(parameters[1:], twins[1:], strict=True):
        mine.grad = torch.ones(40, 40)
        other.grad = torch.ones(40, 40)
    optimizer.step()
    twin.step()
    optimizer.consolidate_state_dict(to=None)
    assert list(optimizer.state_dict()["state"]) == [1, 2, 3]
    assert_same(optimizer.state_dict(), twin.state_dict())
    fresh = ShardedOptimizer(parameters, AdamW)
    fresh.load_state_dict(optimizer.state_dict())
    fresh.consolidate_state_dict(to=None)
    assert list(fresh.state_dict()["state"]) == [1, 2, 3]


@on_ranks(1, 2, 3)
def test_a_tensor_lr_travels_from_the_rank_that_has_the_state(rank):
    saved = trained(lr=torch.tensor(0.25))[3].state_dict()
    optimizer = sharded(make_model(), lr=torch.tensor(1.0))
    optimizer.load_state_dict(saved if rank == 0 else None, from_=0)
    assert_same(optimizer.param_groups[0]["lr"], torch.tensor(0.25))
    assert optimizer.param_groups[0]["lr"] is not saved["param_groups"][0]["lr"]


@on_ranks(1, 2, 3)
def test_the_fused_kernel_chosen_by_auto_does_not_show_in_what_is_saved():
    _, optimizer, _, twin = trained(kernel="auto")
    assert optimizer.optim.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["fused"] is None
    optimizer.consolidate_state_dict(to=None)
    assert_same(optimizer.state_dict()["param_groups"], twin.state_dict()["param_groups"])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.optim.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["fused"] is None


@on_ranks(1, 2, 3)
def test_state_dict_hooks_fire_once(rank):
    _, optimizer, _, twin = trained()
    fired = []
    optimizer.register_state_dict_pre_hook(lambda o: fired.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, sd: fired.append("load") or {"state": sd["state"], "param_groups": sd["groups"]}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: fired.append("loaded"))
    optimizer.consolidate_state_dict(to=None)
    assert optimizer.state_dict()["extra"] == 1
    saved = twin.state_dict()
    optimizer.load_state_dict({"state": saved["state"], "groups": saved["param_groups"]})
    assert fired == ["save", "load", "loaded"]


@on_ranks(1, 2, 3)
def test_state_shows_this_ranks_part_and_is_never_empty(rank, world_size):
    model, optimizer, _, _ = trained(steps=0)
    assert optimizer.state and len(optimizer.state) == 0
    train(model, optimizer, 0, 1)
    held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    total = torch.tensor([held])
    if world_size > 1:
        dist.all_reduce(total)
    assert int(total) == sum(parameter.numel() for parameter in model.parameters())
    first = next(iter(optimizer.state))
    assert optimizer.state[first]["step"] == 1
    assert "exp_avg" in repr(optimizer.state)
