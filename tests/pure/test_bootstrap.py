"""What ``bootstrap`` makes of one process, and which GPU a rank has."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shardopt.comm.bootstrap import Ranks, bootstrap, meet, own_gpu
from shardopt.launchers import Launched

ALONE = Launched(local_rank=0, local_world_size=1)
FOURTH = Launched("torchrun", 7, 8, 3, 4)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PMI_RANK",
        "PMI_SIZE",
        "SLURM_STEP_ID",
    ):
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_nothing():
    assert bootstrap("cpu") == Ranks(0, 1, 0, 1, torch.device("cpu"), "no launcher")
    assert not torch.distributed.is_initialized()


def test_without_torch_distributed_ranks_are_what_the_environment_says(monkeypatch):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "351", strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="rank 3 of 5 from the environment without it; set LOCAL"):
        bootstrap("cpu", init=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ranks = bootstrap("cpu", init=False)
    assert ranks == Ranks(3, 5, 1, 2, torch.device("cpu"), "the environment")
    assert not torch.distributed.is_initialized()


def test_where_ranks_meet_has_to_be_known(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected MASTER_ADDR and MASTER_PORT, where ranks meet"):
        bootstrap("cpu")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(ValueError, match="expected MASTER_PORT beside MASTER_ADDR=localhost, got"):
        bootstrap("cpu")


AGAIN = """
import atexit
import torch.distributed as dist
from shardopt.comm.bootstrap import bootstrap

atexit.register(lambda: print("there still is one:", dist.is_initialized()))
bootstrap("cpu")
kept = dist.distributed_c10d._get_default_store()  # as an optimizer with a deadline does
dist.destroy_process_group()
bootstrap("cpu")
"""


@pytest.mark.slow
def test_a_second_start_finds_the_store_of_the_first_and_ends_with_the_process():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
    local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment = {**os.environ, **place, **local}
    run = subprocess.run([sys.executable, "-c", AGAIN], env=environment, capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"there still is one: False\n"), run.stderr


def test_a_device_that_is_none():
    with pytest.raises(ValueError, match="expected 'auto', 'cpu' or 'cuda', got 'gpu'; choose one"):
        bootstrap("gpu")


@pytest.mark.parametrize(
    ("told", "visible", "index"),
    [(ALONE, 1, 0), (ALONE, 8, 0), (FOURTH, 4, 3), (Launched("Slurm", 5, 8, 1), 2, 1)],
)
def test_a_local_rank_has_the_gpu_of_its_number(told, visible, index):
    assert own_gpu(told, visible, {}) == index


def test_slurm_may_show_each_task_its_own_gpu():
    assert own_gpu(FOURTH, 1, {"SLURM_GPUS_PER_TASK": "1"}) == 0
    assert own_gpu(FOURTH, 4, {"SLURM_GPUS_PER_TASK": "1"}) == 3


@pytest.mark.parametrize(
    ("told", "visible", "says"),
    [
        (ALONE, 0, "a GPU for each of 1 ranks on this machine, got 0 on rank 0"),
        (FOURTH, 3, "a GPU for each of 4 ranks on this machine, got 3 on rank 7; start fewer"),
        (Launched("torchrun", 0, 2, 0, 2), 1, "each of 2 ranks on this machine, got 1 on rank 0"),
        (Launched("Slurm", 5, 8, 2), 2, "a GPU for each of 3 ranks"),
        (Launched("the environment", 0, 2), 8, "without it; set LOCAL_RANK beside RANK"),
    ],
)
def test_too_few_gpus_are_refused(told, visible, says):
    with pytest.raises(ValueError, match=says):
        own_gpu(told, visible, {})


def test_mpirun_without_mpi4py_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(ValueError, match=r"expected the package mpi4py.* or set MASTER_ADDR"):
        bootstrap("cpu")


def starts(store: dist.Store, world_size: int, late: int, seconds: float) -> set[str]:
    """What ranks, which are threads here, take for the name of their start."""

    def start(rank):
        if rank == late:
            time.sleep(seconds)
        return meet(store, rank, world_size)

    with ThreadPoolExecutor(world_size) as threads:
        return set(threads.map(start, range(world_size)))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_start_waits_for_every_rank_and_knows_what_earlier_ones_have_left(late):
    store = dist.HashStore()
    names: set[str] = set()
    for _ in range(3):
        began = time.monotonic()
        name = starts(store, 3, late, 0.2)
        assert len(name) == 1
        assert not name & names
        assert time.monotonic() - began > 0.2
        names |= name


def test_ranks_that_do_not_come_are_named(monkeypatch, caplog):
    monkeypatch.setattr("shardopt.comm.bootstrap._QUIET", 0.05)
    store = dist.HashStore()
    store.set("rank 2", "left by an earlier start")
    with pytest.raises(
        RuntimeError, match=r"expected 4 ranks within 0:00:00.1.*, got 1, .*\[1, 3\]"
    ):
        meet(store, 0, 4, within=timedelta(seconds=0.1))
    assert caplog.messages == ["1 of 4 ranks are here, no word of ranks [1, 3]; waiting"]
    with pytest.raises(RuntimeError, match="timeout"):
        meet(store, 3, 4, within=timedelta(seconds=0.1))
