"""Nothing is used before it has arrived: every communication happens at the last moment allowed.

``DeferredCollectives`` starts each communication only when its handle is waited for. A missing wait
then leaves the data where they were, every time, instead of once in a thousand runs.
"""

import copy

import pytest
import torch
from torch.optim import Adafactor, AdamW

from shardopt import ShardedOptimizer
from shardopt.comm.torch_group import TorchCollectives
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model, train


class Deferred:
    """A communication that starts when it is waited for."""

    def __init__(self, start):
        self._start = start

    def wait(self):
        self._start().wait()


class DeferredCollectives(TorchCollectives):
    """The same collectives, as late as possible."""

    def all_gather(self, bucket, borders):
        start = super().all_gather
        return Deferred(lambda: start(bucket, borders))

    def broadcast(self, tensor, source):
        start = super().broadcast
        return Deferred(lambda: start(tensor, source))

    def send(self, tensor, to):
        start = super().send
        return Deferred(lambda: start(tensor, to))

    def receive(self, tensor, source):
        start = super().receive
        return Deferred(lambda: start(tensor, source))


@on_ranks(2, 3)
@pytest.mark.parametrize("optimizer_class", [AdamW, Adafactor])
def test_everything_waits_for_what_it_uses(optimizer_class, rank):
    ours, theirs = make_model(), make_model()
    options = {"kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS}
    collectives = DeferredCollectives()
    optimizer = ShardedOptimizer(
        ours.parameters(), optimizer_class, collectives, lr=torch.tensor(0.1), **options
    )
    twin = optimizer_class(theirs.parameters(), lr=torch.tensor(0.1))
    train(ours, optimizer, 0, 3)
    train(theirs, twin, 0, 3)
    assert_same_parameters(ours, theirs)
    optimizer.consolidate_state_dict(to=1)
    if rank == 1:
        assert_same(optimizer.state_dict(), twin.state_dict())
    saved = copy.deepcopy(twin.state_dict())
    fresh = ShardedOptimizer(
        ours.parameters(), optimizer_class, collectives, lr=torch.tensor(9.0), **options
    )
    fresh.load_state_dict(saved if rank == 1 else None, from_=1)
    assert_same(fresh.param_groups[0]["lr"], torch.tensor(0.1))
    train(ours, fresh, 3, 5)
    train(theirs, twin, 3, 5)
    assert_same_parameters(ours, theirs)
