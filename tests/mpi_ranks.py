"""A plugin of pytest that runs on every rank of ``mpirun``, and the bodies of ranked tests with it.

::

    mpirun -n 2 python -m mpi4py -m pytest -x -p tests.mpi_ranks tests/ranked/test_bank.py

Of ``@on_ranks(1, 2, 3)`` the world of that size is left. Where a body gives no process group, its
optimizer gets ``MPI.COMM_WORLD``; ``torch.distributed`` is not initialised, unless
``--beside-gloo`` asks for that. With ``-x`` the first failure on any rank ends all of them.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from mpi4py import MPI

from tests import rank_process, ranks
from tests.rank_process import World

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
PASSED: list[str] = []  # on this rank


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where bodies have their tensors: cpu or cuda")
    parser.addoption("--beside-gloo", action="store_true", help="initialise torch.distributed, too")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Here, since a mutant has to come before the first import of the package."""
    from shardopt import comm, optimizer
    from shardopt.checkpoint import arguments

    choose = comm.choose_collectives

    def choose_over_mpi(process_group, timeout=None):
        return choose(MPI.COMM_WORLD if process_group is None else process_group, timeout)

    for module in (comm, optimizer, arguments):
        module.choose_collectives = choose_over_mpi
    ranks.run_on_ranks = run_here
    if session.config.option.beside_gloo:
        folder = MPI.COMM_WORLD.bcast(tempfile.mkdtemp() if RANK == 0 else None)
        session.config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        store = dist.FileStore(f"{folder}/rendezvous", SIZE)
        dist.init_process_group("gloo", store=store, rank=RANK, world_size=SIZE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.option.device
    wanted = [w for w in (World(SIZE), *ranks.GPU_WORLDS) if (w.size, w.device) == (SIZE, device)]
    worlds = {item: getattr(item, "callspec", None) for item in items}
    ours = [item for item, how in worlds.items() if how and how.params.get("world") in wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        PASSED.append(report.nodeid)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """One folder for all ranks."""
    return MPI.COMM_WORLD.bcast(tmp_path)


def run_here(world: World, body, params: dict, *, filters=(), timeout: float) -> None:
    """The body on this rank, as a rank of a pool runs it; the others do the same."""
    rank_process._run(world, RANK, body.__module__, body.__qualname__, params, filters)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(exitstatus: int) -> None:
    """A rank that has failed says so, and ``-m mpi4py`` ends the others, who wait here."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if exitstatus == pytest.ExitCode.OK:
        passed = MPI.COMM_WORLD.gather(PASSED)
        if RANK == 0 and all(names == passed[0] for names in passed):
            files = {name.split("::")[0] for name in PASSED}
            print(f"\n{SIZE} ranks have passed the same {len(PASSED)} tests of {len(files)} files")
