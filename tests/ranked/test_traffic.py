"""What a step sends, counted; and the one line it logs."""

import logging

import pytest
import torch.distributed as dist
from torch.optim import AdamW

from shardopt import Guards
from shardopt.comm import Collectives, choose_collectives
from tests.pairs import Pair, WholeAdamW, pair, random_parameters
from tests.ranks import on_ranks


class Counted(Collectives):
    """Passes everything on and keeps a list of it."""

    def __init__(self, inner: Collectives):
        self.inner, self.calls = inner, []
        self.rank, self.world_size = inner.rank, inner.world_size
        self.wire_device = inner.wire_device

    def all_gather(self, bucket, borders):
        self.calls.append(("all_gather", bucket.data_ptr()))
        return self.inner.all_gather(bucket, borders)

    def all_gather_rows(self, row):
        self.calls.append(("all_gather_rows", row.numel()))
        return self.inner.all_gather_rows(row)

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
def test_a_step_gathers_each_bucket_once_in_order_and_nothing_else(optimizer_class, kernel):
    trained, calls = counted_pair(optimizer_class, kernel=kernel)
    buckets = trained.optimizer._shard.buffers.buckets
    gathers = [("all_gather", bucket.data_ptr()) for bucket in buckets]
    assert len(buckets) > 1
    first = calls_of_a_step(trained, calls)
    assert first[-len(gathers) :] == gathers
    for _ in range(3):
        assert calls_of_a_step(trained, calls) == gathers
    trained.optimizer.param_groups[0]["lr"] = trained.plain.param_groups[0]["lr"] = 0.1
    assert calls_of_a_step(trained, calls) == gathers
    trained.assert_same()


@on_ranks(2, 3)
def test_the_first_step_compares_gradients_by_one_number_each():
    trained, calls = counted_pair()
    first = calls_of_a_step(trained, calls)
    rows = [size for name, size in first if name == "all_gather_rows"]
    failed_before, hashes, failed_in_the_class = 1, 4, 1
    assert rows == [failed_before, hashes, failed_in_the_class]
    unguarded, calls = counted_pair(guards=Guards(replicas=False))
    rows = [size for name, size in calls_of_a_step(unguarded, calls) if name == "all_gather_rows"]
    assert rows == [failed_before, failed_in_the_class]


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
