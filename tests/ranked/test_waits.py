"""Nothing is used before it has arrived: every communication happens at the last moment allowed.

``DeferredCollectives`` starts each communication only when its handle is waited for. A missing wait
then leaves the data where they were, every time, instead of once in a thousand runs.
"""

import copy

import pytest
import torch
from torch import nn
from torch.optim import Adafactor, AdamW, SparseAdam

from shardopt import Guards, ShardedOptimizer
from shardopt.comm.torch_group import TorchCollectives
from shardopt.errors import AgreementError
from shardopt.gradients import norms
from shardopt.gradients.producers import Producers
from tests.each_rank import KINDS, loss_of, mean_gradients
from tests.ranks import on_ranks
from tests.third_party import Scaling
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model, train


class Deferred:
    """A communication that starts when it is first waited for."""

    rows = None

    def __init__(self, start):
        self._start = start

    def wait(self):
        start, self._start = self._start, None
        if start is not None:
            start().wait()

    def is_done(self):
        return False


class DeferredCollectives(TorchCollectives):
    """The same collectives, as late as possible. No bucket is gathered twice at a time."""

    def __init__(self, process_group=None):
        super().__init__(process_group)
        self.under_way = set()

    def all_gather(self, bucket, borders):
        assert bucket.data_ptr() not in self.under_way
        self.under_way.add(bucket.data_ptr())
        gather = super().all_gather

        def start():
            self.under_way.remove(bucket.data_ptr())
            return gather(bucket, borders)

        return Deferred(start)

    def reduce_scatter(self, bucket, borders, out):
        reduce, reduction = super().reduce_scatter, Deferred(None)

        def start():
            under_way = reduce(bucket, borders, out)
            reduction.rows = under_way.rows
            return under_way

        reduction._start = start
        return reduction

    def all_to_all(self, send, send_sizes, out, out_sizes):
        start = super().all_to_all
        return Deferred(lambda: start(send, send_sizes, out, out_sizes))

    def broadcast(self, tensor, source):
        start = super().broadcast
        return Deferred(lambda: start(tensor, source))

    def send(self, tensor, to):
        start = super().send
        return Deferred(lambda: start(tensor, to))

    def receive(self, tensor, source):
        start = super().receive
        return Deferred(lambda: start(tensor, source))


@on_ranks(2, 3, slow=[3])
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


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_wait_for_what_they_use(kind, on_host, rank, world_size, monkeypatch):
    """Norms also as on an accelerator, where they travel by themselves."""
    monkeypatch.setattr(norms, "is_host", lambda device: on_host)
    ours, theirs = make_model(seed=rank), make_model(seed=0)
    options = {"kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, "lr": 0.1}
    optimizer = ShardedOptimizer(
        ours.parameters(), AdamW, DeferredCollectives(), gradients=kind, **options
    )
    twin = AdamW(theirs.parameters(), lr=0.1)
    assert_same_parameters(ours, theirs)
    for step in range(3):
        loss_of(ours, step, rank).backward()
        if step > 0:
            norm = optimizer.clip_grad_norm_(1e9)  # so large that nothing is rounded
        optimizer.step()
        means = mean_gradients(theirs, step, world_size)
        for parameter, mean in zip(theirs.parameters(), means, strict=True):
            parameter.grad = mean
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1e9)
        if step > 0:
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        twin.step()
        assert_same_parameters(ours, theirs)


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_waits_for_the_producers_of_its_gradients(kind, rank, monkeypatch):
    """They are streams of a GPU; here is noted who would wait for which."""
    produced, awaited = [], []
    monkeypatch.setattr(Producers, "note", lambda _, index, parameter: produced.append(index))
    monkeypatch.setattr(Producers, "wait_for", lambda _, gradients: awaited.extend(gradients))
    model = make_model()
    optimizer = ShardedOptimizer(
        model.parameters(), AdamW, gradients=kind, bucket_cap_mb=SMALL_BUCKETS
    )
    loss_of(model, 0, rank).backward()
    optimizer.step()
    everyone = list(range(len([*model.parameters()])))
    assert sorted(produced) == sorted(awaited) == everyone


@on_ranks(2, 3, slow=[3])
def test_a_method_of_the_class_waits_for_the_step_before():
    """Nothing of the model has looked at the parameters in between."""
    ours, theirs = make_model(), make_model()
    options = {"lr": 0.1, "bucket_cap_mb": SMALL_BUCKETS}
    optimizer = ShardedOptimizer(ours.parameters(), Scaling, DeferredCollectives(), **options)
    optimizer.overlap_forward(ours)
    twin = Scaling(theirs.parameters(), lr=0.1)
    for model, each in ((ours, optimizer), (theirs, twin)):
        train(model, each, 0, 1)
        each.scale(0.5)
    assert_same_parameters(ours, theirs)


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_tables_wait_for_what_they_use(kind, rank, world_size):
    tables = [nn.Embedding(60, 5, sparse=True, _weight=torch.ones(60, 5)) for _ in range(2)]
    optimizer = ShardedOptimizer(
        tables[0].parameters(), SparseAdam, DeferredCollectives(), gradients=kind
    )
    twin = SparseAdam(tables[1].parameters())

    def look_up(table, step, one):  # each rank a row more than the one before
        rows = [*range(one + 1), 30 + step, 59 - one]
        return (table(torch.tensor(rows)) * (1 + one)).sum()

    for step in range(3):
        look_up(tables[0], step, rank).backward()
        torch.stack([look_up(tables[1], step, one) for one in range(world_size)]).mean().backward()
        optimizer.step()
        twin.step()
        twin.zero_grad()
        torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-6, atol=0)


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_is_forgotten_does_not_arrive_later(passes, to_none, kind, rank):
    """A NaN that was under way when gradients were cleared is none of the next step."""
    model = make_model()
    optimizer = ShardedOptimizer(
        model.parameters(),
        AdamW,
        DeferredCollectives(),
        gradients=kind,
        bucket_cap_mb=SMALL_BUCKETS,
        guards=Guards(nonfinite="raise"),
    )
    for _ in range(passes):
        (loss_of(model, 0, rank) * float("nan")).backward()
    optimizer.zero_grad(to_none)
    optimizer.step()  # on no gradients at all, or on zeros
    loss_of(model, 0, rank).backward()
    optimizer.step()


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("kind", ["replicated", *KINDS])
def test_another_lr_on_one_rank_is_named_before_the_step(kind, rank):
    model = make_model()
    optimizer = ShardedOptimizer(model.parameters(), AdamW, gradients=kind)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss_of(model, 0, 0 if kind == "replicated" else rank).backward()
    if rank == 1:
        optimizer.param_groups[0]["lr"] = 7.0
    with pytest.raises(AgreementError, match=r"group 0, lr: rank 1 has 7\.0, rank 0 has 0\.001"):
        optimizer.step()
    assert_same([parameter.detach() for parameter in model.parameters()], before)
