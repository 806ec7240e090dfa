"""Processes that fork from a server that has imported torch, which saves each of them seconds."""

import gc
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from tests import ROOT

FORKS = multiprocessing.get_context("forkserver")
# A process has one server, whoever starts it. The first optimizer would import torch._dynamo.
FORKS.set_forkserver_preload(["pytest", "torch", "torch.distributed", "torch._dynamo"])


def run_pytest(*arguments: str, folder: Path, **environment: str) -> tuple[int, str]:
    """pytest in a process of its own: its exit code, and what it writes, to a file in ``folder``.

    The ranks of its tests fork from this process's server.
    """
    process = FORKS.Process(target=_run, args=(arguments, folder / "output", environment))
    process.start()
    process.join()
    return process.exitcode, (folder / "output").read_text()


def _run(arguments: tuple[str, ...], output: Path, environment: dict[str, str]) -> None:
    gc.freeze()
    with open(output, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    os.environ |= environment
    sys.exit(pytest.main([*arguments]))
