"""Runs that are killed, stopped or told to end, and go on: ``launch/train.py --resume auto``.

Each fault comes at a random time after a random step, which the output names.
"""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.launch.jobs import (
    ENVIRONMENT,
    JOB,
    LAUNCH,
    STEPS,
    TOLERANCE,
    Run,
    assert_same_run,
    free_port,
    newest_step,
)

pytestmark = pytest.mark.slow

SAVED = tuple(range(5, 45, 5))  # after one of these steps the fault comes
SEED = int(os.environ.get("SHARDOPT_TEST_SEED", time.time_ns() % 10**6))
TWO_RANKS = {**ENVIRONMENT, "RANKS": "2"}


def assert_undisturbed(undisturbed: Path, out: Path) -> None:
    """Not a bit of the end differs."""
    assert_same_run(undisturbed, out, tolerance=0, step=STEPS, earlier=5)


@pytest.fixture
def torchrun(tmp_path):
    """A run of two ranks by ``torchrun.sh``."""
    out = tmp_path / "out"
    line = [LAUNCH / "torchrun.sh", *JOB, "--timeout", 6, "--out", out]
    with Run(line, out, TWO_RANKS) as run:
        yield run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_is_started_again(torchrun, undisturbed, number):
    """Of a stopped rank the others hear nothing, for 6 s, and torchrun waits 30 s to kill it."""
    torchrun.wait_for_a_step(SAVED, SEED + number)
    began = time.monotonic()
    os.kill(random.Random(SEED).choice(torchrun.ranks()), number)
    assert torchrun.ended() == 0, torchrun.printed()
    print(f"at its end {time.monotonic() - began:.1f} s later")
    assert "resumed after step" in torchrun.printed()
    assert_undisturbed(undisturbed, torchrun.out)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_node_that_is_lost_or_told_to_end_is_done_without(
    number, undisturbed, tmp_path, trained_here
):
    """The run goes on with the ranks of the other one, from the step that it then finds.

    One process takes other sums than two ranks: what it ends with is, bit for bit, what one makes
    of that step, and differs from the undisturbed run by rounding (measured: 7e-7).
    """
    out = tmp_path / "out"
    nodes = {"NODES": "1:2", "RANKS": "1", "ENDPOINT": f"localhost:{free_port()}"}
    line = [LAUNCH / "torchrun.sh", *JOB, "--timeout", 10, "--out", out]

    def node(is_host: int) -> Run:
        conf = {"CONF": f"last_call_timeout=3,keep_alive_interval=1,is_host={is_host}"}
        return Run(line, out, {**ENVIRONMENT, **nodes, **conf})

    with node(1) as first, node(0) as second:
        first.wait_for_a_step(SAVED, SEED)
        if number == signal.SIGKILL:
            second.kill()
        else:
            second.process.terminate()
        assert first.ended() == 0, first.printed()
    (step,) = re.findall(r"resumed after step (\d+), .* on 1 process", first.printed())
    trained_here(tmp_path / "alone", "--resume", out / f"step-{step}")
    assert_same_run(tmp_path / "alone", out, tolerance=0, step=STEPS, earlier=STEPS - 5)
    assert_same_run(undisturbed, out, tolerance=TOLERANCE, step=STEPS, earlier=5)


def test_a_node_that_joins_is_taken_in(tmp_path):
    """The ranks that are there save and end, and all go on from there."""
    out = tmp_path / "out"
    nodes = {"NODES": "1:2", "RANKS": "1", "ENDPOINT": f"localhost:{free_port()}"}
    long = ("--device", "cpu", "--size", "tiny", "--scheduler", "none", "--steps", 900)
    line = [LAUNCH / "torchrun.sh", *long, "--save-every", 300, "--out", out]

    def node(is_host: int) -> Run:
        conf = {"CONF": f"last_call_timeout=2,is_host={is_host}"}
        return Run(line, out, {**ENVIRONMENT, **nodes, **conf})

    with node(1) as first:
        first.wait_for("step     0")
        with node(0) as second:
            assert first.ended() == second.ended() == 0, first.printed()
    (saved,) = re.findall(r"ended by SIGTERM; \S+/step-(\d+) is saved", first.printed())
    assert f"resumed after step {saved}, 900 steps in all, on 2 ranks" in first.printed()
    assert "next step is equal, bit for bit" in first.printed()


@pytest.mark.parametrize("launcher", ["torchrun.sh", "mpirun.sh"])
def test_a_run_that_is_told_to_end_saves_and_goes_on(launcher, undisturbed, tmp_path):
    """SIGTERM to the launcher: all ranks end after one step, which is saved."""
    out = tmp_path / "out"
    line = [LAUNCH / launcher, *JOB, "--out", out]
    with Run(line, out, TWO_RANKS) as run:
        run.wait_for_a_step(SAVED, SEED)
        began = time.monotonic()
        run.process.terminate()
        code = run.ended()
        print(f"at its end {time.monotonic() - began:.1f} s later")
    assert code == (1 if launcher == "torchrun.sh" else 143)  # torchrun's own, or that of ranks
    (saved,) = re.findall(r"ended by SIGTERM; (\S+) is saved", run.printed())
    assert newest_step(out) == int(Path(saved).name.removeprefix("step-"))
    with Run(line, out, TWO_RANKS) as run:
        assert run.ended() == 0, run.printed()
    assert f"resumed after {Path(saved).name.replace('-', ' ')}" in run.printed()
    assert_undisturbed(undisturbed, out)


def test_slurm_starts_a_run_again_that_has_no_time_left(undisturbed, tmp_path):
    """One task gets SIGUSR1, and all end; the job asks to be started again, and is."""
    out, log = tmp_path / "out", tmp_path / "scontrol.log"
    environment = {
        **ENVIRONMENT,
        "PATH": f"{Path(__file__).parent / 'slurm'}:{ENVIRONMENT['PATH']}",
        "SCONTROL_LOG": str(log),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",  # of the script
        "SLURM_NODEID": "0",
    }
    line = [LAUNCH / "slurm.sbatch", *JOB, "--out", out]
    with Run(line, out, environment) as run:
        run.wait_for_a_step(SAVED, SEED)
        os.kill(random.Random(SEED).choice(run.ranks()), signal.SIGUSR1)
        assert run.ended() == 128 + signal.SIGUSR1, run.printed()
    assert "ended by SIGUSR1; " in run.printed()
    assert log.read_text() == "requeue 4711\n"
    with Run(line, out, environment) as run:
        assert run.ended() == 0, run.printed()
    assert "on 2 ranks over gloo" in run.printed()
    assert log.read_text() == "requeue 4711\n"
    assert_undisturbed(undisturbed, out)
