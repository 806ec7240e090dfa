"""The bank of schedulers is complete: no class, no argument and no choice is forgotten."""

import inspect
import typing

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ChainedScheduler, ReduceLROnPlateau

from tests.scheduler_bank import (
    ALGORITHMS,
    CYCLING,
    EPOCHS,
    ROWS,
    Row,
    advance,
    all_schedulers,
    observe,
)

PROMISED = """
    LambdaLR MultiplicativeLR StepLR MultiStepLR ConstantLR LinearLR ExponentialLR SequentialLR
    CosineAnnealingLR ChainedScheduler ReduceLROnPlateau CyclicLR CosineAnnealingWarmRestarts
    OneCycleLR PolynomialLR SWALR
"""
SCHEDULERS = sorted(all_schedulers(), key=lambda each: each.__name__)

# Arguments that no row can show to matter, and what covers them instead.
ELSEWHERE = {
    "last_epoch": "tests/ranked/test_schedulers.py::test_resume_with_last_epoch, on every row",
    "ChainedScheduler.optimizer": "the row 'ChainedScheduler optimizer'; it is the default's value",
}


def options(scheduler: type) -> dict[str, inspect.Parameter]:
    """The constructor's arguments, apart from the optimizer that all but one class demand."""
    found = dict(inspect.signature(scheduler.__init__).parameters)
    del found["self"]
    if scheduler is not ChainedScheduler:
        del found["optimizer"]
    return found


def course(row: Row, algorithm: str) -> list:
    """lr, momentum and betas after each epoch of a small training with plain torch."""
    optimizer_class, shared, second = ALGORITHMS[algorithm]
    parameters = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], **second}]
    optimizer = optimizer_class(groups, **shared)
    scheduler = row.build(optimizer)
    seen = [observe(optimizer)]
    for epoch in range(EPOCHS):
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        optimizer.step()
        advance(scheduler, epoch)
        seen.append(observe(optimizer))
    return seen


def test_every_class_has_a_row():
    assert {each.__name__ for each in SCHEDULERS} == set(PROMISED.split())
    assert {row.scheduler for row in ROWS.values()} == set(SCHEDULERS)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda each: each.__name__)
def test_every_argument_is_given_by_a_row_and_matters_there(scheduler):
    rows = [row for row in ROWS.values() if row.scheduler is scheduler]
    for name, parameter in options(scheduler).items():
        if name in ELSEWHERE or f"{scheduler.__name__}.{name}" in ELSEWHERE:
            continue
        giving = [row for row in rows if name in row.arguments]
        assert giving, f"no row gives {scheduler.__name__}({name}=)"
        if parameter.default is not inspect.Parameter.empty:
            assert any(map(matters, giving, [name] * len(giving))), f"{name}= changes no row"


def matters(row: Row, name: str) -> bool:
    """Whether the row runs otherwise (or not at all) without the argument."""
    without = {key: value for key, value in row.arguments.items() if key != name}
    try:
        return course(row, "SGD") != course(Row(row.name, row.scheduler, without), "SGD")
    except (TypeError, ValueError):
        return True


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda each: each.__name__)
def test_every_choice_is_taken_by_a_row(scheduler):
    """An argument that is one of several words is given as each of them, or the word is default."""
    for name, parameter in options(scheduler).items():
        if "Literal" not in str(parameter.annotation):
            continue
        words = set(typing.get_args(eval(parameter.annotation, {"Literal": typing.Literal})))
        rows = [row for row in ROWS.values() if row.scheduler is scheduler]
        taken = {row.arguments.get(name, parameter.default) for row in rows}
        assert taken == words, f"{scheduler.__name__}({name}=)"


@pytest.mark.parametrize(
    "argument",
    ["min_lr", "base_lr", "max_lr", "base_momentum", "max_momentum", "lr_lambda", "swa_lr"],
)
def test_every_list_valued_argument_is_given_as_a_list(argument):
    assert any(isinstance(row.arguments.get(argument), list) for row in ROWS.values())


@pytest.mark.parametrize("algorithm", CYCLING)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_changes_the_lr_of_each_group(row, algorithm):
    """So that no comparison of ``tests/ranked/test_schedulers.py`` is vacuous."""
    seen = course(ROWS[row], algorithm)
    for group in (0, 1):
        assert len({groups[group][0] for groups in seen}) > 1


@pytest.mark.parametrize("algorithm", CYCLING)
def test_rows_cycle_momentum_or_betas(algorithm):
    field = {"SGD": 1, "AdamW": 2}[algorithm]
    cycled = {
        row.scheduler.__name__
        for row in ROWS.values()
        if len({groups[0][field] for groups in course(row, algorithm)}) > 1
    }
    assert cycled == {"CyclicLR", "OneCycleLR"}


def test_patience_is_the_number_of_bad_epochs_that_are_ignored():
    """The documentation's example: patience 2 ignores two epochs and reduces after the third."""
    optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, patience=2)
    rates = []
    for _ in range(4):  # the first sets the best
        scheduler.step(1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 1.0, 1.0, 0.1]
