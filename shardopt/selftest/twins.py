"""Two equal trainings: one under ``ShardedOptimizer``, one under the class itself on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardopt.comm.collectives import mean_of_rows
from shardopt.optimizer import ShardedOptimizer
from shardopt.selftest.lab import Lab, expect_equal, expect_near

BUCKET_CAP_MB = 0.01  # several buckets, whose matrices are cut
KINDS = ("replicated", "local", "sharded")
ROUNDING = 0.01  # of the way that parameters have come, where sums have another order


class Net(nn.Module):
    """A small model: of everything, of matrices alone, or of one table."""

    def __init__(self, parts: str = "everything"):
        super().__init__()
        torch.manual_seed(0)
        self.parts = parts
        if parts == "table":
            self.table = nn.Embedding(301, 12, sparse=True)
        else:
            bias = parts == "everything"
            self.first, self.last = nn.Linear(61, 53, bias=bias), nn.Linear(53, 37, bias=bias)
            self.scale = nn.Parameter(torch.tensor(1.0)) if bias else 1.0

    def loss(self, step: int, rank: int) -> Tensor:
        """On the batch of one step and rank."""
        generator = torch.Generator().manual_seed(1000 * step + rank)
        if self.parts == "table":
            rows = torch.randperm(301, generator=generator)[:40]
            loss: Tensor = self.table(rows.to(self.table.weight.device)).square().mean()
            return loss
        weight = self.first.weight
        batch = torch.randn(8, 61, generator=generator).to(weight.device, weight.dtype)
        out: Tensor = self.last(torch.tanh(self.first(batch))) * self.scale
        return out.square().mean()

    def gradients(self, step: int, rank: int) -> list[Tensor]:
        """On that batch."""
        return list(torch.autograd.grad(self.loss(step, rank), [*self.parameters()]))


class Twins:
    """Equal models and optimizers; the plain one steps on the mean of all ranks' gradients.

    Args:
        kind: of gradients.
        ours: what only ``ShardedOptimizer`` takes.
        options: of the class.
    """

    def __init__(
        self,
        lab: Lab,
        optimizer_class: type[Optimizer],
        options: Mapping[str, Any],
        *,
        kind: str = "sharded",
        parts: str = "everything",
        dtype: torch.dtype = torch.float32,
        **ours: Any,
    ):
        self.lab, self.kind = lab, kind
        self.ours, self.theirs, self.begun = (Net(parts).to(lab.device, dtype) for _ in range(3))
        how = {"kernel": "torch", "bucket_cap_mb": BUCKET_CAP_MB, **ours}
        self.sharded = ShardedOptimizer(
            self.ours.parameters(), optimizer_class, lab.collectives, gradients=kind,
            **how, **options,
        )  # fmt: skip
        self.plain = optimizer_class(self.theirs.parameters(), **options)
        self.step = 0

    def means(self) -> list[Tensor]:
        """Over all ranks, summed in their order, in fp32 where elements have 16 bits."""
        columns = zip(
            *(self.theirs.gradients(self.step, rank) for rank in range(self.lab.world_size)),
            strict=True,
        )
        means = []
        for column in columns:
            rows = torch.stack([g.to_dense() if g.is_sparse else g for g in column])
            mean = torch.empty_like(rows[0])
            mean_of_rows(rows, mean)
            means.append(mean.to_sparse(1) if column[0].is_sparse else mean)
        return means

    def train(self, num_steps: int, before_step: Callable[[], object] = lambda: None) -> Twins:
        """Some steps of both."""
        for _ in range(num_steps):
            means = self.means()
            if self.kind == "replicated":
                for parameter, mean in zip(self.ours.parameters(), means, strict=True):
                    parameter.grad = mean.clone()
            else:
                self.ours.loss(self.step, self.lab.rank).backward()
            before_step()
            self.sharded.step()
            for parameter, mean in zip(self.theirs.parameters(), means, strict=True):
                parameter.grad = mean
            self.plain.step()
            self.step += 1
        return self

    def saved(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The full state of both, by parameter. Collective."""
        self.sharded.consolidate_state_dict(to=None)
        ours, theirs = self.sharded.state_dict(), copy.deepcopy(self.plain.state_dict())
        theirs["state"] = dict(sorted(theirs["state"].items()))
        return ours, theirs

    def compare(self, *, exact: bool | None = None) -> None:
        """Fail unless parameters and state are equal, or near where sums have another order."""
        ours, theirs, begun = (
            [parameter.detach() for parameter in model.parameters()]
            for model in (self.ours, self.theirs, self.begun)
        )
        if exact is None:
            exact = self.lab.sums_in_rank_order or self.kind == "replicated"
        if not exact:
            expect_near(ours, theirs, begun, ROUNDING)
            return
        expect_equal(ours, theirs, "parameters")
        our_state, their_state = self.saved()
        expect_equal(our_state, their_state, "state_dict")

    def exchange_states(self) -> None:
        """Each goes on with the state that the other has saved. Collective."""
        ours, theirs = self.saved()
        self.plain.load_state_dict(ours)
        self.sharded.load_state_dict(theirs)
