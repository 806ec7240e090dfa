"""What FSDP2 and torch's distributed checkpoint have written, read by one process."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardopt.checkpoint.boxes import Box
from shardopt.checkpoint.opening import open_source
from shardopt.checkpoint.plain import TensorKey
from tests.foreign import filled, read_box
from tests.ranks import on_ranks
from tests.twins import assert_same


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.norm(self.inner(x)) * self.scale


def trained(world_size, dim):
    torch.manual_seed(1)
    model, mesh = Model(), init_device_mesh("cpu", (world_size,))
    placed = {"shard_placement_fn": lambda p: Shard(dim if p.ndim > dim else 0)}
    fully_shard(model.inner, mesh=mesh, **placed)
    fully_shard(model, mesh=mesh, **placed)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    for _ in range(2):
        model(torch.randn(4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@on_ranks(1, 2, 3, slow=[1, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_a_model_and_its_optimizer_are_read_whole(world_size, tmp_path, flat):
    save_and_read(*trained(world_size, dim=0), tmp_path, flat)


@on_ranks(1, 2)  # FSDP2 shards other dims than the first evenly only
@pytest.mark.parametrize("flat", [False, True])
def test_a_model_sharded_along_columns_is_read_whole(world_size, tmp_path, flat):
    save_and_read(*trained(world_size, dim=1), tmp_path, flat)


def save_and_read(model, optimizer, tmp_path, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    sharded = get_model_state_dict(model)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    state = {**sharded, "optimizer": optim} if flat else {"model": sharded, "optim": optim}
    dcp.save({**state, "note": {"seen": [1, 2]}}, checkpoint_id=tmp_path / "d")
    full = StateDictOptions(full_state_dict=True)
    expected = get_model_state_dict(model, options=full)
    expected_optim = get_optimizer_state_dict(model, optimizer, options=full)
    with open_source(tmp_path / "d") as source:
        found = filled(source.tree, source)
    assert found["extra"] == {"note": {"seen": [1, 2]}}
    assert_same(found["model"], expected)
    if flat:  # parameters in the order of the model, in groups of equal options
        assert found["optimizer"]["state"].keys() == expected_optim["state"].keys()
        for name, state in expected_optim["state"].items():
            assert_same(found["optimizer"]["state"][name], state)
    else:
        assert_same(found["optimizer"], expected_optim)
    groups = [
        (group["weight_decay"], sorted(group["params"]))
        for group in found["optimizer"]["param_groups"]
    ]
    assert sorted(groups) == sorted(
        (group["weight_decay"], sorted(group["params"])) for group in expected_optim["param_groups"]
    )


TENSORS = {
    "fp32": torch.arange(24.0).view(6, 4),
    "bf16": torch.arange(24, dtype=torch.bfloat16).view(4, 6),
    "int64": torch.arange(12).view(3, 4),
    "bool": torch.arange(12).view(3, 4) % 3 == 0,
    "complex64": torch.complex(torch.arange(12.0), -torch.arange(12.0)).view(3, 4),
    "more ranks than rows": torch.arange(4.0).view(1, 4),
    "channels_last": torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last),
    "no elements": torch.empty(0, 4),
}


@on_ranks(1, 2, 3, slow=[1, 3])
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_tensors_of_all_ranks_are_read_by_each(world_size, tmp_path, name, placement):
    tensor, mesh = TENSORS[name].clone(), init_device_mesh("cpu", (world_size,))
    dist.broadcast(tensor, 0)
    spread = distribute_tensor(tensor, mesh, [placement])
    dcp.save({"w": spread, "all": torch.tensor(2.5)}, checkpoint_id=tmp_path / "d")
    with open_source(tmp_path / "d") as source:
        assert source.tree == {"model": {"w": TensorKey("w"), "all": TensorKey("all")}}
        assert_same(read_box(source, "w"), tensor)
        assert_same(read_box(source, "all"), torch.tensor(2.5))
        for dim, size in enumerate(tensor.shape):
            if size > 2 and tensor.numel():
                offsets, sizes = [0] * tensor.ndim, list(tensor.shape)
                offsets[dim], sizes[dim] = 1, size - 2
                part = read_box(source, "w", Box(tuple(offsets), tuple(sizes)))
                assert_same(part, tensor.narrow(dim, 1, size - 2))
