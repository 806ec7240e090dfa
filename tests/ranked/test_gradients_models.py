"""What models do to gradients: shared, repeated, recomputed, skipped, sparse, of any dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from shardopt import Guards
from tests.ranked.test_gradients import UNUSED, LossOf, Twins, every_kind, random
from tests.ranks import on_ranks
from tests.twins import assert_same, make_model

pytestmark = pytest.mark.slow  # many rows; the bank of test_gradients.py is fast

WIDTH = 40
BUCKETS = {"one": 25.0, "each": 1e-4}  # MiB


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return make()


def layers(num: int = 4) -> nn.Module:
    return seeded(lambda: nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num)))


def features(seed: int, rank: int, **how: Any) -> Tensor:
    return random(6, WIDTH, seed=seed, rank=rank, **how)


def twice_used(model: nn.Module, seed: int, rank: int) -> Tensor:
    x = features(seed, rank)
    for layer in (model[0], model[1], model[0], model[2], model[3]):
        x = layer(x).tanh()
    return x.square().mean()


def checkpointed(
    model: nn.Module, seed: int, rank: int, *, reentrant: bool, order: str = "0123", free: str = "0"
) -> Tensor:
    """Layers in an order, each recomputed but those of ``free``; one named twice gets two gradients
    from reentrant checkpointing, one after the other."""
    x = features(seed, rank).requires_grad_()
    for name in order:
        layer = model[int(name)]
        x = (layer(x) if name in free else checkpoint(layer, x, use_reentrant=reentrant)).tanh()
    return x.square().mean()


def branching(model: nn.Module, seed: int, rank: int) -> Tensor:
    """Ranks go their own ways."""
    skipped = (seed + rank) % 4
    x = features(seed, rank)
    for number, layer in enumerate(model):
        x = x if number == skipped else layer(x).tanh()
    return x.square().mean()


def tied() -> nn.Module:
    model = layers()
    model[3].weight = model[1].weight
    return model


def partly_frozen() -> nn.Module:
    model = layers()
    model[1].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    return model


def in_order(model: nn.Module, seed: int, rank: int) -> Tensor:
    dtype = model[0].weight.dtype
    x = features(seed, rank, dtype=torch.float32).to(dtype)
    for layer in model:
        x = layer(x).tanh()
    return x.square().mean()


def words() -> nn.Module:
    return seeded(lambda: nn.ModuleList([nn.Embedding(90, 40, sparse=True), nn.Linear(40, 30)]))


def of_words(model: nn.Module, seed: int, rank: int) -> Tensor:
    tokens = (random(12, seed=seed, rank=rank) * 1000).long() % 90
    return model[1](model[0](tokens)).square().mean()


def odd() -> nn.Module:
    """No dims, no elements."""
    shapes = [(), (0,), (70, 50), (3, 0, 2), (1,), ()]
    return nn.ParameterList(
        Parameter(random(*shape, seed=index, rank=0)) for index, shape in enumerate(shapes)
    )


def from_points(model: nn.Module, seed: int, rank: int) -> Tensor:
    losses = []
    for index, parameter in enumerate(model):
        point = random(
            *parameter.shape, seed=10 * seed + index + 50, rank=rank, dtype=parameter.dtype
        )
        losses.append((parameter - point).abs().square().sum())
    return torch.stack(losses).sum()


def images() -> nn.Module:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 5, 3)))
    return model.to(memory_format=torch.channels_last)


def of_images(model: nn.Module, seed: int, rank: int) -> Tensor:
    image = random(2, 3, 8, 8, seed=seed, rank=rank).to(memory_format=torch.channels_last)
    return model(image).square().mean()


def complexes() -> nn.Module:
    return nn.ParameterList(
        Parameter(random(50, 60, seed=index, rank=0, dtype=torch.complex64)) for index in range(2)
    )


@dataclass(frozen=True)
class Row:
    make: Callable[[], nn.Module]
    loss: LossOf
    optimizer_class: type[Optimizer] = AdamW
    options: Mapping[str, Any] = field(default_factory=dict)
    guards: Guards = field(default_factory=Guards)
    late: bool = False  # gradients come in two parts, of which "sharded" averages each


ROWS = {
    "used twice": Row(layers, twice_used),
    "tied": Row(tied, in_order),
    "checkpoint": Row(layers, partial(checkpointed, reentrant=False)),
    "checkpoint twice": Row(layers, partial(checkpointed, reentrant=False, order="0121323")),
    "reentrant": Row(layers, partial(checkpointed, reentrant=True)),
    "reentrant twice": Row(
        layers, partial(checkpointed, reentrant=True, order="0121323"), SGD, late=True
    ),
    "all reentrant": Row(layers, partial(checkpointed, reentrant=True, free="")),
    "all reentrant twice": Row(
        layers, partial(checkpointed, reentrant=True, order="01201323", free=""), SGD, late=True
    ),
    "branches": Row(layers, branching, guards=UNUSED),
    "frozen": Row(partly_frozen, in_order),
    "sparse SGD": Row(words, of_words, SGD, {"lr": 0.1}),
    "sparse Adagrad": Row(words, of_words, Adagrad, {"lr": 0.1}),
    "odd shapes": Row(odd, from_points),
    "channels_last": Row(images, of_images),
    "complex": Row(complexes, from_points),
    "float64": Row(lambda: layers().double(), in_order),
    "bfloat16": Row(lambda: layers().bfloat16(), in_order),
    "float16": Row(lambda: layers().half(), in_order, SGD),
}


@on_ranks(1, 2, 3)
@every_kind
@pytest.mark.parametrize("name", ROWS)
def test_equals_the_twin_on_the_mean(kind, name, rank, world_size):
    """With one bucket and with many; with two backward passes in a step, too."""
    row = ROWS[name]
    for cap in BUCKETS.values():
        twins = Twins(kind, rank, world_size, row.loss)
        twins.exact = kind == "local" or not row.late
        twins.build(
            row.make,
            row.optimizer_class,
            {"bucket_cap_mb": cap, "guards": row.guards},
            **row.options,
        )
        layout = twins.optimizer._shard.layout
        assert len(layout.buckets) == 1 or cap < 1
        assert len(layout.buckets) == len(layout.parameters) or cap > 1e-3
        twins.step(0)
        twins.step(1, 2)
        twins.assert_same_state()


def test_rows_are_not_in_vain():
    """Reentrant checkpointing does give a parameter two gradients, one after the other."""
    model, calls = layers(), []
    model[1].weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(1))
    ROWS["reentrant twice"].loss(model, 0, 0).backward()
    assert len(calls) == 2
    assert len(list(tied().parameters())) == 7
    assert not torch.equal(features(0, 0), features(0, 1))
    model = words()
    of_words(model, 0, 0).backward()
    assert model[0].weight.grad.is_sparse and not model[1].weight.grad.is_sparse
    missing = []
    for rank in range(2):
        model = layers()
        branching(model, 1, rank).backward()
        missing.append([p.grad is None for p in model.parameters()])
    assert missing[0] != missing[1]


@on_ranks(2, 3)
@every_kind
@pytest.mark.parametrize("optimizer_class", [SGD, Adagrad])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_sparse_gradients_give_what_torch_makes_of_them(kind, optimizer_class, rank, world_size):
    """Within rounding: torch's sparse update divides before it multiplies."""
    twins = Twins(kind, rank, world_size, of_words).build(words, optimizer_class, lr=0.1)
    for seed in range(3):
        twins.backward(seed)
        twins.optimizer.step()
        twins.theirs.zero_grad()
        torch.stack([of_words(twins.theirs, seed, r) for r in range(world_size)]).mean().backward()
        assert twins.theirs[0].weight.grad.is_sparse
        twins.plain.step()
    for ours, theirs in zip(twins.ours.parameters(), twins.theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@on_ranks(3)
@every_kind
def test_bfloat16_is_summed_in_float32_and_rounded_once(kind, rank, world_size):
    """256 + 1 + 2 is 259 in fp32, 86.33 on the mean; step by step in bf16 it would be 258, 86."""
    parameter = Parameter(torch.zeros(2000, dtype=torch.bfloat16))
    model = nn.ParameterList([parameter])
    twins = Twins(kind, rank, world_size).build(lambda: model, SGD, lr=1.0)
    (parameter * (256.0, 1.0, 2.0)[rank]).sum().backward()
    twins.optimizer.step()
    right = (torch.tensor(259.0) / 3).bfloat16()
    wrong = torch.tensor(256.0, dtype=torch.bfloat16) + 1 + 2
    assert right != wrong / 3
    assert_same(parameter.detach(), (-right).repeat(2000))


@on_ranks(2)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_is_right_where_gradients_stay(rank, world_size):
    twins = Twins("local", rank, world_size).build()
    for seed in range(2):
        twins.loss(twins.ours, seed, rank).backward(create_graph=True)
        gradients = [parameter.grad for parameter in twins.ours.parameters()]
        assert gradients[0].requires_grad
        twins.optimizer.step()
        twins.follow(seed)


@on_ranks(1, 2)
@every_kind
@pytest.mark.parametrize("share", ["one model", "two models"])
def test_models_of_one_optimizer_and_optimizers_of_one_model(kind, share, rank, world_size):
    """Each parameter has one optimizer; a backward may go through several of either."""

    def make() -> nn.Module:
        return nn.ModuleList([make_model(1), make_model(2)])

    def both(model: nn.Module, seed: int, rank: int) -> Tensor:
        x = random(8, 61, seed=seed, rank=rank)
        return (model[0](x) * model[1](x)).square().mean()

    twins = Twins(kind, rank, world_size, both).build(make)
    if share == "one model":
        twins.step(0)
        twins.step(1, 2)
        return
    parts = [Twins(kind, rank, world_size) for _ in range(2)]
    for number, part in enumerate(parts, 1):
        part.build(lambda number=number: make_model(number))
    ours = nn.ModuleList(part.ours for part in parts)
    for seed in range(3):
        both(ours, seed, rank).backward()
        for part in parts:
            part.optimizer.step()
        twins.step(seed)
        for mine, other in zip(ours.parameters(), twins.ours.parameters(), strict=True):
            assert_same(mine.detach(), other.detach())
