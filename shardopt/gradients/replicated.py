"""Gradients that are the mean already, on every rank: by DDP, or by the user."""

from __future__ import annotations

import torch
from torch import Tensor

from shardopt.gradients import norms
from shardopt.gradients.base import Gradients
from shardopt.gradients.report import Report, Verdict, exchange, judge
from shardopt.guard import agree, digest


class Replicated(Gradients):
    """A segment's gradient is a view of its parameter's ``.grad``; nothing travels."""

    def settle(self) -> Verdict:
        """See the base class. Ranks speak to one another only if non-finite values matter."""
        parameters = self.shard.parameters
        present = frozenset(i for i, p in enumerate(parameters) if p.grad is not None)
        powers = torch.zeros(self.shard.collectives.world_size, dtype=torch.float64, device="cpu")
        if self.guards.nonfinite == "ignore":
            return Verdict(present, False, powers)
        held = {index: self.of(index) for index in self.shard.segments}
        tensors = {
            index: grad._values() if grad.is_sparse else grad
            for index, grad in held.items()
            if grad is not None
        }
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        number = int(norms.first_nonfinite(list(tensors.values()), device))  # waits for a GPU
        report = Report(
            rounds=0,
            lost=0,
            facts=digest(self.facts(None)),
            nonfinite=[*tensors][number - 1] + 1 if number else 0,
            present=present,
        )
        quiet = report.is_quiet(self.guards)
        reports = exchange(self.shard.collectives, report, len(parameters), is_quiet=quiet)
        if len({report.facts for report in reports}) > 1:
            agree(self.shard.collectives, self.facts(None), "call step() alike on every rank")
        return judge(reports, powers, self.shard.names, self.guards)

    def of(self, index: int) -> Tensor | None:
        """See the base class."""
        grad = self.shard.parameters[index].grad
        if grad is None or index not in self.shard.segments:
            return None
        if grad.is_sparse and self.shard.algorithm_of(index).coalesces:
            grad = grad.coalesce()  # the whole one, as the class would: the order of a sum counts
        return self.shard.buffers.segment_of(grad, self.shard.segments[index][0])

    def sparse(self) -> frozenset[int]:
        """See the base class."""
        gradients = enumerate(parameter.grad for parameter in self.shard.parameters)
        return frozenset(i for i, grad in gradients if grad is not None and grad.is_sparse)

    def clip_norm(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
        """See the base class. torch's own: every rank has every gradient."""
        return torch.nn.utils.clip_grad_norm_(
            self.shard.parameters, max_norm, norm_type, error_if_nonfinite
        )

    def clip_value(self, clip_value: float) -> None:
        """See the base class."""
        torch.nn.utils.clip_grad_value_(self.shard.parameters, clip_value)
