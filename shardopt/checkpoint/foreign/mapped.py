"""A file that is mapped into memory, and does not stay there once it is read."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

RESIDENT = 1 << 20  # bytes: what is read before all is let go


def in_parts(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Parts of both, of one shape, with the bytes from the first to the last in the source.

    Those are at most ``RESIDENT``, however it lies in memory.
    """
    strides = [
        stride * (size > 1) for size, stride in zip(source.shape, source.stride(), strict=True)
    ]
    span = 1 + sum(stride * (size - 1) for size, stride in zip(source.shape, strides, strict=True))
    if span * source.itemsize <= RESIDENT or not any(strides):
        yield source, target, span * source.itemsize
        return
    dim = strides.index(max(strides))
    rows = max(1, RESIDENT // (strides[dim] * source.itemsize))
    for part, room in zip(source.split(rows, dim), target.split(rows, dim), strict=True):
        yield from in_parts(part, room)


class MappedFile:
    """A file of which this process has a mapping, on Linux; elsewhere nothing is let go.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._ends: tuple[int, int] | None = None  # of the mapping, once it is looked for
        self._read = 0

    def was_read(self, address: int, num_bytes: int) -> None:
        """Now and then let go of all pages, which come from the file when they are read again.

        Args:
            address: in the mapping; that of others, of the same file, is not touched.
            num_bytes: from the first that was read to the last.
        """
        self._read += num_bytes
        if self._read < RESIDENT:
            return
        self._read = 0
        if self._ends is None:
            self._ends = _unchanged(self._path, address)
        start, stop = self._ends
        if stop > start:
            let_go = ctypes.CDLL(None).madvise
            let_go(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def _unchanged(path: Path, address: int) -> tuple[int, int]:
    """Both ends of the mapping of a file around an address; twice 0 if it is not as the file is.

    torch turns bytes of another byte order where they are mapped, which would be lost.
    """
    maps, name = Path("/proc/self/smaps"), str(path.resolve())
    here, ends = False, (0, 0)
    try:
        lines = os.fsdecode(maps.read_bytes()).splitlines()
    except OSError:
        return 0, 0
    changed = 0  # kB that are no longer the file's, in memory or swapped out
    for line in lines:
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):
            low, high = first.split("-")
            ends = int(low, 16), int(high, 16)
            here = rest[4:] == [name] and ends[0] <= address < ends[1]
        elif here and first in ("Anonymous:", "Swap:"):
            changed += int(rest[0])
        elif here and first == "VmFlags:":  # the last line of a mapping
            return ends if not changed else (0, 0)
    return 0, 0
