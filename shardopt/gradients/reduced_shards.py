"""This rank's shard of each bucket's mean gradient, and the reductions under way.

[Note: In flight] A bucket's gradients are copied into a staging buffer that nobody writes until
its reduction has ended, so that ``.grad`` is free the moment it is copied. A staging buffer (and,
where the backend needs one, room for what comes from the others) exists for each reduction under
way, so of these there are at most ``MAX_IN_FLIGHT``: a further one waits for the first (but see
``has_limit``).
Memory is the reason: with ``"sharded"`` the hook waits, since a gradient that has not been copied
cannot be freed. With ``"local"`` no hook waits, see [Note: Line].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardopt.comm.collectives import Reduction
from shardopt.errors import UnsupportedError
from shardopt.gradients.norms import all_finite, first_nonfinite
from shardopt.layout import Atom, Bucket
from shardopt.shard import Shard

MAX_IN_FLIGHT = 2


@dataclass
class _Flight:
    number: int  # of the bucket
    buffer: Tensor  # whose beginning is the staging buffer
    reduction: Reduction
    out: Tensor
    adds: bool
    counts: bool = True  # until it is forgotten


class ReducedShards:
    """The mean gradients of a shard's buckets, this rank's part of each.

    Args:
        shard: whose buckets.
        adds: whether a second reduction adds to the first, or takes its place.
        looks: whether to look for what is not finite (on a CPU, where looking does not wait).

    Attributes:
        has_limit: whether a reduction waits for room; otherwise it waits for none but the one
            before of the same bucket, and takes what memory it needs.
    """

    has_limit = True

    def __init__(self, shard: Shard, *, adds: bool, looks: bool):
        self._shard = shard
        self._adds, self._looks = adds, looks
        self._means: list[Tensor] = []  # by bucket: (shard_numel,)
        self._filled: set[int] = set()
        self._flights: deque[_Flight] = deque()
        self._free: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self._nonfinite: dict[int, tuple[int, int]] = {}  # by bucket: a parameter, and whose it was

    def extend(self) -> None:
        """Make room for the buckets that the shard has got."""
        rank = self._shard.collectives.rank
        buckets = zip(self._shard.layout.buckets, self._shard.buffers.buckets, strict=True)
        for bucket, buffer in list(buckets)[len(self._means) :]:
            by_rows = bucket.atom is Atom.ROW  # its gradients are sparse: see RowMeans
            numel = 0 if by_rows else bucket.borders[rank + 1] - bucket.borders[rank]
            self._means.append(self._shard.collectives.allocate(numel, bucket.dtype, buffer.device))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been reduced since ``clear``."""
        return not self._filled

    def refuse(self, gradients: Mapping[int, Tensor]) -> None:
        """Refuse what cannot be reduced, before anything of its bucket is sent.

        Raises:
            UnsupportedError: one has a graph, or another dtype than its parameter.
        """
        for index, gradient in gradients.items():
            name, dtype = self._shard.names[index], self._shard.parameters[index].dtype
            if gradient.requires_grad and self._adds:
                raise UnsupportedError(
                    f"parameter {name!r}: backward(create_graph=True) is not supported with "
                    "gradients='sharded', which frees the gradient; use torch.autograd.grad, or "
                    "gradients='local' or 'replicated'"
                )
            if gradient.dtype != dtype:
                raise UnsupportedError(
                    f"parameter {name!r}: expected a gradient of {dtype}, got {gradient.dtype}; "
                    "use gradients='replicated'"
                )

    @property
    def nonfinite(self) -> tuple[int, int] | None:
        """The index of a parameter whose mean is not finite, and the rank that brought it, or -1.

        Known where looking does not wait.
        """
        return self._nonfinite[min(self._nonfinite)] if self._nonfinite else None

    def find_nonfinite(self, device: torch.device) -> int:
        """The index of a parameter whose mean is not finite, -1 for none. Waits for the device."""
        segments = {index: self.of(index) for index in self._shard.segments}
        held = {index: tensor for index, tensor in segments.items() if tensor is not None}
        number = int(first_nonfinite(list(held.values()), device))
        return [*held][number - 1] if number else -1

    def launch(self, number: int, gradients: Mapping[int, Tensor]) -> None:
        """Copy ``gradients`` (parameter index -> tensor) and start to reduce a bucket."""
        while self._is_full(number):
            self._land()
        bucket = self._shard.layout.buckets[number]
        buffer = self._take_buffer(number, bucket)
        staging = buffer[: bucket.numel]
        self._fill(staging, bucket, gradients)
        mean, adds = self._means[number], self._adds and number in self._filled
        out = torch.empty_like(mean) if adds else mean
        if not adds:
            self._nonfinite.pop(number, None)
        collectives = self._shard.collectives
        with collectives.during("backward()"):  # on a mesh it goes on with others', which may fail
            reduction = collectives.reduce_scatter(staging, bucket.borders, out)
        self._flights.append(_Flight(number, buffer, reduction, out, adds))
        self._filled.add(number)

    def has_room(self, number: int) -> bool:
        """Whether ``launch`` would not wait; takes in what has ended."""
        with self._shard.collectives.during("backward()"):
            while self._is_full(number) and self._flights[0].reduction.is_done():
                self._land()
        return not self._is_full(number)

    def _is_full(self, number: int) -> bool:
        flights = self._flights
        full = self.has_limit and len(flights) >= MAX_IN_FLIGHT
        return full or any(flight.number == number for flight in flights)

    def wait(self) -> None:
        """All reductions have ended."""
        while self._flights:
            self._land()

    def clear(self, *, to_zeros: bool = False) -> None:
        """Forget all means, those on their way, too; or let them be zeros."""
        for flight in self._flights:
            flight.counts = False
        self._nonfinite.clear()
        if to_zeros:
            for mean in self.tensors():
                mean.zero_()
        else:
            self._filled.clear()

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

    def _fill(self, staging: Tensor, bucket: Bucket, gradients: Mapping[int, Tensor]) -> None:
        """Copy gradients to where they lie in their bucket, with zeros where there is none."""
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

    def _take_buffer(self, number: int, bucket: Bucket) -> Tensor:
        """A buffer that is free, and large enough for any bucket of its kind."""
        buffers = self._shard.buffers.buckets
        key = bucket.dtype, buffers[number].device
        free = self._free.setdefault(key, [])
        fit = next((i for i, buffer in enumerate(free) if buffer.numel() >= bucket.numel), None)
        if fit is not None:
            return free.pop(fit)
        largest = max(
            buffer.numel()
            for bucket, buffer in zip(self._shard.layout.buckets, buffers, strict=True)
            if (buffer.dtype, buffer.device) == key and bucket.atom is not Atom.ROW
        )
        return self._shard.collectives.allocate(largest, *key)

    def _land(self) -> None:
        """Take in the reduction that was started first."""
        flight = self._flights.popleft()
        with self._shard.collectives.during("backward()"):
            flight.reduction.wait()
        if not flight.counts:
            flight.out.zero_()  # it is the mean, or is added to it
        if flight.adds:
            self._means[flight.number].add_(flight.out)
        looks = self._looks and flight.out.device.type == "cpu"
        if looks and flight.counts and flight.number not in self._nonfinite:
            self._look(flight)
        free = self._free[flight.buffer.dtype, flight.buffer.device]
        if len(free) < MAX_IN_FLIGHT:  # else there were more without the limit
            free.append(flight.buffer)

    def _look(self, flight: _Flight) -> None:
        """Note which parameter's mean is not finite, and from which rank that comes."""
        mean = self._means[flight.number]
        if all_finite(mean):
            return
        bucket = self._shard.layout.buckets[flight.number]
        rank = self._shard.collectives.rank
        for segment in bucket.segments(rank):
            start = segment.start - bucket.borders[rank]
            part = slice(start, start + segment.numel)
            if not mean[part].isfinite().all():
                rows = flight.reduction.rows
                bad = [] if rows is None else (~rows[:, part].isfinite()).any(1).nonzero().tolist()
                first = self._shard.collectives.replica * len(rows) if rows is not None else 0
                self._nonfinite[flight.number] = (
                    segment.parameter,
                    first + bad[0][0] if bad else -1,
                )
                return
