"""One optimizer step: sharded, replicated, and ZeroRedundancyOptimizer, on the same ranks.

    python benchmarks/step.py                         # AdamW, 20M fp32 parameters, 2 gloo ranks
    python benchmarks/step.py --optimizer Adagrad --ranks 3

Gradients are in place before the clock starts: this is the update and the all-gather alone.
Replicated is ``torch.optim`` on every rank, which has nothing to gather. All run the same kernel
(``fused=True`` where the class has one).
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import on_ranks, ratio, timed
from torch.distributed.optim import ZeroRedundancyOptimizer

from shardopt import ShardedOptimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", default="AdamW")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parameters", type=float, default=20e6)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    on_ranks(arguments.ranks, measure, arguments)


def measure(rank: int, arguments: argparse.Namespace) -> None:
    """Time the three in turn; rank 0 prints."""
    optimizer_class = getattr(torch.optim, arguments.optimizer)
    width = int((arguments.parameters / arguments.layers) ** 0.5)
    options = {"lr": 1e-3}
    if arguments.optimizer in ("Adam", "AdamW", "Adagrad", "SGD"):
        options["fused"] = True
    builders = {
        "replicated": lambda parameters: optimizer_class(parameters, **options),
        "ShardedOptimizer": lambda parameters: ShardedOptimizer(
            parameters, optimizer_class, **options
        ),
        "ZeroRedundancyOptimizer": lambda parameters: ZeroRedundancyOptimizer(
            parameters, optimizer_class, **options
        ),
    }
    optimizers = {}
    for name, build in builders.items():
        parameters = [
            torch.nn.Parameter(torch.zeros(width, width)) for _ in range(arguments.layers)
        ]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizers[name] = build(parameters)
        optimizers[name].step()
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(arguments.rounds):
        for name, optimizer in optimizers.items():
            seconds[name].append(timed(optimizer.step))
    if rank == 0:
        count = width * width * arguments.layers / 1e6
        print(f"{arguments.optimizer}, {count:.0f}M parameters, {arguments.ranks} gloo ranks")
        for name, values in seconds.items():
            median = statistics.median(values) * 1e3
            against = ratio(seconds["ShardedOptimizer"], values)
            print(f"  {name:25}{median:9.1f} ms   ours / it: {against}")


if __name__ == "__main__":
    main()
