"""What does not fit is refused by name, on every rank, and nothing has changed."""

import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from shardopt import ShardedOptimizer
from shardopt.checkpoint import latest, load, save
from shardopt.errors import AgreementError, CheckpointError, IncompleteError, UnsupportedError
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same


def model_of(**layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.ModuleDict({name: make() for name, make in layers.items()})


def optimizer_of(model, cls=AdamW, named=True, lr=0.1, **options):
    parameters = model.named_parameters() if named else model.parameters()
    return ShardedOptimizer(parameters, cls, lr=lr, bucket_cap_mb=SMALL_BUCKETS, **options)


def square(out=61, dtype=None, bias=True):
    return lambda: nn.Linear(53, out, dtype=dtype, bias=bias)


def norm(width=4):
    return lambda: nn.BatchNorm1d(width)


def step_once(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def everything(model, optimizer):
    """This rank's values, copied."""
    state = [
        {key: torch.as_tensor(value).clone() for key, value in entries.items()}
        for entries in optimizer.optim.state.values()
    ]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    model_state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"model": model_state, "state": state, "groups": groups}


SAVED = {"a": square(), "b": square(), "n": norm()}
MISFITS = {
    "missing": ({**SAVED, "c": square()}, r"model\.c\.\w+: expected it in the checkpoint"),
    "too much": ({"a": square(), "n": norm()}, r"model\.b\.\w+: the model has no such entry"),
    "shape": (
        {**SAVED, "b": square(60)},
        r"model\.b\.weight: expected float32 \(60, 53\) as the model has, got float32 \(61, 53\)",
    ),
    "dtype": (
        {**SAVED, "b": square(dtype=torch.float64)},
        r"model\.b\.weight: expected float64 \(61, 53\) .*, got float32",
    ),
    "a buffer": ({**SAVED, "n": norm(5)}, r"model\.n\.\w+: expected float32 \(5,\)"),
}


@on_ranks(1, 2)
@pytest.mark.parametrize("misfit", MISFITS)
def test_another_model_is_refused_by_name_and_nothing_changes(misfit, rank, tmp_path):
    layers, message = MISFITS[misfit]
    model = model_of(**SAVED)
    optimizer = optimizer_of(model)
    step_once(model, optimizer)
    save(tmp_path, step=1, model=model, optimizer=optimizer)
    other = model_of(**layers)
    again = optimizer_of(other)
    step_once(other, again)
    before = everything(other, again)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, model=other, optimizer=again)
    assert isinstance(caught.value, ValueError)
    assert "step-1" in str(caught.value)
    assert_same(everything(other, again), before)
    loaded = load(tmp_path, model=other, strict=False)
    assert any(re.search(message, line) for line in loaded.skipped), loaded.skipped
    assert_same(other["a"].state_dict(), model["a"].state_dict())


@on_ranks(2)
def test_a_misfit_of_one_rank_is_raised_on_all(rank, tmp_path):
    """Only one rank's model differs, in what no rank compares at construction."""
    model = model_of(**SAVED)
    save(tmp_path, step=1, model=model)
    other = model_of(**SAVED)
    if rank == 1:
        other["n"] = nn.BatchNorm1d(7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    error = CheckpointError if rank == 1 else AgreementError
    with pytest.raises(error, match=r"model\.n\.\w+: expected float32 \(7,\)"):
        load(tmp_path, model=other)
    assert_same(dict(other.state_dict()), before)


ORDERS = {
    "reordered": (lambda m: [*m.named_parameters()][::-1], "group 0: expected parameter 'b.bias'"),
    "one less": (lambda m: [*m.named_parameters()][1:], "group 0: has no parameter 'a.weight'"),
    "one more": (
        lambda m: [*m.named_parameters(), ("extra", nn.Parameter(torch.ones(3)))],
        "group 0: expected parameter 'extra', got none",
    ),
    "renamed": (
        lambda m: [(f"x{name}", p) for name, p in m.named_parameters()],
        "group 0: expected parameter 'xa.weight', got none",
    ),
    "two groups": (
        lambda m: [{"params": [pair]} for pair in m.named_parameters()],
        "different number of parameter groups",
    ),
}


@on_ranks(1, 2)
@pytest.mark.parametrize("order", ORDERS)
def test_other_names_or_another_order_are_named(order, rank, tmp_path):
    change, message = ORDERS[order]
    model = model_of(a=square(), b=square())
    optimizer = optimizer_of(model)
    step_once(model, optimizer)
    save(tmp_path, step=1, optimizer=optimizer)
    other = model_of(a=square(), b=square())
    again = ShardedOptimizer(change(other), AdamW, lr=0.5)
    before = everything(other, again)
    with pytest.raises((ValueError, AgreementError), match=message):
        load(tmp_path, optimizer=again)
    assert_same(everything(other, again), before)


@on_ranks(1, 2)
def test_parameters_of_one_shape_in_another_order_go_by_name_when_not_strict(rank, tmp_path):
    """Never the state of one for another, though shapes fit."""
    model = model_of(a=square(), b=square())
    optimizer = optimizer_of(model)
    model["a"].weight.grad = torch.ones(61, 53)
    optimizer.step()
    save(tmp_path, step=1, optimizer=optimizer)
    other = model_of(a=square(), b=square())
    again = ShardedOptimizer([*other.named_parameters()][::-1], AdamW, lr=0.5)
    loaded = load(tmp_path, optimizer=again, strict=False)
    assert any("another order" in line for line in loaded.skipped)
    again.consolidate_state_dict(to=None)
    assert list(again.state_dict()["state"]) == [3]  # a.weight is the last one now


@on_ranks(2)
def test_the_state_of_another_class_is_refused(rank, tmp_path):
    model = model_of(a=square())
    optimizer = optimizer_of(model)
    step_once(model, optimizer)
    save(tmp_path, step=1, optimizer=optimizer)
    again = optimizer_of(model_of(a=square()), SGD, momentum=0.9)
    with pytest.raises((ValueError, AgreementError), match="class"):
        load(tmp_path, optimizer=again)
    assert len(again.optim.state) == 0


@on_ranks(1, 2)
def test_what_was_not_saved_is_missed_by_name(rank, tmp_path):
    model = model_of(a=square())
    optimizer = optimizer_of(model)
    schedule = lr_scheduler.StepLR(optimizer, 1)
    save(tmp_path, step=1, model=model)
    for name, part in (("optimizer", optimizer), ("scheduler", schedule)):
        with pytest.raises(CheckpointError, match=f"{name}: expected it in the checkpoint, got m"):
            load(tmp_path, **{name: part})
        assert name in load(tmp_path, **{name: part}, strict=False).skipped[0]
    assert load(tmp_path).path.name == "step-1"  # what is not asked for is not missed


@on_ranks(1, 2)
def test_a_step_is_never_overwritten(rank, tmp_path):
    model = model_of(a=square())
    path = save(tmp_path, step=1, model=model)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises((CheckpointError, AgreementError), match="never overwritten"):
        save(tmp_path, step=1, model=model_of(a=square()), extra=1)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["step-1"]


@on_ranks(1, 2)
def test_the_last_steps_are_kept_and_never_the_new_one_removed(rank, tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, step=step, extra=step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]
    assert latest(tmp_path).name == "step-10"
    save(tmp_path, step=3, extra=3, keep=2)  # from an older step on
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-3", "step-9"]
    assert load(tmp_path, step=9).extra == 9
    assert load(tmp_path / "step-3").extra == 3


@on_ranks(1, 2)
def test_where_there_is_no_checkpoint(rank, tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "nowhere") is None
    for arguments in ({}, {"step": 3}):
        with pytest.raises((IncompleteError, AgreementError), match="expected"):
            load(tmp_path, **arguments)
    with pytest.raises((IncompleteError, AgreementError), match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises((ValueError, AgreementError), match="step: expected how many steps"):
        save(tmp_path, step=-1)
    with pytest.raises((ValueError, AgreementError), match="keep: expected a number"):
        save(tmp_path, step=1, keep=0)
    with pytest.raises(TypeError, match="expected a ShardedOptimizer, got Adam"):
        save(tmp_path, step=1, optimizer=torch.optim.Adam([torch.ones(1)]))
    assert [*tmp_path.iterdir()] == []


@on_ranks(1, 2)
@pytest.mark.parametrize("groups", ["one", "two"])
def test_what_fits_is_loaded_into_a_model_with_another_head(groups, rank, tmp_path):
    model = model_of(body=square(), head=square(60))
    optimizer = optimizer_of(model)
    step_once(model, optimizer)
    save(tmp_path, step=1, model=model, optimizer=optimizer)
    other = model_of(body=square(), head=square(3))
    parts = [[*other[name].named_parameters(prefix=name)] for name in ("body", "head")]
    lists = [[*parts[0], *parts[1]]] if groups == "one" else parts
    again = ShardedOptimizer([{"params": named, "lr": 0.5} for named in lists], AdamW)
    loaded = load(tmp_path, model=other, optimizer=again, strict=False)
    assert_same(other["body"].state_dict(), model["body"].state_dict())
    again.consolidate_state_dict(to=None)
    optimizer.consolidate_state_dict(to=None)
    ours, theirs = again.state_dict(), optimizer.state_dict()
    assert_same(ours["state"], {index: theirs["state"][index] for index in (0, 1)})
    skipped = "\n".join(loaded.skipped)
    assert re.search(
        r"state 'exp_avg' of parameter 'head.weight': expected shape \(3, 53\)", skipped
    )
    assert ("optimizer groups: expected 2, got 1" in skipped) == (groups == "two")
    assert again.param_groups[0]["lr"] == (0.1 if groups == "one" else 0.5)


@on_ranks(1, 2)
def test_a_number_of_groups_without_names_skips_the_optimizer(rank, tmp_path):
    model = model_of(**SAVED)
    save(tmp_path, step=1, optimizer=optimizer_of(model, named=False))
    groups = [{"params": [parameter]} for parameter in model_of(**SAVED).parameters()]
    again = ShardedOptimizer(groups, AdamW)
    (line,) = load(tmp_path, optimizer=again, strict=False).skipped
    assert "different number of parameter groups" in line


@on_ranks(1, 2)
def test_a_model_of_other_parameters_is_refused(rank, tmp_path):
    model, other = model_of(**SAVED), model_of(**SAVED)
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="got a ModuleDict with none of them"):
        save(tmp_path, step=1, model=other, optimizer=optimizer)
    save(tmp_path, step=1, model=model, optimizer=optimizer)
    with pytest.raises(ValueError, match="got a ModuleDict with none of them"):
        load(tmp_path, model=other, optimizer=optimizer)


@on_ranks(1, 2)
def test_what_is_no_model_or_scheduler_is_refused(rank, tmp_path):
    model = model_of(**SAVED)
    for call in (save, load):
        options = {"step": 1} if call is save else {}
        with pytest.raises(
            TypeError, match=r"model: expected a torch\.nn\.Module, got OrderedDict"
        ):
            call(tmp_path, model=model.state_dict(), **options)
        with pytest.raises(TypeError, match="scheduler: expected an object with state_dict"):
            call(tmp_path, scheduler={}, **options)


@on_ranks(1, 2)
def test_a_scheduler_of_another_class_is_refused(rank, tmp_path):
    optimizer = optimizer_of(model_of(**SAVED))
    saved = lr_scheduler.StepLR(optimizer, 7)
    save(tmp_path, step=1, scheduler=saved)
    other = lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.raises(ValueError, match=r"expected \S+ExponentialLR, got the state of \S+StepLR"):
        load(tmp_path, scheduler=other)
    (line,) = load(tmp_path, scheduler=other, strict=False).skipped
    assert "scheduler class" in line
    load(tmp_path, scheduler=saved)


@on_ranks(1, 2)
def test_values_that_hold_themselves_and_tensors_as_keys_are_refused(rank, tmp_path):
    loop = []
    loop.append(loop)
    error = UnsupportedError if rank == 0 else AgreementError
    with pytest.raises(error, match="extra: expected values within values"):
        save(tmp_path, step=1, extra=loop)
    with pytest.raises(error, match=r"extra\['a key'\]: expected plain .* got torch\.Tensor"):
        save(tmp_path, step=1, extra={torch.ones(2): 1})


@on_ranks(1, 2)
def test_a_file_that_is_called_like_a_step_stays(rank, tmp_path):
    if rank == 0:
        (tmp_path / "step-5").write_text("mine")
    for step in (6, 7):
        save(tmp_path, step=step, extra=step, keep=1)
    assert load(tmp_path).extra == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-5", "step-7"]
