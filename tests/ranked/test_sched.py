"""shardopt.sched over real ranks: one decision, one schedule, and the rank named where not."""

import contextlib
import io
import math

import pytest
import torch
from torch.optim import lr_scheduler

from shardopt.errors import AgreementError
from shardopt.sched import ReduceLROnPlateau, check_schedules
from tests.ranks import on_ranks
from tests.scheduler_bank import EPOCHS, METRICS, ROWS, Row
from tests.scheduler_runs import Run, assert_same, set_gradients, start

PLATEAU = Row("plateau", ReduceLROnPlateau, {"patience": 1, "factor": 0.5})


def train_on(run: Run, metrics: list[float]) -> Run:
    """``Run.train`` with metrics of this rank's own."""
    for epoch, metric in enumerate(metrics):
        set_gradients(run.parameters, epoch)
        run.optimizer.step()
        run.scheduler.step(metric)
        rates = [(group["lr"],) for group in run.optimizer.param_groups]
        run.seen.append((rates, run.values()))
    return run


@on_ranks(1, 2, 3, also_on_gpu=True)
def test_plateau_decides_alike_from_different_metrics(rank, world_size, device):
    """Equal to plain torch that is given the mean of all ranks' metrics in float64."""
    noise = [[math.sin(7 * epoch + r) for r in range(world_size)] for epoch in range(EPOCHS)]
    brought = [[m + n for n in ns] for m, ns in zip(METRICS, noise, strict=True)]
    ours = start(PLATEAU, "AdamW", sharded=True, device=device)
    train_on(ours, [torch.tensor(each[rank], dtype=torch.float64) for each in brought])
    torchs = Row("torch", lr_scheduler.ReduceLROnPlateau, PLATEAU.arguments)
    means = [sum(each) / world_size for each in brought]
    twin = train_on(start(torchs, "AdamW", sharded=False, device=device), means)
    assert_same(ours, twin)
    assert ours.scheduler.state_dict() == twin.scheduler.state_dict()
    check_schedules(ours.scheduler)


@on_ranks(2, 3, slow=[3])
def test_torchs_own_plateau_comes_apart_and_is_named(rank):
    """What the class is for: with torch's, ranks that bring different metrics part ways."""
    run = start("ReduceLROnPlateau", "SGD", sharded=True)
    run.scheduler.step(1.0)
    check_schedules(run.scheduler)
    run.scheduler.step(2.0 if rank == 1 else 0.5)
    with pytest.raises(AgreementError, match=r"group 0 lr: rank 1 has 0\.01"):
        check_schedules(run.scheduler)


@on_ranks(1, 2, 3, slow=[3])
def test_plateau_counts_nan_of_one_rank_as_a_bad_epoch_on_all(rank, world_size):
    run = start(PLATEAU, "SGD", sharded=True)
    run.scheduler.step(1.0)
    for _ in range(2):
        run.scheduler.step(math.nan if rank == world_size - 1 else 0.1)
    assert run.scheduler.best == 1.0
    assert run.optimizer.param_groups[0]["lr"] == 0.05
    check_schedules(run.scheduler)


@on_ranks(2, 3, slow=[3])
def test_plateau_without_a_number_on_one_rank_raises_on_all(rank):
    run = start(PLATEAU, "SGD", sharded=True)
    expected = (TypeError, "float") if rank == 1 else (AgreementError, "rank 1 brought")
    with pytest.raises(expected[0], match=expected[1]):
        run.scheduler.step(None if rank == 1 else torch.tensor(0.5))
    run.scheduler.step(1.0)  # and everybody goes on in step
    assert run.scheduler.last_epoch == 1


@on_ranks(2, 3, slow=[3])
def test_plateau_resumed_on_one_rank_only_is_named(rank):
    run = start(PLATEAU, "SGD", sharded=True)
    if rank == 0:
        run.scheduler.load_state_dict({**run.scheduler.state_dict(), "last_epoch": 4, "best": 0.1})
    with pytest.raises(AgreementError, match=r"last_epoch: rank [01] has [04], rank [01] has [04]"):
        run.scheduler.step(0.5)


@on_ranks(1, 2, 3, slow=[3])
def test_plateau_prints_on_rank_0(rank):
    """``verbose`` everywhere, or on one rank only: the others are not disturbed by it."""
    out = io.StringIO()
    verbose = Row("verbose", ReduceLROnPlateau, {"patience": 0, "verbose": True})
    with contextlib.redirect_stdout(out):
        run = start(verbose, "SGD", sharded=True)
        run.scheduler.step(1.0)
        run.scheduler.step(1.0)
    expected = [
        "Epoch     2: reducing learning rate of group 0 to 1.0000e-02.\n",
        "Epoch     2: reducing learning rate of group 1 to 5.0000e-03.\n",
    ]
    assert out.getvalue() == ("".join(expected) if rank == 0 else "")

    run.scheduler.verbose = rank == 0
    check_schedules(run.scheduler)


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("row", ROWS)
def test_equal_schedules_pass(row):
    run = start(row, "SGD", sharded=True)
    check_schedules(run.scheduler)
    if row.startswith("ReduceLROnPlateau"):
        return
    run.train(range(3))
    check_schedules([run.scheduler])


def with_another_epoch(run: Run) -> None:
    run.scheduler.last_epoch = 7


def with_another_option(run: Run) -> None:
    run.scheduler.gamma = 0.9


def with_another_rate(run: Run) -> None:
    run.optimizer.param_groups[1]["lr"] = 0.75


DIFFERENCES = {
    # what the last rank does: the fact that must be named, its value there, and elsewhere
    "last_epoch": (with_another_epoch, "scheduler 0 last_epoch", "7", "0"),
    "option": (with_another_option, "scheduler 0 gamma", "0.9", "0.5"),
    "lr": (with_another_rate, "scheduler 0 group 1 lr", "0.75", "0.05"),
}


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_named_with_rank_and_both_values(difference, rank, world_size):
    act, fact, value, others = DIFFERENCES[difference]
    run = start("StepLR gamma", "SGD", sharded=True)
    if rank == world_size - 1:
        act(run)
    with pytest.raises(AgreementError, match="on every rank") as caught:
        check_schedules(run.scheduler)
    assert f"{fact}: rank {world_size - 1} has {value}, rank 0 has {others}" in str(caught.value)


@on_ranks(2, 3, slow=[3])
def test_another_class_on_one_rank_is_named(rank, world_size):
    row = "ExponentialLR" if rank == world_size - 1 else "StepLR gamma"
    run = start(row, "SGD", sharded=True)
    with pytest.raises(AgreementError, match=r"scheduler 0 class: rank \d has .*ExponentialLR"):
        check_schedules(run.scheduler)


@on_ranks(2, 3, slow=[3])
def test_a_difference_in_an_inner_scheduler_is_named(rank):
    run = start("SequentialLR two", "SGD", sharded=True)
    if rank == 1:
        run.scheduler._schedulers[1].gamma = 0.3
    with pytest.raises(AgreementError, match=r"scheduler 0\.1 gamma: rank 1 has 0\.3"):
        check_schedules(run.scheduler)


@on_ranks(2, 3, slow=[3])
def test_a_scheduler_of_a_plain_optimizer_is_checked_through_a_sharded_one(rank):
    sharded = start("StepLR", "SGD", sharded=True).optimizer
    plain = start("StepLR", "SGD", sharded=False)
    check_schedules(plain.scheduler, sharded)
    if rank == 1:
        plain.train(range(1))
    with pytest.raises(AgreementError, match="last_epoch: rank 1 has 1, rank 0 has 0"):
        check_schedules(plain.scheduler, optimizer=sharded)
