"""Two trainings of one model that must not differ: one sharded, one plain."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from shardopt import ShardedOptimizer
from tests.scheduler_bank import ALGORITHMS, ROWS, Row, advance, observe

# Two groups, 4844 elements: three ranks get shards of 2048, 2048 and the rest, so that a border
# falls inside a parameter of each group.
SHAPES = [[(70, 33), (33,)], [(2500,), ()]]


def fresh_groups(device: torch.device | str = "cpu") -> list[list[Parameter]]:
    """The same parameters at every call, on every rank."""
    generator = torch.Generator().manual_seed(2)
    return [
        [Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
        for shapes in SHAPES
    ]


def set_gradients(parameters: list[Parameter], step: int) -> None:
    """The gradients of one step: equal on every rank, different at every step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.device)


@dataclass
class Run:
    """A training: what is trained, what trains it, and what was seen after each epoch."""

    parameters: list[Parameter]
    optimizer: Optimizer
    scheduler: Any
    seen: list[tuple[list[tuple[Any, ...]], list[Tensor]]] = field(default_factory=list)

    def train(self, epochs: range) -> Run:
        """One optimizer step and then one scheduler step in each epoch."""
        for epoch in epochs:
            set_gradients(self.parameters, epoch)
            self.optimizer.step()
            advance(self.scheduler, epoch)
            self.seen.append((observe(self.optimizer), self.values()))
        return self

    def values(self) -> list[Tensor]:
        """A copy of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def saved(self) -> dict[str, Any]:
        """Both state dicts as they come back from a file; a collective when sharded."""
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.consolidate_state_dict(to=None)
        file = io.BytesIO()
        states = {
            "parameters": self.values(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        torch.save(states, file)
        file.seek(0)
        return torch.load(file)


def start(
    row: Row | str,
    algorithm: str,
    *,
    sharded: bool,
    kernel: str = "torch",
    device: torch.device | str = "cpu",
    tensor_lr: bool = False,
    saved: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """A run that has not begun, or one that goes on from ``saved`` parameters."""
    row = ROWS[row] if isinstance(row, str) else row
    optimizer_class, shared, second = ALGORITHMS[algorithm]
    groups = fresh_groups(device)
    parameters = groups[0] + groups[1]
    for parameter, value in zip(parameters, saved["parameters"] if saved else (), strict=False):
        parameter.data.copy_(value)
    shared, second = {**shared, **options}, dict(second)
    if tensor_lr:
        shared["lr"], second["lr"] = torch.tensor(shared["lr"]), torch.tensor(second["lr"])
    described = [{"params": groups[0]}, {"params": groups[1], **second}]
    if sharded:
        optimizer = ShardedOptimizer(described, optimizer_class, kernel=kernel, **shared)
    else:
        optimizer = optimizer_class(described, **shared)
    return Run(parameters, optimizer, row.build(optimizer))


def assert_same(ours: Run, twin: Run) -> None:
    """lr, momentum, betas and parameters are equal bit for bit after each epoch, and did change."""
    assert len(ours.seen) == len(twin.seen) > 0
    for epoch, ((our_groups, our_values), (groups, values)) in enumerate(
        zip(ours.seen, twin.seen, strict=True)
    ):
        assert our_groups == groups, f"groups after epoch {epoch}: {our_groups}, plain {groups}"
        for index, (our_value, value) in enumerate(zip(our_values, values, strict=True)):
            assert torch.equal(our_value, value), f"parameter {index} after epoch {epoch}"
    assert_alive(twin)


def assert_alive(run: Run) -> None:
    """Guards against a vacuous comparison: the lr of each group changed, all parameters moved."""
    assert all(value.isfinite().all() for value in run.seen[-1][1])
    for group in range(len(SHAPES)):
        assert len({groups[group][0] for groups, _ in run.seen}) > 1, f"lr of group {group} stood"
    for first, last in zip(run.seen[0][1], run.seen[-1][1], strict=True):
        assert not torch.equal(first, last)
