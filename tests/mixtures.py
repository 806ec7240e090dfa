"""A small GPT-like model under one optimizer of two classes, and under one of each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from shardopt import ShardedOptimizer
from tests.twins import SMALL_BUCKETS, assert_same

MUON = {"lr": 0.02, "momentum": 0.9}
ADAMW = {"lr": 0.003, "weight_decay": 0.2}


class Block(nn.Module):
    """One of a transformer, with a mean over what came before in place of attention."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        counts = torch.arange(1, x.shape[1] + 1)[:, None]
        x = x + self.mix(self.norm(x)).cumsum(1) / counts
        return x + self.down(torch.relu(self.up(x)))


def make_model() -> nn.Module:
    """Matrices of four shapes, an embedding and vectors; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        blocks = [Block(24) for _ in range(2)]
        return nn.Sequential(nn.Embedding(50, 24), *blocks, nn.Linear(24, 50))


def matrices(model: nn.Module) -> list[Tensor]:
    """What Muon is meant for."""
    return [p for p in model[1:-1].parameters() if p.dim() == 2]


def others(model: nn.Module) -> list[Tensor]:
    """What it is not."""
    chosen = set(matrices(model))
    return [p for p in model.parameters() if p not in chosen]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Four groups, the classes by turns."""
    hidden, rest = matrices(model), others(model)
    return [
        {"params": rest[:1], "weight_decay": 0.0},
        {"params": hidden[:4], "optimizer_class": Muon, **MUON},
        {"params": rest[1:]},
        {"params": hidden[4:], "optimizer_class": Muon, **MUON, "nesterov": False},
    ]


def mixed(model: nn.Module, **ours: Any) -> ShardedOptimizer:
    """One optimizer of two classes. A collective."""
    options = {"kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, **ours}
    return ShardedOptimizer(groups_of(model), AdamW, **options, **ADAMW)


def side_by_side(model: nn.Module) -> dict[type[Optimizer], Optimizer]:
    """The plain classes over the same groups."""
    groups = groups_of(model)
    muons = [group for group in groups if group.pop("optimizer_class", None)]
    rest = [group for group in groups if "nesterov" not in group and "momentum" not in group]
    return {AdamW: AdamW(rest, **ADAMW), Muon: Muon(muons)}


def taken_out(saved: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The groups of one class and the state of their parameters, as README does it."""
    groups = [group for group in saved["param_groups"] if group.get("optimizer_class") == name]
    held = {number for group in groups for number in group["params"]}
    state = {number: state for number, state in saved["state"].items() if number in held}
    return {"state": state, "param_groups": groups}


def as_plain(saved: dict[str, Any]) -> dict[str, Any]:
    """A state that was taken out, with the numbers and keys that the class itself gives."""
    ids = [number for group in saved["param_groups"] for number in group["params"]]
    place = {number: i for i, number in enumerate(ids)}
    groups = [
        {key: value for key, value in group.items() if key != "optimizer_class"}
        | {"params": [place[number] for number in group["params"]]}
        for group in saved["param_groups"]
    ]
    state = {place[number]: state for number, state in saved["state"].items()}
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """On one rank's batch."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(50, (4, 7), generator=generator)
    logits = model(tokens[:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def train(model: nn.Module, *optimizers: Optimizer, first: int, last: int, rank: int = 0) -> None:
    """Steps ``first`` to ``last``, on the batches of one rank."""
    for step in range(first, last):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_same_state(optimizer: ShardedOptimizer, plain: dict[type[Optimizer], Optimizer]) -> None:
    """Each class's part is what the class has saved, bit for bit. A collective."""
    optimizer.consolidate_state_dict(to=None)
    saved = optimizer.state_dict()
    for optimizer_class, name in ((AdamW, None), (Muon, "torch.optim.Muon")):
        theirs = as_plain(plain[optimizer_class].state_dict())
        assert_same(as_plain(taken_out(saved, name)), theirs)
