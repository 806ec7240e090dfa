"""On which ranks the state is sharded: whatever is given as ``process_group``."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW

from shardopt import ShardedOptimizer
from shardopt.comm import SoloCollectives
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
def test_a_mesh_of_two_dimensions_is_refused_and_one_of_them_taken(world_size):
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("replicate", "shard"))
    match = r"expected a 1-D DeviceMesh, got 2 dimensions \('replicate', 'shard'\); .* mesh\['shard"
    with pytest.raises(ValueError, match=match):
        ShardedOptimizer(four(), AdamW, mesh)
    assert_trains_on(mesh["shard"], world_size)
    assert_trains_on(mesh["replicate"], 1)


@on_ranks(1, 2, 3)
def test_collectives_of_the_users_own(world_size):
    assert_trains_on(SoloCollectives(), 1)
    theirs = pair(four).optimizer.collectives
    assert_trains_on(theirs, world_size)


@on_ranks(2, 3)
def test_optimizers_over_the_same_ranks_share_one_group_beside_the_users():
    """Communicators cost memory on a GPU; the user's own must stay undisturbed."""
    first, second = (pair(four).optimizer.collectives for _ in range(2))
    assert first._group is second._group is not dist.group.WORLD
