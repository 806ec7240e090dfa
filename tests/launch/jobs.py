"""Runs of ``launch/train.py`` in processes of their own, and what they leave."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from shardopt import checkpoint
from shardopt.launchers import NOBODY, launched
from tests import ROOT
from tests.launch.saved import saved

LAUNCH = ROOT / "launch"
SCRIPT = LAUNCH / "train.py"
# Other world sizes sum the same numbers in another order. Measured: 3e-6 on weights of about 0.2
# after ten steps; Adam makes steps of full size from gradients that are mostly rounding.
TOLERANCE = 5e-5

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHON": sys.executable,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # of mpirun
}

STEPS = 60
JOB = ("--device", "cpu", "--size", "tiny", "--steps", STEPS, "--save-every", 5, "--eval-every", 20)


def command(*arguments: object, ranks: int = 1) -> list[str]:
    """The script in a process of its own, or in as many as torchrun starts."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = [sys.executable, *(launcher if ranks > 1 else ()), str(SCRIPT), "--device", "cpu"]
    return [*start, *map(str, arguments)]


def train(*arguments: object, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run the script to its end."""
    return subprocess.run(
        command(*arguments, ranks=ranks),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def trained(out: Path, *arguments: object, ranks: int = 1, how: str = "bit for bit") -> str:
    """What a run that must succeed printed."""
    result = train("--out", out, *arguments, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"next step is equal, {how}" in result.stdout
    return result.stdout


def numbers(run: dict) -> torch.Tensor:
    """All that a saved run holds as numbers: weights, optimizer state, curves."""
    states = run["optimizer"]["state"].values()
    tensors = [*run["model"].values(), *(value for state in states for value in state.values())]
    history = run["extra"]["history"]
    curves = torch.tensor([*history["training"], *sum(history["held_out"], ())])
    return torch.cat([tensor.flatten().double() for tensor in [*tensors, curves]])


def assert_same_run(
    one: Path, other: Path, *, tolerance: float, step: int = 6, earlier: int = 3
) -> None:
    """``other`` ended as the undisturbed ``one`` did, which moved after an earlier save."""
    first, second = saved(one, step), saved(other, step)
    assert first["step"] == second["step"] == step
    assert first["scheduler"] == second["scheduler"]
    rates = [run["extra"]["history"]["lr"] for run in (first, second)]
    assert len(rates[0]) == step
    assert rates[0] == rates[1]
    assert numbers(first).numel() > 3 * 30_000  # weights and two moments
    torch.testing.assert_close(numbers(second), numbers(first), rtol=0, atol=tolerance)
    states = first["optimizer"]["state"]
    before = saved(one, earlier)["optimizer"]["state"]
    assert not torch.equal(before[0]["exp_avg"], states[0]["exp_avg"])


class Run:
    """A job under way; on leaving the ``with``, nothing of it is left.

    Args:
        line: that starts it.
        out: where it writes; its output goes to a file beside.
        environment: of those.
    """

    def __init__(self, line: Sequence[object], out: Path, environment: Mapping[str, str]):
        self.out, self._log = out, out.with_name(f"{out.name}.log")
        self._mark = uuid.uuid4().hex  # by which its processes are found, whoever their parent is
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                list(map(str, line)),
                env={**environment, "SHARDOPT_TEST_RUN": self._mark},
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *problem: object) -> None:
        self.kill()
        self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        for process in (self.process.pid, *self._environments()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def printed(self) -> str:
        return self._log.read_text()

    def ranks(self) -> list[int]:
        """The processes of its ranks, in their order."""
        known = {pid: launched(found) for pid, found in self._environments().items()}
        started = [pid for pid, one in known.items() if one.launcher != NOBODY]
        return sorted(started, key=lambda pid: known[pid].rank)

    def ended(self, within: float = 120) -> int:
        """Wait for its end; the exit code."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {within} s:\n{self.printed()}") from None

    def _environments(self) -> dict[int, dict[str, str]]:
        """Of its processes."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                pairs = (folder / "environ").read_text().split("\0")
                environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if environment.get("SHARDOPT_TEST_RUN") == self._mark:
                    found[int(folder.name)] = environment
        return found

    def wait_for_a_step(self, steps: Sequence[int], seed: int) -> None:
        """Return at some time after one of ``steps`` is saved."""
        choice = random.Random(seed)
        step, seconds = choice.choice(steps), choice.uniform(0, 0.1)
        print(f"seed {seed}: {seconds:.3f} s after step {step}")
        self._wait_until(lambda: (self.out / f"step-{step}").exists())
        time.sleep(seconds)

    def wait_for(self, words: str) -> None:
        """Return when the job has printed them."""
        self._wait_until(lambda: words in self.printed())

    def _wait_until(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_there():
            assert time.monotonic() < deadline and self.process.poll() is None, self.printed()
            time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def newest_step(out: Path) -> int:
    newest = checkpoint.latest(out)
    assert newest is not None
    return int(newest.name.removeprefix("step-"))
