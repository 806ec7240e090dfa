"""What the benchmarks share: ranks, clocks, and the memory of a process."""

from __future__ import annotations

import gc
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MB = 10**6


def on_ranks(num_ranks: int, body: Callable[..., None], *arguments: object) -> None:
    """Run ``body(rank, *arguments)`` on fresh gloo ranks, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (num_ranks, f"{folder}/rendezvous", body, arguments), num_ranks)


def _run(rank: int, num_ranks: int, rendezvous: str, body: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks
    )
    body(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def timed(action: Callable[[], object]) -> float:
    """Seconds until every rank is done."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def peak_growth(action: Callable[[], object]) -> float:
    """Megabytes by which this process's peak resident set rises over what is resident now."""
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = _resident("VmRSS")
    action()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match, field
    return int(match[1]) * 1024 / MB


def from_all_ranks(value: float) -> list[float]:
    """The value of each rank."""
    values = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(values, torch.tensor([value]))
    return [float(v) for v in values]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median, minimum and maximum of the ratios within each round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
