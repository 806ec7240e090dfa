"""Each rank's own batch of ``make_model()``, and the mean gradient that a plain twin gets."""

import torch
from torch import nn

KINDS = ["local", "sharded"]


def batch(step: int, rank: int) -> torch.Tensor:
    """Each rank's own, the same at every call."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 61, generator=generator)


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """Of one rank's batch."""
    return model(batch(step, rank)).square().mean()


def mean_gradients(model: nn.Module, step: int, world_size: int, loss=loss_of):
    """The mean over ranks, summed in rank order as shardopt does."""
    parameters = [*model.parameters()]
    rows = [torch.autograd.grad(loss(model, step, r), parameters) for r in range(world_size)]
    return [sum(column[1:], column[0].clone()) / world_size for column in zip(*rows, strict=True)]
