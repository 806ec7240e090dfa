"""Gradients that ranks bring: reduced while backward goes on, and agreed on before the update."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from shardopt.errors import GradientError
from shardopt.gradients import norms
from shardopt.gradients.base import Facts, Gradients
from shardopt.gradients.report import Report, Verdict, exchange, from_bits, judge, to_bits
from shardopt.gradients.rounds import Rounds
from shardopt.guard import agree, digest
from shardopt.policies import Guards
from shardopt.shard import Shard

_ALIKE = "set options, and call step() and clip_grad_norm_(), alike on every rank"


class Reducer(Gradients):
    """Averages each rank's own gradients by reduce-scatter, overlapped with backward.

    Args:
        shard: the parameters.
        guards: what is checked.
        facts: what ranks must agree on at each step.
        keeps: whether ``.grad`` stays after it is reduced (``"local"``), or is freed
            (``"sharded"``).
    """

    reduces = True

    def __init__(self, shard: Shard, guards: Guards, facts: Facts, *, keeps: bool):
        super().__init__(shard, guards, facts)
        self._rounds = Rounds(shard, keeps=keeps, looks=guards.nonfinite != "ignore")
        self._settled: tuple[float | None, int, Verdict] | None = None

    def extend(self) -> None:
        """See the base class."""
        self._rounds.extend()

    def paused(self) -> AbstractContextManager[None]:
        """See the base class."""
        return self._rounds.paused()

    def settle(self, norm_type: float | None = None) -> Verdict:
        """See the base class."""
        if known := self._known(norm_type):
            return known
        self._rounds.abandon()
        reports, powers = self._exchange(norm_type)
        while any(report.rounds != self._rounds.num_rounds for report in reports):
            self._rounds.close()
            reports, powers = self._exchange(norm_type)
        if len({report.facts for report in reports}) > 1:
            agree(self.shard.collectives, self.facts(norm_type), _ALIKE)
        trained = [i for i, p in enumerate(self.shard.parameters) if p.requires_grad]
        verdict = judge(reports, powers, self.shard.names, trained, self.guards)
        self._settled = norm_type, self._rounds.num_changes, verdict
        return verdict

    def _known(self, norm_type: float | None) -> Verdict | None:
        """The verdict that still holds, if it tells what is asked for."""
        if self._settled is None or self._settled[1] != self._rounds.num_changes:
            return None
        return self._settled[2] if norm_type in (None, self._settled[0]) else None

    def of(self, index: int) -> Tensor | None:
        """See the base class."""
        verdict = self._known(None)
        assert verdict is not None, "settle comes first"
        return self._rounds.means.of(index) if index in verdict.present else None

    def zero(self) -> None:
        """See the base class."""
        self._rounds.abandon()
        self._rounds.forget()

    def consume(self) -> None:
        """See the base class."""
        self._rounds.forget()
        for parameter in self.shard.parameters:
            parameter.grad = None
        self._rounds.hook()

    def clip_norm(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
        """See the base class."""
        total = norms.total_norm(self.settle(norm_type).powers, norm_type)
        if error_if_nonfinite and not total.isfinite():
            raise GradientError(
                f"the total norm of order {norm_type} of the gradients is {float(total)}, so they "
                "cannot be clipped; pass error_if_nonfinite=False to go on, or use "
                "guards=Guards(nonfinite=...)"
            )
        factor = norms.clip_factor(total, max_norm)
        for tensor in self._rounds.means.tensors():
            tensor.mul_(factor.to(tensor.device, non_blocking=True))
        double = any(parameter.dtype is torch.float64 for parameter in self.shard.parameters)
        return total if double else total.float()

    def clip_value(self, clip_value: float) -> None:
        """See the base class."""
        self.settle()
        for tensor in self._rounds.means.tensors():
            tensor.clamp_(-clip_value, clip_value)

    # -- what ranks tell one another -----------------------------------------------------------

    def _exchange(self, norm_type: float | None) -> tuple[list[Report], Tensor]:
        """Every rank's report, once all reductions have ended here."""
        self._rounds.means.wait()
        tensors = self._rounds.means.tensors() if norm_type is not None else []
        power = norms.power_sum(tensors, norm_type or 1.0, self._device)
        index, source = self._find_nonfinite()
        report = Report(
            rounds=self._rounds.num_rounds + self._rounds.has_more(),
            lost=self._rounds.num_lost,
            facts=digest(self.facts(norm_type)),
            changed=self._rounds.changed(),
            nonfinite=index + 1,
            source=source + 1,
            power=to_bits(float(power)) if self._device.type == "cpu" else 0,
            present=frozenset(self._rounds.present),
        )
        reports = exchange(self.shard.collectives, report, len(self.shard.parameters))
        return reports, self._all_powers(reports, power)

    @property
    def _device(self) -> torch.device:
        """Where norms are added up."""
        buffers = self.shard.buffers.buckets
        return buffers[0].device if buffers else torch.device("cpu")

    def _all_powers(self, reports: list[Report], power: Tensor) -> Tensor:  # (world_size,)
        """Every rank's sum of powers: out of the reports, or without waiting for the device."""
        if self._device.type == "cpu":
            powers = [from_bits(report.power) for report in reports]
            return torch.tensor(powers, dtype=torch.float64, device="cpu")
        collectives = self.shard.collectives
        gathered = collectives.allocate(collectives.world_size, torch.float64, self._device)
        gathered[collectives.rank] = power
        collectives.all_gather(gathered, range(collectives.world_size + 1)).wait()
        return gathered

    def _find_nonfinite(self) -> tuple[int, int]:
        """A parameter whose mean is not finite and the rank that brought it; -1 for none."""
        if (
            self.guards.nonfinite == "ignore"
            or self._rounds.means.nonfinite
            or self._device.type == "cpu"
        ):
            return self._rounds.means.nonfinite or (-1, -1)
        segments = {index: self._rounds.means.of(index) for index in self.shard.segments}
        held = {index: tensor for index, tensor in segments.items() if tensor is not None}
        number = int(norms.first_nonfinite(list(held.values()), self._device))  # waits for the GPU
        return ([*held][number - 1] if number else -1), -1
