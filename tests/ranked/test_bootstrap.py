"""``bootstrap`` where ``torch.distributed`` is initialised already."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from shardopt.comm.bootstrap import Ranks, bootstrap
from tests.ranks import on_ranks


@on_ranks(2, slow=[3])
def test_the_group_that_is_there_counts(rank, world_size):
    group = dist.group.WORLD
    expected = Ranks(rank, world_size, rank, world_size, torch.device("cpu"), "torch.distributed")
    assert bootstrap("cpu") == expected  # all ranks are on one machine, as its name tells
    assert dist.group.WORLD is group
    variables = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    with mock.patch.dict(os.environ, variables):
        assert bootstrap("cpu").launcher == "the environment"
    with (
        mock.patch.dict(os.environ, variables | {"WORLD_SIZE": "7"}),
        pytest.raises(ValueError, match=f"got rank {rank} of {world_size} from torch.distributed"),
    ):
        bootstrap("cpu")
