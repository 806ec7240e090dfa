"""A save beside training: the values of the call, one in flight, errors at the next call."""

import logging
import os
import threading
import time

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from shardopt import Guards, ShardedOptimizer
from shardopt.checkpoint import async_save, latest, load, save
from shardopt.comm.torch_group import TorchCollectives
from shardopt.errors import AgreementError, CheckpointError
from tests.checkpoint_runs import SAVED_AT, STEPS, assert_same_run, start, undisturbed
from tests.ranked.test_waits import DeferredCollectives
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, make_model, train

UNUSED = Guards(find_unused_parameters=True)


class Gate:
    """A slow disk: this process's ``os.fsync`` waits until ``open`` is called."""

    def __init__(self, monkeypatch):
        self._go, real = threading.Event(), os.fsync

        def slow(descriptor):
            assert self._go.wait(30)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", slow)

    def open(self):
        self._go.set()


@on_ranks(1, 2, 3)
def test_the_saved_values_are_those_of_the_call(rank, tmp_path):
    run = start("AdamW").train(0, SAVED_AT)
    with pytest.MonkeyPatch.context() as patch:
        disk = Gate(patch)
        saving = async_save(
            tmp_path, step=SAVED_AT, model=run.model, optimizer=run.optimizer, extra=["x"]
        )
        run.train(SAVED_AT, STEPS)
        assert not saving.done()
        assert latest(tmp_path) is None
        disk.open()
        assert saving.result() == tmp_path / f"step-{SAVED_AT}"
    assert_same_run(run, undisturbed("AdamW"))  # training has not noticed
    again = start("AdamW", seed=3)
    loaded = load(tmp_path, model=again.model, optimizer=again.optimizer)
    assert loaded.extra == ["x"]
    assert_same_run(again, undisturbed("AdamW", SAVED_AT))


@on_ranks(1, 2)
def test_one_save_is_in_flight_and_staging_is_used_again(rank, tmp_path):
    run = start("AdamW")
    with pytest.MonkeyPatch.context() as patch:
        disk = Gate(patch)
        first = async_save(tmp_path, step=0, model=run.model, optimizer=run.optimizer)
        run.train(0, 1)
        threading.Timer(0.2, disk.open).start()
        second = async_save(tmp_path, step=1, model=run.model, optimizer=run.optimizer)
        assert first.done()
    run.train(1, STEPS)
    second.result()
    for step in (0, 1):
        again = start("AdamW", seed=3)
        load(tmp_path, step=step, model=again.model, optimizer=again.optimizer)
        assert_same_run(again, undisturbed("AdamW", step))


@on_ranks(1, 2)
def test_a_load_waits_for_the_save_in_flight(rank, tmp_path):
    model = nn.Linear(3, 3)
    with pytest.MonkeyPatch.context() as patch:
        disk = Gate(patch)
        async_save(tmp_path, step=1, model=model)
        threading.Timer(0.2, disk.open).start()
        assert load(tmp_path, model=nn.Linear(3, 3)).step == 1


def broken(directory, rank, on=1):
    """A save in flight that fails on one rank: its disk is full when it flushes."""
    real = os.fsync

    def full(descriptor):
        if rank == on:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        saving = async_save(directory, step=5, model=nn.Linear(3, 3))
        saving.exception()
    return saving


NEXT = {
    "save": lambda directory: save(directory, step=6, extra=1),
    "async_save": lambda directory: async_save(directory, step=6, extra=1),
    "load": lambda directory: load(directory),
}


@on_ranks(2, 3)
@pytest.mark.parametrize("call", NEXT)
@pytest.mark.parametrize("known", ["nobody", "one rank"])
def test_its_error_is_raised_on_every_rank_at_the_next_call(call, known, rank, tmp_path):
    save(tmp_path, step=4, extra=4)
    saving = broken(tmp_path, rank)
    if known == "one rank" and rank == 0:
        with pytest.raises(AgreementError, match="No space left"):
            saving.result()
    with pytest.raises((OSError, AgreementError), match="No space left on device"):
        NEXT[call](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    torch.distributed.barrier()
    assert load(tmp_path).extra == 4  # told once
    save(tmp_path, step=6, extra=6)
    assert load(tmp_path).extra == 6


@on_ranks(1, 2)
def test_an_error_that_was_asked_for_is_not_told_again(rank, tmp_path):
    saving = broken(tmp_path, rank, on=0)
    with pytest.raises((OSError, AgreementError), match="No space left"):
        saving.result()
    save(tmp_path, step=6, extra=6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-6"]


@on_ranks(1, 2)
def test_an_error_that_nobody_asks_for_is_logged(rank, tmp_path):
    told, handler = [], logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("shardopt").addHandler(handler)
    try:
        saving = broken(tmp_path, rank, on=0)
        assert "No space left" in str(saving.exception())
    finally:
        logging.getLogger("shardopt").removeHandler(handler)
    (line,) = [line for line in told if "asynchronous save failed" in line]
    assert "No space left" in line
    with pytest.raises((OSError, AgreementError), match="No space left"):
        saving.result()


@on_ranks(2)
def test_what_cannot_be_kept_is_refused_at_once(rank, tmp_path):
    with pytest.raises((ValueError, AgreementError), match=r"extra\[0\]"):
        async_save(tmp_path, step=1, extra=[object()])
    async_save(tmp_path, step=1, extra=[1])
    with pytest.raises((CheckpointError, AgreementError), match="never overwritten"):
        async_save(tmp_path, step=1, extra=[2]).result()
    assert load(tmp_path).extra == [1]


@on_ranks(2)
def test_extra_is_that_of_the_call(rank, tmp_path):
    """Lists and tensors may change while the save is in flight."""
    extra = {"list": [1], "tensor": torch.ones(3)}
    buffers = nn.BatchNorm1d(3)
    with pytest.MonkeyPatch.context() as patch:
        disk = Gate(patch)
        saving = async_save(tmp_path, step=1, model=buffers, extra=extra)
        extra["list"].append(2)
        extra["tensor"].zero_()
        buffers.running_mean.fill_(5)
        disk.open()
        saving.result()
    loaded = load(tmp_path, model=(other := nn.BatchNorm1d(3)))
    assert_same(loaded.extra, {"list": [1], "tensor": torch.ones(3)})
    assert_same(other.running_mean, torch.zeros(3))


@on_ranks(2, 3)
def test_a_save_needs_nothing_that_is_on_its_way(rank, tmp_path):
    """Gathers that start as late as possible, while only a part of the model knows of them."""
    model, twin = make_model(), make_model()
    optimizer = ShardedOptimizer(
        model.parameters(), AdamW, DeferredCollectives(), bucket_cap_mb=SMALL_BUCKETS, lr=0.1
    )
    optimizer.overlap_forward(model[0])
    plain = ShardedOptimizer(twin.parameters(), AdamW, bucket_cap_mb=SMALL_BUCKETS, lr=0.1)
    train(twin, plain, 0, 2)
    train(model, optimizer, 0, 2)
    save(tmp_path, step=2, model=model, optimizer=optimizer)
    load(tmp_path, model=(other := make_model(1)))
    assert_same(other.state_dict(), twin.state_dict())


class Late(TorchCollectives):
    """What has been gathered reaches the buckets only when it is waited for."""

    def all_gather(self, bucket, borders):
        gathered = bucket.clone()
        super().all_gather(gathered, borders).wait()
        low, high = borders[self.rank], borders[self.rank + 1]

        class Arrival:
            def wait(self):
                bucket[:low], bucket[high:] = gathered[:low], gathered[high:]

        return Arrival()


@on_ranks(2, 3)
def test_a_load_is_not_overwritten_by_what_was_on_its_way(rank, tmp_path):
    model = make_model()
    optimizer = ShardedOptimizer(
        model.parameters(), AdamW, Late(), bucket_cap_mb=SMALL_BUCKETS, lr=0.1
    )
    save(tmp_path, step=0, model=model, optimizer=optimizer)
    optimizer.overlap_forward(model[4])  # the rest of the model waits for nothing by itself
    train(model, optimizer, 0, 1)
    load(tmp_path, model=model, optimizer=optimizer)
    optimizer.wait()
    assert_same(model.state_dict(), make_model().state_dict())


@on_ranks(2)
def test_what_a_save_beside_training_sends_pairs_with_nothing_else(rank):
    collectives = start("AdamW").optimizer.collectives
    aside = collectives.aside("checkpoint")
    assert aside.channel is not collectives.channel
    assert aside.channel is collectives.aside("checkpoint").channel  # and is made once
    assert (aside.rank, aside.world_size) == (collectives.rank, collectives.world_size)


@on_ranks(2, 3)
def test_training_and_saves_beside_it_go_on_together(rank, tmp_path):
    """Each rank's disk is slow at other moments; training communicates all the while."""
    run, twin = (start("AdamW", gradients="local", guards=UNUSED) for _ in range(2))
    twin.train(0, 12, rank)
    with pytest.MonkeyPatch.context() as patch:
        real = os.fsync
        patch.setattr(os, "fsync", lambda fd: time.sleep(0.01 * (1 + rank)) or real(fd))
        for step in range(12):
            async_save(tmp_path, step=step, model=run.model, optimizer=run.optimizer, keep=1)
            run.train(step, step + 1, rank)
        async_save(tmp_path, step=12, model=run.model, optimizer=run.optimizer, keep=1).result()
    assert_same_run(run, twin)
    again = start("AdamW", seed=3, gradients="local", guards=UNUSED)
    assert load(tmp_path, model=again.model, optimizer=again.optimizer).step == 12
    assert_same_run(again, twin)
