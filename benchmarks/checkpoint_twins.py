"""FSDP2's twin of a model and optimizer, whose state it puts together on the first rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard


def fsdp2_twin(
    number: int,
    shape: tuple[int, int],
    optimizer_class: type[torch.optim.Optimizer],
    options: dict[str, Any],
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """So many parameters of one shape under ``fully_shard``, after one step."""
    model = nn.ParameterList(torch.rand(shape) for _ in range(number))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def fsdp2_full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All of the optimizer's state, on the first rank's CPU."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)
