"""What runs in the process of one rank: meet the others, then serve bodies until pytest ends.

Kept apart from ``ranks.py`` so that it is plain which code runs on which side
of the pipe.
"""

import faulthandler
import gc
import importlib
import inspect
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from _pytest.assertion import install_importhook
from _pytest.config import get_config, parse_warning_filter

from tests import HELPERS

# What a rank gives a body, if it takes it. (pytest's monkeypatch would undo nothing here.)
INJECTED = ("world_size", "rank", "device", "monkeypatch")

# Beyond any test's own limit: a rank that waits for ever is told with its stack
# by pytest's side, which says more than the error of the collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The ranks that a test asks for; tests that ask for equal worlds share them."""

    size: int
    backend: str = "gloo"
    device: str = "cpu"

    def __str__(self) -> str:
        on = "" if self.device == "cpu" else f"-{self.backend}-{self.device}"
        return f"ranks{self.size}{on}"


@dataclass(frozen=True)
class Report:
    """What became of a body on one rank."""

    rank: int
    verdict: str  # passed, skipped, raised, died, still busy
    headline: str = ""  # one line: the error, the signal, the reason
    details: str = ""  # the traceback, or the stack
    num_groups: int = 0  # process groups that the rank holds

    @property
    def is_failure(self) -> bool:
        return self.verdict not in ("passed", "skipped")


def read_stack(folder: str, rank: int) -> str:
    """Where ``rank`` stood when it got SIGUSR1, without the frames of this file and below."""
    lines = _stack_file(folder, rank).read_text().splitlines()
    ours = (number for number, line in enumerate(lines) if __file__ in line)
    return "\n".join(lines[: next(ours, None)])


def serve(world: World, rank: int, folder: str, pipe: Connection, mutant: str | None) -> None:
    """Join ``world`` as ``rank``, then run what comes over ``pipe``, one report each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's to handle
    gc.freeze()  # collecting torch, and looking for DDP in it, took most of the time
    threading.Thread(target=_follow_pytest, daemon=True).start()
    with _stack_file(folder, rank).open("w") as stacks:
        # Works even while C code holds the GIL.
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
        pipe.send(_attempt(rank, lambda: _join(world, rank, folder, mutant)))
        while True:
            task = pipe.recv_bytes()
            pipe.send(_attempt(rank, lambda task=task: _run(world, rank, *pickle.loads(task))))


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"rank{rank}.stack")


def _follow_pytest() -> None:
    """End with pytest, whatever ended it and whatever this rank is busy with."""
    wait([parent_process().sentinel])
    os._exit(1)


def _join(world: World, rank: int, folder: str, mutant: str | None) -> None:
    torch.set_num_threads(1)
    _rewrite_asserts()
    if world.backend == "nccl":
        torch.cuda.set_device(_device(world, rank))
    store = dist.FileStore(f"{folder}/rendezvous", world.size)
    dist.init_process_group(
        world.backend, store=store, rank=rank, world_size=world.size, timeout=COLLECTIVE_TIMEOUT
    )
    if mutant:
        importlib.import_module("tests.mutants").apply(mutant)


def _rewrite_asserts() -> None:
    """A failed assert shows its values here as it does in pytest's own process."""
    install_importhook(get_config()).mark_rewrite(*HELPERS)


def _run(world: World, rank: int, module: str, name: str, params: dict, filters: list[str]) -> None:
    test = getattr(importlib.import_module(module), name)
    body = test.__wrapped__
    wanted = inspect.signature(body).parameters
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "filterwarnings"]
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        given = (world.size, rank, _device(world, rank), patch)
        injected = dict(zip(INJECTED, given, strict=True))
        params |= {key: value for key, value in injected.items() if key in wanted}
        for line in [*filters, *(line for mark in reversed(marks) for line in mark.args)]:
            warnings.filterwarnings(*parse_warning_filter(line, escape=False))
        body(**params)


def _device(world: World, rank: int) -> torch.device:
    if world.device == "cpu":
        return torch.device("cpu")
    return torch.device(world.device, rank % torch.cuda.device_count())


def _attempt(rank: int, job: Callable[[], None]) -> Report:
    try:
        job()
    except pytest.skip.Exception as skipped:
        return Report(rank, "skipped", str(skipped))
    except BaseException as error:  # whatever it is, pytest's side must hear of it
        headline = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
        return Report(rank, "raised", headline, _body_traceback(error))
    return Report(rank, "passed", num_groups=len(dist.distributed_c10d._world.pg_map))


def _body_traceback(error: BaseException) -> str:
    """The traceback without the frames of this file, unless all of them are."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(error.with_traceback(frames or error.__traceback__)))
