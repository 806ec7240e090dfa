"""Tensors of a checkpoint, or stretches of them, read into new memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardopt.buffers import in_memory_order
from shardopt.checkpoint.boxes import Box, stretch
from shardopt.checkpoint.entries import TensorEntry
from shardopt.checkpoint.plain import TensorKey
from shardopt.checkpoint.source import Source
from shardopt.checkpoint.tensors import bytes_of, empty
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
        out = empty(entry.dtype, entry.shape, entry.order)
        self._source.reader.read(key.key, Box.whole(entry.shape), bytes_of(out))
        return out

    def part(
        self, key: TensorKey, order: tuple[int, ...] | None, start: int, stop: int
    ) -> Tensor:  # (stop - start,)
        """Elements ``[start, stop)`` of a tensor, as they lie in memory with dims in ``order``."""
        entry = self.entry(key)
        if order != entry.order:  # another memory format now
            laid_out = empty(entry.dtype, entry.shape, order).copy_(self.whole(key))
            return in_memory_order(laid_out, laid_out.stride())[start:stop].clone()
        out = empty(entry.dtype, (stop - start,))
        room, done = bytes_of(out), 0
        for box in stretch(entry.shape, order, start, stop):
            size = box.numel * entry.itemsize
            self._source.reader.read(key.key, box, room[done : done + size])
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
            return torch.cat(parts) if parts else empty(self.entry(key).dtype, (0,))

        return read
