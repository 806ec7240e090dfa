"""Tensors of a checkpoint, or stretches of them, read into new memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardopt.buffers import in_memory_order
from shardopt.checkpoint.boxes import Box, boxes_of_range, contiguous_strides
from shardopt.checkpoint.contents import bytes_of
from shardopt.checkpoint.manifest import TensorEntry
from shardopt.checkpoint.plain import TensorKey
from shardopt.checkpoint.source import Source
from shardopt.shard import Shard
from shardopt.state.flat import spans_of


class TensorReader:
    """Reads tensors by their keys, onto the CPU.

    Args:
        source: the checkpoint.
    """

    def __init__(self, source: Source):
        self._source = source

    def entry(self, key: TensorKey) -> TensorEntry:
        """What the checkpoint says of a tensor."""
        return self._source.tensors[key.key]

    def whole(self, key: TensorKey) -> Tensor:
        """A tensor, on the CPU, with the strides it was saved with."""
        entry = self.entry(key)
        out = _empty(entry, entry.shape, entry.order)
        self._source.reader.read(key.key, Box.whole(entry.shape), bytes_of(out))
        return out

    def part(
        self, key: TensorKey, order: tuple[int, ...] | None, start: int, stop: int
    ) -> Tensor:  # (stop - start,)
        """Elements ``[start, stop)`` of a tensor, as they lie in memory with dims in ``order``."""
        entry = self.entry(key)
        if order != entry.order:  # another memory format now
            laid_out = _empty(entry, entry.shape, order).copy_(self.whole(key))
            return in_memory_order(laid_out, laid_out.stride())[start:stop].clone()
        out = _empty(entry, (stop - start,))
        room, done = bytes_of(out), 0
        dims = order or tuple(range(len(entry.shape)))
        back = sorted(range(len(dims)), key=dims.__getitem__)
        for box in boxes_of_range([entry.shape[dim] for dim in dims], start, stop):
            size = box.numel * entry.itemsize
            self._source.reader.read(key.key, box.permuted(back), room[done : done + size])
            done += size
        return out

    def outline(self, key: TensorKey) -> Tensor:
        """A tensor without memory in place of one that is not read."""
        entry = self.entry(key)
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")

    def stretches(self, shard: Shard) -> Callable[[TensorKey], Tensor]:
        """Reads of a vector over all parameters what is this rank's."""

        def read(key: TensorKey) -> Tensor:
            parts = [
                self.part(key, None, there.start, there.stop)
                for there, _ in spans_of(shard, shard.collectives.rank)
            ]
            return torch.cat(parts) if parts else _empty(self.entry(key), (0,))

        return read


def _empty(
    entry: TensorEntry, shape: tuple[int, ...], order: tuple[int, ...] | None = None
) -> Tensor:
    dims = order or tuple(range(len(shape)))
    strides = dict(zip(dims, contiguous_strides([shape[dim] for dim in dims]), strict=True))
    dtype = getattr(torch, entry.dtype)
    return torch.empty_strided(shape, [strides[d] for d in range(len(shape))], dtype=dtype)
