"""Run the body of a test on several ranks: ``@on_ranks(1, 2, 3)``.

The ranks of one world start once and serve every test that asks for it; only
a failure, or many process groups, cost new ones. They fork from a server that has imported torch
already and meet through a file, so no port is ever taken::

    pytest (or one xdist worker)           ranks
    test of 2 ranks --- task over pipe ---> 0, 1 of World(2)     the body runs on each,
                    <-- Report over pipe -- 0, 1                 in one gloo process group
    test of 3 ranks --- task over pipe ---> 0, 1, 2 of World(3)

A rank that raises, dies or hangs fails its test by name, with what every rank
had to say, and ends its pool: after a failure nobody knows which collectives
are still under way. The ranks find the body by module and name, so it stands
at module level, and pytest and the ranks import ``tests`` as the same package.
"""

import contextlib
import functools
import inspect
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import pytest
import torch

from tests.forks import FORKS
from tests.rank_process import INJECTED, Report, World, read_stack, serve

TIMEOUT = float(os.environ.get("SHARDOPT_TEST_TIMEOUT", "60"))  # seconds for one test
START_TIMEOUT = 180.0  # seconds for the ranks of a new pool to import torch and meet
GRACE = 1.0  # seconds for the other ranks to answer once one has failed
MAX_POOLS = 6  # idle ranks cost memory
MAX_GROUPS = 20  # of a rank: a thread of each gloo group wakes up 100 times a second

GPU_WORLDS = (World(1, "nccl", "cuda"), World(2, "gloo", "cuda"))

# What gloo says when its peer has gone: the consequence of another rank's failure.
CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer")


def on_ranks(
    *world_sizes: int,
    backend: str = "gloo",
    device: str | None = None,  # "cpu", or "cuda" where the backend is NCCL
    also_on_gpu: bool = False,
    slow: Iterable[int] = (),  # those of world_sizes that only run in `make test-all`
    timeout: float = TIMEOUT,  # seconds
):
    """Run the decorated body on every rank, once for each of ``world_sizes``.

    The body may take ``world_size``, ``rank``, ``device`` (a ``torch.device``), ``monkeypatch``,
    ``tmp_path`` (one folder for all ranks), what ``pytest.mark.parametrize``
    gives it, and any fixture whose value can be pickled. On ``device="cuda"``
    the test is marked ``gpu``; with ``also_on_gpu`` it runs on ``GPU_WORLDS`` too. World sizes
    in ``slow`` are marked so.
    """
    device = device or ("cuda" if backend == "nccl" else "cpu")
    worlds = [World(size, backend, device) for size in world_sizes]
    worlds += GPU_WORLDS if also_on_gpu else ()

    def decorate(body: Callable[..., None]):
        if "." in body.__qualname__:
            raise TypeError(
                f"on_ranks wants a function at module level, which the ranks can find;"
                f" got {body.__qualname__}"
            )
        wanted = inspect.signature(body).parameters
        given_by_pytest = [name for name in wanted if name not in INJECTED]

        @functools.wraps(body)
        def test(*, world: World, pytestconfig: pytest.Config, **given):
            params = {name: given[name] for name in given_by_pytest}
            filters = pytestconfig.getini("filterwarnings")
            run_on_ranks(world, body, params, filters=filters, timeout=timeout)

        test.__signature__ = inspect.Signature(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
            for name in dict.fromkeys([*given_by_pytest, "world", "pytestconfig"])
        )
        cases = [
            pytest.param(world, id=str(world), marks=_marks(world, world.size in slow))
            for world in worlds
        ]
        return pytest.mark.parametrize("world", cases)(test)

    return decorate


def run_on_ranks(
    world: World, body: Callable, params: dict, *, filters: Iterable[str] = (), timeout: float
) -> None:
    """Run ``body`` on every rank of ``world``; fail or skip as the ranks did."""
    if lacking := _lacking(world):
        pytest.skip(lacking)
    pool = _idle_pools.pop(world, None) or RankPool(world)
    try:
        reports = pool.run(body, params, filters, timeout)
        if any(report.is_failure for report in reports):
            pytest.fail(_describe(world, body, reports), pytrace=False)
    except BaseException:  # Ctrl-C too: the ranks are left in the middle of something
        pool.close()
        raise
    if max(report.num_groups for report in reports) > MAX_GROUPS:
        pool.close()
    else:
        _idle_pools[world] = pool
    while len(_idle_pools) > MAX_POOLS:
        _idle_pools.pop(next(iter(_idle_pools))).close()
    for report in reports:
        if report.verdict == "skipped":
            pytest.skip(report.headline)


def close_pools() -> None:
    """End all ranks. They would follow pytest anyway: see ``rank_process.py``."""
    while _idle_pools:
        _idle_pools.popitem()[1].close()


class RankPool:
    """The processes of one world, in one process group, that run bodies in step."""

    def __init__(self, world: World):
        self.world = world
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        try:
            for rank in range(world.size):
                self._start(rank)
            reports = self._collect(START_TIMEOUT)
            if any(report.is_failure for report in reports):
                raise RuntimeError(_describe(world, "the start of the ranks", reports))
        except BaseException:
            self.close()
            raise

    def run(self, body: Callable, params: dict, filters: Iterable[str], timeout: float):
        """One report of each rank about ``body``, in the order in which they came."""
        task = pickle.dumps((body.__module__, body.__qualname__, params, list(filters)))
        for pipe in self._pipes:
            # A rank that died since the last test is told by its missing report.
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(task)
        return self._collect(timeout)

    def close(self) -> None:
        """Kill the ranks and wait for their end."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._folder.cleanup()

    def _start(self, rank: int) -> None:
        ours, theirs = FORKS.Pipe()
        mutant = os.environ.get("SHARDOPT_MUTANT")
        given = (self.world, rank, self._folder.name, theirs, mutant)
        process = FORKS.Process(target=serve, args=given, daemon=True)
        process.start()
        theirs.close()  # so that a dead rank reads as end of file here
        self._processes.append(process)
        self._pipes.append(ours)

    def _collect(self, timeout: float) -> list[Report]:
        deadline = time.monotonic() + timeout
        reports: list[Report] = []
        busy = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while busy:
            answered = wait(list(busy), max(0.0, deadline - time.monotonic()))
            if not answered:
                failed = any(report.is_failure for report in reports)
                when = "after the failure" if failed else f"after {timeout:g} s"
                return reports + self._busy_reports(sorted(busy.values()), when)
            for pipe in answered:
                reports.append(self._receive(pipe, busy.pop(pipe)))
                if reports[-1].is_failure:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return reports

    def _receive(self, pipe: Connection, rank: int) -> Report:
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[rank]
            process.join(GRACE)
            code = process.exitcode
            how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
            return Report(rank, "died", how)

    def _busy_reports(self, ranks: list[int], when: str) -> list[Report]:
        """Reports on behalf of ranks that have not answered: where each of them stands."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)  # writes its stack
        time.sleep(0.2)
        return [
            Report(rank, "still busy", when, read_stack(self._folder.name, rank)) for rank in ranks
        ]


_idle_pools: dict[World, RankPool] = {}  # the least recently used first


def _marks(world: World, is_slow: bool) -> list[pytest.MarkDecorator]:
    on_gpu = [pytest.mark.gpu] if world.device == "cuda" else []
    return [*on_gpu, pytest.mark.slow] if is_slow else on_gpu


def _lacking(world: World) -> str:
    """Why this machine cannot hold ``world``; empty if it can."""
    if world.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if world.backend == "nccl" and (found := torch.cuda.device_count()) < world.size:
        return f"NCCL wants a GPU for each of {world.size} ranks, found {found}"
    return ""


def _describe(world: World, what: Callable | str, reports: list[Report]) -> str:
    """The first failure as the headline, then every rank's own words."""
    name = what if isinstance(what, str) else f"{what.__module__}.{what.__qualname__}"
    failures = [report for report in reports if report.is_failure]
    causes = [r for r in failures if not any(text in r.details for text in CONSEQUENCES)]
    first = (causes or failures)[0]
    lines = [f"rank {first.rank} of {world.size} {first.verdict} in {name}: {first.headline}"]
    for report in sorted(reports, key=lambda report: report is not first):
        lines += [f"\n--- rank {report.rank}: {report.verdict} {report.headline}".rstrip()]
        lines += [report.details.rstrip()] if report.details else []
    return "\n".join(lines)
