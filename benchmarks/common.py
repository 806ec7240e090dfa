"""What the benchmarks share: ranks, clocks, and the memory of a process."""

from __future__ import annotations

import gc
import json
import pathlib
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from shardopt.comm import Collectives
from shardopt.comm.collectives import Handle, Reduction, Work

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


def peak_allocated(action: Callable[[], object]) -> float:
    """Most megabytes of tensors at one time that ``action`` has allocated and not freed yet.

    What torch's CPU allocator reports to the profiler: every tensor, temporaries of kernels and of
    autograd included, to the byte; nothing of Python, libraries, or gloo's own buffers.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(pathlib.Path(f"{folder}/trace.json").read_text())["traceEvents"]
    changes = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    changes.sort(key=lambda event: event["ts"])
    return _most_held([(e["args"]["Addr"], e["args"]["Bytes"]) for e in changes]) / MB


def _most_held(changes: Sequence[tuple[int, int]]) -> int:
    """The most bytes held at one time, from blocks that came (bytes > 0) and went.

    What gloo's threads free is not reported: memory handed out anew had been freed before.
    """
    held: dict[int, int] = {}  # address -> bytes
    most = 0
    for start, size in changes:
        if size < 0:
            held.pop(start, None)
            continue
        for other in [at for at, n in held.items() if at < start + size and start < at + n]:
            del held[other]
        held[start] = size
        most = max(most, sum(held.values()))
    return most


class Counted(Collectives):
    """Passes everything on, and adds up the bytes that this rank hands over for other ranks."""

    def __init__(self, inner: Collectives):
        self.inner = inner
        self.rank, self.world_size = inner.rank, inner.world_size
        self.wire_device = inner.wire_device
        self.sent: Counter[str] = Counter()

    def all_gather(self, bucket: Tensor, borders: Sequence[int]) -> Handle:
        own = borders[self.rank + 1] - borders[self.rank]
        self.sent["all_gather"] += own * bucket.itemsize * (self.world_size - 1)
        return self.inner.all_gather(bucket, borders)

    def reduce_scatter(self, bucket: Tensor, borders: Sequence[int], out: Tensor) -> Reduction:
        self.sent["reduce_scatter"] += (bucket.numel() - out.numel()) * bucket.itemsize
        return self.inner.reduce_scatter(bucket, borders, out)

    def all_to_all(
        self, send: Tensor, send_sizes: Sequence[int], out: Tensor, out_sizes: Sequence[int]
    ) -> Work:
        elsewhere = sum(send_sizes) - send_sizes[self.rank]
        self.sent["all_to_all"] += elsewhere * send.itemsize
        return self.inner.all_to_all(send, send_sizes, out, out_sizes)

    def all_gather_rows(self, row: Tensor) -> Tensor:
        self.sent["all_gather_rows"] += row.nbytes * (self.world_size - 1)
        return self.inner.all_gather_rows(row)

    def sum_rows(self, row: Tensor) -> Tensor:
        self.sent["sum_rows"] += 2 * row.nbytes * (self.world_size - 1) // self.world_size
        return self.inner.sum_rows(row)

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        self.sent["broadcast"] += tensor.nbytes * (self.world_size - 1) * (self.rank == source)
        return self.inner.broadcast(tensor, source)

    def send(self, tensor: Tensor, to: int) -> Handle:
        self.sent["send"] += tensor.nbytes
        return self.inner.send(tensor, to)

    def receive(self, tensor: Tensor, source: int) -> Handle:
        return self.inner.receive(tensor, source)


def from_all_ranks(value: float) -> list[float]:
    """The value of each rank."""
    values = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(values, torch.tensor([value]))
    return [float(v) for v in values]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median, minimum and maximum of the ratios within each round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
