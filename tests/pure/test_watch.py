"""Which rank an error names, from what all have said of themselves; and what guards refuse."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from shardopt import Guards
from shardopt.comm import SoloCollectives
from shardopt.comm.board import Sign, in_words
from shardopt.comm.watch import Watch, _holder, _is_of_the_backend, missing, watch
from shardopt.errors import AgreementError, GradientError

NOW = time.time()
WAITS = Sign("step()", 8, inside=True, since=NOW - 5, now=NOW)
LEFT = Sign("step()", 7, since=NOW - 6, now=NOW)
GAVE_UP = replace(WAITS, inside=False, problem="DeadlineError: rank 3 in step(), number 8: ...")
FAILED = replace(WAITS, inside=False, problem="ValueError: lr")
ENDED = replace(LEFT, ended=True)
SAVES = Sign("checkpoint.save()", 7, inside=True, since=NOW - 1, now=NOW)


def told(*others, silent=()):
    """What rank 0 says, which waits in a step."""
    before = [WAITS, *others]
    after = [
        sign if rank in silent else replace(sign, now=sign.now + 0.8)
        for rank, sign in enumerate(before)
    ]
    return missing(before, after, 0, replace(WAITS, passes=2))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (LEFT, "rank 1 has left step(), number 7, 6.8 s ago, and does not come"),
        (
            replace(LEFT, what="backward()"),
            "rank 1 was in backward() after step 7, 6.8 s ago, and does not come",
        ),
        (SAVES, "rank 1 has been in checkpoint.save() after step 7, for 1.8 s, and does not come"),
        (FAILED, "rank 1 has left step(), number 8, 5.8 s ago, with ValueError: lr"),
        (ENDED, "rank 1 has ended, after step(), number 7"),
        (
            replace(ENDED, problem="KeyError: 'a'"),
            "rank 1 has ended, after step(), number 7, with KeyError: 'a'",
        ),
        (
            GAVE_UP,
            "rank 1 has left step(), number 8, 5.8 s ago, with DeadlineError: rank 3 in step(), "
            "number 8: ...",
        ),
        (
            replace(WAITS, passes=3),
            "rank 1 has been in step(), number 8, after 3 backward passes, for 5.8 s, and this "
            "rank, after 2",
        ),
        (WAITS, "all are there: the network has failed, or is too slow"),
    ],
)
def test_what_is_said_of_a_rank(other, words):
    assert told(other) == words


def test_a_silent_rank_is_told_by_its_last_sign():
    words = told(WAITS, SAVES, silent=(2,))
    assert words.startswith("rank 2 is gone or stopped: ")
    assert words.endswith(
        " s ago it last said it has been in checkpoint.save() after step 7, for 1.0 s"
    )


def test_only_the_surest_cause_is_told():
    causes = [GAVE_UP, LEFT, WAITS, ENDED]  # which are silent where it says so
    for number, rank in enumerate((1, 2, 3, 4), 1):
        words = told(*causes[:number], silent=(3,))
        assert words.startswith(f"rank {rank} "), words
        assert words.count("rank") == (2 if rank == 1 else 1)  # which quotes


def test_many_are_counted():
    assert told(*[LEFT] * 6).endswith(
        "rank 4 "
        + str(replace(LEFT, now=LEFT.now + 0.8))
        + ", and does not come (and 2 more ranks)"
    )


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (
            RuntimeError("[.../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]"),
            True,
        ),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5ms"), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (RuntimeError("all_gather has not ended within 2 s: a rank has failed"), True),
        (TimeoutError(), True),
        (RuntimeError("shape '[2]' is invalid for input of size 1"), False),
        (torch.OutOfMemoryError("Timed out"), False),
        (RuntimeError("the data loader has met a timeout"), False),
        (ValueError("gloo"), False),
    ],
)
def test_errors_of_the_backend_are_known(error, is_so):
    assert _is_of_the_backend(error) is is_so


def test_others_quote_the_beginning_of_an_error():
    assert in_words(None) == ""
    assert in_words(KeyError("a")) == "KeyError: 'a'"
    assert len(in_words(ValueError("a" * 10_000))) == 500


def test_a_process_that_has_come_to_its_end_tells_no_more():
    """No thread starts then, and whoever waits for one waits for ever."""
    watching = Watch(SoloCollectives(), 5.0)
    watching._board.end()
    with pytest.raises(RuntimeError, match=r"^gloo") as caught, watching.during("forward()"):
        raise RuntimeError("gloo: Connection closed by peer")
    assert type(caught.value) is RuntimeError and watching._board.sign.ended


@pytest.mark.parametrize(
    ("error", "problem"),
    [(AgreementError("lr"), ""), (GradientError("nan"), ""), (ValueError("lr"), "ValueError: lr")],
)
def test_what_all_ranks_raise_is_no_rank_s_problem(error, problem):
    watching = Watch(SoloCollectives(), 5.0)
    with pytest.raises(type(error)), watching.during("step()", 3):
        raise error
    assert watching._board.sign.problem == problem
    watching._board.end()


def test_who_holds_the_store_is_known_under_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert _holder() == "rank 0 by default"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert _holder() == "the agent of torchrun"


def test_a_world_of_one_waits_for_nobody():
    alone = SoloCollectives()
    watch(alone, 5.0)
    assert alone.watch is None
    with alone.during("step()", 1):
        pass


@pytest.mark.parametrize(
    "given",
    [
        {"deadline": 0},
        {"deadline": -1.0},
        {"deadline": float("inf")},
        {"deadline": float("nan")},
        {"deadline": "5"},
        {"deadline": True},
        {"replicas": "yes"},
        {"find_unused_parameters": None},
        {"check_replicas_every": -1},
        {"check_replicas_every": 1.5},
        {"check_replicas_every": True},
    ],
    ids=str,
)
def test_guards_that_mean_nothing_are_refused(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value!r}$"):
        Guards(**given)


def test_an_exception_that_ends_a_process_is_known_at_its_end():
    """``sys.last_value`` is what ``Board.end`` looks at."""
    lines = ["import atexit, sys", "atexit.register(lambda: print(repr(sys.last_value)))", "1 / 0"]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert run.stdout == "ZeroDivisionError('division by zero')\n"
