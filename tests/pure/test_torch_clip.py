"""torch's own clipping finds no freed gradient, and says so."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_  # taken before anything is watched
from torch.optim import SGD

from shardopt import ShardedOptimizer
from shardopt.errors import GradientError


def sharded(model):
    return ShardedOptimizer(model.parameters(), SGD, gradients="sharded")


def test_torch_has_the_function_that_is_watched():
    assert hasattr(clip_grad, "_clip_grads_with_norm_")


def test_clipping_freed_gradients_raises_and_names_ours():
    model = nn.Linear(3, 2)
    optimizer = sharded(model)
    clip_grad_norm_(model.parameters(), 1.0)  # nothing has been freed yet
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(GradientError, match=r"'0, of shape \(2, 3\)'.*optimizer\.clip_grad_norm_"):
        clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    clip_grad_norm_(model.parameters(), 1.0)  # used up


def test_others_are_clipped_as_ever():
    ours, model = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = sharded(ours)
    for each in (ours, model):
        each(torch.ones(1, 3)).sum().backward()
    norm = clip_grad_norm_((parameter for parameter in model.parameters()), 0.5)
    assert norm > 0.5
    assert torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()])) < 0.6
    del optimizer
    gc.collect()
    clip_grad_norm_(ours.parameters(), 1.0)
