"""On which ranks the state is sharded: whatever is given as ``process_group``."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW

from shardopt import ShardedOptimizer
from shardopt.comm import SoloCollectives
from shardopt.comm.torch_group import TorchCollectives
from tests import ROOT
from tests.pairs import four, pair
from tests.ranks import on_ranks


def assert_trains_on(process_group, world_size: int) -> None:
    trained = pair(four, process_group=process_group)
    assert trained.optimizer.collectives.world_size == world_size
    trained.train(2)
    trained.assert_is_shared_out()


@on_ranks(1, 2, 3)
def test_a_process_group_or_none(world_size):
    assert_trains_on(None, world_size)
    assert_trains_on(dist.group.WORLD, world_size)


@on_ranks(3)
@pytest.mark.parametrize("members", [[0, 1], [1, 2], [2, 0], [1]], ids=str)
def test_a_group_of_some_ranks(members, rank):
    group = dist.new_group(members)
    if rank in members:
        assert_trains_on(group, len(members))
        dist.barrier(group)
    else:
        with pytest.raises(ValueError, match=f"this rank in it, got none for global rank {rank}"):
            ShardedOptimizer(four(), AdamW, group)


@on_ranks(2, 3)
def test_groups_of_one_rank_each_train_apart(rank, world_size):
    groups = [dist.new_group([each]) for each in range(world_size)]
    trained = pair(four, process_group=groups[rank])
    for _ in range(rank + 1):
        trained.step()
    trained.assert_same()


@on_ranks(1, 2, 3)
def test_a_mesh_of_one_dimension(world_size):
    assert_trains_on(init_device_mesh("cpu", (world_size,)), world_size)


@on_ranks(1, 2, 3)
def test_a_mesh_of_two_dimensions_or_one_of_them(world_size):
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("replicate", "shard"))
    assert_trains_on(mesh, world_size)
    assert_trains_on(mesh["shard"], world_size)
    assert_trains_on(mesh["replicate"], 1)


@on_ranks(1, 2)
def test_a_mesh_of_three_dimensions_is_refused(world_size):
    mesh = init_device_mesh("cpu", (1, 1, world_size), mesh_dim_names=("a", "b", "shard"))
    match = (
        r"2-D one \(replicate x shard\), got 3 dimensions \('a', 'b', 'shard'\); .* mesh\['shard"
    )
    with pytest.raises(ValueError, match=match):
        ShardedOptimizer(four(), AdamW, mesh)


@on_ranks(1, 2, 3)
def test_collectives_of_the_users_own(world_size):
    assert_trains_on(SoloCollectives(), 1)
    theirs = pair(four).optimizer.collectives
    assert_trains_on(theirs, world_size)


@on_ranks(2, 3)
def test_optimizers_over_the_same_ranks_share_their_groups_beside_the_users():
    """Communicators cost memory on a GPU; the user's own must stay undisturbed."""
    first, second = (pair(four).optimizer.collectives for _ in range(2))
    assert first._group is second._group is not dist.group.WORLD
    assert first._messages is second._messages is not first._group


@on_ranks(2)
def test_no_group_of_ours_outlives_its_destruction():
    """Its threads would still be there when the interpreter ends, and abort the process."""
    collectives = TorchCollectives(dist.new_group([0, 1]))
    own = weakref.ref(collectives._group)
    del collectives
    gc.collect()
    dist.destroy_process_group(own())
    gc.collect()
    assert own() is None


ENDS_BADLY = """
import sys, torch, shardopt, torch.distributed as dist
dist.init_process_group("gloo")
parameter = torch.nn.Parameter(torch.ones(3000))
optimizer = shardopt.ShardedOptimizer([parameter], torch.optim.SGD)
sys.setswitchinterval(100)  # a thread that waits for the interpreter's lock waits until the end
parameter.grad = torch.ones(3000)
optimizer.step()
optimizer.consolidate_state_dict(to=None)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_job_ends_in_peace_though_its_optimizer_is_global(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(ENDS_BADLY)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(5):
        command = [sys.executable, *launcher, str(script)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
