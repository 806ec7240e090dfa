"""Whole optimisations by LBFGS: one problem under ``ShardedOptimizer``, and under the plain class.

Each rank evaluates a part of the problem; the mean over ranks is the whole, which the plain class
evaluates. With replicated gradients each rank evaluates the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from shardopt import ShardedOptimizer
from tests.pairs import random_parameters
from tests.twins import SMALL_BUCKETS, assert_same, make_model


class Rosenbrock:
    """Many of its valleys, over several parameters; a part is every n-th valley."""

    def __init__(self, dtype: torch.dtype = torch.float64, shapes=((40, 50), (), (0, 3), (2099,))):
        self.dtype, self.shapes = dtype, shapes

    def parameters(self) -> list[Tensor]:
        values = [torch.full(shape, -1.0, dtype=self.dtype) for shape in self.shapes]
        values[0].view(-1)[::2] = 0.5
        return [Parameter(value) for value in values]

    def loss(self, parameters: list[Tensor], part: int, parts: int) -> Tensor:
        x = torch.cat([parameter.flatten() for parameter in parameters])
        x, y = x[::2], x[1::2]
        valleys = 100 * (y - x**2) ** 2 + (1 - x) ** 2
        return valleys[part::parts].sum() * parts


class Digits:
    """Logistic regression on scikit-learn's digits. Its 650 parameters are one rank's shard."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.tensor(images / 16), torch.tensor(labels)

    def parameters(self) -> list[Tensor]:
        return [
            Parameter(torch.zeros(10, 64, dtype=torch.float64)),
            Parameter(torch.zeros(10).double()),
        ]

    def loss(self, parameters: list[Tensor], part: int, parts: int) -> Tensor:
        weight, bias = parameters
        scores = self.images[part::parts] @ weight.T + bias
        total = torch.nn.functional.cross_entropy(scores, self.labels[part::parts], reduction="sum")
        return total * parts / len(self.labels) + 1e-3 * weight.square().sum()


class Network:
    """A small network; the first rank has more of the data than the others."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.model = make_model().to(dtype)
        self.names = [name for name, _ in self.model.named_parameters()]
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(50, 61, generator=generator, dtype=dtype)

    def parameters(self) -> list[Tensor]:
        return [Parameter(value.detach().clone()) for value in self.model.parameters()]

    def loss(self, parameters: list[Tensor], part: int, parts: int) -> Tensor:
        inputs = self.inputs
        if parts > 1:
            inputs = self.inputs[:30] if part == 0 else self.inputs[30:][part - 1 :: parts - 1]
        outputs = torch.func.functional_call(
            self.model, dict(zip(self.names, parameters, strict=True)), inputs
        )
        errors = (outputs - inputs[:, :1].sin()).square()
        return errors.sum() * parts / len(self.inputs)


class Mixed:
    """Parameters of several dtypes, complex ones and one without elements among them."""

    def parameters(self) -> list[Tensor]:
        return [
            *random_parameters((40, 30)),
            *random_parameters((1300,), dtype=torch.complex64),
            *random_parameters((0, 3)),
            *random_parameters((), (50, 30), dtype=torch.float64),
        ]

    def loss(self, parameters: list[Tensor], part: int, parts: int) -> Tensor:
        powers = [parameter.abs().square().sum().double() for parameter in parameters]
        shifts = [(parameter - 1).abs().sum().double() for parameter in parameters]
        return sum(powers) / 1000 + (sum(shifts) / 100).cos()


@dataclass
class Search:
    """Equal parameters under both, and the losses at each call of their closures."""

    problem: Any
    ours: list[Tensor]
    theirs: list[Tensor]
    optimizer: ShardedOptimizer
    plain: Optimizer
    part: int = 0  # of the problem, that this rank evaluates
    parts: int = 1
    calls: list[float] = field(default_factory=list)  # the losses of ours
    plain_calls: list[float] = field(default_factory=list)

    def closure(self) -> Tensor:
        """Ours."""
        self.optimizer.zero_grad()
        loss = self.problem.loss(self.ours, self.part, self.parts)
        loss.backward()
        self.calls.append(loss.item())
        return loss

    def plain_closure(self) -> Tensor:
        """Theirs."""
        self.plain.zero_grad()
        loss = self.problem.loss(self.theirs, 0, 1)
        loss.backward()
        self.plain_calls.append(loss.item())
        return loss

    def step(self) -> tuple[Tensor, Tensor]:
        """One step of both; what they return."""
        return self.optimizer.step(self.closure), self.plain.step(self.plain_closure).detach()

    def run(self, steps: int, **tolerance: float) -> Search:
        """Several steps, compared: bit for bit without a ``tolerance``."""
        for _ in range(steps):
            loss, plain_loss = self.step()
            assert len(self.calls) == len(self.plain_calls)
            compare(loss, plain_loss, **tolerance)
            self.assert_same(**tolerance)
        return self

    def assert_same(self, **tolerance: float) -> None:
        """Parameters, and the number of evaluations. A collective, as is ``saved``."""
        compare([p.detach() for p in self.ours], [p.detach() for p in self.theirs], **tolerance)

    def saved(self) -> dict[str, Any]:
        """Our full state, in torch's form."""
        self.optimizer.consolidate_state_dict(to=None)
        return self.optimizer.state_dict()


def compare(ours: Any, theirs: Any, **tolerance: float) -> None:
    """Bit for bit, or within ``rtol`` and ``atol``."""
    if tolerance:
        torch.testing.assert_close(ours, theirs, **tolerance)
    else:
        assert_same(ours, theirs)


def search(
    problem: Any,
    kind: str = "replicated",
    rank: int = 0,
    world_size: int = 1,
    process_group: Any = None,
    **options: Any,
) -> Search:
    """Both at their beginning. A collective."""
    ours, theirs = problem.parameters(), problem.parameters()
    optimizer = ShardedOptimizer(
        ours, LBFGS, process_group, gradients=kind, bucket_cap_mb=SMALL_BUCKETS, **options
    )
    parts = {} if kind == "replicated" else {"part": rank, "parts": world_size}
    return Search(problem, ours, theirs, optimizer, LBFGS(theirs, **options), **parts)
