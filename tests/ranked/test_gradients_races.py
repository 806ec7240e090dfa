"""Time changes nothing: sleeps around every communication, gradients in any order on each rank."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, AdamW

from shardopt import ShardedOptimizer
from shardopt.comm.mesh import MeshCollectives
from shardopt.comm.solo import SoloCollectives
from shardopt.comm.torch_group import TorchCollectives
from tests.ranked.test_gradients import Twins, every_kind
from tests.ranked.test_gradients import random as random_tensor
from tests.ranks import on_ranks
from tests.twins import assert_same_parameters

pytestmark = pytest.mark.slow  # many rows; the bank of test_gradients.py is fast

LONGEST = 2e-3  # seconds


class Drowsy:
    """A handle that sleeps before it waits, and after, and may not notice that it is done."""

    def __init__(self, handle: Any, doze: Callable[[], None], is_awake: Callable[[], bool]):
        self._handle, self._doze, self._is_awake = handle, doze, is_awake

    def is_done(self) -> bool:
        return self._is_awake() and self._handle.is_done()

    def is_completed(self) -> bool:
        return self._is_awake() and self._handle.is_completed()

    def wait(self) -> None:
        self._doze()
        self._handle.wait()
        self._doze()

    @property
    def rows(self):
        return self._handle.rows


class DrowsyCollectives(TorchCollectives):
    """The same collectives, with sleeps in front of and behind each, that each rank draws."""

    def __init__(self, seed: int, process_group=None, use: str = "shardopt"):
        super().__init__(process_group, use=use)
        self._random = random.Random(1000 * seed + self.rank)
        self.started: list[tuple[str, int]] = []  # the name of each, and the size of what it moves

    def _doze(self) -> None:
        if self._random.random() < 0.5:
            time.sleep(self._random.uniform(0, LONGEST))

    def _slowly(self, start: Callable[..., Any], *arguments: Any) -> Any:
        self.started.append((start.__name__, arguments[0].numel()))
        self._doze()
        handle = start(*arguments)
        self._doze()
        return Drowsy(handle, self._doze, lambda: self._random.random() < 0.5)

    def all_gather(self, bucket, borders):
        return self._slowly(super().all_gather, bucket, borders)

    def reduce_scatter(self, bucket, borders, out):
        return self._slowly(super().reduce_scatter, bucket, borders, out)

    def broadcast(self, tensor, source):
        return self._slowly(super().broadcast, tensor, source)

    def all_gather_rows(self, row):
        self.started.append(("all_gather_rows", row.numel()))
        self._doze()
        rows = super().all_gather_rows(row)
        self._doze()
        return rows


NUM_BRANCHES = 12


def branches() -> nn.Module:
    """Independent of one another, of sizes that differ; a bucket holds some of them."""
    sizes = [40 * (7 * number % NUM_BRANCHES + 1) for number in range(NUM_BRANCHES)]
    return nn.ParameterList(Parameter(random_tensor(size, seed=size, rank=0)) for size in sizes)


def in_any_order(model: nn.Module, seed: int, rank: int, shuffled: bool = True) -> torch.Tensor:
    """The engine goes back to the branch that was built last; each rank builds them its own way."""
    order = list(range(NUM_BRANCHES))
    if shuffled:
        random.Random(97 * seed + rank).shuffle(order)
    losses = {}
    for index in order:
        point = random_tensor(*model[index].shape, seed=50 * seed + index, rank=rank)
        losses[index] = (model[index] - point).square().sum() * (1 + index)
    return torch.stack([losses[index] for index in range(NUM_BRANCHES)]).sum()


def order_of_arrival(seed: int, rank: int) -> list[int]:
    model, arrived = branches(), []
    for index, parameter in enumerate(model):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: arrived.append(index))
    in_any_order(model, seed, rank).backward()
    return arrived


def test_gradients_do_arrive_in_another_order_on_each_rank():
    orders = [tuple(order_of_arrival(seed, rank)) for seed in range(2) for rank in range(3)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(NUM_BRANCHES)) for order in orders)


@on_ranks(2, 3)
@every_kind
@pytest.mark.parametrize("optimizer_class", [AdamW, Adafactor])
@pytest.mark.parametrize("seed", [0, 1])
def test_sleeps_and_orders_change_no_bit(kind, optimizer_class, seed, rank, world_size):
    collectives = DrowsyCollectives(seed)
    twins = Twins(kind, rank, world_size, in_any_order)
    twins.build(
        branches,
        optimizer_class,
        {"process_group": collectives, "bucket_cap_mb": 0.0015},
    )
    num_buckets = len(twins.optimizer._shard.layout.buckets)
    assert num_buckets > 4
    for number in range(4):
        twins.step(10 * seed + 2 * number, 10 * seed + 2 * number + 1)
    twins.assert_same_state()
    started = [name for name, _ in collectives.started]
    assert started.count("reduce_scatter") == 4 * 2 * num_buckets
    rows = torch.tensor([len(name) * 10**6 + size for name, size in collectives.started])
    everyone = TorchCollectives.all_gather_rows(collectives, rows)
    assert (everyone == rows).all()  # in one order on every rank


@on_ranks(2, 3)
@every_kind
def test_one_rank_that_is_late_with_everything(kind, rank, world_size):
    """The others wait for it, and nobody takes what is not there yet."""
    collectives = DrowsyCollectives(0)
    collectives._doze = lambda: time.sleep(LONGEST if rank == 1 else 0)
    twins = Twins(kind, rank, world_size, in_any_order).build(
        branches, SGD, {"process_group": collectives, "bucket_cap_mb": 0.0015}
    )
    twins.step(0)
    twins.backward(1, 2)
    twins.optimizer.zero_grad()
    twins.backward(3)
    norm = twins.optimizer.clip_grad_norm_(1e9)
    total = torch.nn.utils.get_total_norm(list(twins.means(3)))
    torch.testing.assert_close(norm, total, rtol=1e-5, atol=0)
    twins.optimizer.step()
    twins.follow(3)
    assert_same_parameters(twins.ours, twins.theirs)


@on_ranks(4)
@every_kind
@pytest.mark.parametrize("shape", [(2, 2), (4, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_on_a_mesh_two_optimizers_start_everything_in_one_order(
    kind, shape, seed, rank, world_size
):
    """Of whom each reduces in two halves, whose first ends at another time on each rank."""
    mesh = init_device_mesh("cpu", shape)
    column, row = (DrowsyCollectives(seed, mesh.get_group(axis)) for axis in (0, 1))
    means = DrowsyCollectives(seed, mesh.get_group(0), "means")
    rows = [row, row] if row.world_size > 1 else [SoloCollectives(), SoloCollectives()]
    ours, theirs = branches(), branches()
    halves = [[*ours.parameters()][half::2] for half in range(2)]
    options = {"gradients": kind, "bucket_cap_mb": 0.0003, "eps": 1e-3}
    optimizers = [
        ShardedOptimizer(half, AdamW, MeshCollectives(own, column, means), **options)
        for half, own in zip(halves, rows, strict=True)
    ]
    twin = AdamW(theirs.parameters(), eps=1e-3)
    for step in range(4):
        in_any_order(ours, step, rank, shuffled=False).backward()
        for optimizer in optimizers:
            optimizer.step()
        twin.zero_grad()
        for other in range(world_size):
            (in_any_order(theirs, step, other, shuffled=False) / world_size).backward()
        twin.step()
    torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()], rtol=0, atol=1e-4)
    for axis in (column, row, means):
        rows = torch.tensor([len(name) * 10**6 + size for name, size in axis.started])
        assert (TorchCollectives.all_gather_rows(axis, rows) == rows).all()
