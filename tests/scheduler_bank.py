"""The bank of schedulers: one row for each way to build one. A new scheduler is a new row.

Every row meets every test of ``ranked/test_schedulers.py`` on 1, 2 and 3 ranks;
``pure/test_schedulers.py`` keeps the bank complete: no class and no argument forgotten, and
no argument given in vain.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

EPOCHS = 8
HALF = 4  # where the tests of resuming cut
METRICS = [1.0, 0.9, 0.95, 0.96, 0.97, 0.895, 0.99, 1.2]  # improves, stalls, improves, worsens


@dataclass(frozen=True)
class FromOptimizer:
    """An argument that can be made only once the optimizer stands."""

    make: Callable[[Optimizer], Any]


@dataclass(frozen=True)
class Row:
    """One way to build one scheduler."""

    name: str
    scheduler: type
    arguments: dict[str, Any]

    def build(self, optimizer: Optimizer, **more: Any) -> Any:
        """The scheduler, over ``optimizer``; callable objects, which have a state, are copied."""
        given = {
            key: value.make(optimizer) if isinstance(value, FromOptimizer) else copy.deepcopy(value)
            for key, value in {**self.arguments, **more}.items()
        }
        if self.scheduler is ChainedScheduler:  # the one class whose optimizer is optional
            return ChainedScheduler(**given)
        return self.scheduler(optimizer, **given)


class Decay:
    """A callable object, whose state LambdaLR and CyclicLR save where a lambda is dropped."""

    def __init__(self, rate: float):
        self.rate = rate
        self.calls = 0

    def __call__(self, count: float) -> float:
        self.calls += 1
        return self.rate**count


def row(name: str, scheduler: type, **arguments: Any) -> Row:
    """A row of the bank, named after its class and what is special about it."""
    return Row(f"{scheduler.__name__} {name}".strip(), scheduler, arguments)


def _warm_up_then_decay(optimizer: Optimizer) -> list[Any]:
    return [ConstantLR(optimizer, factor=0.1, total_iters=2), ExponentialLR(optimizer, gamma=0.8)]


def _three_in_a_row(optimizer: Optimizer) -> list[Any]:
    return [
        LinearLR(optimizer, total_iters=2),
        CosineAnnealingLR(optimizer, T_max=3),
        StepLR(optimizer, step_size=1, gamma=0.5),
    ]


_LIKE_ITSELF = FromOptimizer(lambda optimizer: optimizer)
_PLATEAU = {"patience": 1, "factor": 0.5}
_CYCLE = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2}
_ONE_CYCLE = {"max_lr": 0.2, "total_steps": 10}

ROWS = {
    each.name: each
    for each in [
        row("function", LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
        row("list", LambdaLR, lr_lambda=[lambda epoch: 1 / (1 + epoch), Decay(0.7)]),
        row("function", MultiplicativeLR, lr_lambda=lambda epoch: 0.95),
        row("list", MultiplicativeLR, lr_lambda=[Decay(0.99), lambda epoch: 1.1]),
        row("", StepLR, step_size=3),
        row("gamma", StepLR, step_size=2, gamma=0.5),
        row("", MultiStepLR, milestones=[2, 6]),
        row("gamma, twice at one epoch", MultiStepLR, milestones=[2, 5, 5], gamma=0.5),
        row("", ConstantLR),
        row("factor total_iters", ConstantLR, factor=0.25, total_iters=3),
        row("", LinearLR),
        row("all", LinearLR, start_factor=0.5, end_factor=0.25, total_iters=4),
        row("", ExponentialLR, gamma=0.9),
        row("two", SequentialLR, schedulers=FromOptimizer(_warm_up_then_decay), milestones=[3]),
        row("three", SequentialLR, schedulers=FromOptimizer(_three_in_a_row), milestones=[2, 5]),
        row("", CosineAnnealingLR, T_max=6),
        row("eta_min, past T_max", CosineAnnealingLR, T_max=3, eta_min=0.003),
        row("", ChainedScheduler, schedulers=FromOptimizer(_warm_up_then_decay)),
        row(
            "optimizer",
            ChainedScheduler,
            schedulers=FromOptimizer(_three_in_a_row),
            optimizer=_LIKE_ITSELF,
        ),
        row("", ReduceLROnPlateau, patience=0),
        row("factor patience", ReduceLROnPlateau, factor=0.25, patience=1),
        row("mode max", ReduceLROnPlateau, **_PLATEAU, mode="max"),
        row("threshold", ReduceLROnPlateau, **_PLATEAU, threshold=0.2),
        row(
            "threshold_mode abs",
            ReduceLROnPlateau,
            factor=0.5,
            patience=0,
            threshold=0.0053,
            threshold_mode="abs",
        ),
        row("cooldown", ReduceLROnPlateau, factor=0.5, patience=0, cooldown=2),
        row("min_lr", ReduceLROnPlateau, factor=0.1, patience=0, min_lr=0.004),
        row("min_lr list", ReduceLROnPlateau, factor=0.1, patience=0, min_lr=[0.002, 0.01]),
        row("eps", ReduceLROnPlateau, factor=0.5, patience=0, eps=4e-3),
        row("", CyclicLR, base_lr=0.01, max_lr=0.1),
        row("triangular", CyclicLR, **_CYCLE, step_size_down=3, mode="triangular"),
        row("triangular2", CyclicLR, **_CYCLE, mode="triangular2"),
        row("exp_range gamma", CyclicLR, **_CYCLE, mode="exp_range", gamma=0.9),
        row("scale_fn by cycle", CyclicLR, **_CYCLE, scale_fn=lambda cycle: 1 / 5 ** (cycle - 1)),
        row(
            "scale_fn by iterations",
            CyclicLR,
            **_CYCLE,
            scale_fn=Decay(0.9),
            scale_mode="iterations",
        ),
        row("lists", CyclicLR, base_lr=[0.01, 0.02], max_lr=[0.1, 0.3], step_size_up=3),
        row("momentum", CyclicLR, **_CYCLE, base_momentum=0.5, max_momentum=0.95),
        row(
            "momentum lists", CyclicLR, **_CYCLE, base_momentum=[0.5, 0.6], max_momentum=[0.9, 0.7]
        ),
        row("cycle_momentum off", CyclicLR, **_CYCLE, cycle_momentum=False),
        row("", CosineAnnealingWarmRestarts, T_0=3),
        row("T_mult eta_min", CosineAnnealingWarmRestarts, T_0=2, T_mult=2, eta_min=0.003),
        row("total_steps", OneCycleLR, **_ONE_CYCLE),
        row("epochs steps_per_epoch", OneCycleLR, max_lr=0.2, epochs=5, steps_per_epoch=2),
        row(
            "lists",
            OneCycleLR,
            max_lr=[0.2, 0.1],
            total_steps=10,
            base_momentum=[0.7, 0.8],
            max_momentum=[0.9, 0.97],
        ),
        row("pct_start linear", OneCycleLR, **_ONE_CYCLE, pct_start=0.5, anneal_strategy="linear"),
        row("cos", OneCycleLR, **_ONE_CYCLE, anneal_strategy="cos"),
        row("momentum", OneCycleLR, **_ONE_CYCLE, base_momentum=0.6, max_momentum=0.8),
        row("cycle_momentum off", OneCycleLR, **_ONE_CYCLE, cycle_momentum=False),
        row("factors", OneCycleLR, **_ONE_CYCLE, div_factor=10.0, final_div_factor=100.0),
        row("three_phase", OneCycleLR, **_ONE_CYCLE, three_phase=True),
        row("", PolynomialLR, total_iters=10),
        row("total_iters power", PolynomialLR, total_iters=6, power=2.0),
        row("", SWALR, swa_lr=0.02),
        row("linear", SWALR, swa_lr=[0.02, 0.2], anneal_epochs=4, anneal_strategy="linear"),
        row("cos", SWALR, swa_lr=0.3, anneal_epochs=5, anneal_strategy="cos"),
    ]
}

ALGORITHMS: dict[str, tuple[type[Optimizer], dict[str, Any], dict[str, Any]]] = {
    # name: (class, options of all groups, options of the second group)
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.05, "momentum": 0.8}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}, {"lr": 0.02, "betas": (0.8, 0.95)}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}, {"lr": 0.05}),
}
CYCLING = ["SGD", "AdamW"]  # the one has momentum to cycle, the other betas; Adagrad neither


def all_schedulers() -> set[type]:
    """Every public scheduler of today's torch, its abstract base apart."""
    public = {getattr(lr_scheduler, name) for name in lr_scheduler.__all__}
    return public - {lr_scheduler.LRScheduler} | {SWALR}


def advance(scheduler: Any, epoch: int) -> None:
    """One epoch further, with the metric of that epoch where the scheduler asks for one."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(METRICS[epoch])
    else:
        scheduler.step()


def observe(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    """What schedulers write, of each group: lr, momentum, betas."""
    return [
        (float(group["lr"]), group.get("momentum"), group.get("betas"))
        for group in optimizer.param_groups
    ]
