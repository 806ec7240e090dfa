"""The bytes of whole tensors, a few MB at a time. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from shardopt.checkpoint.boxes import Box, slices
from shardopt.checkpoint.reader import PIECE
from shardopt.checkpoint.source import ReadsBoxes


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
        size = len(self._buffer) // entry.itemsize
        for box in slices(Box.whole(entry.shape), entry.order, size):
            yield self.read(key, box)

    def read(self, key: str, box: Box) -> memoryview:
        """A box that fits into the buffer, its elements end to end in memory order."""
        room = self._buffer[: box.numel * self._reader.tensors[key].itemsize]
        if room:
            self._reader.read(key, box, room)
        return room
