"""Tensors that are in memory, or mapped into it, read as if they lay in a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from shardopt.checkpoint.boxes import Box, dims_in
from shardopt.checkpoint.entries import ITEMSIZE, TensorEntry
from shardopt.checkpoint.foreign.archive import memory_order
from shardopt.checkpoint.foreign.mapped import MappedFile, in_parts
from shardopt.checkpoint.plain import TensorKey
from shardopt.checkpoint.tensors import dtype_name
from shardopt.errors import UnsupportedError


class LooseTensors:
    """Tensors by key, whose parts are copied out of memory.

    Args:
        where: the file they are from, for errors.
        tensors: key -> entry, to which they are added.
        mapped: the file, if they are mapped.
    """

    def __init__(
        self,
        where: str,
        tensors: dict[str, TensorEntry] | None = None,
        mapped: MappedFile | None = None,
    ):
        self._entries = {} if tensors is None else tensors
        self.tensors: Mapping[str, TensorEntry] = self._entries
        self._where, self._mapped = where, mapped
        self._held: dict[str, Tensor] = {}

    def taken(self, value: Any, key: str) -> Any:
        """The value with a ``TensorKey`` in place of each tensor, which is kept here.

        Args:
            key: of the value; what lies within it gets its path there, joined by dots.

        Raises:
            UnsupportedError: a tensor whose elements are not plain numbers in memory.
        """
        if isinstance(value, Tensor):
            return self._add(value, key)
        prefix = f"{key}." if key else ""
        if isinstance(value, dict) and not isinstance(value, Counter):
            return type(value)(
                (name, self.taken(item, f"{prefix}{name}")) for name, item in value.items()
            )
        if type(value) in (list, tuple):
            return type(value)(
                self.taken(item, f"{prefix}{place}") for place, item in enumerate(value)
            )
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def read(self, key: str, box: Box, out: memoryview) -> None:
        """Fill ``out`` with a box's elements, end to end in the tensor's memory order."""
        if not box.numel:
            return
        entry, tensor = self.tensors[key], self._held[key]
        order = dims_in(entry.order, len(entry.shape))
        sizes = box.permuted(order).sizes
        target = torch.frombuffer(out, dtype=torch.uint8).view(tensor.dtype).view(sizes)
        copy(part_of(tensor, box).permute(list(order)), target, self._mapped)

    def close(self) -> None:
        """Let go of all tensors."""
        self._held.clear()

    def _add(self, value: Tensor, key: str) -> TensorKey:
        dtype = dtype_name(value.dtype)
        plain = type(value) in (Tensor, Parameter) and value.layout == torch.strided
        if not plain or dtype not in ITEMSIZE or value.device.type != "cpu":
            raise UnsupportedError(
                f"{self._where}: tensor {key!r}: expected a dense tensor in memory, of a dtype "
                f"that shardopt knows, got {type(value).__name__} of {value.dtype}, "
                f"{value.layout}, on {value.device}: save it as a plain tensor"
            )
        tensor = value.detach()
        while key in self._entries:
            key += "'"
        try:
            order = memory_order(tensor.shape, tensor.stride())
        except ValueError:  # parts are copied element by element anyway
            order = None
        self._entries[key] = TensorEntry(dtype, tuple(tensor.shape), order)
        self._held[key] = tensor
        return TensorKey(key)


def copy(source: Tensor, target: Tensor, mapped: MappedFile | None) -> None:
    """Copy what is mapped, if it is, little at a time."""
    for part, room, num_bytes in in_parts(source, target):
        room.copy_(part)
        if mapped is not None:
            mapped.was_read(part.data_ptr(), num_bytes)


def part_of(tensor: Tensor, box: Box) -> Tensor:
    """A box of a tensor, as a view."""
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor
