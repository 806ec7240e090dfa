"""One step of Muon on a GPT's matrices: batched, as ``kernel="auto"`` has it, and torch's own.

    OMP_NUM_THREADS=1 python benchmarks/muon.py      # 10.6M parameters in 24 matrices

One process, gradients in place. Both in turn; the median of several rounds. CPU time is that of all
threads of the process, which other work on the machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import ratio
from model import gpt

from shardopt import ShardedOptimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = gpt(arguments.width, arguments.layers, context=64)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    generator = torch.Generator().manual_seed(0)
    optimizers = {}
    for kernel in ("torch", "auto"):
        parameters = [torch.nn.Parameter(p.detach().clone()) for p in matrices]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizers[kernel] = ShardedOptimizer(parameters, torch.optim.Muon, kernel=kernel)
        optimizers[kernel].step()
    clock: dict[str, list[float]] = {kernel: [] for kernel in optimizers}
    used: dict[str, list[float]] = {kernel: [] for kernel in optimizers}
    for _ in range(arguments.rounds):
        for kernel, optimizer in optimizers.items():
            start = time.perf_counter(), time.process_time()
            optimizer.step()
            clock[kernel].append(time.perf_counter() - start[0])
            used[kernel].append(time.process_time() - start[1])
    count = sum(p.numel() for p in matrices) / 1e6
    threads = torch.get_num_threads()
    print(f"{len(matrices)} matrices, {count:.1f}M parameters, {threads} thread(s)")
    for kernel in optimizers:
        milliseconds = [statistics.median(rows[kernel]) * 1e3 for rows in (clock, used)]
        print(f"  kernel={kernel!r:8}{milliseconds[0]:9.0f} ms, CPU {milliseconds[1]:9.0f} ms")
    for name, rows in (("by the clock", clock), ("CPU time", used)):
        print(f"  auto / torch, {name}: {ratio(rows['auto'], rows['torch'])}")


if __name__ == "__main__":
    main()
