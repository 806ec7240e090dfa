"""Memory of one rank, measured: parameters, gradients of each kind, optimizer state, and the peak.

    python benchmarks/memory.py                       # 50M fp32 parameters on 1, 2, 3 and 4 ranks
    python benchmarks/memory.py --ranks 2 --bucket-mb 4

Trains a stack of square matrices for three steps of AdamW and prints, of the fullest rank: the peak
of all tensors (``tensors``: what torch's CPU allocator tells the profiler, to the byte) beside the
formula, and the growth of the peak resident set (``VmHWM``), which has some 15 MB of libraries and
workspace besides. For P parameters of 4 bytes on N ranks the formulas are

    replicated   4P + 4P          + 8P/N      local     4P + 4P + 4P/N         + 8P/N
    DDP          4P + 4P + 4P     + 8P/N      sharded   4P + 4P/N + 2 buckets  + 8P/N

Replicated gradients are averaged in place here, by hand; DDP copies them into buckets of its own.

glibc keeps freed blocks for later, which shows as memory in use; a fixed ``MALLOC_MMAP_THRESHOLD_``
makes it give tensors back.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from common import MB, from_all_ranks, on_ranks, peak_allocated, peak_growth
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardopt import ShardedOptimizer

LAYERS = 50
OPTIONS = {"lr": 1e-3, "fused": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--parameters", type=float, default=50e6)
    parser.add_argument("--bucket-mb", type=float, default=25, help="MiB that travel as one")
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # the ranks inherit it
    print(f"{'':34}ranks  formula  tensors  ratio  resident  (MB)")
    for num_ranks in arguments.ranks:
        for kind in ("AdamW", "DDP", "replicated", "local", "sharded"):
            if kind != "DDP" or num_ranks > 1:
                on_ranks(num_ranks, measure, kind, num_ranks, arguments)


def measure(rank: int, kind: str, num_ranks: int, arguments: argparse.Namespace) -> None:
    """Train on one rank, twice; rank 0 prints the largest of each figure."""
    numel, bucket_mb = arguments.parameters, arguments.bucket_mb
    resident = max(from_all_ranks(peak_growth(lambda: train(kind, numel, bucket_mb))))
    tensors = max(from_all_ranks(peak_allocated(lambda: train(kind, numel, bucket_mb))))
    if rank == 0:
        expected = formula(kind, num_ranks, 4 * numel / MB, bucket_mb * (1 << 20) / MB)
        print(
            f"{NAMES[kind]:34}{num_ranks:5}{expected:9.0f}{tensors:9.0f}"
            f"{tensors / expected:7.2f}{resident:10.0f}",
            flush=True,
        )


NAMES = {
    "AdamW": "torch.optim.AdamW, by hand",
    "DDP": "DDP + ours, replicated",
    "replicated": "ours, replicated, by hand",
    "local": "ours, local",
    "sharded": "ours, sharded",
}


def formula(kind: str, num_ranks: int, parameters: float, bucket: float) -> float:
    gradients = {
        "AdamW": parameters,
        "DDP": 2 * parameters,
        "replicated": parameters,
        "local": parameters + parameters / num_ranks,
        "sharded": parameters / num_ranks + 2 * bucket,
    }
    state = 2 * parameters / (1 if kind == "AdamW" else num_ranks)
    return parameters + gradients[kind] + state


def train(kind: str, numel: float, bucket_mb: float) -> None:
    """Three steps."""
    torch.manual_seed(0)
    width = int((numel / LAYERS) ** 0.5)
    layers = [nn.Linear(width, width, bias=False) for _ in range(LAYERS)]
    model: nn.Module = nn.Sequential(*layers)
    if kind == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    else:
        gradients = kind if kind in ("local", "sharded") else "replicated"
        optimizer = ShardedOptimizer(
            model.parameters(),
            torch.optim.AdamW,
            gradients=gradients,
            bucket_cap_mb=bucket_mb,
            **OPTIONS,
        )
    if kind == "DDP":
        model = DistributedDataParallel(model)
    for _ in range(3):
        model(torch.ones(1, width)).sum().backward()
        if kind in ("AdamW", "replicated"):
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
