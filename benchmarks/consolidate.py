"""Consolidating the optimizer state against a plain ``dist.gather`` of the same bytes.

    python benchmarks/consolidate.py                  # 48 MB of AdamW state a rank, 2 gloo ranks
    python benchmarks/consolidate.py --ranks 3 --megabytes 96

Each round times, in turn and on the same ranks, ``dist.gather`` into fresh CPU tensors,
``ShardedOptimizer.consolidate_state_dict(to=0)`` and ZeroRedundancyOptimizer's; the ratio is taken
within a round and the median over rounds is printed. Memory is the growth of a rank's peak resident
set (``VmHWM``) during one consolidation.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import re
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.optim import ZeroRedundancyOptimizer

from shardopt import ShardedOptimizer

MB = 10**6


def main() -> None:
    """Parse the command line and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=48, help="optimizer state of one rank")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (arguments, f"{folder}/rendezvous"), arguments.ranks)


def run(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """Measure on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    world_size = arguments.ranks
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    shard_numel = arguments.megabytes * MB // 8  # two fp32 moments
    width = int((shard_numel * world_size / arguments.layers) ** 0.5)
    ours, theirs = (
        trained(optimizer_class, arguments.layers, width)
        for optimizer_class in (ShardedOptimizer, ZeroRedundancyOptimizer)
    )
    seconds: dict[str, list[float]] = {"gather": [], "ours": [], "zero": []}
    growth = 0.0
    for round_number in range(arguments.rounds + 1):
        shard = torch.zeros(2 * width * width * arguments.layers // world_size)
        taken = {
            "gather": timed(lambda shard=shard: gather(shard, rank, world_size)),
            "ours": timed(lambda: ours.consolidate_state_dict(to=0)),
        }
        if round_number < 2:  # slow, and only for scale
            taken["zero"] = timed(lambda: theirs.consolidate_state_dict(to=0))
            theirs._all_state_dicts = []
        ours._snapshot.forget()
        if round_number:  # the first warms up
            for name, value in taken.items():
                seconds[name].append(value)
    gc.collect()
    growth = grown(lambda: ours.consolidate_state_dict(to=0))
    growths = [torch.zeros(1) for _ in range(world_size)]
    dist.all_gather(growths, torch.tensor([growth]))
    if rank == 0:
        report(seconds, [float(value) for value in growths], arguments)
    dist.barrier()
    dist.destroy_process_group()


def trained(optimizer_class: type, layers: int, width: int):
    """An AdamW over square matrices that has taken one step."""
    parameters = [torch.nn.Parameter(torch.zeros(width, width)) for _ in range(layers)]
    optimizer = optimizer_class(parameters, torch.optim.AdamW, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def gather(shard: torch.Tensor, rank: int, world_size: int) -> None:
    """The floor: every rank's bytes into fresh tensors on rank 0."""
    outs = [torch.empty_like(shard) for _ in range(world_size)] if rank == 0 else None
    dist.gather(shard, outs, dst=0)


def timed(action) -> float:
    """Seconds until every rank is done."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def grown(action) -> float:
    """Megabytes by which the peak resident set rises over what is resident now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """A field of this process's status, in megabytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / MB


def report(seconds: dict[str, list[float]], growths: list[float], arguments) -> None:
    """Print medians, ratios within a round, and memory."""
    ratios = [ours / floor for ours, floor in zip(seconds["ours"], seconds["gather"], strict=True)]
    print(
        f"{arguments.megabytes} MB of state a rank, {arguments.ranks} gloo ranks, torch {torch.__version__}"
    )
    for name, values in seconds.items():
        print(f"  {name:8} {statistics.median(values) * 1e3:8.1f} ms")
    print(
        f"  ours / gather: median {statistics.median(ratios):.2f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
    )
    for rank, growth in enumerate(growths):
        print(f"  rank {rank} grew by {growth:.1f} MB at its peak")


if __name__ == "__main__":
    main()
