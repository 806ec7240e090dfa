"""fp16: a scaler whose ranks skip and shrink alike, and torch's where it can do the same."""

import pytest
import torch
from torch.optim import SGD

import shardopt
from shardopt import ShardedOptimizer
from shardopt.errors import UnsupportedError
from tests.each_rank import KINDS, batch, mean_gradients
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, make_model

OPTIONS = {"init_scale": 2.0**10, "growth_interval": 3}


def forward(model, step, rank):
    with torch.autocast("cpu", torch.float16):
        return model(batch(step, rank)).float().square().mean()


def sharded(model, kind, **options):
    options = {"lr": 0.01, "momentum": 0.9, "bucket_cap_mb": SMALL_BUCKETS, **options}
    return ShardedOptimizer(model.parameters(), SGD, kernel="torch", gradients=kind, **options)


def scaled_step(model, optimizer, scaler, step, rank, clip=None, spoil=False):
    optimizer.zero_grad()
    loss = scaler.scale(forward(model, step, rank))
    if spoil:  # one parameter, so that one rank alone finds it
        loss = loss + float("inf") * model[4].bias.sum()
    loss.backward()
    if clip:
        scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(clip)
    scaler.step(optimizer)
    scaler.update()


def twin_step(model, optimizer, scaler, step, world_size, clip=None, spoil=False):
    scale = scaler.scale(torch.ones(()))
    means = mean_gradients(model, step, world_size, lambda *each: forward(*each) * scale)
    for parameter, mean in zip(model.parameters(), means, strict=True):
        parameter.grad = mean
    if spoil:
        model[4].bias.grad.fill_(float("inf"))
    if clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_equals_torchs_scaler_on_the_mean(kind, clip, rank, world_size):
    """Inf on the last rank in step 2 alone: all skip it, all shrink, and all grow later."""
    ours, theirs = make_model(), make_model()
    optimizer, twin = sharded(ours, kind), SGD(theirs.parameters(), 0.01, momentum=0.9)
    scaler, other = shardopt.GradScaler("cpu", **OPTIONS), torch.amp.GradScaler("cpu", **OPTIONS)
    scales = []
    for step in range(7):
        before = [parameter.detach().clone() for parameter in ours.parameters()]
        spoil = step == 2
        scaled_step(ours, optimizer, scaler, step, rank, clip, spoil and rank == world_size - 1)
        twin_step(theirs, twin, other, step, world_size, clip, spoil)
        assert scaler.get_scale() == other.get_scale()
        scales.append(scaler.get_scale())
        moved = not torch.equal(before[0], next(ours.parameters()))
        assert moved == (not spoil)
    assert min(scales) == 2.0**9 < scales[-1]
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6 if clip else 0)


@on_ranks(1, 2)
def test_replicated_gradients_work_with_either_scaler():
    models = [make_model() for _ in range(3)]
    optimizers = [sharded(models[0], "replicated"), sharded(models[1], "replicated")]
    optimizers.append(SGD(models[2].parameters(), 0.01, momentum=0.9))
    scalers = [cls("cpu", **OPTIONS) for cls in (shardopt.GradScaler, *[torch.amp.GradScaler] * 2)]
    for step in range(4):
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            scaled_step(model, optimizer, scaler, step, rank=0, spoil=step == 1)
    for model in models[:2]:
        assert_same([*model.parameters()], [*models[2].parameters()])
    assert scalers[0].state_dict() == scalers[2].state_dict()


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_scaler_is_refused_with_ours_as_the_remedy(kind, rank):
    model, scaler = make_model(), torch.amp.GradScaler("cpu")
    optimizer = sharded(model, kind)
    scaler.scale(forward(model, 0, rank)).backward()
    with pytest.raises(UnsupportedError, match=r"use shardopt\.GradScaler"):
        scaler.step(optimizer)


@on_ranks(1, 2)
def test_fp16_gradients_are_refused_as_by_torch():
    parameter = torch.nn.Parameter(torch.ones(2000, dtype=torch.float16))
    optimizer = ShardedOptimizer([parameter], SGD, gradients="sharded")
    scaler = shardopt.GradScaler("cpu")
    scaler.scale(parameter.float().sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)
