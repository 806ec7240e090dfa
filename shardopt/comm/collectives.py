"""What an optimizer asks of the ranks around it, whoever carries the bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import string_at
from datetime import timedelta
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

DEFAULT_TIMEOUT = timedelta(minutes=10)  # for one communication


class Handle(Protocol):
    """A communication under way. Until ``wait`` returns, its tensors belong to it."""

    def wait(self) -> object:
        """Return when the tensors may be used again (on an accelerator: by the current stream)."""


class Work(Handle, Protocol):
    """A communication under way that tells whether it has ended."""

    def is_completed(self) -> bool:
        """Whether ``wait`` would not wait."""


class Done:
    """The handle of something that had nothing to do."""

    def is_completed(self) -> bool:
        """It has been from the beginning."""
        return True

    def wait(self) -> None:
        """Return at once."""


class Together:
    """Several handles, waited for as one."""

    def __init__(self, handles: Sequence[Handle]):
        self._handles = handles

    def wait(self) -> None:
        """Wait for each in the order in which they were started."""
        for handle in self._handles:
            handle.wait()


class Reduction(Handle, Protocol):
    """A reduction under way.

    Attributes:
        rows: after ``wait``, what each rank brought for this rank's shard, ``(world_size, n)``;
            ``None`` where the backend does not tell.
    """

    rows: Tensor | None

    def is_done(self) -> bool:
        """Whether ``wait`` may be called now and does not wait for what it has started."""


class Reduced:
    """A reduction by the backend, or one that ends here: the mean of what each rank has sent."""

    def __init__(self, work: Work, out: Tensor, rows: Tensor | None = None):
        self._work, self._out, self.rows = work, out, rows

    def is_done(self) -> bool:
        """See ``Reduction``."""
        return self._work.is_completed()

    def wait(self) -> None:
        """See ``Reduction``."""
        self._work.wait()
        if self.rows is not None:
            mean_of_rows(self.rows, self._out)


class Watching(Protocol):
    """Hears what this rank does, and whom it waits for in vain; see ``shardopt.comm.watch``."""

    def during(self, what: str, step: int | None) -> AbstractContextManager[None]:
        """See ``Collectives.during``."""

    def waits_for(self, passes: int) -> None:
        """This rank waits for the results of so many backward passes."""


class Collectives(ABC):
    """Allocates buckets and moves them between the ranks that share an optimizer's state.

    Launch order is law: every rank starts the same communications in the same order. (Two gloo
    all-reduces of one size launched in opposite order return wrong sums silently.) They run on a
    channel of their own, so that they never pair with those of DDP or of the user.

    Attributes:
        rank: this rank, counted from 0 among those that split the state.
        world_size: number of ranks that split the state.
        replica: which copy of the shards this rank's belongs to; 0 but on a 2-D mesh.
        gathers_up_to: number of ranks up to which each one hears from all where a sum might do.
        wire_device: where small messages and consolidated state travel.
        watch: who is told what this rank does; ``None`` for nobody.
    """

    rank: int
    world_size: int
    wire_device: torch.device
    replica: int = 0
    gathers_up_to: int = 64
    watch: Watching | None = None

    def during(self, what: str, step: int | None = None) -> AbstractContextManager[None]:
        """In here this rank does ``what``, as its number ``step``, and may wait for the others."""
        return nullcontext() if self.watch is None else self.watch.during(what, step)

    @property
    def channel(self) -> object:
        """What two have in common if their communications must start in one order."""
        return self

    @property
    def num_ranks(self) -> int:
        """Of all replicas together."""
        return self.world_size

    @property
    def shard_axis(self) -> Collectives:
        """The ranks that hold one copy of the state among them: all, but on a 2-D mesh."""
        return self

    @property
    def replicate_axis(self) -> Collectives | None:
        """The ranks that hold the same shard, on a 2-D mesh."""
        return None

    def aside(self, use: str) -> Collectives:
        """The same ranks on a channel for what goes on beside all else. Collective."""
        return self

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A zeroed 1-D buffer of ``numel`` elements that this object can move without a copy."""
        return torch.zeros(numel, dtype=dtype, device=device)

    @abstractmethod
    def all_gather(
        self,
        bucket: Tensor,  # (numel,)
        borders: Sequence[int],  # world_size + 1
    ) -> Work:
        """Start to fill the bucket in place on every rank: shard ``r`` comes from rank ``r``."""

    def reduce_scatter(
        self,
        bucket: Tensor,  # (numel,)
        borders: Sequence[int],  # world_size + 1
        out: Tensor,  # (borders[rank + 1] - borders[rank],)
    ) -> Reduction:
        """Start to fill ``out`` with this rank's shard of the mean of all ranks' buckets.

        Summed in rank order, in fp32 where elements have 16 bits, then divided: by the owner of the
        shard, to whom every rank sends what it has of it.
        """
        sizes = [high - low for low, high in pairwise(borders)]
        rows = out.new_empty(self.world_size, out.numel())
        work = self.all_to_all(bucket, sizes, rows, [out.numel()] * self.world_size)
        return Reduced(work, out, rows)

    @abstractmethod
    def all_to_all(
        self,
        send: Tensor,  # contiguous: what goes to rank 0, to rank 1, ... end to end
        send_sizes: Sequence[int],  # world_size numbers of elements
        out: Tensor,  # contiguous, of the same dtype: what comes from rank 0, from rank 1, ...
        out_sizes: Sequence[int],  # world_size numbers of elements
    ) -> Work:
        """Start to send each rank of the shard axis its part, and to receive what it sends."""

    @abstractmethod
    def all_gather_rows(
        self,
        row: Tensor,  # (k,), k and dtype the same on every rank
    ) -> Tensor:  # (number of ranks, k), on the CPU
        """Every rank's small message, in rank order, replica by replica. Blocks."""

    @abstractmethod
    def sum_rows(
        self,
        row: Tensor,  # (k,) float64, k the same on every rank
    ) -> Tensor:  # (k,), on the CPU
        """The sum of every rank's small message, in the same bits everywhere. Blocks."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        """Start to overwrite ``tensor`` (contiguous) on every rank by that of rank ``source``."""

    @abstractmethod
    def send(self, tensor: Tensor, to: int) -> Handle:
        """Start to send a contiguous tensor on ``wire_device``; ``receive`` takes it, in order."""

    @abstractmethod
    def receive(self, tensor: Tensor, source: int) -> Handle:
        """Start to fill a contiguous tensor on ``wire_device`` with what ``source`` sends next."""


def mean_of_rows(
    rows: Tensor,  # (world_size, n)
    out: Tensor,  # (n,)
) -> None:
    """The mean over ranks, summed in rank order, in fp32 where elements have 16 bits."""
    small = rows.is_floating_point() and rows.itemsize < 4
    total = rows[0].float() if small else out.copy_(rows[0])
    for row in rows[1:]:
        total += row
    total /= len(rows)
    if small:
        out.copy_(total)


def gather_texts(collectives: Collectives, text: bytes) -> list[bytes]:
    """Every rank's bytes, of any length, by two collectives of fixed size."""
    lengths = (
        collectives.all_gather_rows(torch.tensor([len(text)], device="cpu")).flatten().tolist()
    )
    padded = torch.zeros(max(max(lengths), 1), dtype=torch.uint8, device="cpu")
    padded[: len(text)] = (
        torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else padded[:0]
    )
    rows = collectives.all_gather_rows(padded)
    return [string_at(row.data_ptr(), size) for row, size in zip(rows, lengths, strict=True)]


def broadcast_text(collectives: Collectives, text: bytes, source: int) -> bytes:
    """The bytes of rank ``source``, on every rank."""
    length = torch.tensor([len(text)], device=collectives.wire_device)
    collectives.broadcast(length, source).wait()
    data = torch.zeros(int(length), dtype=torch.uint8, device="cpu")
    if collectives.rank == source and text:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    data = data.to(collectives.wire_device)
    collectives.broadcast(data, source).wait()
    data = data.cpu()
    return string_at(data.data_ptr(), data.numel())
