"""Bodies for the ranks of ``mpirun`` alone; ``tests/ranked/test_mpi.py`` starts them."""

import gc
import time
import weakref
from datetime import timedelta

import pytest
import torch
from mpi4py import MPI
from torch.optim import AdamW

from shardopt import ShardedOptimizer
from shardopt.comm import SoloCollectives, choose_collectives
from shardopt.comm.collectives import mean_of_rows
from shardopt.comm.mpi import MpiCollectives
from tests.pairs import four, pair
from tests.ranks import on_ranks

DTYPES = [
    torch.bool,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.complex128,
]
PATIENCE = 10  # seconds


def over_all(**how) -> MpiCollectives:
    return MpiCollectives(MPI.COMM_WORLD, **how)


@on_ranks(2, 3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives_as_it_was_sent(dtype, rank, world_size):
    collectives = over_all()

    def own(source, to):  # nothing comes from rank 1
        numbers = torch.arange(0 if source == 1 else 3 + to) * (source + 1) + to
        return (numbers % 2 == 0).to(dtype) if dtype is torch.bool else numbers.to(dtype)

    sent = [own(rank, to) for to in range(world_size)]
    expected = [own(source, rank) for source in range(world_size)]
    out = torch.empty(sum(map(len, expected)), dtype=dtype)
    sizes, out_sizes = [*map(len, sent)], [*map(len, expected)]
    collectives.all_to_all(torch.cat(sent), sizes, out, out_sizes).wait()
    assert out.view(torch.uint8).equal(torch.cat(expected).view(torch.uint8))
    last = own(world_size, 7) if rank == world_size - 1 else torch.zeros(10, dtype=dtype)
    collectives.broadcast(last.requires_grad_(dtype.is_floating_point), world_size - 1).wait()
    assert last.detach().view(torch.uint8).equal(own(world_size, 7).view(torch.uint8))


@on_ranks(2, 3, also_on_gpu=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_mean_is_taken_in_rank_order_and_small_elements_in_fp32(
    dtype, rank, world_size, device
):
    """In bf16, 256 + 1 + 1 is 256."""
    rows = [torch.full((10,), 256.0 if r == 0 else 1.0) for r in range(world_size)]
    buckets = [row.to(device, dtype) for row in rows]
    borders = [0, *(4 + 3 * r for r in range(world_size - 1)), 10]
    mine = slice(borders[rank], borders[rank + 1])
    out = torch.empty(borders[rank + 1] - borders[rank], dtype=dtype, device=device)
    reduction = over_all().reduce_scatter(buckets[rank], borders, out)
    reduction.wait()
    expected = torch.empty_like(out)
    mean_of_rows(torch.stack(buckets)[:, mine], expected)
    assert out.equal(expected) and reduction.is_done()
    assert out.eq((256 + world_size - 1) / world_size).all() or dtype is not torch.float32


@on_ranks(2, 3)
def test_a_sum_has_the_same_bits_on_every_rank(rank, world_size):
    collectives = over_all()
    if rank == 0:
        time.sleep(0.1)  # the others have to wait for it
    row = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    total = collectives.sum_rows(row).clone()  # at once: it might arrive later
    rows = collectives.all_gather_rows(row)
    torch.testing.assert_close(total, rows.sum(0), rtol=1e-12, atol=1e-12)
    assert all(each.equal(total) for each in collectives.all_gather_rows(total))


@on_ranks(2, 3)
def test_what_is_under_way_arrives_while_nobody_waits(rank, world_size):
    """MPI alone would begin with the wait."""
    collectives, numel = over_all(), 4 << 20
    bucket = torch.full((numel * world_size,), -1.0)
    bucket[rank * numel : (rank + 1) * numel] = rank
    under_way = collectives.all_gather(bucket, range(0, bucket.numel() + 1, numel))
    deadline = time.monotonic() + PATIENCE
    while bucket[-1 if rank == 0 else 0] < 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bucket[-1 if rank == 0 else 0] >= 0
    under_way.wait()
    assert bucket.view(world_size, numel).eq(torch.arange(world_size)[:, None]).all()


@on_ranks(2, 3)
def test_memory_stays_while_mpi_writes_to_it(rank):
    """Though whoever started it has forgotten it, as after an exception."""
    collectives = over_all()
    if rank == 1:
        MPI.COMM_WORLD.recv(source=0)
        collectives.send(torch.ones(1 << 20), 0).wait()
    if rank == 0:
        tensor = torch.zeros(1 << 20)
        memory = weakref.ref(tensor.untyped_storage())
        collectives.receive(tensor, 1)
        del tensor
        gc.collect()
        stayed = memory() is not None
        MPI.COMM_WORLD.send(None, dest=1)
        deadline = time.monotonic() + PATIENCE
        while (is_there := memory() is not None) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stayed and not is_there
    MPI.COMM_WORLD.Barrier()


@on_ranks(2, 3)
def test_waiting_has_a_limit(rank, world_size):
    """And what was under way still ends when the others come."""
    collectives = over_all(timeout=timedelta(seconds=0.3))
    if rank == 0:
        start = time.monotonic()
        expected = (
            rf"all_gather_rows on rank 0 of {world_size} has not ended within 0.3 s: .* -m mpi4py"
        )
        with pytest.raises(RuntimeError, match=expected):
            collectives.all_gather_rows(torch.zeros(1))
        assert 0.3 <= time.monotonic() - start < 2
    MPI.COMM_WORLD.Barrier()
    if rank != 0:
        collectives.all_gather_rows(torch.zeros(1))
    assert collectives.all_gather_rows(torch.tensor([rank]))[:, 0].tolist() == [*range(world_size)]


@on_ranks(2, 3)
def test_an_error_of_mpi_is_raised_where_it_is_waited_for(rank):
    collectives = over_all()
    if rank == 1:
        collectives.send(torch.ones(10), 0).wait()
    if rank == 0:
        too_short = collectives.receive(torch.ones(5), 1)
        with pytest.raises(MPI.Exception, match=r"(?i)trunc"):
            too_short.wait()
    MPI.COMM_WORLD.Barrier()


@on_ranks(2, 3)
def test_a_communicator_has_one_channel_which_is_freed_with_it(rank):
    users = MPI.COMM_WORLD.Dup()
    first, second = (pair(four, process_group=users).optimizer.collectives for _ in range(2))
    assert first.channel is second.channel is MpiCollectives(users).channel
    assert first.channel is not over_all().channel
    assert first.aside("saving").channel is second.aside("saving").channel is not first.channel
    assert users not in (first.channel.buckets, first.channel.messages)
    under_way = first.broadcast(torch.ones(3), 0)
    users.Free()
    assert first.channel.buckets == first.channel.messages == MPI.COMM_NULL
    under_way.wait()


@on_ranks(1, 2, 3)
def test_any_intracommunicator(rank, world_size):
    def assert_trains_on(comm):
        trained = pair(four, process_group=comm)
        assert trained.optimizer.collectives.world_size == comm.size
        trained.train(2)
        trained.assert_is_shared_out()

    reversed_, line = MPI.COMM_WORLD.Split(0, -rank), MPI.COMM_WORLD.Create_cart([world_size])
    some, alone = MPI.COMM_WORLD.Split(min(rank, 1)), MPI.COMM_WORLD.Split(rank)
    for comm in (MPI.COMM_WORLD, MPI.COMM_SELF, reversed_, line, some, alone):
        assert_trains_on(comm)
    assert type(choose_collectives(alone)) is type(choose_collectives(MPI.COMM_SELF))
    assert type(choose_collectives(alone)) is SoloCollectives


@on_ranks(2, 3)
def test_what_is_no_communicator_of_these_ranks_is_refused(rank):
    null = MPI.COMM_WORLD.Split(0 if rank else MPI.UNDEFINED)
    freed = MPI.COMM_WORLD.Dup()
    freed.Free()
    for comm in (null, freed) if rank == 0 else (freed,):
        expected = rf"MPI.COMM_NULL, or one that has been freed, on rank {rank} of COMM_WORLD"
        with pytest.raises(ValueError, match=expected):
            ShardedOptimizer(four(), AdamW, comm)
    sides = MPI.COMM_WORLD.Split(min(rank, 1))
    both = sides.Create_intercomm(0, MPI.COMM_WORLD, 1 - min(rank, 1))
    with pytest.raises(ValueError, match=r"got an intercommunicator, .* comm\.Merge\(\)"):
        ShardedOptimizer(four(), AdamW, both)
    with pytest.raises(TypeError, match=r"expected a communicator of mpi4py, got str"):
        MpiCollectives("MPI.COMM_WORLD")


@on_ranks(2)
def test_more_bytes_than_an_int_counts(rank):
    data = torch.full(((1 << 31) + 64,), rank, dtype=torch.uint8)
    over_all().broadcast(data, 1).wait()
    assert data.amin() == data.amax() == 1
