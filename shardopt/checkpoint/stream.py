"""The bytes of whole tensors, at most 1 MB at a time. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from shardopt.checkpoint.boxes import Box, slices
from shardopt.checkpoint.source import ReadsBoxes

_SIZE = 1 << 20  # bytes: more makes it no faster


class Stream:
    """Reads tensors from one end to the other, through one buffer.

    Args:
        reader: of a checkpoint.
        size: of the buffer, in bytes; as large as the largest tensor, or 1 MB, if left out.
    """

    def __init__(self, reader: ReadsBoxes, size: int | None = None):
        self._reader = reader
        if size is None:
            largest = max((entry.nbytes for entry in reader.tensors.values()), default=0)
            size = min(_SIZE, largest)
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
