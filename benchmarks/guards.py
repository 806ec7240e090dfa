"""What all guards together add to a training step.

    python benchmarks/guards.py                       # a GPT of 25M parameters, 2 gloo ranks

One model under DDP trains with AdamW, a step with every guard and a step with none in turn, round
after round. "None" is also without the agreement of each step, which cannot be switched off. A
comparison of replicas is timed by itself, and a hundredth of it added, as with
``check_replicas_every=100``; so is the thread that says where a rank is, which runs all the time.
``CPU`` is what rank 0 has computed, all its threads together, which a busy machine disturbs less
than the clock; and least disturbed is what the agreement of a step takes by itself.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.distributed as dist
from common import MB, on_ranks, ratio
from model import gpt, gpt_parser, loss_of, windows
from torch.nn.parallel import DistributedDataParallel

from shardopt import Guards, ShardedOptimizer
from shardopt.gradients import Gradients, Verdict

EVERY = 100  # steps to a comparison of replicas


def main() -> None:
    arguments = gpt_parser(__doc__.splitlines()[0], rounds=25).parse_args()
    on_ranks(arguments.ranks, measure, arguments)


def measure(rank: int, arguments: argparse.Namespace) -> None:
    """Take the steps; rank 0 prints."""
    model = DistributedDataParallel(gpt(arguments.width, arguments.layers, arguments.context))
    guards = Guards(nonfinite="skip", deadline=60.0)
    options = {"guards": guards, "lr": 1e-3, "fused": True}
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, **options)
    alone: list[float] = []  # seconds of CPU of the agreement
    settle = optimizer._gradients.settle

    def timed_settle(problem: Exception | None = None) -> Verdict:
        begun = time.process_time()
        verdict = settle(problem)
        alone.append(time.process_time() - begun)
        return verdict

    optimizer._gradients.settle = timed_settle
    batch = windows(rank, arguments.windows, arguments.context)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    busy: dict[bool, list[float]] = {True: [], False: []}  # seconds of CPU, all threads
    for number in range(arguments.rounds + 2):
        for guarded in (True, False) if number % 2 else (False, True):
            dist.barrier()
            clock, cpu = time.perf_counter(), time.process_time()
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if guarded:
                optimizer.step()
            else:
                with without_guards(optimizer):
                    optimizer.step()
            if number > 1:  # DDP orders its buckets anew after the first
                busy[guarded].append(time.process_time() - cpu)
                dist.barrier()
                seconds[guarded].append(time.perf_counter() - clock)
    beside = comparison_and_thread(optimizer, arguments.rounds)
    if rank == 0:
        size = sum(parameter.nbytes for parameter in model.parameters())
        print(
            f"GPT, {size / MB:.0f} MB of parameters under DDP, {arguments.ranks} gloo ranks, "
            f"{arguments.rounds} rounds, torch {torch.__version__}"
        )
        print_row("clock", seconds, beside)
        print_row("CPU", busy, beside)
        agreement, step = statistics.median(alone), statistics.median(busy[False])
        total = (agreement + beside[0] / EVERY) / step + beside[1]
        print(
            f"  by themselves, in CPU: the agreement {agreement * 1e3:.1f} ms, a comparison "
            f"{beside[0] * 1e3:.1f} ms ({size / beside[0] / 1e9:.2f} GB/s), the thread "
            f"{beside[1]:.2%} of a core: {total:.2%} of a step"
        )


@contextmanager
def without_guards(optimizer: ShardedOptimizer) -> Iterator[None]:
    """Every rank takes it that the others are there, with the same finite gradients."""
    gradients, collectives = optimizer._gradients, optimizer.collectives
    watch, settle = collectives.watch, gradients.settle
    collectives.watch, gradients.settle = None, MethodType(without_a_word, gradients)
    try:
        yield
    finally:
        collectives.watch, gradients.settle = watch, settle


def without_a_word(gradients: Gradients, problem: Exception | None = None) -> Verdict:
    present = frozenset(i for i, p in enumerate(gradients.shard.parameters) if p.grad is not None)
    return Verdict(present, False, torch.zeros(gradients.shard.collectives.world_size))


def comparison_and_thread(optimizer: ShardedOptimizer, rounds: int) -> tuple[float, float]:
    """CPU seconds of a comparison of replicas, and of a second of the thread beside."""
    comparisons = []
    for _ in range(rounds):
        begun = time.process_time()
        optimizer.check_replicas()
        comparisons.append(time.process_time() - begun)
    thread = next(each for each in threading.enumerate() if each.name == "shardopt.watch")
    clock = time.pthread_getcpuclockid(thread.ident)
    begun = time.clock_gettime(clock)
    time.sleep(3.0)
    return statistics.median(comparisons), (time.clock_gettime(clock) - begun) / 3.0


def print_row(name: str, taken: dict[bool, list[float]], beside: tuple[float, float]) -> None:
    comparison, thread = beside
    without = statistics.median(taken[False])
    added = statistics.median(taken[True]) / without - 1
    total = added + comparison / EVERY / without + thread
    print(
        f"  {name:6}{without * 1e3:6.0f} ms without guards, {added:+.2%} with those of a step "
        f"(by round {ratio(taken[True], taken[False])}), {total:+.2%} with all"
    )


if __name__ == "__main__":
    main()
