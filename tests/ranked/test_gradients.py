"""Gradients that ranks bring: averaged by shardopt, equal to the unsharded twin on their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from shardopt import Guards, ShardedOptimizer
from shardopt.comm import Collectives, choose_collectives
from tests.bank import BANK, DEFAULTS
from tests.bank_runs import (
    SAVED_AT,
    STEPS,
    Training,
    assert_same_training,
    assert_sharded,
    start,
)
from tests.each_rank import KINDS, loss_of, mean_of, random
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model

every_kind = pytest.mark.parametrize("kind", KINDS)
AS_MANY = "sharded, as many ranks"
WAYS = [*KINDS, AS_MANY]
every_way = pytest.mark.parametrize("kind", [*KINDS, pytest.param(AS_MANY, marks=pytest.mark.slow)])
UNUSED = Guards(find_unused_parameters=True)

LossOf = Callable[[nn.Module, int, int], Tensor]  # of a model, a pass and a rank


def gradients_of(model: nn.Module, loss: LossOf, passes: Iterable[int], rank: int):
    """What ``.grad`` holds on ``rank`` after a backward for each of ``passes``."""
    model.zero_grad()
    for seed in passes:
        if (value := loss(model, seed, rank)).requires_grad:
            value.backward()
    return [parameter.grad for parameter in model.parameters()]


def add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first + second


def as_many() -> Collectives:
    """The collectives of a few ranks, which agree as many would."""
    collectives = choose_collectives(None)
    collectives.gathers_up_to = 1
    return collectives


# Those that take rows alone are in test_sparse.py.
DENSE = [name for name in DEFAULTS if not BANK[name].takes_rows]
DENSE += ["AdamW amsgrad", "SGD momentum=0.9"]


class Twins:
    """A model under ``ShardedOptimizer`` and an equal one under the plain class, on every rank.

    The plain one gets the mean of all ranks' gradients: of their sums where ``.grad`` keeps them
    (local), as the sum of means where it does not (sharded).
    """

    def __init__(self, kind: str, rank: int, world_size: int, loss: LossOf = loss_of):
        self.kind, *ways = kind.split(", ")
        self.many = bool(ways)  # ranks agree as more of them would: by sums
        self.rank, self.world_size, self.loss = rank, world_size, loss
        self.exact = True  # in the order of all sums

    def build(
        self,
        make: Callable[[], nn.Module] = make_model,
        optimizer_class: type[Optimizer] = AdamW,
        ours: dict | None = None,  # what only ShardedOptimizer takes
        **options,
    ) -> Twins:
        options = {"lr": 0.01, **options}
        sharded = {"kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, **(ours or {}), **options}
        if self.many:
            sharded["process_group"] = as_many()
        self.ours, self.theirs = make(), make()
        self.optimizer = ShardedOptimizer(
            self.ours.named_parameters(), optimizer_class, gradients=self.kind, **sharded
        )
        self.plain = optimizer_class(self.theirs.named_parameters(), **options)
        return self

    def adopt(self, ours: Training, theirs: Training) -> Twins:
        """Take trainings of the bank."""
        self.ours, self.optimizer = nn.ParameterList(ours.parameters), ours.optimizer
        self.theirs, self.plain = nn.ParameterList(theirs.parameters), theirs.optimizer
        return self

    def backward(self, *passes: int) -> Twins:
        """Ours alone."""
        for seed in passes:
            if (value := self.loss(self.ours, seed, self.rank)).requires_grad:
                value.backward()
        return self

    def means(self, *passes: int) -> list[Tensor | None]:
        """Of the twin, after these backward passes on every rank."""
        totals: list[Tensor | None] = [None for _ in self.theirs.parameters()]
        for group in [passes] if self.kind == "local" else [[seed] for seed in passes]:
            ranks = range(self.world_size)
            rows = [gradients_of(self.theirs, self.loss, group, rank) for rank in ranks]
            totals = list(map(add, totals, map(mean_of, zip(*rows, strict=True))))
        return totals

    def follow(self, *passes: int, scale: float = 1.0) -> None:
        """Ours has stepped on these passes; so does the twin, and they are equal."""
        for parameter, mean in zip(self.theirs.parameters(), self.means(*passes), strict=True):
            parameter.grad = mean if mean is None or scale == 1.0 else mean * scale
        self.plain.step()
        if self.exact:
            assert_same_parameters(self.ours, self.theirs)
        for ours, theirs in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)

    def step(self, *passes: int) -> None:
        """A whole step of both."""
        before = [parameter.detach().clone() for parameter in self.theirs.parameters()]
        self.backward(*passes)
        self.optimizer.step()
        self.follow(*passes)
        pairs = zip(before, self.theirs.parameters(), strict=True)
        moved = [not torch.equal(old, new) for old, new in pairs if new.grad is not None]
        assert any(moved) or not moved  # not in vain

    def assert_same_state(self) -> None:
        """A collective."""
        self.optimizer.consolidate_state_dict(to=None)
        ours, theirs = self.optimizer.state_dict(), self.plain.state_dict()
        assert_same(dict(sorted(ours["state"].items())), dict(sorted(theirs["state"].items())))


# -- the bank --------------------------------------------------------------------------------------


def has_gradient(seed: int, index: int, rank: int) -> bool:
    """A pattern in which a parameter has one on all ranks, on some, or on none."""
    return seed != 2 and (3 * seed + 2 * index + rank) % 5 > 2


def loss_of_some(model: nn.Module, seed: int, rank: int) -> Tensor:
    """Of a list of parameters: how far some are from points that are each rank's own."""
    losses = [
        (parameter - random(*parameter.shape, seed=100 * seed + index, rank=rank)).square().sum()
        for index, parameter in enumerate(model)
        if has_gradient(seed, index, rank)
    ]
    return torch.stack(losses).sum() if losses else torch.zeros(())


@on_ranks(1, 2, 3, slow=[3])
@every_way
@pytest.mark.parametrize("name", DENSE)
def test_every_class_equals_its_twin(kind, name, rank, world_size):
    """Two groups; gradients that come and go on each rank; saved, loaded, and gone on with."""
    twins = Twins(kind, rank, world_size, loss_of_some)
    case, how = BANK[name], {"kernel": "torch", "gradients": twins.kind, "guards": UNUSED}
    how |= {"process_group": as_many()} if twins.many else {}
    ours, theirs = start(case, **how), start(case)
    assert_sharded(ours)
    twins.adopt(ours, theirs)
    for seed in range(SAVED_AT):
        twins.step(seed)
    saved = assert_same_training(ours, theirs, name)
    plain, ours = ours.go_on(saved, kernel=None), ours.go_on(saved, **how)
    twins.adopt(ours, theirs)
    for seed in range(SAVED_AT, STEPS):
        twins.step(seed)
        for parameter, twin in zip(plain.parameters, theirs.parameters, strict=True):
            parameter.grad = twin.grad
        plain.optimizer.step()
    assert_same_training(ours, theirs, name)
    assert_same_training(plain, theirs, f"{name}, continued in torch")


@on_ranks(1, 2, 3)
@every_way
@pytest.mark.parametrize("optimizer_class", [AdamW, SGD, Adagrad])
def test_the_fused_kernel_of_auto(kind, optimizer_class, rank, world_size):
    twins = Twins(kind, rank, world_size).build(
        optimizer_class=optimizer_class, ours={"kernel": "auto"}
    )
    assert twins.optimizer.optim.param_groups[0]["fused"]
    twins.plain = optimizer_class(twins.theirs.parameters(), lr=0.01, fused=True)
    for seed in range(3):
        twins.step(seed)
    twins.assert_same_state()


@on_ranks(2, 3)
@every_way
def test_construction_sends_the_first_ranks_parameters(kind, rank, world_size):
    """Frozen ones too; the twin starts as rank 0 does."""

    def make(seed: int) -> nn.Module:
        model = make_model(seed)
        model[0].requires_grad_(False)
        return model

    twins = Twins(kind, rank, world_size).build(make=lambda: make(rank))
    twins.theirs.load_state_dict(make(0).state_dict())
    assert_same_parameters(twins.ours, twins.theirs)
    twins.step(0)
    twins.step(1)
