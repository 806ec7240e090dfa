"""A run of two steps that ``save`` has written, to be damaged, and what must come of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from shardopt import ShardedOptimizer
from shardopt.checkpoint import latest, load, save
from shardopt.checkpoint.verify import verify
from shardopt.errors import CheckpointError
from tests.twins import assert_same

RANKS_FILE, VALUES, METADATA = "__0_0.distcp", "values.distcp", ".metadata"
EXTRA = {"seen": [1, 2.5], "rng": torch.arange(9)}


def begin(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(150, 200), nn.BatchNorm1d(200))
    return model, ShardedOptimizer(model.named_parameters(), AdamW, lr=0.1)


def train(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def everything(model, optimizer):
    optimizer.consolidate_state_dict()
    saved = optimizer.state_dict()
    groups = [dict(sorted(group.items())) for group in saved["param_groups"]]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    state = {
        number: {key: value.clone() for key, value in entries.items()}
        for number, entries in saved["state"].items()
    }
    return {"model": values, "state": state, "groups": groups}


def write(directory: Path):
    """Two steps; returns what each holds."""
    model, optimizer = begin()
    holds = {}
    for step in (1, 2):
        train(model, optimizer)
        save(directory, step=step, model=model, optimizer=optimizer, extra={**EXTRA, "step": step})
        holds[step] = everything(model, optimizer)
    return holds


def assert_noticed(run, holds, error, words, *, when_loaded=True):
    """Step 2 does not verify; a load names the damage, or brings what was saved; step 1 is there.

    ``when_loaded``: whether a load of step 2 must fail, ``None`` if it may.
    """
    with pytest.raises(error) as caught:
        verify(run / "step-2")
    for word in words:
        assert word in str(caught.value)
    assert latest(run) == run / "step-1"
    model, optimizer = begin(seed=5)
    train(model, optimizer)
    before = everything(model, optimizer)
    try:
        loaded = load(run, step=2, model=model, optimizer=optimizer)
    except CheckpointError as problem:
        assert when_loaded is not False
        assert words[0] in str(problem)
        assert_same(everything(model, optimizer), before)
    else:
        assert not when_loaded
        assert_same(everything(model, optimizer), holds[2])
        assert loaded.extra["seen"] == EXTRA["seen"] and loaded.extra["step"] == 2
        assert_same(loaded.extra["rng"], EXTRA["rng"])
    assert load(run, model=model, optimizer=optimizer).step == 1
    assert_same(everything(model, optimizer), holds[1])
