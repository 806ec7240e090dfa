"""Where checks run, and what they fail with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardopt.comm import Collectives


class Skipped(Exception):
    """A check does not apply here; its text says why. Raised on every rank alike."""


@dataclass(frozen=True)
class Lab:
    """Where checks run.

    Attributes:
        collectives: what moves buckets.
        device: of this rank.
        backend: what carries buckets: ``"gloo"``, ``"nccl"``, ``"mpi"``, or ``"nothing"``.
        directory: which all ranks see; ``None``: there is none.
    """

    collectives: Collectives
    device: torch.device
    backend: str
    directory: Path | None

    @property
    def rank(self) -> int:
        """This rank."""
        return self.collectives.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.collectives.world_size

    @property
    def sums_in_rank_order(self) -> bool:
        """Whether means of fp32 are those taken one rank after another, bit for bit."""
        return self.backend != "nccl" or self.world_size <= 2

    def need_ranks(self) -> None:
        """Skip where there is nobody to differ from."""
        if self.world_size == 1:
            raise Skipped("needs two ranks")


def expect(holds: object, what: str) -> None:
    """Fail unless it holds; an ``assert`` would be taken out by ``python -O``."""
    if not holds:
        raise AssertionError(what)


def expect_equal(ours: Any, theirs: Any, path: str) -> None:
    """Fail unless two trees of values and tensors are equal in every bit."""
    if isinstance(theirs, Tensor):
        ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
        expect((ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), f"{path}: another kind")
        num_different = int((ours != theirs).sum()) if not torch.equal(ours, theirs) else 0
        expect(not num_different, f"{path}: {num_different} of {ours.numel()} elements differ")
    elif isinstance(theirs, Mapping):
        expect(ours.keys() == theirs.keys(), f"{path}: keys {[*ours]} and {[*theirs]}")
        for key, value in theirs.items():
            expect_equal(ours[key], value, f"{path}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        expect(len(ours) == len(theirs), f"{path}: {len(ours)} and {len(theirs)} items")
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            expect_equal(one, other, f"{path}[{number}]")
    else:
        expect(ours == theirs, f"{path}: {ours!r} and {theirs!r}")


def expect_near(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    starts: Sequence[Tensor],
    share: float,
) -> None:
    """Fail if tensors lie further apart than a ``share`` of the way that they have come."""
    for number, (our, their, start) in enumerate(zip(ours, theirs, starts, strict=True)):
        apart, way = (float((t.double() - their.double()).norm()) for t in (our, start))
        expect(
            apart <= share * way, f"parameter {number}: {apart:.2e} apart after a way of {way:.2e}"
        )
