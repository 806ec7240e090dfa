"""torch's tensors as the entries and bytes of a checkpoint, and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from shardopt.checkpoint.boxes import order_of, strides_of
from shardopt.checkpoint.entries import ITEMSIZE, TensorEntry
from shardopt.errors import UnsupportedError


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """As entries have it: without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def entry_of(
    key: str, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int] | None = None
) -> TensorEntry:
    """The entry of a dense tensor, without chunks; row-major if no strides are given.

    Raises:
        UnsupportedError: a dtype that no entry has; names the tensor's ``key``.
    """
    name = dtype_name(dtype)
    if name not in ITEMSIZE:
        raise UnsupportedError(
            f"{key}: expected a tensor of one of {', '.join(ITEMSIZE)}, got {name}; convert it"
        )
    return TensorEntry(name, tuple(shape), order_of(shape, strides) if strides else None)


def empty(dtype: str, shape: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """New memory on the CPU for a tensor whose dims lie in this order."""
    return torch.empty_strided(shape, strides_of(shape, order), dtype=getattr(torch, dtype))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a dense CPU tensor; good as long as the tensor lives."""
    size = tensor.numel() * tensor.itemsize
    if size == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")
