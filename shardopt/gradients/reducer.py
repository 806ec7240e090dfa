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
from shardopt.gradients.refusals import refuse_abandoned, refuse_ddp
from shardopt.gradients.report import (
    Report,
    Verdict,
    all_powers,
    exchange,
    judge,
    refuse_lost,
    to_bits,
)
from shardopt.gradients.rounds import Rounds
from shardopt.gradients.row_means import RowMeans
from shardopt.gradients.torch_calls import watch
from shardopt.guard import agree, digest, fail_everywhere
from shardopt.policies import Guards
from shardopt.shard import Shard

Said = Mapping[str, object]
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
        self._keeps = keeps
        self._knows_ddp = False
        self._rounds = Rounds(shard, keeps=keeps, looks=looks)
        self._rows = RowMeans(shard, adds=not keeps, looks=looks)
        self._settled: tuple[float | None, int, Verdict] | None = None
        watch(self)

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
        early = not self._rounds.means.has_limit  # the others may be elsewhere
        reports, powers = self._exchange(norm_type, said, failed=problem is not None, early=early)
        self._refuse_uneven(reports, norm_type, said)
        if any(report.failed for report in reports):
            fail_everywhere(self.shard.collectives, problem)
        everything = False  # the first round may end one that is half-way on some ranks
        while any(report.early or report.more or report.rows for report in reports):
            if any(report.more for report in reports):
                self._refuse_late_ddp()
                self._rounds.close(everything=everything)
                everything = True
            if any(report.rows for report in reports):
                self._rounds.kept.note_sending(self.shard.layout.by_rows)
                self._rows.exchange()
            reports, powers = self._exchange(norm_type, said)
        self._refuse_spoilt(reports)
        self._rounds.agreed()
        if not self.guards.find_unused_parameters and any(report.missing for report in reports):
            refuse_abandoned(self.shard, self.reduced(), warns=False)
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

    def zero(self, *, to_none: bool = True) -> None:
        """See the base class."""
        self._rounds.abandon(retries=True)
        self._rounds.forget(to_none=to_none)
        self._rows.clear()

    def reduced(self) -> set[int]:
        """See the base class."""
        return self._rounds.present | self._rows.present

    def has_reduced(self) -> bool:
        """See ``Watched``: a rank may have reduced what others brought, and nothing of its own."""
        return bool(self.reduced()) or self._rounds.num_rounds > self._rounds.num_void

    def freed(self) -> set[int]:
        """See ``Watched``."""
        return set() if self._keeps else self.reduced()

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
        self._note_scaled()
        double = any(parameter.dtype is torch.float64 for parameter in self.shard.parameters)
        return total if double else total.float()

    def clip_value(self, clip_value: float) -> None:
        """See the base class."""
        self.settle(clip_value=clip_value)
        for tensor in self._means():
            tensor.clamp_(-clip_value, clip_value)
        self._note_scaled()

    def unscale(self, inverse: Tensor, found: Tensor) -> None:
        """See the base class."""
        self.settle()
        for tensor in self._means():
            device = tensor.device
            torch._amp_foreach_non_finite_check_and_unscale_(
                [tensor], here := found.to(device), inverse.to(device)
            )
            found.copy_(torch.maximum(found, here.to(found.device)))
        self._note_scaled()

    def _note_scaled(self) -> None:
        """The means have been scaled: what ranks agreed on holds, but for the norm."""
        self._rounds.note_scaled()
        if self._settled is not None:
            self._settled = None, *self._settled[1:]

    def _means(self) -> list[Tensor]:
        """All that this rank has of the mean gradients."""
        return self._rounds.means.tensors() + self._rows.tensors()

    # -- what ranks tell one another -----------------------------------------------------------

    def _exchange(
        self, norm_type: float | None, said: Said, *, failed: bool = False, early: bool = False
    ) -> tuple[list[Report], Tensor]:
        """Every rank's report, and its sum of powers, which it does not have if it is early."""
        if watch := self.shard.collectives.watch:
            watch.waits_for(self._rounds.num_rounds)
        nothing = torch.zeros((), dtype=torch.float64, device=self._device), -1, -1
        power, index, source = nothing if early else self._look(norm_type)
        flags = [parameter.requires_grad for parameter in self.shard.parameters]
        present = self.reduced()
        missing = [i for i, flag in enumerate(flags) if flag and i not in present]
        report = Report(
            rounds=self._rounds.num_rounds,
            void=self._rounds.num_void,
            lost=self._rounds.num_lost,
            failed=int(failed),
            early=int(early),
            facts=digest({**self.facts(norm_type), **said, "trained": crc32(bytes(flags))}),
            more=int(self._rounds.has_more()),
            rows=int(self._rows.has_more()),
            missing=missing[0] + 1 if missing else 0,
            num_missing=len(missing),
            changed=self._rounds.changed(),
            nonfinite=index + 1,
            source=source + 1,
            power=to_bits(float(power)) if norms.is_host(self._device) else 0,
            present=frozenset(present),
        )
        reports = exchange(
            self.shard.collectives,
            report,
            len(self.shard.parameters),
            is_quiet=report.is_quiet(self.guards) and norm_type != math.inf,
        )
        return reports, all_powers(self.shard.collectives, reports, power)

    def _refuse_uneven(
        self, reports: Sequence[Report], norm_type: float | None, said: Said
    ) -> None:
        """Raise on every rank if they do not stand at the same point of the same program.

        First bring all to the same number of rounds, so that every reduction ends.
        """
        num_rounds, num_void = self._rounds.num_rounds, self._rounds.num_void
        if len({report.rounds for report in reports}) > 1:
            self.lose(max(report.rounds for report in reports))
        self._refuse_spoilt(reports)
        if len({(report.facts, report.rounds, report.void) for report in reports}) > 1:
            pairs = zip(self.shard.names, self.shard.parameters, strict=True)
            flags = {f"requires_grad of parameter {name!r}": p.requires_grad for name, p in pairs}
            passes = {
                "the number of backward passes": num_rounds,
                "the number of backward passes before zero_grad()": num_void,
            }
            facts = {**self.facts(norm_type), **said, **passes}
            agree(self.shard.collectives, facts | flags, _ALIKE)

    def _refuse_spoilt(self, reports: Sequence[Report]) -> None:
        """Raise on every rank if what one has reduced is of no use."""
        if any(report.changed > 0 for report in reports):  # by DDP that has come late?
            refuse_ddp([{"params": self.shard.parameters}])
        refuse_lost(reports, self.shard.names)

    def _refuse_late_ddp(self) -> None:
        """DDP brings back what has been freed. Looks once: there are models that do, too."""
        if not self._knows_ddp:
            refuse_ddp([{"params": self.shard.parameters}])
        self._knows_ddp = True

    @property
    def _device(self) -> torch.device:
        """Where norms are added up."""
        buffers = self.shard.buffers.buckets
        return buffers[0].device if buffers else torch.device("cpu")

    def _look(self, norm_type: float | None) -> tuple[Tensor, int, int]:
        """This rank's sum of powers; what is not finite, and whence, or -1."""
        looks = self.guards.nonfinite != "ignore"
        if looks or norm_type is not None:
            self._rounds.means.wait()
        tensors = [] if norm_type is None else self._means()
        power = norms.power_sum(tensors, norm_type or 1.0, self._device)
        known = self._rounds.means.nonfinite or self._rows.nonfinite or (-1, -1)
        if looks and known[0] < 0 and not norms.is_host(self._device):
            known = self._rounds.means.find_nonfinite(self._device), -1
        return power, *known
