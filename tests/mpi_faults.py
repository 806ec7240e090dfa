"""Three ranks over MPI, of which one is at fault; and what each says of it, and after how long.

::

    mpirun -n 3 python -m mpi4py -m tests.mpi_faults disagree
    mpirun -n 3 python -m mpi4py -m tests.mpi_faults stop sharded 1

Every rank tells in a line of its own: see ``tell``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch
from mpi4py import MPI
from torch import nn
from torch.optim import AdamW

from shardopt import Guards, ShardedOptimizer
from tests.each_rank import loss_of
from tests.mpi_run import write_line
from tests.twins import SMALL_BUCKETS, make_model

STEPS = 3
DEADLINE = 2.0  # seconds
PATIENCE = 60.0  # seconds, in which mpirun ends a job
KINDS = ["replicated", "local", "sharded"]
WORLD = MPI.COMM_WORLD
MANY_BUCKETS = 1e-6  # MiB: one to a parameter, more than are under way at a time


class Training:
    """One rank's model and optimizer, with all guards, on a communicator of their own.

    Args:
        change: what ``culprit`` does to its list of parameters.
    """

    def __init__(
        self,
        kind: str,
        culprit: int = 1,
        change: Callable[[list[nn.Parameter]], object] | None = None,
        bucket_cap_mb: float = SMALL_BUCKETS,
        nonfinite: str = "raise",
    ):
        self.kind, self.is_at_fault = kind, WORLD.rank == culprit
        self.model, self.number = make_model(), 0
        parameters = [*self.model.parameters()]
        if self.is_at_fault and change is not None:
            change(parameters)
        self.optimizer = ShardedOptimizer(
            parameters,
            AdamW,
            WORLD.Dup(),
            gradients=kind,
            guards=Guards(deadline=DEADLINE, nonfinite=nonfinite, check_replicas_every=1),
            bucket_cap_mb=bucket_cap_mb,
        )

    def backward(self) -> None:
        self.number += 1
        loss_of(self.model, self.number, 0 if self.kind == "replicated" else WORLD.rank).backward()

    def steps(self, count: int) -> Training:
        for _ in range(count):
            self.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def tell(fault: str, kind: str, begun: float, error: Exception) -> None:
    """What a rank has found, and how many seconds that took, as a line of JSON."""
    seconds = time.monotonic() - begun
    write_line(json.dumps([fault, kind, WORLD.rank, seconds, type(error).__name__, str(error)]))


# -- ranks that disagree: each fault yields before the call that has to find it --------------------


def permuted_parameters(kind: str) -> Iterator[None]:
    yield
    Training(kind, change=list.reverse)


def other_shapes(kind: str) -> Iterator[None]:
    def change(parameters: list[nn.Parameter]) -> None:
        parameters[2] = nn.Parameter(torch.ones(50, 50))

    yield
    Training(kind, change=change)


def another_lr(kind: str) -> Iterator[None]:
    training = Training(kind).steps(STEPS)
    if training.is_at_fault:
        training.optimizer.param_groups[0]["lr"] = 7.0
    yield
    training.steps(1)


def a_skipped_step(kind: str) -> Iterator[None]:
    """Where ranks look for NaN they wait for reductions first, and hear of it at the deadline."""
    training = Training(kind, nonfinite="ignore").steps(STEPS)
    yield
    if training.is_at_fault:
        skip_a_step(training)
    training.steps(1)


def a_gradient_that_is_not_finite(kind: str) -> Iterator[None]:
    training = Training(kind).steps(STEPS)
    if training.is_at_fault:
        training.model[2].weight.register_hook(lambda gradient: gradient * float("nan"))
    yield
    training.steps(1)


def a_flipped_bit(kind: str) -> Iterator[None]:
    training = Training(kind).steps(STEPS)
    training.backward()
    if training.is_at_fault:
        training.model[4].bias.detach().view(torch.uint8)[0] ^= 4
    yield
    training.optimizer.step()


DISAGREEMENTS = [
    permuted_parameters,
    other_shapes,
    another_lr,
    a_skipped_step,
    a_gradient_that_is_not_finite,
    a_flipped_bit,
]


def disagree() -> None:
    """All of them, with every kind of gradients: none ends the job."""
    for fault, kind in product(DISAGREEMENTS, KINDS):
        try:
            for _ in fault(kind):
                WORLD.Barrier()
                begun = time.monotonic()
        except Exception as error:
            tell(fault.__name__, kind, begun, error)
    WORLD.Barrier()


# -- a rank that is lost: what it does when the others take a step ---------------------------------


def stay_away(training: Training) -> None:
    time.sleep(PATIENCE)


def skip_a_step(training: Training) -> None:
    training.backward()
    training.optimizer.zero_grad()


def stop(training: Training) -> None:
    send_in_the_update(training, signal.SIGSTOP)


def die(training: Training) -> None:
    send_in_the_update(training, signal.SIGKILL)


def send_in_the_update(training: Training, number: signal.Signals) -> None:
    def send(*_: object, **__: object) -> None:
        time.sleep(0.5)  # in which it tells where it is
        write_line(f"killed at {time.time()}")
        os.kill(os.getpid(), number)

    training.optimizer._update = send
    training.steps(1)


def lose(fault: str, kind: str, culprit: str) -> None:
    """The others raise once all of them have told: the first who does ends the job for all."""
    training = Training(kind, int(culprit), bucket_cap_mb=MANY_BUCKETS).steps(STEPS)
    others = WORLD.Split(training.is_at_fault)
    WORLD.Barrier()
    begun = time.monotonic()
    try:
        if training.is_at_fault:
            globals()[fault](training)
        training.steps(2)
    except Exception as error:
        if training.is_at_fault:
            time.sleep(PATIENCE)
        tell(fault, kind, begun, error)
        others.Barrier()
        raise


if __name__ == "__main__":
    disagree() if sys.argv[1] == "disagree" else lose(*sys.argv[1:])
