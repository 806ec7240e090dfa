"""Gradients that ranks bring: reduced while backward goes on, and agreed on before the update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from zlib import crc32

import torch
from torch import Tensor

from shardopt.errors import GradientError
from shardopt.gradients import norms
from shardopt.gradients.base import Facts, Gradients
from shardopt.gradients.report import (
    Report,
    Verdict,
    exchange,
    from_bits,
    judge,
    refuse_lost,
    to_bits,
)
from shardopt.gradients.rounds import Rounds
from shardopt.gradients.row_means import RowMeans
from shardopt.guard import agree, digest, fail_everywhere
from shardopt.policies import Guards
from shardopt.shard import Shard

_ALIKE = "set options, and call backward(), step() and clip_grad_norm_(), alike on every rank"


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
        looks = guards.nonfinite != "ignore"
        self._rounds = Rounds(shard, keeps=keeps, looks=looks)
        self._rows = RowMeans(shard, adds=not keeps, looks=looks)
        self._settled: tuple[float | None, int, Verdict] | None = None

    def extend(self) -> None:
        """See the base class."""
        self._rounds.extend()

    def paused(self) -> AbstractContextManager[None]:
        """See the base class."""
        return self._rounds.paused()

    def settle(
        self,
        problem: Exception | None = None,
        *,
        norm_type: float | None = None,
        **said: object,
    ) -> Verdict:
        """See the base class.

        Args:
            problem: see there; where ``clip_norm`` has settled already, other ranks are not told.
            norm_type: the order of the norm that the verdict is to tell; ``None`` for none.
            said: what else the user said, on which ranks must agree.
        """
        known = self._known(norm_type)
        has_more = self._rounds.has_more() or self._rows.has_more()
        if known and not has_more and not self._rounds.changed():
            if problem is not None:
                raise problem
            return known
        self._rounds.abandon(retries=False)
        reports, powers = self._exchange(norm_type, said, failed=problem is not None)
        self._refuse_uneven(reports, norm_type, said)
        if any(report.failed for report in reports):
            fail_everywhere(self.shard.collectives, problem)
        everything = False  # the first round may end one that is half-way on some ranks
        while any(report.more or report.rows for report in reports):
            if any(report.more for report in reports):
                self._rounds.close(everything=everything)
                everything = True
            if any(report.rows for report in reports):
                self._rows.exchange()
            reports, powers = self._exchange(norm_type, said)
        self._rounds.follow_training()
        verdict = judge(reports, powers, self.shard.names, self.guards)
        self._rounds.means.wait()
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
        if index not in verdict.present:
            return None
        mean = self._rows.of(index)
        return self._rounds.means.of(index) if mean is None else mean

    @property
    def num_rounds(self) -> int:
        """See the base class."""
        return self._rounds.num_rounds

    def lose(self, num_rounds: int) -> None:
        """See the base class."""
        self._rounds.abandon(retries=False)
        while self._rounds.num_rounds < num_rounds:
            self._rounds.close(lost=True)
        self._rounds.tear()

    def zero(self) -> None:
        """See the base class."""
        self._rounds.abandon(retries=True)
        self._rounds.forget()
        self._rows.clear()

    def consume(self) -> None:
        """See the base class."""
        self._rounds.forget()
        self._rows.clear()
        for parameter in self.shard.parameters:
            parameter.grad = None
        self._rounds.hook()

    def clip_norm(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
        """See the base class."""
        total = norms.total_norm(
            self.settle(norm_type=norm_type, max_norm=max_norm).powers, norm_type
        )
        if error_if_nonfinite and not total.isfinite():
            raise GradientError(
                f"the total norm of order {norm_type} of the gradients is {float(total)}, so they "
                "cannot be clipped; pass error_if_nonfinite=False to go on, or use "
                "guards=Guards(nonfinite=...)"
            )
        factor = norms.clip_factor(total, max_norm)
        for tensor in self._means():
            tensor.mul_(factor.to(tensor.device, non_blocking=True))
        self._forget_norm()
        double = any(parameter.dtype is torch.float64 for parameter in self.shard.parameters)
        return total if double else total.float()

    def clip_value(self, clip_value: float) -> None:
        """See the base class."""
        self.settle(clip_value=clip_value)
        for tensor in self._means():
            tensor.clamp_(-clip_value, clip_value)
        self._forget_norm()

    def unscale(self, inverse: Tensor, found: Tensor) -> None:
        """See the base class."""
        self.settle()
        for tensor in self._means():
            device = tensor.device
            torch._amp_foreach_non_finite_check_and_unscale_(
                [tensor], here := found.to(device), inverse.to(device)
            )
            found.copy_(torch.maximum(found, here.to(found.device)))
        self._forget_norm()

    def _forget_norm(self) -> None:
        """Gradients have been scaled: what ranks agreed on holds, but for the norm."""
        if self._settled is not None:
            self._settled = None, *self._settled[1:]

    def _means(self) -> list[Tensor]:
        """All that this rank has of the mean gradients."""
        return self._rounds.means.tensors() + self._rows.tensors()

    # -- what ranks tell one another -----------------------------------------------------------

    def _exchange(
        self, norm_type: float | None, said: Mapping[str, object], *, failed: bool = False
    ) -> tuple[list[Report], Tensor]:
        """Every rank's report, and its sum of powers."""
        if watch := self.shard.collectives.watch:
            watch.waits_for(self._rounds.num_rounds)
        if norm_type is not None or self.guards.nonfinite != "ignore":
            self._rounds.means.wait()
        tensors = self._means() if norm_type is not None else []
        power = norms.power_sum(tensors, norm_type or 1.0, self._device)
        index, source = self._find_nonfinite()
        flags = [parameter.requires_grad for parameter in self.shard.parameters]
        present = self._rounds.present | self._rows.present
        missing = [i for i, flag in enumerate(flags) if flag and i not in present]
        report = Report(
            rounds=self._rounds.num_rounds,
            lost=self._rounds.num_lost,
            failed=int(failed),
            facts=digest({**self.facts(norm_type), **said, "trained": crc32(bytes(flags))}),
            more=int(self._rounds.has_more()),
            rows=int(self._rows.has_more()),
            missing=missing[0] + 1 if missing else 0,
            num_missing=len(missing),
            changed=self._rounds.changed(),
            nonfinite=index + 1,
            source=source + 1,
            power=to_bits(float(power)) if _is_host(self._device) else 0,
            present=frozenset(present),
        )
        reports = exchange(
            self.shard.collectives,
            report,
            len(self.shard.parameters),
            is_quiet=report.is_quiet(self.guards) and norm_type != math.inf,
        )
        return reports, self._all_powers(reports, power)

    def _refuse_uneven(
        self, reports: Sequence[Report], norm_type: float | None, said: Mapping[str, object]
    ) -> None:
        """Raise on every rank if they do not stand at the same point of the same program.

        First bring all to the same number of rounds, so that every reduction ends.
        """
        num_rounds = self._rounds.num_rounds
        if len({(report.rounds, report.lost) for report in reports}) > 1:
            for _ in range(max(report.rounds for report in reports) - num_rounds):
                self._rounds.close(lost=True)
            self._rounds.tear()
        refuse_lost(reports, self.shard.names)
        if len({(report.facts, report.rounds) for report in reports}) > 1:
            pairs = zip(self.shard.names, self.shard.parameters, strict=True)
            training = {
                f"requires_grad of parameter {name!r}": p.requires_grad for name, p in pairs
            }
            facts = {**self.facts(norm_type), **said, "the number of backward passes": num_rounds}
            agree(self.shard.collectives, facts | training, _ALIKE)

    @property
    def _device(self) -> torch.device:
        """Where norms are added up."""
        buffers = self.shard.buffers.buckets
        return buffers[0].device if buffers else torch.device("cpu")

    def _all_powers(self, reports: list[Report], power: Tensor) -> Tensor:  # (world_size,)
        """Every rank's sum of powers: out of the reports, or without waiting for the device."""
        if _is_host(self._device):
            one_copy = reports[: self.shard.collectives.world_size]
            powers = [from_bits(report.power) for report in one_copy]
            return torch.tensor(powers, dtype=torch.float64, device="cpu")
        collectives = self.shard.collectives
        gathered = collectives.allocate(collectives.world_size, torch.float64, self._device)
        gathered[collectives.rank] = power
        collectives.all_gather(gathered, range(collectives.world_size + 1)).wait()
        return gathered

    def _find_nonfinite(self) -> tuple[int, int]:
        """A parameter whose mean is not finite and the rank that brought it; -1 for none."""
        known = self._rounds.means.nonfinite or self._rows.nonfinite
        if self.guards.nonfinite == "ignore" or known or _is_host(self._device):
            return known or (-1, -1)
        segments = {index: self._rounds.means.of(index) for index in self.shard.segments}
        held = {index: tensor for index, tensor in segments.items() if tensor is not None}
        number = int(norms.first_nonfinite(list(held.values()), self._device))  # waits for the GPU
        return ([*held][number - 1] if number else -1), -1


def _is_host(device: torch.device) -> bool:
    """Whether a number can be read without waiting for an accelerator."""
    return device.type == "cpu"
