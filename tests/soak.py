"""Trains under random faults, and holds what comes out against a run that nobody disturbed.

::

    python -m tests.soak --minutes 30 --every 60

``launch/torchrun.sh`` trains a small model over and over; now and then something happens to it. A
run ends as the undisturbed one did, bit for bit, or this ends with what differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

from shardopt.checkpoint.steps import number_of, steps_in
from tests.launch.jobs import ENVIRONMENT, LAUNCH, Run, assert_same_run, trained

PATIENCE = 180.0  # seconds until a new step is saved, whatever has happened
STOPPED = 10.0  # seconds until ranks give up one that does not answer


class Soak:
    """A job that is disturbed.

    Args:
        folder: for all that is written.
        seed: of what happens, and when.
        every: mean seconds from one fault to the next, for which a step has been saved meanwhile.
        steps: of a run.
    """

    def __init__(self, folder: Path, seed: int, every: float, steps: int):
        self._choice, self._folder, self._every, self._steps = (
            random.Random(seed),
            folder,
            every,
            steps,
        )
        self._job = ["--size", "tiny", "--steps", steps, "--save-every", 25, "--eval-every", steps]
        self._reference = folder / "undisturbed"
        self.num_runs = 0
        self.seconds: dict[str, list[float]] = defaultdict(list)  # fault -> until the next new step

    def run(self, minutes: float) -> None:
        """Run after run; the last begun comes to its end undisturbed."""
        trained(self._reference, *self._job, ranks=2)
        self._began = time.monotonic()
        self._deadline = self._began + 60 * minutes
        while time.monotonic() < self._deadline:
            self._run_once(self._folder / f"run-{self.num_runs}")
            self.num_runs += 1

    def _run_once(self, out: Path) -> None:
        line = [LAUNCH / "torchrun.sh", *self._job, "--device", "cpu", "--keep", 3]
        line += ["--timeout", STOPPED, "--out", out]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        python = {"PYTHON": sys.executable, "PATH": path, "RANKS": "2", "RESTARTS": "1000"}
        while True:
            with Run(line, out, {**ENVIRONMENT, **python}) as run:
                if self._disturb(run):
                    break
        assert_same_run(
            self._reference, out, tolerance=0, step=self._steps, earlier=self._steps - 25
        )

    def _disturb(self, run: Run) -> bool:
        """Until a run has ended by itself, or has to be started again."""
        while True:
            self._wait_for_a_new_step(run)
            if run.process.poll() is not None:
                break
            due = self._began + self._choice.uniform(0.5, 1.5) * self._every
            while run.process.poll() is None and time.monotonic() < due:
                time.sleep(0.01)
            if run.process.poll() is not None or time.monotonic() > self._deadline:
                break
            if self._newest(run) >= self._steps:  # a rank that stops now is missed by nobody
                break
            name = self._choice.choice(list(FAULTS))
            if name in DAMAGES and len(steps_in(run.out)) < 2:
                continue
            print(f"{time.strftime('%H:%M:%S')} {name}, at step {self._newest(run)}", flush=True)
            self._fault, self._before, self._began = name, self._newest(run), time.monotonic()
            FAULTS[name](run, self._choice)
            if name in ENDS:
                run.ended()
                return False
        assert run.process.wait() == 0, run.printed()
        return True

    _fault: str | None = None
    _before = -1

    def _wait_for_a_new_step(self, run: Run) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._newest(run) <= self._before and run.process.poll() is None:
            assert time.monotonic() < deadline, f"no new step after {PATIENCE} s:\n{run.printed()}"
            time.sleep(0.01)
        if self._fault is not None:
            self.seconds[self._fault].append(time.monotonic() - self._began)
        self._fault, self._before = None, -1

    def _newest(self, run: Run) -> int:
        found = steps_in(run.out) if run.out.is_dir() else []
        return int(number_of(found[0])) if found else -1

    def table(self) -> str:
        """What has happened, and how long it took."""
        rows = [f"{'fault':<34}{'times':>6}{'median s':>10}{'longest s':>11}"]
        for name in FAULTS:
            taken = self.seconds.get(name, [])
            row = f"{name:<34}{len(taken):>6}"
            rows.append(row + (f"{median(taken):>10.1f}{max(taken):>11.1f}" if taken else ""))
        return "\n".join(rows)


def a_rank(run: Run, choice: random.Random, number: int) -> None:
    """A signal to one of them."""
    if ranks := run.ranks():
        with contextlib.suppress(ProcessLookupError):
            os.kill(choice.choice(ranks), number)


def pause(run: Run, choice: random.Random) -> None:
    """Less than the others' patience."""
    if ranks := run.ranks():
        rank = choice.choice(ranks)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGSTOP)
            time.sleep(STOPPED / 5)
            os.kill(rank, signal.SIGCONT)


def fill_disk(run: Run, choice: random.Random) -> None:
    """No file of one rank grows beyond 4 KiB."""
    if ranks := run.ranks():
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(choice.choice(ranks), resource.RLIMIT_FSIZE, (4096, 4096))


def damage(how: Callable[[Path, random.Random], None]) -> Callable[[Run, random.Random], None]:
    """Of a file of the newest step, while nobody runs."""

    def act(run: Run, choice: random.Random) -> None:
        run.kill()
        newest = steps_in(run.out)[0]
        how(choice.choice([path for path in newest.iterdir() if path.name != ".metadata"]), choice)

    return act


def flip(path: Path, choice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    path.write_bytes(data)


def cut(path: Path, choice: random.Random) -> None:
    os.truncate(path, choice.randrange(path.stat().st_size))


DAMAGES = {
    "a bit of the newest step flips": damage(flip),
    "a file of the newest step is cut": damage(cut),
    "a file of the newest step is gone": damage(lambda path, choice: path.unlink()),
}
ENDS = {  # then it is started again, as a cluster would
    "SIGTERM to torchrun": lambda run, choice: run.process.terminate(),
    "SIGKILL to all processes": lambda run, choice: run.kill(),
    **DAMAGES,
}
FAULTS = {
    "SIGKILL to a rank": lambda run, choice: a_rank(run, choice, signal.SIGKILL),
    "SIGSTOP to a rank": lambda run, choice: a_rank(run, choice, signal.SIGSTOP),
    "a rank pauses": pause,
    "a disk is full for a rank": fill_disk,
    **ENDS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=30, help="after which no other run begins")
    add("--every", type=float, default=60, help="mean seconds from one fault to the next")
    add("--steps", type=int, default=4000, help="of a run")
    add("--seed", type=int, default=time.time_ns() % 10**6)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.seed, options.every, options.steps)
        begun = time.monotonic()
        soak.run(options.minutes)
        seconds = time.monotonic() - begun
    print(f"{soak.num_runs} runs in {seconds / 60:.1f} minutes, all as undisturbed\n{soak.table()}")


if __name__ == "__main__":
    main()
