"""Collectives over MPI, by mpi4py: no ``torch.distributed`` is needed.

MPI moves elements of 1, 2, 4, 8 or 16 bytes, and adds up none but the float64 of ``sum_rows``: so
every dtype arrives as it was sent, and 16-bit gradients are averaged in fp32, as over gloo. Tensors
in CPU memory are read and written where they lie. Those of a GPU are, too, where MPI says that it
can (``MPIX_Query_cuda_support``); otherwise they travel through pinned host memory.

A bucket of more than 2^31 elements (8 GiB in fp32) needs an MPI of version 4, such as MPICH 4; Open
MPI 5 refuses it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardopt.comm.collectives import DEFAULT_TIMEOUT, Collectives
from shardopt.comm.mpi_progress import UnderWay

if TYPE_CHECKING:
    from mpi4py import MPI


class MpiCollectives(Collectives):
    """The ranks of a communicator of mpi4py, on communicators of shardopt's own.

    Args:
        comm: whose ranks take part: an intracommunicator. It is duplicated, once for each ``use``,
            and the duplicates are freed with it.
        timeout: how long one communication may take before it raises.
        use: what for; for another use there is another channel.

    Raises:
        TypeError: ``comm`` is no communicator of mpi4py.
        ValueError: this rank is not in it, it has been freed, or it has two sides.
        RuntimeError: MPI is not running, or not for threads.
    """

    def __init__(
        self, comm: MPI.Intracomm, *, timeout: timedelta = DEFAULT_TIMEOUT, use: str = "shardopt"
    ):
        refuse_comm(comm)
        self._comm, self._timeout = comm, timeout
        self._channel = _channel_of(comm, use, timeout)
        self.rank, self.world_size = comm.rank, comm.size
        self.wire_device = torch.device("cpu")

    @property
    def channel(self) -> object:
        """Optimizers over the same communicator share its duplicates."""
        return self._channel

    def aside(self, use: str) -> MpiCollectives:
        """See the base class."""
        return MpiCollectives(self._comm, timeout=self._timeout, use=f"shardopt {use}")

    def all_gather(self, bucket: Tensor, borders: Sequence[int]) -> UnderWay:
        """See the base class."""
        from mpi4py import MPI

        counts = [high - low for low, high in pairwise(borders)]
        data = _in_reach(bucket, slice(borders[self.rank], borders[self.rank + 1]))
        whole = [_memory(data), counts, list(borders[:-1]), _element(data)]
        request = self._channel.buckets.Iallgatherv(MPI.IN_PLACE, whole)
        return self._under_way("all_gather", request, data, into=bucket)

    def all_to_all(
        self, send: Tensor, send_sizes: Sequence[int], out: Tensor, out_sizes: Sequence[int]
    ) -> UnderWay:
        """See the base class.

        What a rank has for itself is copied: MPICH would move 8 KiB of it at each look.
        """
        data, arrived = _in_reach(send), _in_reach(out, slice(0))
        here, there = _starts(send_sizes)[self.rank], _starts(out_sizes)[self.rank]
        own = send_sizes[self.rank]
        arrived[there : there + own] = data[here : here + own]
        parts = self._of_others(data, send_sizes), self._of_others(arrived, out_sizes)
        request = self._channel.buckets.Ialltoallv(*parts)
        return self._under_way("all_to_all", request, arrived, data, into=out)

    def all_gather_rows(self, row: Tensor) -> Tensor:
        """See the base class."""
        row = row.detach().cpu().contiguous()
        rows = row.new_empty(self.world_size, row.numel())
        request = self._channel.messages.Iallgather(_buffer(row), _buffer(rows))
        self._under_way("all_gather_rows", request, rows, row).wait()
        return rows

    def sum_rows(self, row: Tensor) -> Tensor:
        """See the base class. The first rank adds up, and all get it from there."""
        from mpi4py import MPI

        total = row.detach().to("cpu", copy=True).contiguous()
        numbers = [_memory(total), MPI.DOUBLE]
        parts = (MPI.IN_PLACE, numbers) if self.rank == 0 else (numbers, None)
        request = self._channel.messages.Ireduce(*parts)
        self._under_way("sum_rows", request, total).wait()
        request = self._channel.messages.Ibcast(numbers)
        self._under_way("sum_rows", request, total).wait()
        return total

    def broadcast(self, tensor: Tensor, source: int) -> UnderWay:
        """See the base class."""
        data = _in_reach(tensor, slice(None if self.rank == source else 0))
        request = self._channel.buckets.Ibcast(_buffer(data), source)
        return self._under_way(f"broadcast from rank {source}", request, data, into=tensor)

    def send(self, tensor: Tensor, to: int) -> UnderWay:
        """See the base class."""
        request = self._channel.buckets.Isend(_buffer(tensor), to)
        return self._under_way(f"send to rank {to}", request, tensor)

    def receive(self, tensor: Tensor, source: int) -> UnderWay:
        """See the base class."""
        request = self._channel.buckets.Irecv(_buffer(tensor), source)
        return self._under_way(f"receive from rank {source}", request, tensor)

    def _of_others(self, data: Tensor, sizes: Sequence[int]) -> list[Any]:
        """Parts that lie end to end, one for each rank, without this rank's own."""
        counts = [0 if rank == self.rank else size for rank, size in enumerate(sizes)]
        return [_memory(data), counts, _starts(sizes), _element(data)]

    def _under_way(
        self,
        what: str,
        request: MPI.Request,
        data: Tensor,
        *sent: Tensor,
        into: Tensor | None = None,
    ) -> UnderWay:
        """The handle of a request that fills ``data``, which is then ``into``, or copied there."""
        finish = functools.partial(_arrive, data, into)
        what = f"{what} on rank {self.rank} of {self.world_size}"
        return UnderWay(request, data, *sent, what=what, timeout=self._timeout, finish=finish)


@dataclass(frozen=True, eq=False)
class _Channel:
    """Duplicates of a communicator: messages pass buckets by."""

    buckets: MPI.Intracomm
    messages: MPI.Intracomm


def _channel_of(comm: MPI.Intracomm, use: str, timeout: timedelta) -> _Channel:
    """The channel of all optimizers over ``comm``; MPI keeps it with ``comm``, and frees both."""
    channels: Any = comm.Get_attr(_key())  # use -> _Channel
    if channels is None:
        comm.Set_attr(_key(), channels := {})
    if use not in channels:
        channels[use] = _Channel(_duplicate(comm, timeout), _duplicate(comm, timeout))
    return channels[use]


@functools.cache
def _key() -> int:
    from mpi4py import MPI

    def free(comm: MPI.Comm, key: int, channels: dict[str, _Channel]) -> None:
        for channel in channels.values():
            channel.buckets.Free()
            channel.messages.Free()

    return MPI.Comm.Create_keyval(delete_fn=free)


def _duplicate(comm: MPI.Intracomm, timeout: timedelta) -> MPI.Intracomm:
    duplicate, request = comm.Idup()
    what = f"duplicating the communicator on rank {comm.rank} of {comm.size}"
    UnderWay(request, what=what, timeout=timeout).wait()
    return duplicate


def refuse_comm(comm: Any) -> None:
    """Refuse what ranks cannot share their state over; see ``MpiCollectives``."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(comm, mpi.Comm):
        raise TypeError(
            f"comm: expected a communicator of mpi4py, got {type(comm).__name__}; install "
            "shardopt[mpi] and pass mpi4py.MPI.COMM_WORLD, or another"
        )
    if not mpi.Is_initialized() or mpi.Is_finalized():
        when = "after MPI.Finalize()" if mpi.Is_finalized() else "before MPI.Init()"
        raise RuntimeError(f"process_group: expected MPI to be running, got {comm!r} {when}")
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise RuntimeError(
            "process_group: expected MPI to be initialized for threads (MPI_THREAD_MULTIPLE), got "
            f"level {mpi.Query_thread()}; leave mpi4py.rc.threads and mpi4py.rc.thread_level alone"
        )
    if comm == mpi.COMM_NULL:
        raise ValueError(
            "process_group: expected a communicator with this rank in it, got MPI.COMM_NULL, or "
            f"one that has been freed, on rank {mpi.COMM_WORLD.rank} of COMM_WORLD; construct the "
            "optimizer only on the ranks of its communicator, and free that afterwards"
        )
    if comm.is_inter:
        raise ValueError(
            "process_group: expected an intracommunicator, got an intercommunicator, which has two "
            "sides; make them one: comm.Merge()"
        )


@functools.cache
def _takes_cuda() -> bool:
    """Whether this MPI reads and writes CUDA memory, as its library says."""
    from mpi4py import MPI

    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())


def _in_reach(tensor: Tensor, read: slice = slice(None)) -> Tensor:  # (numel,)
    """Where MPI can write a contiguous tensor, and read a part of it: in place, or on the host."""
    flat = tensor.detach().view(-1)
    if flat.device.type == "cpu":
        return flat
    if flat.is_cuda and _takes_cuda():
        torch.cuda.current_stream(flat.device).synchronize()  # MPI knows of no stream
        return flat
    host = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=flat.is_cuda)
    host[read] = flat[read]
    return host


def _arrive(data: Tensor, into: Tensor | None) -> None:
    """Copy to where it belongs what MPI could not bring there."""
    if into is not None and into.device != data.device:
        into.detach().view(-1).copy_(data, non_blocking=True)


def _memory(tensor: Tensor) -> MPI.buffer:
    from mpi4py import MPI

    return MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)


def _element(tensor: Tensor) -> MPI.Datatype:
    """What MPI moves in place of an element, and as many of it."""
    from mpi4py import MPI

    types = (MPI.BYTE, MPI.INT16_T, MPI.INT32_T, MPI.INT64_T, MPI.C_DOUBLE_COMPLEX)
    return next(each for each in types if each.size == tensor.itemsize)


def _buffer(tensor: Tensor) -> tuple[MPI.buffer, MPI.Datatype]:
    return _memory(tensor), _element(tensor)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each of several parts begins that lie end to end."""
    return [0, *accumulate(sizes[:-1])]
