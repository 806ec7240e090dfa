"""Checkpoints read through ``shardopt.checkpoint``, as tensors again, for tests."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardopt.checkpoint.boxes import Box
from shardopt.checkpoint.plain import TensorKey
from shardopt.checkpoint.source import Source


class Trap:
    """Pickles as a call that makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def trapped(path: Path) -> bytes:
    return pickle.dumps(Trap(path))


def read_box(source: Source, key: str, box: Box | None = None) -> Tensor:
    """A part of a tensor, or all of it, read through the reader."""
    entry = source.tensors[key]
    box = box or Box.whole(entry.shape)
    order = entry.order or tuple(range(len(entry.shape)))
    data = bytearray(b"\xff" * (box.numel * entry.itemsize))
    source.reader.read(key, box, memoryview(data))
    dtype = getattr(torch, entry.dtype)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    stored = flat.view([box.sizes[dim] for dim in order])
    return stored.permute([order.index(dim) for dim in range(len(order))])


def filled(value: Any, source: Source) -> Any:
    """The tree with tensors in place of keys."""
    if isinstance(value, TensorKey):
        return read_box(source, value.key)
    if isinstance(value, dict):
        return {key: filled(item, source) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(filled(item, source) for item in value)
    return value
