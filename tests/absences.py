"""Ranks of which one dies, stops, fails or stays away; and what the others say of it, and when.

Each rank is a process of its own in a gloo group. All train for ``STEPS`` steps, and then do what
each is told to, see ``ACTIONS``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW

from shardopt import Guards, ShardedOptimizer, checkpoint
from tests.each_rank import loss_of
from tests.forks import FORKS
from tests.twins import make_model

STEPS = 3
DEADLINE = 2.0  # seconds
PATIENCE = 60.0  # seconds for a job to come to its end


class Training:
    """One rank's model and optimizer."""

    def __init__(self, rank: int, kind: str, folder: str, tell: Callable[..., None]):
        self.rank, self.kind, self.folder, self.tell = rank, kind, folder, tell
        self.model, self.number = make_model(), 0
        # A bucket to a parameter: more than are under way at a time.
        self.optimizer = self.construct(bucket_cap_mb=1e-6)

    def construct(self, **options: Any) -> ShardedOptimizer:
        guards = Guards(deadline=DEADLINE)
        return ShardedOptimizer(
            self.model.parameters(), AdamW, gradients=self.kind, guards=guards, **options
        )

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.backward()
        self.optimizer.step(closure)
        self.optimizer.zero_grad()

    def backward(self) -> None:
        self.number += 1
        loss_of(self.model, self.number, 0 if self.kind == "replicated" else self.rank).backward()

    def hang(self, *_: Any, **__: Any) -> None:
        """Say so, and be killed, or stopped, here."""
        self.tell("there")
        time.sleep(PATIENCE)

    def hang_in_the_update(self) -> None:
        self.optimizer._update = self.hang
        self.step()

    def hang_before_the_agreement(self) -> None:
        self.optimizer._check = self.hang
        self.step()

    def fail_in_step(self) -> None:
        def closure() -> None:
            raise ValueError("no such file")

        with contextlib.suppress(ValueError):
            self.step(closure)
        self.hang()

    def fail(self) -> None:
        print(1 / 0)

    def save(self) -> None:
        checkpoint.save(self.folder, step=STEPS, optimizer=self.optimizer)

    def load(self) -> None:
        checkpoint.load(self.folder, optimizer=self.optimizer)

    def consolidate(self) -> None:
        self.optimizer.consolidate_state_dict()

    def skip_a_step_and_save(self) -> None:
        time.sleep(0.5)  # in which it says where it is
        self.tell("there")
        self.save()

    def clip(self) -> None:
        self.backward()
        self.optimizer.clip_grad_norm_(1.0)

    def clip_after_one_pass(self) -> None:
        self.optimizer = self.construct()  # one bucket, for which no backward waits
        self.clip()

    def clip_after_two_passes(self) -> None:
        self.optimizer = self.construct()
        self.backward()
        self.clip()

    def step_and_run_the_next_forward(self) -> None:
        self.optimizer.overlap_forward(self.model)
        self.step()
        loss_of(self.model, self.number, self.rank)

    def backward_on_a_mesh(self, hook: Callable[..., None] = lambda _: time.sleep(0.3)) -> None:
        """Where hooks see by themselves whether what they have started has failed."""
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1))
        self.optimizer = self.construct(process_group=mesh, bucket_cap_mb=1e-6)
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)
        self.backward()

    def hang_in_backward_on_a_mesh(self) -> None:
        self.backward_on_a_mesh(self.hang)

    def steps(self) -> None:
        for _ in range(2):
            self.step()


def serve(
    rank: int, world_size: int, port: int, holds: bool, kind: str, action: str, folder: str, tell
) -> None:
    """One rank: trains, does what it is told to, and tells what comes of it."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=holds, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    training = Training(rank, kind, folder, tell)
    for _ in range(STEPS):
        training.step()
    try:
        getattr(training, action)()
    except Exception as error:
        tell("raised", time.monotonic(), type(error).__name__, str(error))
        if action == "fail":
            raise
        time.sleep(PATIENCE)  # a job need not end because one rank raises
    tell("done")


def _serve_over(pipe: Connection, *arguments: Any) -> None:
    serve(*arguments, lambda *message: pipe.send(message))
    os._exit(0)


class Job:
    """The ranks of one job.

    Args:
        actions: of each rank, the name of a method of ``Training``.
        kind: of the gradients.
        folder: for checkpoints.
        holder: the rank that holds the store; ``None``: this process, as a launcher does.
    """

    def __init__(
        self, *actions: str, folder: Path, kind: str = "replicated", holder: int | None = None
    ):
        if holder is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = free_port() if holder is not None else self._store.port
        self._pipes, self._processes = [], []
        for rank, action in enumerate(actions):
            ours, theirs = FORKS.Pipe(duplex=False)
            place = (rank, len(actions), port, rank == holder)
            process = FORKS.Process(
                target=_serve_over, args=(theirs, *place, kind, action, str(folder)), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()

    def hear(self, rank: int) -> tuple[Any, ...]:
        """What a rank tells next."""
        assert self._pipes[rank].poll(PATIENCE), f"rank {rank} says nothing"
        return self._pipes[rank].recv()

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to a rank that hangs; returns when."""
        assert self.hear(rank) == ("there",)
        time.sleep(0.3)  # in which it tells where it is
        os.kill(self._processes[rank].pid, number)
        return time.monotonic()


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def main(arguments: Mapping[str, Any]) -> None:
    """A rank of its own: ``python -m tests.absences '{"rank": 0, ...}'``."""

    def tell(*message: Any) -> None:
        print(json.dumps(message), flush=True)

    serve(**arguments, tell=tell)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
