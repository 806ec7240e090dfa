"""Ranks that save or load differently are told, and so is what fails on one of them alone."""

import pytest
import torch
from torch import nn

from shardopt.checkpoint import async_save, load, save
from shardopt.checkpoint.manifest import read_manifest
from shardopt.checkpoint.opening import open_source
from shardopt.errors import AgreementError, CorruptError, IncompleteError
from tests.checkpoint_runs import SAVED_AT, STEPS, start
from tests.checkpoints import flip
from tests.ranked.test_checkpoint_refusals import (
    everything,
    model_of,
    optimizer_of,
    square,
    step_once,
)
from tests.ranks import on_ranks
from tests.twins import assert_same

DIFFERENT = {
    "step": ("checkpoint step", lambda rank: {"step": 1 + rank}),
    "directory": ("checkpoint directory", lambda rank: {"directory": rank}),
    "keep": ("checkpoint keep", lambda rank: {"keep": 1 + rank}),
    "a part": ("what is saved", lambda rank: {"model": nn.Linear(2, 2) if rank else None}),
    "a step that is no number": ("failed", lambda rank: {"step": 1 if rank else "one"}),
}


@on_ranks(2, 3)
@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_ranks_that_save_differently_are_told(what, with_optimizer, rank, tmp_path):
    words, arguments = DIFFERENT[what]
    how = {"step": 1, **arguments(rank)}
    directory = tmp_path / str(how.pop("directory", 0))
    optimizer = optimizer_of(model_of(a=square())) if with_optimizer else None
    with pytest.raises((AgreementError, ValueError), match=f"{words}|step: expected"):
        save(directory, optimizer=optimizer, **how)
    assert [*tmp_path.rglob("step*")] == []


@on_ranks(2)
def test_one_rank_beside_training_and_one_not_are_told(rank, tmp_path):
    call = save if rank == 0 else async_save
    with pytest.raises(AgreementError, match=r"the call: rank 1 has 'async_save\(\)'"):
        call(tmp_path, step=1, model=nn.Linear(2, 2))


class Schedule:
    """A scheduler of someone else's."""

    def __init__(self, state):
        self.state, self.fails = state, False

    def state_dict(self):
        if self.state is None:
            raise RuntimeError("no state here")
        return {"state": self.state}

    def load_state_dict(self, state):
        if self.fails:
            raise RuntimeError("cannot load it")
        self.state = state["state"]


@on_ranks(2, 3)
def test_schedulers_that_differ_or_fail_on_one_rank_are_told(rank, tmp_path):
    with pytest.raises(AgreementError, match="the scheduler's state"):
        save(tmp_path, step=1, scheduler=Schedule(rank))
    with pytest.raises((AgreementError, RuntimeError), match="no state here"):
        save(tmp_path, step=1, scheduler=Schedule(None if rank == 1 else 1))
    assert [*tmp_path.iterdir()] == []


@on_ranks(2)
def test_a_checkpoint_that_one_rank_cannot_read_is_loaded_by_none(rank, tmp_path):
    """Each rank reads what it is to hold: the damage lies in what only one of them does."""
    run = start("AdamW").train(0, SAVED_AT)
    path = save(tmp_path, step=SAVED_AT, optimizer=run.optimizer)
    if rank == 0:
        chunks = [c for entry in read_manifest(path).tensors.values() for c in entry.chunks]
        flip(path / "__1_0.distcp", next(c.offset for c in chunks if c.file == "__1_0.distcp"))
    torch.distributed.barrier()
    again = start("AdamW", seed=3).train(0, 1)
    before = again.local()
    with pytest.raises(CorruptError if rank == 1 else AgreementError, match=r"__1_0\.distcp"):
        load(path, optimizer=again.optimizer)
    assert_same(again.local(), before)


@on_ranks(2)
def test_ranks_that_load_differently_are_told(rank, tmp_path):
    save(tmp_path, step=1, extra=1)
    save(tmp_path, step=2, extra=2)
    with pytest.raises(AgreementError, match="ranks differ in strict"):
        load(tmp_path, strict=rank == 0)
    with pytest.raises(AgreementError, match="ranks differ in checkpoint step"):
        load(tmp_path, step=1 + rank)
    with pytest.raises(AgreementError, match="ranks differ in checkpoint directory"):
        load(tmp_path / f"step-{1 + rank}")
    with pytest.raises(AgreementError, match="ranks differ in what is loaded"):
        load(tmp_path, model=nn.Linear(1, 1) if rank else None)


@on_ranks(2)
def test_ranks_that_see_different_files_are_told(rank, tmp_path):
    """Each has a disk of its own under the same path."""
    model = nn.Linear(2, 2)
    for own in range(2):
        save(tmp_path / f"disk-{own}", step=1, model=model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "shardopt.checkpoint.restoring.open_source",
            lambda path: open_source(tmp_path / f"disk-{rank}" / path.name),
        )
        with pytest.raises(AgreementError, match="ranks differ in checkpoint: "):
            load(tmp_path, step=1, model=model)


@on_ranks(2)
def test_where_no_step_verifies_every_rank_is_told(rank, tmp_path):
    save(tmp_path, step=1, extra=1)
    if rank == 0:
        flip(tmp_path / "step-1" / "manifest.json", 99)
    torch.distributed.barrier()
    with pytest.raises(IncompleteError if rank == 0 else AgreementError, match="1 of which none"):
        load(tmp_path)


@on_ranks(2)
def test_a_checkpoint_that_one_rank_cannot_open(rank, tmp_path):
    save(tmp_path, step=1, extra=1)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:

            def fail(path):
                raise OSError(5, "Input/output error", str(path))

            patch.setattr("pathlib.Path.read_bytes", fail)
        with pytest.raises(OSError if rank == 1 else AgreementError, match="Input/output error"):
            load(tmp_path, step=1)


class Sore(nn.Linear):
    """A model whose own hook fails."""

    def _load_from_state_dict(self, *args, **kwargs):
        raise RuntimeError("the hook of a model")


@on_ranks(2)
@pytest.mark.parametrize("what", ["scheduler", "class", "model"])
def test_what_user_code_refuses_on_one_rank_changes_nothing_else(what, rank, tmp_path):
    """Schedulers, classes and models load by code of their own, which may raise."""
    model = model_of(a=square())
    optimizer = optimizer_of(model)
    step_once(model, optimizer)
    save(tmp_path, step=1, model=model, optimizer=optimizer, scheduler=Schedule(5))
    other, schedule = model_of(a=square()), Schedule(3)
    again = optimizer_of(other, lr=0.5)
    step_once(other, again)
    step_once(other, again)
    if rank == 1:
        if what == "scheduler":
            schedule.fails = True
        elif what == "class":
            again.optim.load_state_dict = lambda saved: [][1]
        else:
            other["a"].__class__ = Sore
    before = everything(other, again)
    words = {"scheduler": "cannot load it", "class": "out of range", "model": "the hook"}[what]
    with pytest.raises((RuntimeError, IndexError), match=words):
        load(tmp_path, model=other, optimizer=again, scheduler=schedule)
    assert schedule.state == 3
    after = everything(other, again)
    if what == "model":  # is written in place, last of all
        after["model"] = before["model"]
    assert_same(after, before)


@on_ranks(2)
def test_an_optimizer_of_two_classes_goes_on_as_it_was(rank, tmp_path):
    run, twin = (start("Muon and AdamW").train(0, SAVED_AT) for _ in range(2))
    save(tmp_path, step=1, optimizer=start("Muon and AdamW").optimizer, scheduler=Schedule(5))
    schedule = Schedule(3)
    schedule.fails = rank == 1
    with pytest.raises((RuntimeError, AgreementError), match="cannot load it"):
        load(tmp_path, optimizer=run.optimizer, scheduler=schedule)
    assert_same(run.local(), twin.local())
    assert_same(run.train(SAVED_AT, STEPS).local(), twin.train(SAVED_AT, STEPS).local())
