"""Every row of the bank on 1, 2 and 3 ranks, against the class itself, bit for bit."""

import pytest
import torch

from tests.bank import BANK, DEFAULTS, ON_CPU, Case
from tests.bank_runs import (
    SAVED_AT,
    STEPS,
    Training,
    assert_alive,
    assert_same_training,
    assert_sharded,
    presences,
    start,
)
from tests.ranks import on_ranks


def check(case: Case, presence: str, rank: int, **where) -> None:
    """Ours equals the plain twin: while training, when saved, and however it goes on."""
    ours = start(case, "torch", **where)
    twin = start(case, **where)
    assert_sharded(ours)
    for training in (ours, twin):
        training.run(presence, 0, SAVED_AT)
    assert_same_training(ours, twin, f"{presence}, trained")
    saved = twin.saved()
    resumed = twin.go_on(saved)
    continuations = {
        "ours in plain torch": twin.go_on(ours.saved()),
        "plain torch's in ours": ours.go_on(saved),
        "plain torch's in ours, from rank 0": ours.go_on(saved if rank == 0 else None, from_=0),
    }
    for training in (ours, twin, resumed, *continuations.values()):
        training.run(presence, SAVED_AT, STEPS)
    assert_same_training(ours, twin, f"{presence}, trained on")
    for name, training in continuations.items():
        assert_same_training(training, resumed, f"{presence}, {name}")
    assert_alive(ours, presence)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", ON_CPU)
def test_equals_the_class(name, rank):
    """Options, presence, state and reload both ways; the kernel is the user's own choice."""
    case = BANK[name]
    for presence in presences(case):
        check(case, presence, rank)
