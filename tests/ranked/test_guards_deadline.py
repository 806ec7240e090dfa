"""A rank that dies, stops, fails or stays away is named by the others, within a stated time."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import ROOT
from tests.absences import DEADLINE, PATIENCE, STEPS, Job, free_port
from tests.each_rank import KINDS

ALL_KINDS = ["replicated", *KINDS]
TO_NAME = 1.0  # seconds that the error takes once a communication has failed
SLACK = 1.5  # seconds that a busy machine may add


def assert_named(job, rank, pattern, since, expected):
    """The rank raises what fits the pattern, ``expected`` seconds after ``since``."""
    said, when, kind, text = job.hear(rank)
    assert (said, kind) == ("raised", "DeadlineError"), text
    assert re.search(pattern, text), text
    assert expected - 0.1 < when - since < expected + TO_NAME + SLACK, (when - since, text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_rank_that_is_killed_within_a_step(kind, tmp_path):
    with Job("steps", "hang_in_the_update", kind=kind, folder=tmp_path) as job:
        killed = job.signal(1, signal.SIGKILL)
        pattern = rf"rank 1 is gone or stopped: .* it has been in step\(\), number {STEPS + 1},"
        assert_named(job, 0, pattern, killed, expected=0)


BEGUN, LEFT = rf"has been in step\(\), number {STEPS + 1},", rf"has left step\(\), number {STEPS},"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "where", "last"),
    [
        ("replicated", "hang_in_the_update", BEGUN),
        ("local", "hang_before_the_agreement", BEGUN),
        ("local", "hang", LEFT),  # the others wait within backward
        ("sharded", "hang", LEFT),
    ],
)
def test_a_rank_that_is_stopped(kind, where, last, tmp_path):
    with Job("steps", where, "steps", kind=kind, folder=tmp_path) as job:
        stopped = job.signal(1, signal.SIGSTOP)
        for rank in (0, 2):
            pattern = rf"rank 1 is gone or stopped: .* it {last}"
            assert_named(job, rank, pattern, stopped - 0.5, expected=DEADLINE - 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_killed_within_backward_on_a_mesh(kind, tmp_path):
    actions = "backward_on_a_mesh", "hang_in_backward_on_a_mesh"
    with Job(*actions, kind=kind, folder=tmp_path) as job:
        killed = job.signal(1, signal.SIGKILL)
        pattern = r"^rank 0 in backward\(\).* rank 1 is gone or stopped: .* was in backward\(\)"
        assert_named(job, 0, pattern, killed - 0.5, expected=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("holder", [0, None])
def test_the_rank_that_holds_the_store_may_be_the_one(how, holder, tmp_path):
    with Job("hang_in_the_update", "steps", folder=tmp_path, holder=holder) as job:
        since = job.signal(0, how)
        pattern = (
            "rank 0 is gone or stopped" if holder is None else r"who holds it \(rank 0 by default\)"
        )
        late = 0 if how == signal.SIGKILL else DEADLINE - 0.5
        assert_named(job, 1, pattern, since - 0.5, late)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["steps", "save", "load", "consolidate"])
def test_a_rank_that_does_not_come(call, tmp_path):
    with Job(call, "hang", folder=tmp_path) as job:
        assert job.hear(1) == ("there",)
        pattern = rf"rank 1 {LEFT} .* s ago, and does not come"
        assert_named(job, 0, pattern, time.monotonic() - 0.5, DEADLINE - 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "where", "named"),
    [
        (
            "clip",
            "hang_before_the_agreement",
            rf"(clip_grad_norm_|backward)\(\) after step {STEPS}",
        ),
        (
            "step_and_run_the_next_forward",
            "hang_in_the_update",
            rf"forward\(\) after step {STEPS + 1}",
        ),
    ],
)
def test_other_calls_wait_no_longer(call, where, named, tmp_path):
    with Job(call, where, folder=tmp_path, kind="local") as job:
        assert job.hear(1) == ("there",)
        pattern = rf"^rank 0 in {named}: .* but rank 1 {BEGUN} .* s, and does not come;"
        assert_named(job, 0, pattern, time.monotonic() - 0.5, DEADLINE - 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_backward_passes_before_a_norm_is_asked_for(kind, tmp_path):
    """Each waits: one for a reduction that nobody else has started, the others for its word."""
    with Job("clip_after_one_pass", "clip_after_two_passes", kind=kind, folder=tmp_path) as job:
        said, _, error, text = job.hear(0)
        assert (said, error) == ("raised", "DeadlineError"), text
        in_vain = r"rank 1 has left .*DeadlineError: .*but rank 0 .*after 1 backward pass"
        other = r"rank 1 has been in clip_grad_norm_\(\) .*, after 2 backward passes, "
        assert re.search(rf"{other}.*and this rank, after 1|{in_vain}", text), text


@pytest.mark.slow
def test_a_rank_that_fails_in_step_and_lives_on(tmp_path):
    with Job("steps", "fail_in_step", folder=tmp_path) as job:
        assert job.hear(1) == ("there",)
        since = time.monotonic()
        pattern = rf"rank 1 has left step\(\), number {STEPS + 1}, .*ValueError: no such file; look"
        assert_named(job, 0, pattern, since - 0.5, DEADLINE - 0.5)


@pytest.mark.slow
def test_a_rank_that_skips_a_step_and_saves(tmp_path):
    """gloo ends the process that gets more than it asks for."""
    with Job("steps", "skip_a_step_and_save", folder=tmp_path) as job:
        assert job.hear(1) == ("there",)
        pattern = rf"rank 1 is gone or stopped: .* it ({LEFT}|has been in checkpoint\.save)"
        assert_named(job, 0, pattern, time.monotonic(), expected=0)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_that_ends_a_rank(failing, tmp_path):
    """Its words are those of the others, even where the store goes with it."""
    given = {"world_size": 2, "port": free_port(), "kind": "replicated", "folder": str(tmp_path)}
    ranks = []
    for rank in range(2):
        action = "fail" if rank == failing else "steps"
        mine = {**given, "rank": rank, "holds": rank == 0, "action": action}
        command = [sys.executable, "-m", "tests.absences", json.dumps(mine)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, cwd=ROOT, **pipes))
    try:
        _, errors = ranks[failing].communicate(timeout=PATIENCE)
        assert "ZeroDivisionError" in errors
        ended = time.monotonic()
        _, when, kind, text = json.loads(ranks[1 - failing].stdout.readline())
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    expected = (
        f"rank {failing} has ended, after step(), number {STEPS}, with ZeroDivisionError: div"
    )
    assert kind == "DeadlineError" and expected in text
    assert when - ended < TO_NAME + SLACK
