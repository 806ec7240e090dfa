"""Checkpoints beside torch's own: saving, loading, verifying, and making one file of them.

    python benchmarks/checkpoint.py                   # 400 MB in large tensors, 2000 of 8 KB
    python benchmarks/checkpoint.py --cases small --rounds 11 --directory /scratch

Two gloo ranks save a model and its optimizer's state, in turn with the others: ``dcp.save`` of the
same shapes as DTensors (cut along dim 0, as FSDP2 has them) and of plain tensors that a rank has to
itself (half of them each), ``torch.save`` of all on one rank, and a plain write and fsync of each
rank's bytes. What is written is removed and ``sync`` called before the clock starts again, so that
nobody pays for what another has left in the page cache. Loads are of files in the page cache, on
two ranks and on one and three. Ratios are taken within a round.

``verify`` and ``consolidate`` run in one process, beside ``dcp_to_torch_save`` of the same
directory and torch's consolidation of what its safetensors writer has written. Memory is the growth
of a fresh process's peak resident set over what imports have taken.
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.tensor
from checkpoint_twins import fsdp2_full_state, fsdp2_twin
from common import MB, on_ranks, peak_growth, ratio, timed
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import Shard

from shardopt import ShardedOptimizer, checkpoint
from shardopt.checkpoint.offline import consolidate
from shardopt.checkpoint.verify import verify


@dataclass(frozen=True)
class Case:
    """Parameters of one shape, and a class with so many tensors of state of that shape for each."""

    title: str
    number: int
    shape: tuple[int, int]
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]
    states: int

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters and their state."""
        return 4 * self.shape[0] * self.shape[1] * self.number * (1 + self.states)


CASES = {
    "large": Case("48 tensors of 8.3 MB", 16, (1444, 1444), torch.optim.AdamW, {}, 2),
    "small": Case("2000 tensors of 8 KB", 1000, (32, 64), torch.optim.SGD, {"momentum": 0.9}, 1),
}

Ways = dict[str, Callable[[int], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="where to write; a temporary directory if left out")
    arguments = parser.parse_args()
    for name in arguments.cases:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
            case, rounds, root = CASES[name], arguments.rounds, pathlib.Path(folder)
            print(f"{case.title}, {case.nbytes / MB:.0f} MB, {rounds} rounds, {torch.__version__}")
            on_ranks(2, saves, case, rounds, root)
            for num_ranks in (2, 1, 3):
                on_ranks(num_ranks, loads, case, rounds, root)
            on_ranks(2, live, case, rounds)
            in_fresh_process(offline, rounds, root)
            for way in single_files(root, ()):
                growth = in_fresh_process(memory_of, way, root)
                print(f"  peak memory of {way:40}{growth:9.1f} MB", flush=True)


def trained(case: Case) -> tuple[nn.Module, ShardedOptimizer]:
    """A model and an optimizer with state."""
    torch.manual_seed(0)
    model = nn.ParameterList(torch.rand(case.shape) for _ in range(case.number))
    optimizer = ShardedOptimizer(model.named_parameters(), case.optimizer, lr=1e-3, **case.options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def names(case: Case) -> list[str]:
    """One for each tensor."""
    kinds = ["model", *(f"optimizer.{number}" for number in range(case.states))]
    return [f"{kind}.{index}" for kind in kinds for index in range(case.number)]


def as_dtensors(case: Case) -> dict[str, Tensor]:
    """The same shapes, cut along dim 0 among all ranks."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    make = functools.partial(torch.distributed.tensor.ones, device_mesh=mesh, placements=[Shard(0)])
    return {name: make(case.shape) for name in names(case)}


def saves(rank: int, case: Case, rounds: int, root: pathlib.Path) -> None:
    """Time the ways to save in turn, and leave a checkpoint of each kind; rank 0 prints."""
    model, optimizer = trained(case)
    mine = {"model": model, "optimizer": optimizer}
    cut = as_dtensors(case)
    own = {name: torch.rand(case.shape) for name in names(case)[rank :: dist.get_world_size()]}
    whole = {name: torch.rand(case.shape) for name in names(case)} if rank == 0 else {}
    data = torch.cat([tensor.view(-1) for tensor in own.values()]).view(torch.uint8).numpy()
    pending: list[Any] = []
    ways: Ways = {
        "save": lambda n: checkpoint.save(root / "ours", step=n, **mine),
        "async_save, blocking part": lambda n: pending.append(
            checkpoint.async_save(root / "ours", step=n, **mine)
        ),
        "dcp.save of DTensors": lambda n: dcp.save(cut, checkpoint_id=root / f"dcp-{n}"),
        "dcp.save of plain tensors": lambda n: dcp.save(own, checkpoint_id=root / f"own-{n}"),
        "torch.save of all on one rank": lambda n: rank or torch.save(whole, root / f"torch-{n}"),
        "write + fsync": lambda n: write_synced(root / f"raw-{n}-{rank}", data),
    }
    first = timed(functools.partial(ways["async_save, blocking part"], 10**6))
    pending.pop().result()
    seconds = alternate(ways, rounds, lambda: clean(rank, root, pending))
    if rank == 0:
        report(seconds, "save")
        blocking = ratio(seconds["async_save, blocking part"], seconds["save"])
        print(f"  async_save's blocking part / save: {blocking}; the first: {first * 1e3:.1f} ms")
    checkpoint.save(root / "ours", step=0, **mine)
    dcp.save(cut, checkpoint_id=root / "dcp")
    writer = dcp.HuggingFaceStorageWriter(str(root / "sharded"), save_distributed=True)
    dcp.save(cut, storage_writer=writer)


def write_synced(path: pathlib.Path, data: Any) -> None:
    """The floor: bytes in a new file, on the disk."""
    with path.open("xb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())


def clean(rank: int, root: pathlib.Path, pending: list[Any]) -> None:
    """Remove what was written."""
    while pending:
        pending.pop().result()
    dist.barrier()
    if rank == 0:
        for path in root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.sync()


def loads(rank: int, case: Case, rounds: int, root: pathlib.Path) -> None:
    """Time loading what two ranks have written; rank 0 prints."""
    model, optimizer = trained(case)
    cut = as_dtensors(case)
    ways: Ways = {
        "load": lambda _: checkpoint.load(root / "ours", step=0, model=model, optimizer=optimizer),
        "dcp.load into DTensors": lambda _: dcp.load(cut, checkpoint_id=root / "dcp"),
    }
    seconds = alternate(ways, rounds)
    if rank == 0:
        print(f"  on {dist.get_world_size()} rank(s):")
        report(seconds, "load")


def live(rank: int, case: Case, rounds: int) -> None:
    """Time putting the optimizer's state together on rank 0, which prints."""
    _, optimizer = trained(case)
    twin = fsdp2_twin(case.number, case.shape, case.optimizer, case.options)
    ways: Ways = {
        "consolidate_state_dict(to=0)": lambda _: optimizer.consolidate_state_dict(to=0),
        "FSDP2 full_state_dict, cpu_offload": lambda _: fsdp2_full_state(*twin),
    }
    seconds = alternate(ways, rounds)
    if rank == 0:
        report(seconds, "consolidate_state_dict(to=0)")


def alternate(
    ways: Ways, rounds: int, after: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, action in ways.items():
            after()
            seconds[name].append(timed(functools.partial(action, number)))
    after()
    return {name: values[1:] for name, values in seconds.items()}


def report(seconds: dict[str, list[float]], ours: str) -> None:
    """Medians, and ratios within rounds."""
    for name, values in seconds.items():
        against = "" if name == ours else f"   {ours} / it: {ratio(seconds[ours], values)}"
        print(f"  {name:36}{statistics.median(values) * 1e3:9.1f} ms{against}", flush=True)


def single_files(
    root: pathlib.Path, names: Iterable[str]
) -> dict[str, Callable[[pathlib.Path], object]]:
    """The ways to make one file of a checkpoint, with these tensors."""
    step = root / "ours" / "step-0"
    index = dict.fromkeys(names, 1)
    return {
        "consolidate": lambda out: consolidate(step, out),
        "dcp_to_torch_save": lambda out: dcp_to_torch_save(step, out),
        "consolidate to safetensors": lambda out: consolidate(step, out, format="safetensors"),
        "torch's consolidation of safetensors": lambda out: torch_safetensors(root, out, index),
    }


def names_in(root: pathlib.Path) -> list[str]:
    """The tensors that torch's safetensors writer has written."""
    metadata = dcp.HuggingFaceStorageReader(str(root / "sharded")).read_metadata()
    return list(metadata.state_dict_metadata)


def torch_safetensors(root: pathlib.Path, out: pathlib.Path, index: dict[str, int]) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import (
        consolidate_safetensors_files,
    )

    out.mkdir()
    consolidate_safetensors_files(str(root / "sharded"), str(out), index)


def offline(rounds: int, root: pathlib.Path) -> None:
    """Time what one process does with a checkpoint, and print it."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    step, out = root / "ours" / "step-0", root / "out"
    size = sum(path.stat().st_size for path in step.iterdir())
    verify(step)
    rates = []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        verify(step)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rates.append((size / cpu / 1e9, size / wall / 1e9))
    cpu, wall = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"  verify: {cpu:.2f} GB a CPU second, {wall:.2f} GB/s by the clock")
    ways = single_files(root, names_in(root))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, action in ways.items():
            os.sync()
            start = time.perf_counter()
            action(out)
            seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    counted = {name: values[1:] for name, values in seconds.items()}
    pairs = list(counted)
    for ours, theirs in (pairs[:2], pairs[2:]):
        report({ours: counted[ours], theirs: counted[theirs]}, ours)


def memory_of(way: str, root: pathlib.Path) -> float:
    """Megabytes that one way takes."""
    logging.disable(logging.WARNING)
    import torch.distributed.checkpoint._consolidate_hf_safetensors  # noqa: F401

    out = root / "out"
    # What reads them leaves room on the heap, in which others would hide what they take.
    names = names_in(root) if "of safetensors" in way else ()
    growth = peak_growth(functools.partial(single_files(root, names)[way], out))
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return growth


def in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a process that has done nothing but import."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    main()
