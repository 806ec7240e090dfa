"""The collectives over a process group: what they move, and their own time limit."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shardopt.comm import choose_collectives
from shardopt.comm.collectives import broadcast_text, gather_texts
from shardopt.comm.torch_group import TorchCollectives
from shardopt.comm.transfer import PACKED_BYTES, receive_tensors, send_tensors
from tests.ranks import on_ranks


@on_ranks(2, 3, also_on_gpu=True)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_all_gather_fills_the_bucket_in_place(even, dtype, rank, world_size, device):
    collectives = choose_collectives(None)
    borders = [8 * r if even else 5 * r * r for r in range(world_size + 1)]
    bucket = collectives.allocate(borders[-1], dtype, device)
    assert bucket.eq(0).all()
    bucket[borders[rank] : borders[rank + 1]] = rank + 1
    collectives.all_gather(bucket, borders).wait()
    for r in range(world_size):
        assert bucket[borders[r] : borders[r + 1]].eq(r + 1).all()


@on_ranks(1, 2, 3)
def test_small_messages(rank, world_size):
    collectives = choose_collectives(None)
    rows = collectives.all_gather_rows(torch.tensor([rank, rank * rank], dtype=torch.float64))
    assert rows.tolist() == [[r, r * r] for r in range(world_size)]
    texts = gather_texts(collectives, b"x" * rank)
    assert texts == [b"x" * r for r in range(world_size)]
    last = world_size - 1
    assert broadcast_text(collectives, b"hello" if rank == last else b"", last) == b"hello"
    assert broadcast_text(collectives, b"", 0) == b""


@on_ranks(2, 3)
def test_lists_of_tensors_arrive_packed_or_not(rank, world_size):
    collectives = choose_collectives(None)
    sizes = [0, 1, 5, PACKED_BYTES // 4, 3, 2 * PACKED_BYTES]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
    sent = [
        torch.arange(size).to(dtype) + source
        for source in range(world_size)
        for size in sizes
        for dtype in dtypes
    ]
    each = len(sizes) * len(dtypes)
    if rank != 0:
        send_tensors(collectives, sent[rank * each : (rank + 1) * each], 0).wait()
        return
    handles, received = [], []
    for source in range(1, world_size):
        outs = [torch.empty_like(t) for t in sent[source * each : (source + 1) * each]]
        handles.append(receive_tensors(collectives, outs, source))
        received += outs
    for handle in handles:
        handle.wait()
    assert all(torch.equal(a, b) for a, b in zip(received, sent[each:], strict=True))


@on_ranks(2, 3)
def test_the_group_has_its_own_time_limit(rank):
    limit = timedelta(seconds=1)
    collectives = TorchCollectives(timeout=limit)
    assert TorchCollectives(timeout=limit)._group is collectives._group  # made once
    assert collectives._group is not dist.group.WORLD
    dist.barrier()
    if rank == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            collectives.all_gather_rows(torch.zeros(1))
        assert time.monotonic() - start < 10
    dist.barrier()  # the default group has not noticed


@on_ranks(4)
def test_subgroups_whose_ranks_know_different_numbers_of_groups(rank):
    """torch names a group after that number, and would wait for ever."""
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1]), dist.new_group([0, 1, 2])]
    if rank < 3:
        collectives = choose_collectives(groups[2])
        rows = collectives.all_gather_rows(torch.tensor([rank]))
        assert rows.flatten().tolist() == [0, 1, 2]
