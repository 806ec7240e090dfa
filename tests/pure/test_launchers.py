"""Which rank of how many the environment makes of a process, and what contradicts itself."""

import re
import subprocess
import sys

import pytest

from shardopt.launchers import Launched, first_host, launched, slurm_address
from tests import ROOT

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "6", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH = {  # of the script of sbatch, before srun has started anything
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[01-03]",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2(x3)",
}
SLURM = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "6"}
# What has started one process to a node, which has started ranks there.
PROXY = SLURM | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "3"}
OPEN_MPI_AGENT = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}
MPICH_AGENT = {"PMI_RANK": "1", "PMI_SIZE": "3"}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (OPEN_MPI, "Open MPI"),
        (MPICH, "MPICH or Intel MPI"),
        (SLURM, "Slurm"),
    ],
)
def test_each_launcher_is_read(environment, launcher):
    assert launched(environment) == Launched(launcher, 3, 6, 1, 2)


@pytest.mark.parametrize("environment", [{}, BATCH, {"SLURM_NTASKS": "8", "LOCAL_RANK": "-1"}])
def test_nothing_has_started_one_process(environment):
    assert launched(environment) == Launched("no launcher", 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (TORCHRUN, OPEN_MPI_AGENT),
        (TORCHRUN, MPICH_AGENT),
        (TORCHRUN, PROXY),
        (OPEN_MPI, PROXY),
        (MPICH, PROXY),
    ],
)
def test_the_inner_launcher_counts(inner, outer):
    assert launched(outer | inner) == launched(inner)
    assert launched(BATCH | inner) == launched(inner)


def test_what_is_set_by_hand_has_to_agree_with_a_launcher():
    assert launched(BY_HAND) == Launched("the environment", 3, 6)
    known = Launched("the environment", 3, 6, 1, 2)
    for other in (OPEN_MPI, MPICH, SLURM):
        assert launched(BY_HAND | other) == known
    assert launched(BY_HAND | MPICH | PROXY) == known
    said = "got rank 2 of 6 from the environment, and rank 3 of 6 from "
    for other in (OPEN_MPI, MPICH, SLURM):
        with pytest.raises(ValueError, match=f"launchers that agree, {said}.*; unset the variable"):
            launched(BY_HAND | {"RANK": "2"} | other)
    with pytest.raises(ValueError, match="rank 3 of 6 from Open MPI, and rank 2 of 6 from MPICH"):
        launched(OPEN_MPI | MPICH | {"PMI_RANK": "2"})


def test_a_launcher_that_agrees_says_what_the_counting_one_does_not():
    """srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE, and nothing of this machine."""
    pmi = {"PMI_RANK": "3", "PMI_SIZE": "6"}
    assert launched(pmi) == Launched("MPICH or Intel MPI", 3, 6)
    assert launched(pmi | SLURM) == Launched("MPICH or Intel MPI", 3, 6, 1, 2)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0"}, "expected WORLD_SIZE beside RANK=0, got none; set both"),
        ({"WORLD_SIZE": "2"}, "expected RANK beside WORLD_SIZE=2, got none"),
        ({"PMI_RANK": "0"}, "expected PMI_SIZE beside PMI_RANK=0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "expected RANK below WORLD_SIZE=2, got 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "expected RANK below WORLD_SIZE=0"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK: expected a whole number, got 'one'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "got '-1'; correct the variable or unset it"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK: expected a whole number, got ''"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "expected LOCAL_RANK below LOCAL_WORLD_SIZE=2, got 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "7"}, "LOCAL_WORLD_SIZE of at most WORLD_SIZE=6, got 7"),
        (BY_HAND | {"LOCAL_RANK": "6"}, "expected LOCAL_RANK below WORLD_SIZE=6, got 6"),
        (
            SLURM | {"SLURM_LOCALID": "2"},
            "expected SLURM_LOCALID below SLURM_TASKS_PER_NODE here=2",
        ),
        (SLURM | {"SLURM_PROCID": "6"}, "expected SLURM_PROCID below SLURM_NTASKS=6, got 6"),
    ],
)
def test_variables_that_contradict_one_another_are_named(environment, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        launched(environment)


@pytest.mark.parametrize(
    ("tasks", "node", "here"),
    [("2(x3)", 2, 2), ("4,2", 1, 2), ("3(x1),1(x3)", 3, 1), ("2", 1, None), ("many", 0, None)],
)
def test_slurm_counts_tasks_by_node(tasks, node, here):
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    assert launched(environment | {"SLURM_LOCALID": "0"}).local_world_size == here


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("node[01-04,7],login", "node01"),
        ("node[7,01-04]", "node7"),
        ("rack[2-3]node[04-07,9]-ib,x", "rack2node04-ib"),
        ("login,node[1-2]", "login"),
        ("10.0.0.7,10.0.0.8", "10.0.0.7"),
    ],
)
def test_the_first_of_slurms_hosts(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",a", "node[1-2", "[", "node]1"])
def test_a_list_of_hosts_that_is_none(nodes):
    with pytest.raises(ValueError, match=re.escape(f"got {nodes!r}; set MASTER_ADDR")):
        first_host(nodes)


def test_ranks_of_slurm_meet_at_one_address_and_steps_at_different_ones():
    host, port = slurm_address(SLURM)
    assert (host, port) == slurm_address(SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert host == "node01"
    ports = {
        slurm_address(SLURM | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})[1]
        for job in ("4711", "4712", "99999999")
        for step in ("0", "1", "2")
    }
    assert len(ports) == 9
    assert all(1024 < port < 32768 for port in ports)
    step = SLURM | {"SLURM_STEP_NODELIST": "node02"}
    assert slurm_address(step)[0] == "node02"


def test_no_torch_is_needed():
    lines = "import sys, shardopt.launchers as l; l.launched({}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], check=True, cwd=ROOT)
