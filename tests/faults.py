"""Kills ranks with ``kill -9`` at random moments of saves, and looks at what is left.

::

    python -m tests.faults --kills 200

A job of two ranks saves step after step, until one of its ranks, or each of them, is killed. Then
the steps that were there verify, the newest is found, the others have raised, and nothing else is
left of the step under way. The next job goes on from there, and its first save leaves no debris.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import signal
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

from shardopt import ShardedOptimizer
from shardopt.checkpoint import async_save, latest, load, save
from shardopt.checkpoint.steps import number_of, steps_in
from shardopt.checkpoint.verify import verify
from tests.forks import FORKS

RANKS = 2
KEEP = 2
PATIENCE = 60.0  # seconds for a job to start, and for its survivors to notice
WIDTH = 300  # of a model of 0.4 MB, with 1.1 MB of files


def model_at(step: int) -> nn.Module:
    """What a checkpoint of that step holds: the step in every element."""
    model = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    return model


def serve(rank: int, rendezvous: str, directory: Path, in_flight: bool, pipe: Connection) -> None:
    """One rank: goes on from the newest step, then saves for ever, and tells what it has seen."""
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    store = dist.FileStore(rendezvous, RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    model = model_at(0)
    optimizer = ShardedOptimizer(model.parameters(), AdamW, lr=0.0, weight_decay=0.0)
    # A rank whose peer dies while they make a process group waits for the time limit of its store.
    optimizer.collectives.aside("checkpoint")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    step = 0
    try:
        if latest(directory) is not None:
            step = load(directory, model=model, optimizer=optimizer).step
            for parameter in model.parameters():
                assert (parameter == step).all(), f"step {step} holds {parameter.unique()}"
        pipe.send(("ready", step))
        while True:
            step += 1
            model.load_state_dict(model_at(step).state_dict())
            parts = {"model": model, "optimizer": optimizer, "keep": KEEP}
            if in_flight:
                async_save(directory, step=step, **parts).result()
            else:
                save(directory, step=step, **parts)
            if rank == 0:  # nobody else begins a step
                assert debris(directory) == []
            pipe.send(("saved", step))
    except AssertionError as problem:
        pipe.send(("wrong", str(problem)))
    except Exception as problem:  # what a user's job would end with
        pipe.send(("raised", f"{type(problem).__name__}: {problem}"))
    os._exit(0)


class Job:
    """The ranks of one job, and what they have told."""

    def __init__(self, directory: Path, in_flight: bool):
        self._folder = tempfile.TemporaryDirectory(prefix="faults-")
        self._pipes, self._processes = [], []
        self.saved = 0  # the last step of which any rank has told
        self.raised: dict[int, str] = {}
        for rank in range(RANKS):
            ours, theirs = FORKS.Pipe(duplex=False)
            where = f"{self._folder.name}/rendezvous"
            process = FORKS.Process(
                target=serve, args=(rank, where, directory, in_flight, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def listen(self, until: str, ranks: list[int]) -> None:
        """Take messages until each of the ranks has said a word."""
        for rank in ranks:
            said = ""
            while said != until:
                if not self._pipes[rank].poll(PATIENCE):
                    os.kill(self._processes[rank].pid, signal.SIGUSR1)  # writes its stack
                    time.sleep(1)
                    raise AssertionError(f"rank {rank} says nothing")
                said, what = self._pipes[rank].recv()
                self._note(rank, said, what)
                assert until == "raised" or said != "raised", what

    def kill(self, victims: list[int]) -> None:
        """``kill -9``, and wait until they are gone."""
        for rank in victims:
            os.kill(self._processes[rank].pid, signal.SIGKILL)
        for rank in victims:
            self._processes[rank].join(PATIENCE)
            while self._pipes[rank].poll(0):
                try:
                    self._note(rank, *self._pipes[rank].recv())
                except EOFError:
                    break

    def _note(self, rank: int, said: str, what: int | str) -> None:
        assert said != "wrong", what
        if said == "saved":
            self.saved = max(self.saved, what)
        elif said == "raised":
            self.raised[rank] = what

    def close(self) -> None:
        """End what is left."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._folder.cleanup()


def debris(directory: Path) -> list[str]:
    """What is there beside committed steps."""
    steps = set(steps_in(directory))
    return sorted(path.name for path in directory.iterdir() if path not in steps)


def under_way(directory: Path, known: set[Path]) -> bool:
    """Whether a step is being written, or was left so, beside what was left before."""
    return not set(directory.glob("step-*.tmp-*")) <= known


def kill_once(directory: Path, draw: random.Random) -> str:
    """One job, killed at a random moment; returns in which state its step was found."""
    before, known = latest(directory), set(directory.glob("step-*.tmp-*"))
    job = Job(directory, in_flight=draw.random() < 0.3)
    everyone = list(range(RANKS))
    victims = everyone if draw.random() < 0.15 else [draw.randrange(RANKS)]
    survivors = [rank for rank in everyone if rank not in victims]
    try:
        job.listen("ready", everyone)
        if draw.random() < 0.5:
            job.listen("saved", everyone)
        aimed_until = time.monotonic() + (1.0 if draw.random() < 0.6 else 0.0)
        while not under_way(directory, known) and time.monotonic() < aimed_until:
            pass
        time.sleep(draw.uniform(0, 0.003 if under_way(directory, known) else 0.03))
        unfinished = under_way(directory, known)
        job.kill(victims)
        job.listen("raised", survivors)
        assert sorted(job.raised) == survivors
    finally:
        job.close()
    if survivors:
        assert not under_way(directory, known), debris(directory)
    return judge(directory, before, job, unfinished)


def judge(directory: Path, before: Path | None, job: Job, unfinished: bool) -> str:
    """Nothing committed is lost, nothing half is there."""
    steps = steps_in(directory)
    for path in steps:
        verify(path)
    newest = latest(directory)
    assert newest == (steps[0] if steps else None)
    told = max(job.saved, number_of(before) if before else 0)
    assert (number_of(newest) if newest else 0) in (told, told + 1), (newest, told)
    assert len(steps) >= min(told, KEEP), steps
    if unfinished:
        return "under way"
    return "committed" if newest and number_of(newest) > told else "between"


def run(directory: Path, kills: int, seed: int = 0) -> Counter[str]:
    """Kill so many times; returns how often the step was found in which state."""
    draw, found = random.Random(seed), Counter()
    for number in range(kills):
        found[kill_once(directory, draw)] += 1
        if number % 10 == 9:
            print(f"{number + 1} kills: {dict(found)}", flush=True)
    job = Job(directory, in_flight=False)
    try:
        job.listen("ready", list(range(RANKS)))
        job.listen("saved", list(range(RANKS)))
        job.kill(list(range(RANKS)))
    finally:
        job.close()
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        begun = time.monotonic()
        found = run(Path(directory), arguments.kills, arguments.seed)
        print(f"{arguments.kills} kills in {time.monotonic() - begun:.0f} s: {dict(found)}")


if __name__ == "__main__":
    main()
