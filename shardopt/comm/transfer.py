"""Lists of tensors between two ranks, with small ones packed into one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardopt.comm.collectives import Collectives, Handle, Together

PACKED_BYTES = 1 << 16  # below this a message costs more than a copy


def send_tensors(collectives: Collectives, tensors: Sequence[Tensor], to: int) -> Handle:
    """Start to send contiguous ``tensors``; the other side calls ``receive_tensors``."""
    handles = []
    for members in _messages(tensors):
        flat = [tensors[i].detach().reshape(-1) for i in members]
        message = (flat[0] if len(flat) == 1 else torch.cat(flat)).to(collectives.wire_device)
        handles.append(_KeepAlive(collectives.send(message, to), message))
    return Together(handles)


def receive_tensors(collectives: Collectives, outs: Sequence[Tensor], source: int) -> Handle:
    """Start to fill contiguous ``outs``, of the sizes and dtypes that ``source`` sends.

    A large tensor on the wire's device is received in place, without a copy.
    """
    handles: list[Handle] = []
    for members in _messages(outs):
        flat = [outs[i].view(-1) for i in members]
        if len(flat) == 1 and flat[0].device == collectives.wire_device:
            handles.append(collectives.receive(flat[0], source))
        else:
            numel = sum(out.numel() for out in flat)
            message = torch.empty(numel, dtype=flat[0].dtype, device=collectives.wire_device)
            handles.append(_Unpack(collectives.receive(message, source), message, flat))
    return Together(handles)


class _KeepAlive:
    """A handle that holds the tensor in flight."""

    def __init__(self, handle: Handle, message: Tensor):
        self._handle, self._message = handle, message

    def wait(self) -> None:
        self._handle.wait()


class _Unpack:
    """Copies a message to where its parts belong once it is there."""

    def __init__(self, handle: Handle, message: Tensor, outs: Sequence[Tensor]):
        self._handle, self._message, self._outs = handle, message, outs

    def wait(self) -> None:
        self._handle.wait()
        parts = self._message.split([out.numel() for out in self._outs])
        for out, part in zip(self._outs, parts, strict=True):
            out.copy_(part)


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of the tensors of each message; the same on both sides, since sizes are."""
    packed: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel() * tensor.dtype.itemsize >= PACKED_BYTES:
            yield [i]
        elif tensor.numel():
            packed.setdefault(tensor.dtype, []).append(i)
    yield from packed.values()
