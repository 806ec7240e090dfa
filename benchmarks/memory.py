"""Memory of one rank, measured: optimizer state, and the peak of the whole process.

    python benchmarks/memory.py                       # 50M fp32 parameters on 1, 2, 3 and 4 ranks

Builds a model of square matrices, takes three AdamW steps with replicated gradients, and prints
what the fullest rank holds: bytes of parameters, gradients and state (from the tensors), and the
growth of its peak resident set (``VmHWM``) since before the model was made. The formula for N ranks
and P parameters is 4P + 4P + 8P/N.

glibc keeps freed blocks for later, which shows as memory in use; a fixed ``MALLOC_MMAP_THRESHOLD_``
makes it give tensors back.
"""

from __future__ import annotations

import argparse
import os

import torch
from common import MB, from_all_ranks, on_ranks, peak_growth

from shardopt import ShardedOptimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--parameters", type=float, default=50e6)
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # the ranks inherit it
    print(
        "optimizer                    ranks  parameters  gradients   state  formula    peak  (MB)"
    )
    for sharded, num_ranks in [(False, 1), *((True, ranks) for ranks in arguments.ranks)]:
        on_ranks(num_ranks, measure, sharded, num_ranks, arguments.parameters)


def measure(rank: int, sharded: bool, num_ranks: int, numel: float) -> None:
    """Train on one rank; rank 0 prints the largest of each figure."""
    held: dict[str, int] = {}
    peak = peak_growth(lambda: held.update(train(sharded, numel)))
    rows = {name: max(from_all_ranks(size / MB)) for name, size in held.items()}
    peak = max(from_all_ranks(peak))
    if rank == 0:
        formula = (4 * numel + 4 * numel + 8 * numel / num_ranks) / MB
        name = "ShardedOptimizer(AdamW)" if sharded else "torch.optim.AdamW"
        print(
            f"{name:28} {num_ranks:5} {rows['parameters']:11.0f} {rows['gradients']:10.0f} "
            f"{rows['state']:7.0f} {formula:8.0f} {peak:7.0f}"
        )


def train(sharded: bool, numel: float) -> dict[str, int]:
    """Three steps; bytes of what is held after them."""
    layers = 50
    width = int((numel / layers) ** 0.5)
    parameters = [torch.nn.Parameter(torch.zeros(width, width)) for _ in range(layers)]
    options = {"lr": 1e-3, "fused": True}
    if sharded:
        optimizer = ShardedOptimizer(parameters, torch.optim.AdamW, **options)
    else:
        optimizer = torch.optim.AdamW(parameters, **options)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values()]
    tensors = {"parameters": parameters, "gradients": [p.grad for p in parameters], "state": state}
    return {name: sum(t.nbytes for t in ts) for name, ts in tensors.items()}


if __name__ == "__main__":
    main()
