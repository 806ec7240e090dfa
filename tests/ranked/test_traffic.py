"""What a step sends, counted; and the one line it logs."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch.optim import AdamW

from shardopt import Guards, ShardedOptimizer, update
from shardopt.comm import Collectives, choose_collectives
from shardopt.comm.torch_group import TorchCollectives
from tests.each_rank import KINDS, loss_of
from tests.pairs import Pair, WholeAdamW, pair, random_parameters
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, make_model


class Counted(Collectives):
    """Passes everything on and keeps a list of it."""

    def __init__(self, inner: Collectives):
        self.inner, self.calls = inner, []
        self.rank, self.world_size = inner.rank, inner.world_size
        self.wire_device = inner.wire_device

    def all_gather(self, bucket, borders):
        self.calls.append(("all_gather", bucket.data_ptr()))
        return self.inner.all_gather(bucket, borders)

    def reduce_scatter(self, bucket, borders, out):
        self.calls.append(("reduce_scatter", bucket.numel()))
        return self.inner.reduce_scatter(bucket, borders, out)

    def all_to_all(self, send, send_sizes, out, out_sizes):
        self.calls.append(("all_to_all", send.numel()))
        return self.inner.all_to_all(send, send_sizes, out, out_sizes)

    def all_gather_rows(self, row):
        self.calls.append(("all_gather_rows", row.numel()))
        return self.inner.all_gather_rows(row)

    def sum_rows(self, row):
        self.calls.append(("sum_rows", row.numel()))
        return self.inner.sum_rows(row)

    def broadcast(self, tensor, source):
        self.calls.append(("broadcast", tensor.numel()))
        return self.inner.broadcast(tensor, source)

    def send(self, tensor, to):
        self.calls.append(("send", tensor.numel()))
        return self.inner.send(tensor, to)

    def receive(self, tensor, source):
        self.calls.append(("receive", tensor.numel()))
        return self.inner.receive(tensor, source)


def counted_pair(optimizer_class=AdamW, **options) -> tuple[Pair, list]:
    collectives = Counted(choose_collectives(None))
    trained = pair(
        lambda: random_parameters((70, 33), (5,), (40, 40), (2500,)),
        optimizer_class,
        process_group=collectives,
        **options,
    )
    return trained, collectives.calls


def calls_of_a_step(trained: Pair, calls: list) -> list:
    calls.clear()
    trained.step()
    return list(calls)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("optimizer_class", [AdamW, WholeAdamW], ids=lambda c: c.__name__)
def test_a_step_agrees_then_gathers_each_bucket_once_in_order_and_nothing_else(
    optimizer_class, kernel
):
    trained, calls = counted_pair(optimizer_class, kernel=kernel)
    buckets = trained.optimizer._shard.buffers.buckets
    gathers = [("all_gather", bucket.data_ptr()) for bucket in buckets]
    assert len(buckets) > 1
    first = calls_of_a_step(trained, calls)
    assert first[-len(gathers) :] == gathers
    whole = [("all_gather_rows", 14 + 1), *gathers]
    for _ in range(3):
        assert calls_of_a_step(trained, calls) == whole
    trained.optimizer.param_groups[0]["lr"] = trained.plain.param_groups[0]["lr"] = 0.1
    assert calls_of_a_step(trained, calls) == whole
    trained.assert_same()


@on_ranks(2, 3, slow=[3])
def test_the_first_step_compares_gradients_by_one_number_each():
    trained, calls = counted_pair()
    first = calls_of_a_step(trained, calls)
    rows = [size for name, size in first if name == "all_gather_rows"]
    failed_before, hashes, report, failed_in_the_class = 1, 4, 14 + 1, 1
    assert rows == [failed_before, hashes, report, failed_in_the_class]
    unguarded, calls = counted_pair(guards=Guards(replicas=False))
    rows = [size for name, size in calls_of_a_step(unguarded, calls) if name == "all_gather_rows"]
    assert rows == [failed_before, report, failed_in_the_class]


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clips", [False, True])
def test_a_step_reduces_and_gathers_each_bucket_once_and_agrees_once(kind, clips, rank):
    collectives = Counted(choose_collectives(None))
    model = make_model()
    options = {"gradients": kind, "bucket_cap_mb": SMALL_BUCKETS}
    optimizer = ShardedOptimizer(model.parameters(), AdamW, collectives, **options)
    buckets = [bucket.numel for bucket in optimizer._shard.layout.buckets]
    assert len(buckets) > 1
    for step in range(3):
        collectives.calls.clear()
        loss_of(model, step, rank).backward()
        assert collectives.calls == [("reduce_scatter", numel) for numel in buckets]
        if clips:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        names = [name for name, _ in collectives.calls[len(buckets) :] if step > 0]
        assert not names or names == ["all_gather_rows"] + ["all_gather"] * len(buckets)
    agreed = next(size for name, size in collectives.calls if name == "all_gather_rows")
    assert agreed == 14 + 1, "a report has 14 words, and one for up to 62 parameters"


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("kind", ["replicated", *KINDS])
@pytest.mark.parametrize("clips", [False, True])
def test_many_ranks_agree_by_one_sum_and_nothing_else(kind, clips, rank):
    collectives = Counted(choose_collectives(None))
    collectives.gathers_up_to = 1
    model = make_model()
    guards = Guards(nonfinite="raise")
    optimizer = ShardedOptimizer(
        model.parameters(), AdamW, collectives, gradients=kind, guards=guards
    )
    for step in range(3):
        loss_of(model, step, 0 if kind == "replicated" else rank).backward()
        collectives.calls.clear()
        if clips:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        agreed = [call for call in collectives.calls if "rows" in call[0]]
        optimizer.zero_grad()
    assert agreed == [("sum_rows", 1 + 1 + 2 * 4 + 1)], "one word for up to 26 parameters"


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("kind", ["replicated", *KINDS])
@pytest.mark.parametrize("optimizer_class", [AdamW, WholeAdamW], ids=lambda c: c.__name__)
def test_a_gather_starts_as_soon_as_its_bucket_is_updated(kind, optimizer_class, monkeypatch):
    """Where the class may go bucket by bucket, which is known of torch's own."""
    collectives = Counted(choose_collectives(None))
    model = make_model()
    options = {"gradients": kind, "bucket_cap_mb": SMALL_BUCKETS}
    optimizer = ShardedOptimizer(model.parameters(), optimizer_class, collectives, **options)
    step = update.step_without_hooks

    def noting(optim):
        collectives.calls.append(("update", 0))
        step(optim)

    monkeypatch.setattr(update, "step_without_hooks", noting)
    num_buckets = len(optimizer._shard.layout.buckets)
    for _ in range(2):
        loss_of(model, 0, 0).backward()
        collectives.calls.clear()
        optimizer.step()
    names = [name for name, _ in collectives.calls if name in ("update", "all_gather")]
    separable = optimizer_class is AdamW
    expected = ["update", "all_gather"] * num_buckets
    assert names == (expected if separable else ["update", *["all_gather"] * num_buckets])


class Waits(TorchCollectives):
    """Counts who starts a reduction and who waits for one; they end at once, or when waited for."""

    def __init__(self, process_group=None, *, quick: bool):
        super().__init__(process_group)
        self.quick, self.num_started, self.num_waits = quick, 0, 0

    def reduce_scatter(self, bucket, borders, out):
        reduction = super().reduce_scatter(bucket, borders, out)
        wait = reduction.wait
        self.num_started += 1

        def counting():
            self.num_waits += not self.quick
            wait()

        reduction.wait, reduction.is_done = counting, lambda: self.quick
        return reduction


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quick", [True, False])
def test_backward_waits_for_nothing_but_room(kind, quick, rank):
    """At most two buckets are under way: a third waits in the hook, or (local) for a later one."""
    model, collectives = make_model(), Waits(quick=quick)
    options = {"gradients": kind, "bucket_cap_mb": 1e-6}
    optimizer = ShardedOptimizer(model.parameters(), AdamW, collectives, **options)
    assert len(optimizer._shard.layout.buckets) == 6
    after_hooks = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: after_hooks.append((collectives.num_started, collectives.num_waits))
        )
    loss_of(model, 0, rank).backward()
    room = 6 if quick or kind == "sharded" else 2
    waits = 0 if quick or kind == "local" else 4
    assert after_hooks == [(min(n, room), min(max(n - 2, 0), waits)) for n in range(1, 7)]
    assert (collectives.num_started, collectives.num_waits) == (6, 0 if quick else 4)
    optimizer.step()
    assert (collectives.num_started, collectives.num_waits) == (6, 0 if quick else 6)


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("quick", [True, False])
def test_optimizers_on_one_channel_start_in_the_order_in_which_buckets_are_ready(quick, rank):
    """Although, where ``.grad`` stays, only time tells when there is room."""
    model, started = make_model(), []

    class Named(Waits):
        def reduce_scatter(self, bucket, borders, out):
            started.append(bucket.numel())
            return super().reduce_scatter(bucket, borders, out)

    options = {"gradients": "local", "bucket_cap_mb": 1e-6}
    halves = [[*model.parameters()][half::2] for half in range(2)]
    optimizers = [
        ShardedOptimizer(half, AdamW, Named(quick=quick and rank == 0), **options)
        for half in halves
    ]
    loss_of(model, 0, rank).backward()
    sizes = {}
    for optimizer, half in zip(optimizers, halves, strict=True):
        for parameter, bucket in zip(reversed(half), optimizer._shard.layout.buckets, strict=True):
            sizes[parameter] = bucket.numel
    arrivals = [sizes[parameter] for parameter in order_of_arrival(model, rank)]
    assert started == arrivals
    for optimizer in optimizers:
        optimizer.step()


def order_of_arrival(model: torch.nn.Module, rank: int) -> list[torch.Tensor]:
    """Of gradients, in a backward without any optimizer."""
    twin, arrived = make_model(), []
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.register_post_accumulate_grad_hook(lambda _, own=parameter: arrived.append(own))
    loss_of(twin, 0, rank).backward()
    return arrived


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kind", KINDS)
def test_no_sync_reduces_once_where_the_full_gradients_are_kept(kind, rank):
    collectives = Counted(choose_collectives(None))
    model = make_model()
    options = {"gradients": kind, "bucket_cap_mb": SMALL_BUCKETS}
    optimizer = ShardedOptimizer(model.parameters(), AdamW, collectives, **options)
    collectives.calls.clear()
    with optimizer.no_sync():
        loss_of(model, 0, rank).backward()
        loss_of(model, 1, rank).backward()
    loss_of(model, 2, rank).backward()
    rounds = 1 if kind == "local" else 3
    assert len(collectives.calls) == rounds * len(optimizer._shard.layout.buckets)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_arrive_in_a_step(kind, rank, world_size):
    """Twice (N-1)/N of the parameters' bytes: gradients, then parameters."""
    parameter = torch.nn.Parameter(torch.ones(3 * 2 * 1024))  # nothing to pad
    optimizer = ShardedOptimizer([parameter], AdamW, gradients=kind)
    arrived = []

    def count(name, received):
        original = getattr(dist, name)

        def counting(*tensors, **options):
            arrived.append(received(*tensors, **options))
            return original(*tensors, **options)

        patch.setattr(dist, name, counting)

    parameter.sum().backward()
    optimizer.step()
    with pytest.MonkeyPatch.context() as patch:
        count("all_to_all_single", lambda out, *_, **__: out.numel() - out.numel() // world_size)
        count("broadcast", lambda data, group_src, **_: 0 if group_src == rank else data.numel())
        parameter.sum().backward()
        optimizer.step()
    assert sum(arrived) == 2 * (world_size - 1) / world_size * parameter.nbytes


@on_ranks(1, 2, 3)
def test_construction_sends_facts_and_hashes_but_no_parameter():
    _, calls = counted_pair()
    assert [size for name, size in calls if name == "all_gather_rows"][:2] == [1, 1]
    assert {name for name, _ in calls} == {"all_gather_rows"}
    assert sum(size for _, size in calls) <= 2 + 1 + 4  # verdicts, digest, a hash of each value


@on_ranks(1)
def test_one_rank_sends_nothing():
    def forbidden(*args, **options):
        raise AssertionError("a world of one communicates")

    names = ["all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce"]
    names += ["broadcast", "isend", "irecv", "barrier", "new_group"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, forbidden, raising=False)
        trained = pair(lambda: random_parameters((70, 33), (5,)))
        trained.train(3)


@on_ranks(1, 2, 3)
def test_one_rank_of_several_says_once_how_to_save(rank, world_size):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("shardopt")
    log.addHandler(handler)
    level, before = logging.INFO, log.level
    log.setLevel(level)
    try:
        trained = pair(lambda: random_parameters((70, 33)))
        assert not records
        for _ in range(3):
            trained.step()
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    texts = [record.getMessage() for record in records]
    assert len(texts) == (1 if rank == 0 and world_size > 1 else 0)
    for text in texts:
        assert f"sharded over {world_size} ranks" in text
        assert "call consolidate_state_dict(to=0) on every rank, then state_dict()" in text
