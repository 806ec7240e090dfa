"""Starts ``mpirun``: a job of its own, or pytest on every rank (``tests/mpi_ranks.py``)."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import ROOT

_BESIDE_PYTHON = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@dataclass(frozen=True)
class Mpi:
    """An implementation of MPI: what starts it, and what ranks have in their environment."""

    mpirun: str | None = shutil.which("mpirun", path=_BESIDE_PYTHON)
    environment: Mapping[str, str] = field(default_factory=dict)


INSTALLED = Mpi()
needs_mpi = pytest.mark.skipif(
    INSTALLED.mpirun is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpi4py and mpirun: pip install shardopt[mpi]",
)


def run_job(
    size: int,
    *arguments: str | Path,  # of python -m mpi4py
    mpi: Mpi = INSTALLED,
    timeout: float = 60,  # seconds
) -> subprocess.CompletedProcess[str]:
    """``python -m mpi4py ...`` on ``size`` ranks, to its end."""
    process = subprocess.Popen(
        [mpi.mpirun, "-n", str(size), sys.executable, "-m", "mpi4py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | mpi.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        process.terminate()  # mpirun ends its ranks
        print(process.communicate(timeout=30)[0])
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def run_tests(size: int, *arguments: str, mpi: Mpi = INSTALLED, timeout: float = 600) -> None:
    """The bodies of ranked tests, chosen by arguments of pytest, on the ranks of ``mpirun``.

    Each file that is named has one that passes.
    """
    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "tests.mpi_ranks")
    run = run_job(size, "-m", "pytest", *options, *arguments, mpi=mpi, timeout=timeout)
    files = sum(argument.endswith(".py") for argument in arguments)
    passed = rf"^{size} ranks have passed the same \d+ tests of {files} files$"
    assert run.returncode == 0 and re.search(passed, run.stdout, re.M), run.stdout[-6000:]


def write_line(line: str) -> None:
    """Written by a rank at once: ``mpirun`` mixes what its ranks write in pieces."""
    os.write(sys.stdout.fileno(), f"\n{line}\n".encode())
