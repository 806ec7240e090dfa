"""``shardopt.selftest`` as a user starts it, on a whole shardopt and on broken ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardopt.selftest.checks import all_checks
from tests.mutants import ROOT, sites

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MPIRUN = [str(Path(sys.executable).with_name("mpirun")), "-n", "2", sys.executable, "-m", "mpi4py"]


def start(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "where"),
    [
        ([*TORCHRUN, "-m", "shardopt.selftest"], "gloo on cpu, started by torchrun"),
        pytest.param(
            [*MPIRUN, "-m", "shardopt.selftest", "--mpi"],
            "mpi on cpu, started by MPICH or Intel MPI",
            marks=pytest.mark.skipif(not Path(MPIRUN[0]).exists(), reason="no mpirun here"),
        ),
    ],
)
def test_it_passes_under_a_launcher(command, where):
    done = start(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()
    assert rows[0].endswith(f"2 rank(s) over {where}")
    passed = [row[:26].strip() for row in rows if row[26:33] == "passed "]
    assert passed == list(all_checks())


BROKEN = {
    "shardopt/update.py::gather::all_gather": "SGD",
    "shardopt/gradients/reduced_shards.py::ReducedShards.launch::reduce_scatter": "SGD",
    "shardopt/comm/torch_group.py::TorchCollectives.broadcast::broadcast": "collectives, float32",
    "shardopt/checkpoint/job.py::Job.write::gather_texts": "checkpoints",
}


@pytest.mark.slow
@pytest.mark.parametrize("site", BROKEN)
def test_it_fails_where_a_synchronisation_is_missing(site):
    assert site in sites()
    lines = (
        f"from tests.mutants import apply; apply({site!r})",
        "import sys; from shardopt.selftest import __main__ as selftest",
        "from shardopt.selftest import checks",
        f"every = checks.all_checks(); name = {BROKEN[site]!r}",
        "selftest.all_checks = lambda: {name: every[name]}",
        "sys.exit(selftest.main([]))",
    )
    done = start(*TORCHRUN, "--no-python", sys.executable, "-c", "\n".join(lines))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{BROKEN[site]:<26}failed" in done.stdout, done.stdout + done.stderr
