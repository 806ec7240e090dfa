"""Gradients that ranks bring: averaged by shardopt, equal to the unsharded twin on their mean."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW

from shardopt import ShardedOptimizer
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model

KINDS = ["local", "sharded"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def batch(step: int, rank: int) -> torch.Tensor:
    """Each rank's own."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 61, generator=generator)


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    return model(batch(step, rank)).square().mean()


def mean_gradients(model: nn.Module, step: int, world_size: int) -> list[torch.Tensor | None]:
    """The mean over ranks, summed in rank order as shardopt does."""
    rows = [
        torch.autograd.grad(loss_of(model, step, rank), [*model.parameters()], allow_unused=True)
        for rank in range(world_size)
    ]
    means = []
    for column in zip(*rows, strict=True):
        total = column[0].clone()
        for gradient in column[1:]:
            total += gradient
        means.append(total / world_size)
    return means


def sharded(model: nn.Module, kind: str, optimizer_class=AdamW, **options) -> ShardedOptimizer:
    options = {"lr": 0.01, "kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, **options}
    return ShardedOptimizer(model.parameters(), optimizer_class, gradients=kind, **options)


@on_ranks(1, 2, 3)
@every_kind
@pytest.mark.parametrize("optimizer_class", [AdamW, SGD, Adafactor])
def test_equals_the_twin_on_the_mean(kind, optimizer_class, rank, world_size):
    ours, theirs = make_model(), make_model()
    optimizer = sharded(ours, kind, optimizer_class)
    twin = optimizer_class(theirs.parameters(), lr=0.01)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(ours, step, rank).backward()
        optimizer.step()
        means = mean_gradients(theirs, step, world_size)
        for parameter, mean in zip(theirs.parameters(), means, strict=True):
            parameter.grad = mean
        twin.step()
        assert_same_parameters(ours, theirs)
    optimizer.consolidate_state_dict(to=None)
    assert_same(optimizer.state_dict()["state"], twin.state_dict()["state"])
