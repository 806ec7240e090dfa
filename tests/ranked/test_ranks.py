"""The harness itself: a rank that raises, dies or hangs fails its test by name."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.rank_process import World
from tests.ranks import MAX_GROUPS, on_ranks

ROOT = Path(__file__).parents[2]
LIMIT = 10.0  # seconds


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("value", [4.0])
def test_a_body_runs_on_every_rank(world_size, rank, device, tmp_path, value):
    total = torch.tensor([value])
    dist.all_reduce(total)
    assert total.item() == value * world_size
    assert (dist.get_rank(), device) == (rank, torch.device("cpu"))
    (tmp_path / str(rank)).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == world_size


@on_ranks(2, device="cuda")
def test_gloo_ranks_share_a_gpu(rank, device):
    total = torch.ones(3, device=device)
    dist.all_reduce(total)
    assert total.tolist() == [2.0] * 3


@on_ranks(1, backend="nccl")
def test_nccl_rank(device):
    total = torch.ones(3, device=device)
    dist.all_reduce(total)
    assert total.tolist() == [1.0] * 3


@on_ranks(2)
def test_pytest_raises_works_in_a_body():
    with pytest.raises(ValueError, match="not a rank"):
        raise ValueError("not a rank")


@on_ranks(2)
def test_a_warning_is_an_error_on_ranks_too():
    with pytest.raises(UserWarning, match="careful"):
        warnings.warn("careful", stacklevel=1)


@on_ranks(2)
@pytest.mark.filterwarnings("ignore:careful")
def test_a_mark_allows_a_warning_on_ranks_too():
    warnings.warn("careful", stacklevel=1)


@on_ranks(2)
def good():
    dist.barrier()


@on_ranks(2)
def patches(monkeypatch):
    assert not hasattr(dist, "left_behind")
    monkeypatch.setattr(dist, "left_behind", True, raising=False)


@on_ranks(2, timeout=LIMIT)
def raises(rank):
    if rank == 1:
        assert rank == 0
    dist.barrier()


@on_ranks(2, timeout=LIMIT)
def exits(rank):
    if rank == 1:
        os._exit(3)
    dist.barrier()


@on_ranks(2, timeout=LIMIT)
def is_killed(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@on_ranks(2, timeout=1.0)
def hangs(rank):
    if rank == 1:
        time.sleep(3600)


@on_ranks(2)
def skips():
    pytest.skip("not today")


@on_ranks(2)
def makes_groups():
    """Other ranks than those of the test before, which are full."""
    assert len(dist.distributed_c10d._world.pg_map) <= MAX_GROUPS
    for _ in range(MAX_GROUPS):
        dist.new_group([0, 1])


FAILURES = {  # body -> how its message begins, and what else it holds
    raises: ("rank 1 of 2 raised", "assert 1 == 0"),
    exits: ("rank 1 of 2 died", "exit code 3"),
    is_killed: ("rank 1 of 2 died", "SIGKILL"),
    hangs: ("rank 1 of 2 still busy", "in hangs"),
}


def run(body, pytestconfig):
    body(world=World(2), pytestconfig=pytestconfig)


def test_what_a_body_patches_is_put_back(pytestconfig):
    for _ in range(2):
        run(patches, pytestconfig)


def test_ranks_with_many_groups_end(pytestconfig):
    for _ in range(2):
        run(makes_groups, pytestconfig)


@pytest.mark.parametrize("body", FAILURES, ids=lambda body: body.__name__)
def test_a_failing_rank_is_named_and_the_next_test_runs(body, pytestconfig):
    run(good, pytestconfig)  # so that the limit covers no start of ranks
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception) as failure:
        run(body, pytestconfig)
    assert time.monotonic() - started < LIMIT
    begins, holds = FAILURES[body]
    message = str(failure.value)
    assert message.startswith(f"{begins} in {__name__}.{body.__name__}: ")
    assert holds in message
    assert "--- rank 0: " in message
    run(good, pytestconfig)


def test_a_skip_on_the_ranks_skips_the_test(pytestconfig):
    with pytest.raises(pytest.skip.Exception, match="not today"):
        run(skips, pytestconfig)


def test_a_body_must_be_where_ranks_find_it():
    with pytest.raises(TypeError, match="module level"):

        @on_ranks(2)
        def hidden():
            pass


SESSION = """
import os, time, pytest
from tests.ranks import on_ranks

@on_ranks(2)
def test_before(): pass

@on_ranks(2)
def test_raises(rank): assert rank == 0

@on_ranks(2)
def test_dies(rank):
    if rank == 0: os._exit(1)

@on_ranks(2, timeout=2)
def test_hangs(rank):
    if rank == 1: time.sleep(3600)

@on_ranks(2)
def test_after(): pass

@pytest.mark.slow
@on_ranks(2, timeout=3600)
def test_hangs_for_ever(tmp_path, rank):
    open(f"{os.environ['READY']}/{rank}", "w").close()
    time.sleep(3600)
"""


def start_pytest(folder: Path, *options: str) -> subprocess.Popen:
    """pytest in a session of its own, on the tests above."""
    (folder / "test_session.py").write_text(SESSION)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    command += ["-c", str(ROOT / "pyproject.toml"), "-o", f"pythonpath={ROOT}", str(folder)]
    return subprocess.Popen(
        [*command, *options],
        cwd=folder,
        env=os.environ | {"READY": str(folder), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(session: int) -> list[str]:
    """The commands of the processes that still run in ``session``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            command, fields = stat.read_text().rsplit(")", 1)
        except OSError:  # it has ended since
            continue
        state, _parent, _group, its_session = fields.split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(command)
    return found


def wait_until(condition, limit=60.0):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit} s"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-n0"], ["-n2"]], ids=["plain", "xdist"])
def test_a_session_names_its_failures_and_leaves_nothing_behind(tmp_path, options):
    pytest_process = start_pytest(tmp_path, "-m", "not slow", *options)
    output, _ = pytest_process.communicate(timeout=120)
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert "3 failed, 2 passed" in output
    for name, rank in {"raises": 1, "dies": 0, "hangs": 1}.items():
        assert any(f"test_{name}[ranks2] - Failed: rank {rank} of 2 " in line for line in failed), (
            output
        )
    wait_until(lambda: not processes_of(pytest_process.pid), limit=10)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-n0"], ["-n1"]], ids=["plain", "xdist"])
def test_busy_ranks_end_when_pytest_is_killed(tmp_path, options):
    pytest_process = start_pytest(tmp_path, "-m", "slow", *options)
    wait_until(lambda: all((tmp_path / rank).exists() for rank in "01"))
    assert len(processes_of(pytest_process.pid)) >= 3
    pytest_process.kill()
    pytest_process.communicate()
    wait_until(lambda: not processes_of(pytest_process.pid), limit=20)
