"""The peak of each kind of gradients, against the formulas of docs/design.md.

Measured by ``benchmarks.common.peak_allocated``: what torch's CPU allocator tells the profiler.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

from benchmarks.common import MB, peak_allocated
from shardopt import ShardedOptimizer
from tests.ranks import on_ranks

LAYERS, WIDTH = 80, 512
PARAMETERS = 4 * LAYERS * WIDTH * WIDTH / MB
BUCKET_MB = 1  # MiB: one layer, and a small part of the whole, as buckets are of a large model
BUCKET = BUCKET_MB * (1 << 20) / MB


def train(gradients: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    optimizer = ShardedOptimizer(
        model.parameters(), AdamW, gradients=gradients, bucket_cap_mb=BUCKET_MB, lr=1e-3
    )
    for _ in range(3):
        model(torch.ones(1, WIDTH)).sum().backward()
        if gradients == "replicated" and dist.get_world_size() > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()


def formula(gradients: str, num_ranks: int) -> float:
    """Parameters, gradients and two moments, in MB."""
    part = PARAMETERS / num_ranks
    kinds = {
        "replicated": PARAMETERS,
        "local": PARAMETERS + part,
        "sharded": part + 2 * BUCKET,
    }
    return PARAMETERS + kinds[gradients] + 2 * part


@pytest.mark.slow
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("gradients", ["replicated", "local", "sharded"])
def test_peak_is_that_of_the_formula(gradients, world_size):
    train(gradients)  # what is allocated once for ever is there
    peak = peak_allocated(lambda: train(gradients))
    assert peak == pytest.approx(formula(gradients, world_size), rel=0.05)


@pytest.mark.slow
@on_ranks(2)
def test_kinds_differ_by_what_they_keep():
    """Not vacuous: each bound is far from the other kinds' figures."""
    kinds = ("replicated", "local", "sharded")
    peaks = {kind: peak_allocated(partial(train, kind)) for kind in kinds}
    half = PARAMETERS / 2
    assert peaks["local"] - peaks["replicated"] == pytest.approx(half, rel=0.3)
    assert peaks["replicated"] - peaks["sharded"] == pytest.approx(half, rel=0.3)
