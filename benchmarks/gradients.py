"""One training step, from forward to update: who averages the gradients, and what it costs.

    python benchmarks/gradients.py                    # a GPT of 25M parameters, 2 gloo ranks
    python benchmarks/gradients.py --windows 16       # more to compute for each byte that travels

Five ways to train the same model on the same ranks take a step each, in turn, round after round:
forward, backward, clipping to a norm of 1, AdamW with torch's fused kernel. Ratios are taken within
a round. ``CPU`` is what rank 0 has computed, all its threads together, which a busy machine
disturbs less than the clock. Bytes are those that the average rank sends in a step: ``counted``
where shardopt hands tensors to its collectives, ``loopback`` by the kernel, which also counts
headers, and whatever else uses the interface meanwhile.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from common import MB, Counted, on_ranks, ratio
from model import gpt, gpt_parser, loss_of, windows
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from shardopt import ShardedOptimizer
from shardopt.comm import choose_collectives

ADAMW = {"lr": 1e-3, "fused": True}


@dataclass
class Way:
    """A model, who averages its gradients, and an optimizer; and what was measured of them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    counted: Counted | None = None
    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)  # seconds of CPU of this rank, all threads
    loopback: list[float] = field(default_factory=list)  # MB a rank

    def step(self, batch: tuple[Tensor, Tensor], max_norm: float) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, batch).backward()
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.clip_grad_norm_(max_norm)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()

    def measure(self, action: Callable[[], None]) -> None:
        dist.barrier()
        sent, busy, start = loopback_bytes(), time.process_time(), time.perf_counter()
        action()
        self.busy.append(time.process_time() - busy)
        dist.barrier()
        self.seconds.append(time.perf_counter() - start)
        self.loopback.append((loopback_bytes() - sent) / MB / dist.get_world_size())


def ways(new_model: Callable[[], nn.Module]) -> dict[str, Way]:
    def ddp(new_optimizer: Callable[..., torch.optim.Optimizer]) -> Way:
        model = DistributedDataParallel(new_model())
        return Way(model, new_optimizer(model.parameters()))

    def sharded(gradients: str) -> Way:
        counted, model = Counted(choose_collectives(None)), new_model()
        if gradients == "replicated":
            model = DistributedDataParallel(model)
        optimizer = ShardedOptimizer(
            model.parameters(), torch.optim.AdamW, counted, gradients=gradients, **ADAMW
        )
        return Way(model, optimizer, counted)

    return {
        "DDP + AdamW": ddp(lambda parameters: torch.optim.AdamW(parameters, **ADAMW)),
        "DDP + ZeroRedundancyOptimizer": ddp(
            lambda parameters: ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **ADAMW)
        ),
        "DDP + ours, replicated": sharded("replicated"),
        "ours, local": sharded("local"),
        "ours, sharded": sharded("sharded"),
    }


def loopback_bytes() -> int:
    return int(pathlib.Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def main() -> None:
    parser = gpt_parser(__doc__.splitlines()[0], rounds=15)
    parser.add_argument("--max-norm", type=float, default=1.0)
    arguments = parser.parse_args()
    on_ranks(arguments.ranks, measure, arguments)


def measure(rank: int, arguments: argparse.Namespace) -> None:
    """Take the steps; rank 0 prints."""
    context = arguments.context
    tried = ways(lambda: gpt(arguments.width, arguments.layers, context))
    batch = windows(rank, arguments.windows, context)
    for number in range(arguments.rounds + 2):
        if number == 2:  # DDP orders its buckets anew after the first
            for way in tried.values():
                for figures in (way.seconds, way.busy, way.loopback):
                    figures.clear()
                if way.counted is not None:
                    way.counted.sent.clear()
        for way in tried.values():
            way.measure(lambda way=way: way.step(batch, arguments.max_norm))
    alone = [seconds_of(lambda: compute_only(tried["ours, local"], batch)) for _ in range(5)]
    if rank == 0:
        print_table(tried, arguments, statistics.median(alone))


def compute_only(way: Way, batch: tuple[Tensor, Tensor]) -> None:
    """Forward and backward, with nothing sent."""
    with way.optimizer.no_sync():
        loss_of(way.model, batch).backward()
    way.optimizer.zero_grad()


def seconds_of(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def print_table(tried: dict[str, Way], arguments: argparse.Namespace, alone: float) -> None:
    numel = sum(p.numel() for p in tried["ours, local"].model.parameters())
    tokens, bound = arguments.windows * arguments.context, 2 * (1 - 1 / arguments.ranks)
    print(
        f"GPT, {numel / 1e6:.1f}M parameters ({4 * numel / MB:.1f} MB), {tokens} tokens a rank,"
        f" {arguments.ranks} gloo ranks, {arguments.rounds} rounds, torch {torch.__version__}\n"
        f"forward and backward alone {alone * 1e3:.0f} ms;"
        f" 2 (N-1)/N of the parameters' bytes: {bound * 4 * numel / MB:.1f} MB\n"
        f"{'':31}{'ms':>7}  {'sharded / it':21}{'CPU ms':>7}  {'sharded / it':21}"
        f"{'counted MB':>11}{'loopback MB':>13}"
    )
    ours = tried["ours, sharded"]
    for name, way in tried.items():
        by_clock, by_cpu = ratio(ours.seconds, way.seconds), ratio(ours.busy, way.busy)
        counted = ""
        if way.counted is not None:
            counted = f"{sum(way.counted.sent.values()) / arguments.rounds / MB:.1f}"
        print(
            f"  {name:29}{statistics.median(way.seconds) * 1e3:7.0f}  {by_clock:21}"
            f"{statistics.median(way.busy) * 1e3:7.0f}  {by_cpu:21}"
            f"{counted:>11}{statistics.median(way.loopback):13.1f}"
        )


if __name__ == "__main__":
    main()
