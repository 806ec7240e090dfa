"""The peak of LBFGS, against the formula in ``shardopt/algos/lbfgs.py``.

Measured by ``benchmarks.common.peak_allocated``: what torch's CPU allocator tells the profiler.
"""

import pytest
import torch
from torch import nn
from torch.optim import LBFGS

from benchmarks.common import MB, peak_allocated
from shardopt import ShardedOptimizer
from tests.ranks import on_ranks

LAYERS, WIDTH, HISTORY = 20, 512, 4
PARAMETERS = 4 * LAYERS * WIDTH * WIDTH / MB
BUCKET_MB = 1  # MiB: one layer
WORKING = {None: (7, 7), "strong_wolfe": (7, 12)}  # vectors within a step, beside the history


def train(line_search_fn: str | None, history_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    optimizer = ShardedOptimizer(
        model.parameters(),
        LBFGS,
        gradients="sharded",
        bucket_cap_mb=BUCKET_MB,
        lr=1 if line_search_fn else 0.1,
        line_search_fn=line_search_fn,
        history_size=history_size,
        max_iter=2 * HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
    )

    def closure():
        optimizer.zero_grad()
        layers = enumerate(model.parameters(), 1)  # stiffer from one to the next
        loss = sum(number * weight.cosh().sum() for number, weight in layers)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    (state,) = optimizer.optim.state.values()
    assert len(state["old_dirs"]) == history_size  # it is full


def formula(num_vectors: int, num_ranks: int) -> float:
    """Parameters, a shard of gradients with two buckets in flight, and vectors of a part, in MB."""
    part = PARAMETERS / num_ranks
    gradients = part + 2 * BUCKET_MB * (1 << 20) / MB
    return PARAMETERS + gradients + num_vectors * part


@pytest.mark.slow
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("history_size", [1, HISTORY])
@pytest.mark.parametrize("line_search_fn", WORKING)
def test_peak_is_that_of_the_formula(line_search_fn, history_size, world_size):
    """How many vectors a line search holds at once depends on its way: there are two bounds."""
    train(line_search_fn, history_size)  # what is allocated once for ever is there
    peak = peak_allocated(lambda: train(line_search_fn, history_size))
    least, most = [2 * history_size + number for number in WORKING[line_search_fn]]
    assert 0.98 * formula(least, world_size) < peak < 1.02 * formula(most, world_size)
