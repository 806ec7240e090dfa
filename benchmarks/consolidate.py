"""Consolidating the optimizer state against a plain ``dist.gather`` of the same bytes.

    python benchmarks/consolidate.py                  # 48 MB of AdamW state a rank, 2 gloo ranks
    python benchmarks/consolidate.py --ranks 3 --megabytes 96

Each round times, in turn and on the same ranks, ``dist.gather`` into fresh CPU tensors,
``ShardedOptimizer.consolidate_state_dict(to=0)`` and ZeroRedundancyOptimizer's; the ratio is taken
within a round and the median over rounds is printed. Memory is the growth of a rank's peak resident
set (``VmHWM``) during its first consolidation.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.distributed as dist
from common import MB, from_all_ranks, on_ranks, peak_growth, ratio, timed
from torch.distributed.optim import ZeroRedundancyOptimizer

from shardopt import ShardedOptimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=48, help="optimizer state of one rank")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    on_ranks(arguments.ranks, measure, arguments)


def measure(rank: int, arguments: argparse.Namespace) -> None:
    """Time the three ways in turn; rank 0 prints."""
    numel = arguments.megabytes * MB * arguments.ranks // 8  # two fp32 moments
    width = int((numel / arguments.layers) ** 0.5)
    ours = trained(ShardedOptimizer, arguments.layers, width)
    zero = trained(ZeroRedundancyOptimizer, arguments.layers, width)
    growth = from_all_ranks(peak_growth(ours.consolidate_state_dict))
    shard = torch.zeros(2 * width * width * arguments.layers // arguments.ranks)
    seconds: dict[str, list[float]] = {"dist.gather": [], "ShardedOptimizer": [], "zero": []}
    for _ in range(arguments.rounds):
        seconds["dist.gather"].append(timed(lambda: gather(shard, rank, arguments.ranks)))
        seconds["ShardedOptimizer"].append(timed(ours.consolidate_state_dict))
    for _ in range(2):
        seconds["zero"].append(timed(zero.consolidate_state_dict))
    if rank == 0:
        print(f"{arguments.megabytes} MB a rank, {arguments.ranks} gloo ranks, {torch.__version__}")
        for name, values in seconds.items():
            print(f"  {name:18}{statistics.median(values) * 1e3:9.1f} ms")
        print(f"  ours / gather: {ratio(seconds['ShardedOptimizer'], seconds['dist.gather'])}")
        print(f"  peak growth of each rank, MB: {[round(value, 1) for value in growth]}")


def trained(optimizer_class: type, layers: int, width: int) -> ShardedOptimizer:
    """An AdamW over square matrices that has taken one step."""
    parameters = [torch.nn.Parameter(torch.zeros(width, width)) for _ in range(layers)]
    optimizer = optimizer_class(parameters, torch.optim.AdamW, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def gather(shard: torch.Tensor, rank: int, num_ranks: int) -> None:
    """The floor: every rank's bytes into fresh tensors on rank 0."""
    outs = [torch.empty_like(shard) for _ in range(num_ranks)] if rank == 0 else None
    dist.gather(shard, outs, dst=0)


if __name__ == "__main__":
    main()
