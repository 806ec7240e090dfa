"""shardopt.sched without processes: ranks are threads, or there is but one."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

from shardopt.errors import AgreementError
from shardopt.sched import ReduceLROnPlateau, check_schedules
from shardopt.sched.agreement import schedule_facts

TORCHS = lr_scheduler.ReduceLROnPlateau
METRICS = [1.0, 0.9, 0.95, 0.96, 0.97, 0.895, 0.99, 1.2]


def optimizer(lr: float = 0.1) -> torch.optim.SGD:
    parameters = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": lr / 2}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def rates(scheduler) -> list[float]:
    return [group["lr"] for group in scheduler.optimizer.param_groups]


class ThreadRanks:
    """The collectives and the agreement of ranks that are threads of one process."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=10)
        self.brought = [None] * world_size
        self.num_exchanges = 0

    def optimizer_of(self, rank: int, **options) -> torch.optim.SGD:
        """A plain optimizer with what ``shardopt.sched`` asks of a sharded one."""
        made = optimizer(**options)
        gather = lambda row: torch.stack(self._exchange(rank, row))  # noqa: E731
        made.collectives = SimpleNamespace(
            rank=rank, world_size=self.world_size, all_gather_rows=gather
        )
        made.agree = lambda facts, remedy: self._agree(rank, dict(facts), remedy)
        return made

    def run(self, body) -> list:
        """``body(rank)`` on every rank at once; its results, or its errors, in rank order."""

        def attempt(rank: int):
            try:
                return body(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.world_size) as threads:
            return list(threads.map(attempt, range(self.world_size)))

    def _exchange(self, rank: int, mine):
        self.brought[rank] = mine
        self.num_exchanges += rank == 0
        self.barrier.wait()
        everything = list(self.brought)
        self.barrier.wait()
        return everything

    def _agree(self, rank: int, facts: dict, remedy: str) -> None:
        everything = self._exchange(rank, facts)
        for name in dict.fromkeys(key for brought in everything for key in brought):
            values = [repr(brought.get(name)) for brought in everything]
            if len(set(values)) > 1:
                raise AgreementError(f"{name}: {values}; {remedy}")


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 0},
        {"mode": "max", "factor": 0.5, "patience": 1, "threshold": 0.01, "threshold_mode": "abs"},
        {"patience": 0, "cooldown": 2, "min_lr": [0.01, 0.02], "eps": 1e-3},
    ],
)
def test_over_a_plain_optimizer_it_is_torchs(options):
    ours, torchs = ReduceLROnPlateau(optimizer(), **options), TORCHS(optimizer(), **options)
    for metric in [*METRICS, math.nan, math.inf, -math.inf]:
        ours.step(torch.tensor(metric))
        torchs.step(torch.tensor(metric))
        assert rates(ours) == rates(torchs)
        assert ours.state_dict() == torchs.state_dict()
    assert rates(ours) != [0.1, 0.05]


def test_arguments_by_position_are_torchs():
    ours = ReduceLROnPlateau(optimizer(), "max", 0.5, 3, 0.2, "abs", 4, [0.1, 0.2], 1e-5)
    torchs = TORCHS(optimizer(), "max", 0.5, 3, 0.2, "abs", 4, [0.1, 0.2], 1e-5)
    assert ours.state_dict() == torchs.state_dict()
    with pytest.raises(ValueError, match=r"Factor should be < 1\.0"):
        ReduceLROnPlateau(optimizer(), factor=1.5)
    with pytest.raises(TypeError, match="unexpected keyword"):
        ReduceLROnPlateau(optimizer(), patients=1)


BOTH_WAYS = [(ReduceLROnPlateau, TORCHS), (TORCHS, ReduceLROnPlateau)]


@pytest.mark.parametrize("first, second", BOTH_WAYS)
def test_state_goes_to_torchs_class_and_back(first, second):
    saved = first(optimizer(), patience=1)
    for metric in METRICS[:4]:
        saved.step(metric)
    resumed = second(optimizer(), patience=7)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.state_dict() == saved.state_dict()
    assert "verbose" not in resumed.state_dict()


def test_verbose_prints_the_old_words(capsys):
    scheduler = ReduceLROnPlateau(optimizer(), patience=0, min_lr=[0.0, 0.05], verbose=True)
    scheduler.step(1.0)
    scheduler.step(1.0)
    words = "reducing learning rate of group 0 to"
    assert capsys.readouterr().out == f"Epoch     2: {words} 1.0000e-02.\n"
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(1.0, epoch=2.5)
    assert capsys.readouterr().out == f"Epoch 2.50: {words} 1.0000e-03.\n"


def test_verbose_is_silent_by_default_and_survives_old_states(capsys):
    scheduler = ReduceLROnPlateau(optimizer(), patience=0)
    scheduler.load_state_dict({**scheduler.state_dict(), "verbose": True})  # as torch once saved it
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert rates(scheduler) != [0.1, 0.05]
    assert capsys.readouterr().out == ""


def test_ranks_decide_by_the_mean(capsys):
    """One rank improves and one worsens: alone they would decide otherwise."""
    mine = [[1.0, 0.8, 0.6], [1.0, 1.3, 1.6]]  # the mean worsens: 1.0, 1.05, 1.1

    def body(rank: int):
        scheduler = ReduceLROnPlateau(ranks.optimizer_of(rank), patience=1, verbose=True)
        for metric in mine[rank]:
            scheduler.step(metric)
        return scheduler.state_dict(), rates(scheduler)

    ranks = ThreadRanks(2)
    first, second = ranks.run(body)
    assert first == second
    assert first[0]["best"] == 1.0
    assert first[1] == pytest.approx([0.01, 0.005])
    assert capsys.readouterr().out.count("reducing learning rate") == 2  # two groups, rank 0 only
    assert ranks.num_exchanges == 3  # one for each step


@pytest.mark.parametrize("world_size", [2, 3, 5, 7])
def test_a_metric_that_all_ranks_bring_is_not_rounded(world_size):
    def body(rank: int) -> float:
        scheduler = ReduceLROnPlateau(ranks.optimizer_of(rank))
        scheduler.step(metric)
        return scheduler.best

    for metric in (0.1, 1 / 3, 2.7182818, 1e308):
        ranks = ThreadRanks(world_size)
        assert ranks.run(body) == [metric] * world_size


@pytest.mark.parametrize("spoiler", [math.nan, math.inf])
def test_nan_and_infinity_of_one_rank_are_a_bad_epoch_on_all(spoiler):
    def body(rank: int):
        scheduler = ReduceLROnPlateau(ranks.optimizer_of(rank), patience=0)
        scheduler.step(1.0)
        scheduler.step(spoiler if rank == 1 else 0.5)
        return scheduler.best, rates(scheduler)

    ranks = ThreadRanks(3)
    assert ranks.run(body) == [(1.0, pytest.approx([0.01, 0.005]))] * 3


def test_no_metric_on_one_rank_is_an_error_on_all():
    def body(rank: int):
        scheduler = ReduceLROnPlateau(ranks.optimizer_of(rank))
        before = scheduler.state_dict()
        try:
            scheduler.step(None if rank == 1 else 0.5)
        finally:
            assert scheduler.state_dict() == before

    ranks = ThreadRanks(3)
    errors = ranks.run(body)
    assert isinstance(errors[1], TypeError)
    for error in (errors[0], errors[2]):
        assert isinstance(error, AgreementError)
        assert "rank 1" in str(error)


def test_ranks_that_have_counted_differently_are_named():
    def body(rank: int):
        scheduler = ReduceLROnPlateau(ranks.optimizer_of(rank))
        if rank == 1:
            scheduler.load_state_dict({**scheduler.state_dict(), "num_bad_epochs": 5})
        scheduler.step(0.5)

    ranks = ThreadRanks(2)
    for error in ranks.run(body):
        assert isinstance(error, AgreementError)
        assert "num_bad_epochs: ['0', '5']" in str(error)


def test_check_needs_somebody_to_ask():
    scheduler = lr_scheduler.StepLR(optimizer(), step_size=1)
    with pytest.raises(TypeError, match=r"drives SGD; .* pass the ShardedOptimizer"):
        check_schedules(scheduler)
    with pytest.raises(TypeError, match="got one that drives no scheduler"):
        check_schedules([])
    with pytest.raises(TypeError, match="got one that drives NoneType"):
        check_schedules(None)
    asked = []
    other = SimpleNamespace(agree=lambda facts, remedy: asked.append((facts, remedy)))
    check_schedules(scheduler, optimizer=other)
    ((facts, remedy),) = asked
    assert facts["scheduler 0 last_epoch"] == 0
    assert "scheduler.step()" in remedy


def test_facts_come_most_telling_first_and_without_addresses():
    made = optimizer()
    chained = lr_scheduler.SequentialLR(
        made,
        [
            lr_scheduler.MultiStepLR(made, milestones=[3, 5]),
            lr_scheduler.LambdaLR(made, [lambda epoch: 1.0, lambda epoch: 0.5]),
        ],
        milestones=[2],
    )
    facts = schedule_facts([chained, lr_scheduler.StepLR(made, step_size=4)])
    names = list(facts)
    assert names[0] == "scheduler 0 class"
    assert facts["scheduler 0.1 class"] == "torch.optim.lr_scheduler.LambdaLR"
    assert facts["scheduler 0.0 milestones[3]"] == 1
    assert facts["scheduler 0 group 1 lr"] == made.param_groups[1]["lr"]
    assert facts["scheduler 0 group 0 momentum"] == 0.9
    assert not any("scheduler 1 group" in name for name in names)  # one optimizer, told once
    assert " at 0x" not in repr(facts)
    order = ["class", "last_epoch", "lr"]
    told = [order.index(name.split()[-1]) if name.split()[-1] in order else 3 for name in names]
    assert told == sorted(told)


def test_facts_of_tensors_functions_and_objects_are_plain():
    class Holder:
        pass

    scheduler = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]))
    scheduler.state_dict = lambda: {
        "tensor": torch.tensor([1.0, 2.0]),
        "function": math.cos,
        "object": Holder(),
        "rows": [{"end": 1.0}, {"end": 2.0}],
        "nothing": None,
    }
    facts = schedule_facts([scheduler])
    assert facts["scheduler 0 tensor"] == [1.0, 2.0]
    assert facts["scheduler 0 function"] == "math.cos"
    assert facts["scheduler 0 object"].endswith("Holder")
    assert facts["scheduler 0 rows[1]['end']"] == 2.0
    assert facts["scheduler 0 nothing"] is None
