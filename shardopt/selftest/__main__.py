"""Run the checks on every rank, and print the table on the first."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

import shardopt
from shardopt.comm import Collectives, choose_collectives
from shardopt.comm.bootstrap import bootstrap
from shardopt.comm.collectives import gather_texts
from shardopt.selftest.checks import Check, all_checks
from shardopt.selftest.lab import Lab, Skipped

TIMEOUT = 60.0  # seconds for one communication: a rank that has failed leaves the others


def run(lab: Lab, checks: dict[str, Check]) -> bool:
    """Run the checks and print a row for each; returns whether none has failed. Collective."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    begun = time.perf_counter()
    for name, check in checks.items():
        started = time.perf_counter()
        verdict, why = _everybodys(lab, *_attempt(lab, check))
        counts[verdict] += 1
        taken = f"{time.perf_counter() - started:5.1f} s"
        _say(lab, f"{name:<26}{verdict:<9}{taken}  {why}".rstrip())
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    _say(lab, f"\n{total}, in {time.perf_counter() - begun:.0f} s")
    return not counts["failed"]


def _attempt(lab: Lab, check: Check) -> tuple[str, str]:
    try:
        check(lab)
    except Skipped as reason:
        return "skipped", str(reason)
    except Exception as problem:
        text = f"rank {lab.rank}: {type(problem).__name__}: {problem}"
        if torch.cuda.is_available() and lab.device.type == "cuda":
            torch.cuda.synchronize(lab.device)
        return "failed", text
    return "passed", ""


def _everybodys(lab: Lab, verdict: str, why: str) -> tuple[str, str]:
    """The worst verdict of all ranks, that of the lowest such rank."""
    try:
        texts = gather_texts(lab.collectives, f"{verdict}\t{why}".encode())
    except RuntimeError as problem:  # a rank is elsewhere, or gone
        print(f"rank {lab.rank}: {verdict} {why}\nranks are out of step: {problem}", flush=True)
        raise SystemExit(1) from None
    said = [tuple(text.decode().split("\t", 1)) for text in texts]
    worst = min(said, key=lambda pair: ("failed", "skipped", "passed").index(pair[0]))
    return worst[0], worst[1]


def _say(lab: Lab, line: str) -> None:
    if lab.rank == 0:
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a check fails, 2 for what the user can put right."""
    options = _parser().parse_args(arguments)
    try:
        ranks = bootstrap(options.device, init=not options.mpi)
        collectives, backend = _collectives(options.mpi)
    except (ValueError, ImportError) as problem:
        print(f"selftest: {problem}", file=sys.stderr)
        return 2
    where = f"{collectives.world_size} rank(s) over {backend} on {ranks.device.type}"
    with _directory(collectives, options.directory) as directory:
        lab = Lab(collectives, ranks.device, backend, directory)
        versions = f"shardopt {shardopt.__version__}, torch {torch.__version__}"
        _say(lab, f"{versions}: {where}, started by {ranks.launcher}\n")
        passed = run(lab, all_checks())
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "shardopt.selftest",
        description="Checks on the ranks, backend and devices at hand that shardopt works there.",
    )
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, or auto: GPUs where there are any")
    add("--mpi", action="store_true", help="let MPI move the buckets, without torch.distributed")
    add(
        "--directory",
        type=Path,
        help="for checkpoints, on a file system that all ranks see; default: a temporary one",
    )
    return parser


def _collectives(by_mpi: bool) -> tuple[Collectives, str]:
    """What moves buckets, and its name."""
    if by_mpi:
        from mpi4py import MPI

        return choose_collectives(MPI.COMM_WORLD, TIMEOUT), "mpi"
    backend = dist.get_backend() if dist.is_available() and dist.is_initialized() else "nothing"
    return choose_collectives(None, TIMEOUT), backend


@contextmanager
def _directory(collectives: Collectives, parent: Path | None) -> Iterator[Path | None]:
    """A new directory that all ranks see, until they are done with it. Collective."""
    is_first = collectives.rank == 0
    path = tempfile.mkdtemp(prefix="selftest-", dir=parent) if is_first else ""
    there = Path(gather_texts(collectives, path.encode())[0].decode())
    seen = collectives.all_gather_rows(torch.tensor([int(there.is_dir())]))
    try:
        yield there if seen.all() else None
    finally:
        if is_first:
            shutil.rmtree(there, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
