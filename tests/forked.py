"""Run pytest in a process of its own that forks after torch's import: a command takes seconds more.

The ranks of that pytest fork from the same server.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from tests import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "torch", "torch.distributed"])


def run_pytest(*arguments: str, folder: Path, **environment: str) -> tuple[int, str]:
    """What ``pytest`` exits with and has written, for which ``folder`` takes a file."""
    process = _CONTEXT.Process(target=_run, args=(arguments, folder / "output", environment))
    process.start()
    process.join()
    return process.exitcode, (folder / "output").read_text()


def _run(arguments: tuple[str, ...], output: Path, environment: dict[str, str]) -> None:
    with open(output, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    os.environ |= environment
    sys.exit(pytest.main([*arguments]))
