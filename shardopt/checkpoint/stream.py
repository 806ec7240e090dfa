"""The bytes of whole tensors, a few MB at a time. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from shardopt.checkpoint.boxes import Box, cut
from shardopt.checkpoint.manifest import TensorEntry
from shardopt.checkpoint.source import ReadsBoxes

PIECE = 4 << 20  # bytes


class Stream:
    """Reads tensors from one end to the other, through one buffer.

    Args:
        reader: of a checkpoint.
        size: of the buffer, in bytes.
    """

    def __init__(self, reader: ReadsBoxes, size: int = PIECE):
        self._reader = reader
        self._buffer = memoryview(bytearray(size))

    def pieces(self, key: str) -> Iterator[memoryview]:
        """A tensor's bytes in memory order; each piece is there until the next is asked for."""
        entry = self._reader.tensors[key]
        for box in in_memory_order(entry, len(self._buffer) // entry.itemsize):
            yield self.read(key, box)

    def read(self, key: str, box: Box) -> memoryview:
        """A box that fits into the buffer, its elements end to end in memory order."""
        room = self._buffer[: box.numel * self._reader.tensors[key].itemsize]
        if room:
            self._reader.read(key, box, room)
        return room


def in_memory_order(entry: TensorEntry, max_numel: int) -> Iterator[Box]:
    """A tensor in boxes of at most so many elements, each of which lie end to end in memory."""
    order = entry.order or tuple(range(len(entry.shape)))
    back = sorted(range(len(order)), key=order.__getitem__)
    for part in cut(Box.whole(entry.shape).permuted(order), max_numel):
        yield part.permuted(back)
