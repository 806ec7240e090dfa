"""Gradients that are the mean already, on every rank: by DDP, or by the user."""

from __future__ import annotations

from ctypes import string_at
from zlib import crc32

import torch
from torch import Tensor

from shardopt.gradients import norms
from shardopt.gradients.base import Gradients
from shardopt.gradients.report import Report, Verdict, exchange, judge
from shardopt.guard import agree, digest, fail_everywhere

_SAMPLED = 64  # gradients of which a step looks at the first element

_ALIKE = (
    "with gradients='replicated' every rank sets the same options and calls step() after the same "
    "backward, with the averaged gradients"
)


class Replicated(Gradients):
    """A segment's gradient is a view of its parameter's ``.grad``; nothing travels but reports."""

    def settle(self, problem: Exception | None = None) -> Verdict:
        """See the base class."""
        collectives, parameters = self.shard.collectives, self.shard.parameters
        present = frozenset(i for i, p in enumerate(parameters) if p.grad is not None)
        report = Report(
            rounds=0,
            lost=0,
            failed=int(problem is not None),
            facts=digest({**self.facts(None), "gradients": self._said(present)}),
            nonfinite=0 if problem else self._first_nonfinite() + 1,
            present=present,
        )
        quiet = report.is_quiet(self.guards)
        reports = exchange(collectives, report, len(parameters), is_quiet=quiet)
        if len({report.facts for report in reports}) > 1:
            agree(collectives, {**self.facts(None), **self._gradient_facts()}, _ALIKE)
        if any(report.failed for report in reports):
            fail_everywhere(collectives, problem)
        powers = torch.zeros(collectives.world_size, dtype=torch.float64, device="cpu")
        return judge(reports, powers, self.shard.names, self.guards)

    def _said(self, present: frozenset[int]) -> int:
        """A hash of which gradients there are, and of a sample of them."""
        flags = bytes(index in present for index in range(len(self.shard.parameters)))
        return crc32(b"".join(self._sample().values()), crc32(flags))

    def _sample(self) -> dict[int, bytes]:
        """The first element of some gradients, by parameter, where looking does not wait.

        Those of another batch, or of one rank alone, differ in all of them.
        """
        parameters = self.shard.parameters if self.guards.replicas else []
        every = len(parameters) // _SAMPLED + 1
        chosen = {index: parameters[index].grad for index in range(0, len(parameters), every)}
        return {
            index: string_at(grad.data_ptr(), grad.itemsize)
            for index, grad in chosen.items()
            if grad is not None and grad.layout is torch.strided and grad.numel() and grad.is_cpu
        }

    def _gradient_facts(self) -> dict[str, object]:
        """What ``_said`` is the hash of, by name."""
        sample, facts = self._sample(), dict[str, object]()
        named = zip(self.shard.names, self.shard.parameters, strict=True)
        for index, (name, parameter) in enumerate(named):
            fact = "none" if parameter.grad is None else "one"
            if index in sample:
                fact = f"one that begins with the bytes {sample[index].hex()}"
            facts[f"the gradient of parameter {name!r}"] = fact
        return facts

    def _first_nonfinite(self) -> int:
        """A parameter whose gradient is not finite; -1 for none, or where nobody asks."""
        if self.guards.nonfinite == "ignore":
            return -1
        held = {index: self.of(index) for index in self.shard.segments}
        tensors = {
            index: grad._values() if grad.is_sparse else grad
            for index, grad in held.items()
            if grad is not None
        }
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        number = int(norms.first_nonfinite(list(tensors.values()), device))  # waits for a GPU
        return [*tensors][number - 1] if number else -1

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
