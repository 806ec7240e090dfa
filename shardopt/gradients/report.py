"""What each rank says of its gradients before a step, and what all ranks make of it.

[Note: Agreement] One small all-gather a step: every rank has every report and judges them alike,
in rank order, so that all go on, all skip, or all raise. A report has ``15 + P / 62`` words of 64
bits for ``P`` parameters. On more ranks than ``Collectives.gathers_up_to`` sums come first, and
reports only if these show that there is something to tell.

[Note: Sums] ``N`` gathered reports are ``8 N (15 + P / 62)`` bytes, and a sum moves about ``3 P``
however many ranks there are: 1000 parameters on 64 ranks make 16 kB against 3 kB, on 512 ranks
127 kB against 3 kB. A sum takes about three times as long to set out, which 64 ranks are worth.
That all ranks say the same shows in sums of a number and of its square: ``N`` times the second
is the square of the first if, and only if, all numbers are equal.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from shardopt.comm import Collectives
from shardopt.errors import GradientError
from shardopt.gradients import norms
from shardopt.guard import digest
from shardopt.policies import Guards

_log = logging.getLogger("shardopt")
_BITS = 62  # of a word that stand for parameters: the sign is left alone
_EXACT_BITS = 53  # of an integer in a float64


class Spoilt(IntEnum):
    """Why means are of no use."""

    LOST = -1  # an exception has ended a backward
    UNSCALED = -2  # what .grad holds, which was not clipped when the means were, has been sent


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank says. Parameters are named by index + 1, with 0 for none."""

    rounds: int  # of reductions that it has taken part in
    void: int = 0  # of these, the first, which do not count any more
    lost: int = 0  # those whose backward an exception has ended, since all agreed
    facts: int  # hash of the steps taken, the options, and what it is about to do
    failed: int = 0  # whether it has refused something of its own before this step
    early: int = 0  # whether it speaks before it has its means, and wants to be heard again
    more: int = 0  # whether it has gradients that want another round
    rows: int = 0  # whether it has gradients of tables cut by rows that want to be exchanged
    missing: int = 0  # the first parameter that is trained and has no gradient here
    num_missing: int = 0
    changed: int = 0  # a parameter whose gradient was changed after it was sent, or a ``Spoilt``
    nonfinite: int = 0  # a parameter whose mean gradient is not finite
    source: int = 0  # the rank that brought it, plus 1
    power: int = 0  # bits of a float64: the sum of |g|**p over its segments, or the largest |g|
    present: frozenset[int] = frozenset()  # indices of parameters that have a gradient here

    def is_quiet(self, guards: Guards) -> bool:
        """Whether nobody needs to read it, if all say the same."""
        unused = self.missing and not guards.find_unused_parameters
        wants = self.early or self.more or self.rows or self.changed or self.nonfinite or unused
        return not (self.failed or wants)


@dataclass(frozen=True)
class Verdict:
    """What every rank knows of the gradients of this step."""

    present: frozenset[int]  # indices of parameters that have a gradient on any rank
    skips: bool  # leave parameters and state as they are
    powers: Tensor  # (world_size,) float64: each rank's sum of |g|**p, or largest |g|; or one sum


def exchange(
    collectives: Collectives, report: Report, num_parameters: int, *, is_quiet: bool = False
) -> list[Report]:
    """Every rank's report, in rank order; or one that holds for all. Collective.

    Args:
        is_quiet: whether this one need not be read, if all say the same, and its power may be
            added to the others.
    """
    if collectives.num_ranks > collectives.gathers_up_to:
        common = _add_up(collectives, report, num_parameters, is_quiet)
        if common is not None:
            return [common]
    *numbers, present = astuple(report)
    words = [0] * (num_parameters // _BITS + 1)
    for index in present:
        words[index // _BITS] |= 1 << index % _BITS
    row = torch.tensor([*numbers, *words], dtype=torch.int64, device="cpu")
    return [_read(row) for row in collectives.all_gather_rows(row).tolist()]


def _add_up(
    collectives: Collectives, report: Report, num_parameters: int, is_quiet: bool
) -> Report | None:
    """The report that holds for all ranks; ``None``, on all, if one wants to be read."""
    num_ranks = collectives.num_ranks
    point = (report.rounds, report.void, report.lost)
    said = digest({"point": point, "facts": report.facts})
    digits = [said >> shift & 0xFFFF for shift in range(0, 64, 16)]
    squares = [digit**2 for digit in digits]
    bits = num_ranks.bit_length()  # of a parameter's count, of which a word holds several
    in_word = _EXACT_BITS // bits
    words = [0] * (num_parameters // in_word + 1)
    for index in report.present:
        words[index // in_word] += 1 << index % in_word * bits
    power = from_bits(report.power) if collectives.replica == 0 else 0.0
    row = torch.tensor(
        [power, not is_quiet, *digits, *squares, *words], dtype=torch.float64, device="cpu"
    )
    power, *numbers = collectives.sum_rows(row).tolist()
    num_loud, *sums = [int(number) for number in numbers]
    alike = [num_ranks * sums[4 + i] == sums[i] ** 2 for i in range(4)]
    if num_loud or not all(alike):
        return None
    present = {
        index
        for index in range(num_parameters)
        if sums[8 + index // in_word] >> index % in_word * bits & (1 << bits) - 1
    }
    common = replace(report, missing=0, num_missing=0, present=frozenset(present))
    return replace(common, power=to_bits(power))


def _read(row: Sequence[int]) -> Report:
    names = [field.name for field in fields(Report)][:-1]
    words = row[len(names) :]
    present = {i * _BITS + b for i, word in enumerate(words) for b in range(_BITS) if word >> b & 1}
    return Report(**dict(zip(names, row, strict=False)), present=frozenset(present))


def to_bits(value: float) -> int:
    """A float64 as an integer of the same 64 bits."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


def from_bits(bits: int) -> float:
    """The float64 that ``to_bits`` was given."""
    return float(struct.unpack("d", struct.pack("q", bits))[0])


def all_powers(
    collectives: Collectives,
    reports: Sequence[Report],
    power: Tensor,  # () float64
) -> Tensor:  # (world_size,)
    """Every rank's sum of powers: out of the reports, or without waiting for the device."""
    if norms.is_host(power.device):
        one_copy = reports[: collectives.world_size]
        powers = [from_bits(report.power) for report in one_copy]
        return torch.tensor(powers, dtype=torch.float64, device="cpu")
    gathered = collectives.allocate(collectives.world_size, torch.float64, power.device)
    gathered[collectives.rank] = power
    collectives.all_gather(gathered, range(collectives.world_size + 1)).wait()
    return gathered


def judge(
    reports: Sequence[Report],
    powers: Tensor,  # (world_size,)
    names: Sequence[str],  # of the parameters
    guards: Guards,
) -> Verdict:
    """The verdict that every rank comes to.

    Raises:
        GradientError: on every rank.
    """
    present = frozenset[int]().union(*(report.present for report in reports))
    if present and not guards.find_unused_parameters:
        _refuse_unused(reports, names)
    return Verdict(present, _skips(reports, names, guards), powers)


def refuse_lost(reports: Sequence[Report], names: Sequence[str]) -> None:
    """Refuse means that an exception or a late change has spoilt on any rank.

    Raises:
        GradientError: on every rank.
    """
    for rank, report in enumerate(reports):
        if report.changed > 0:
            raise GradientError(
                f"the gradient of parameter {names[report.changed - 1]!r} was changed on rank "
                f"{rank} after it had been sent to the other ranks, as by torch.nn.utils."
                "clip_grad_norm_, GradScaler.unscale_, or zero_grad(set_to_none=False) of a part "
                "of the model; use optimizer.clip_grad_norm_, shardopt.GradScaler or optimizer."
                "zero_grad(), or change .grad before backward() has sent it, in a hook or within "
                "no_sync()"
            )
        if report.changed == Spoilt.UNSCALED:
            raise GradientError(
                f"on rank {rank} a backward() has added to gradients that had been clipped or "
                "unscaled, and with gradients='local' .grad holds what they were before; call "
                "optimizer.zero_grad(), and clip after the last backward() of a step (or use "
                "gradients='sharded', which adds to what is clipped)"
            )
        if report.changed == Spoilt.LOST:
            raise GradientError(
                f"an exception ended a backward() that was not repeated, or while gradients were "
                f"accumulated, or on some ranks only: what rank {rank} has is of no use; call "
                "optimizer.zero_grad() and repeat all backward passes of this step on every rank"
            )
    if len({(report.rounds, report.void) for report in reports}) > 1:
        lost = [(report.lost, report.void if report.lost else 0) for report in reports]
        if max(lost) > min(lost):
            raise GradientError(
                f"an exception ended a backward() on rank {lost.index(max(lost))} and not on rank "
                f"{lost.index(min(lost))}, which has gone on; call optimizer.zero_grad() and "
                "repeat it on every rank"
            )


def _refuse_unused(reports: Sequence[Report], names: Sequence[str]) -> None:
    for rank, report in enumerate(reports):
        if report.missing:
            more = f" and {report.num_missing - 1} more" if report.num_missing > 1 else ""
            raise GradientError(
                f"expected a gradient for every parameter, got none on rank {rank} for "
                f"parameter {names[report.missing - 1]!r}{more}; let every parameter take part in "
                "the loss on every rank, freeze it with requires_grad_(False), or pass "
                "guards=Guards(find_unused_parameters=True)"
            )


def _skips(reports: Sequence[Report], names: Sequence[str], guards: Guards) -> bool:
    for report in sorted(reports, key=lambda report: report.source == 0):
        if report.nonfinite and guards.nonfinite != "ignore":
            name = names[report.nonfinite - 1]
            where = f"rank {report.source - 1}" if report.source else "a rank"
            text = f"the gradient of parameter {name!r} from {where} is not finite"
            if guards.nonfinite == "raise":
                raise GradientError(
                    f"{text}; look for the cause there, or pass guards=Guards(nonfinite='skip')"
                )
            _log.warning("%s: the step is skipped on every rank", text)
            return True
    return False
