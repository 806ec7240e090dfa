"""What each rank has of its own, and the mean over ranks that a plain twin gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

KINDS = ["local", "sharded"]


def random(*shape: int, seed: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each rank's own, the same at every call."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator, dtype=dtype)


def batch(step: int, rank: int) -> Tensor:
    """For ``make_model()``."""
    return random(8, 61, seed=step, rank=rank)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """Of ``make_model()``, on one rank's batch."""
    return model(batch(step, rank)).square().mean()


def mean_of(column: Sequence[Tensor | None]) -> Tensor | None:
    """The mean over ranks in rank order, in fp32 where elements have 16 bits; absent is zero."""
    there = [gradient for gradient in column if gradient is not None]
    if not there:
        return None
    dense = [torch.zeros_like(there[0]) if g is None else g for g in column]
    wide = torch.float32 if there[0].dtype.itemsize == 2 else there[0].dtype
    rows = [(g if g.layout is torch.strided else g.to_dense()).to(wide) for g in dense]
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return (total / len(rows)).to(there[0].dtype)


def mean_gradients(model: nn.Module, step: int, world_size: int, loss=loss_of):
    """Of all parameters of a model, each rank's batch in turn."""
    parameters = [*model.parameters()]
    rows = [torch.autograd.grad(loss(model, step, r), parameters) for r in range(world_size)]
    return [mean_of(column) for column in zip(*rows, strict=True)]
