"""This rank's shard of each bucket's mean gradient, and the reductions under way.

[Note: In flight] A bucket's gradients are copied into a staging buffer that nobody writes until
its reduction has ended, so that ``.grad`` is free the moment it is copied. A staging buffer (and,
where the backend needs one, room for what comes from the others) exists for each reduction under
way: of which there are at most ``MAX_IN_FLIGHT`` where memory is what counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardopt.comm.collectives import Reduction
from shardopt.layout import Bucket
from shardopt.shard import Shard

MAX_IN_FLIGHT = 2


@dataclass
class _Flight:
    number: int  # of the bucket
    staging: Tensor
    reduction: Reduction
    out: Tensor
    adds: bool


class ReducedShards:
    """The mean gradients of a shard's buckets, this rank's part of each.

    Args:
        shard: whose buckets.
        adds: whether a second reduction adds to the first, or takes its place.
        max_in_flight: how many reductions may be under way; ``None`` for any number.
        looks: whether to look for what is not finite (on a CPU, where looking does not wait).
    """

    def __init__(self, shard: Shard, *, adds: bool, max_in_flight: int | None, looks: bool):
        self._shard = shard
        self._adds, self._max_in_flight, self._looks = adds, max_in_flight, looks
        self._means: list[Tensor] = []  # by bucket: (shard_numel,)
        self._filled: set[int] = set()
        self._flights: deque[_Flight] = deque()
        self._free: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self.nonfinite: tuple[int, int] | None = None  # index of a parameter, and whose it was

    def extend(self) -> None:
        """Make room for the buckets that the shard has got."""
        rank = self._shard.collectives.rank
        buckets = zip(self._shard.layout.buckets, self._shard.buffers.buckets, strict=True)
        for bucket, buffer in list(buckets)[len(self._means) :]:
            numel = bucket.borders[rank + 1] - bucket.borders[rank]
            self._means.append(self._shard.collectives.allocate(numel, bucket.dtype, buffer.device))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been reduced since ``clear``."""
        return not self._filled

    def launch(self, number: int, gradients: Mapping[int, Tensor]) -> None:
        """Copy ``gradients`` (parameter index -> tensor) and start to reduce a bucket."""
        limit = self._max_in_flight
        while any(flight.number == number for flight in self._flights) or (
            limit is not None and len(self._flights) >= limit
        ):
            self._land()
        bucket = self._shard.layout.buckets[number]
        staging = self._stage(number, bucket, gradients)
        mean, adds = self._means[number], self._adds and number in self._filled
        out = torch.empty_like(mean) if adds else mean
        reduction = self._shard.collectives.reduce_scatter(staging, bucket.borders, out)
        self._flights.append(_Flight(number, staging, reduction, out, adds))
        self._filled.add(number)

    def wait(self) -> None:
        """All reductions have ended."""
        while self._flights:
            self._land()

    def clear(self) -> None:
        """Forget all means, once nothing is under way any more."""
        self.wait()
        self._filled.clear()
        self.nonfinite = None

    def tensors(self) -> list[Tensor]:
        """The means that are there, each ``(shard_numel,)``."""
        return [self._means[number] for number in sorted(self._filled)]

    def of(self, index: int) -> Tensor | None:
        """The mean gradient of a parameter's segment, shaped as the segment's tensor."""
        number, _ = self._shard.layout.place(index)
        if index not in self._shard.segments or number not in self._filled:
            return None
        segment, tensor = self._shard.segments[index]
        start = self._shard.layout.buckets[number].borders[self._shard.collectives.rank]
        return self._means[number].as_strided(tensor.shape, tensor.stride(), segment.start - start)

    def _stage(self, number: int, bucket: Bucket, gradients: Mapping[int, Tensor]) -> Tensor:
        """A bucket of gradients, with zeros where there is none."""
        device = self._shard.buffers.buckets[number].device
        free = self._free.setdefault((bucket.dtype, device), [])
        fit = [i for i, buffer in enumerate(free) if buffer.numel() == bucket.numel]
        staging = (
            free.pop(fit[0])
            if fit
            else self._shard.collectives.allocate(bucket.numel, bucket.dtype, device)
        )
        for start, stop in bucket.gaps:
            staging[start:stop].zero_()
        targets, sources = [], []
        for slot in bucket.slots:
            view = self._shard.buffers.slot_of(staging, slot)
            gradient = gradients.get(slot.parameter)
            if gradient is None:
                view.zero_()
            elif gradient.layout is not torch.strided:
                view.copy_(gradient.to_dense())
            else:
                targets.append(view)
                sources.append(gradient)
        if targets:
            torch._foreach_copy_(targets, sources)
        return staging

    def _land(self) -> None:
        """Take in the reduction that was started first."""
        flight = self._flights.popleft()
        flight.reduction.wait()
        if self._looks and flight.out.device.type == "cpu" and self.nonfinite is None:
            self._look(flight)
        if flight.adds:
            self._means[flight.number].add_(flight.out)
        key = (flight.staging.dtype, flight.staging.device)
        free = self._free.setdefault(key, [])
        free.append(flight.staging)
        del free[:-MAX_IN_FLIGHT]

    def _look(self, flight: _Flight) -> None:
        """Note which parameter's mean is not finite, and from which rank that comes."""
        if not flight.out.numel() or torch.linalg.vector_norm(flight.out, torch.inf).isfinite():
            return
        bucket = self._shard.layout.buckets[flight.number]
        rank = self._shard.collectives.rank
        for segment in bucket.segments(rank):
            start = segment.start - bucket.borders[rank]
            part = slice(start, start + segment.numel)
            if not flight.out[part].isfinite().all():
                rows = flight.reduction.rows
                bad = [] if rows is None else (~rows[:, part].isfinite()).any(1).nonzero().tolist()
                self.nonfinite = (segment.parameter, bad[0][0] if bad else -1)
                return
