"""torch's own clipping finds no freed gradient, and says so."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_  # taken before all is watched
from torch.optim import SGD

from shardopt import ShardedOptimizer
from shardopt.errors import GradientError
from shardopt.gradients import torch_calls


def sharded(model):
    return ShardedOptimizer(model.parameters(), SGD, gradients="sharded")


CLIPPERS = {
    "clip_grad_norm_": clip_grad_norm_,
    "clip_grad_value_": clip_grad_value_,
    "clip_grads_with_norm_": lambda parameters, limit: torch.nn.utils.clip_grads_with_norm_(
        parameters, limit, torch.tensor(2.0)
    ),
}


@pytest.mark.parametrize("name", torch_calls._CLIPPERS)
def test_torch_has_the_function_that_is_watched(name):
    sharded(nn.Linear(3, 2))
    assert torch_calls.cell_of(name).cell_contents._by_shardopt


@pytest.mark.parametrize("name", CLIPPERS)
def test_clipping_freed_gradients_raises_and_names_ours(name):
    model, clip = nn.Linear(3, 2), CLIPPERS[name]
    optimizer = sharded(model)
    other = nn.Parameter(
        torch.ones(1)
    )  # of no optimizer; torch's clip_grad_value_ wants a gradient
    other.grad = torch.ones(1)
    both = [*model.parameters(), other]
    clip(both, 1.0)  # nothing has been freed yet
    model(torch.ones(1, 3)).sum().backward()
    ours = "clip_grad_value_" if name == "clip_grad_value_" else "clip_grad_norm_"
    words = rf"of parameter 0 of shape \(2, 3\) has .* use optimizer\.{ours}$"
    with pytest.raises(GradientError, match=words):
        clip(both, 1.0)
    optimizer.step()
    clip(both, 1.0)  # used up


def test_values_of_others_are_clipped_as_ever():
    ours, model = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = sharded(ours)
    for each in (ours, model):
        each(torch.ones(1, 3)).sum().backward()
    clip_grad_value_((parameter for parameter in model.parameters()), 0.25)
    assert all(parameter.grad.eq(0.25).all() for parameter in model.parameters())
    optimizer.step()


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
