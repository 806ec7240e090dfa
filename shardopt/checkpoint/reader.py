"""Bytes of boxes, out of chunks in files, each block checked as it is read. No torch."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path

from shardopt.checkpoint.boxes import Box, dims_in, strides_of
from shardopt.checkpoint.crc import MAX_BLOCK, block_size
from shardopt.checkpoint.entries import RESTORE, Chunk, FileEntry, TensorEntry
from shardopt.errors import CorruptError, IncompleteError

PIECE = MAX_BLOCK  # bytes: the most that is read at once
_MAX_OPEN = 64  # files


class Reader:
    """Reads tensors of one checkpoint, any part of them.

    Args:
        directory: of the checkpoint.
        tensors: key -> entry.
        files: name -> entry, where sizes are known.

    Attributes:
        bytes_read: from files, so far.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, TensorEntry],
        files: Mapping[str, FileEntry] | None = None,
    ):
        self.directory, self.tensors = directory, tensors
        self.bytes_read = 0
        self._files = files or {}
        self._open: OrderedDict[str, int] = OrderedDict()
        self._block = bytearray()
        self._block_is: tuple[str, int] | None = None  # file and offset of what _block holds

    def read(self, key: str, box: Box, out: memoryview) -> None:
        """Fill ``out`` with a box's elements, end to end in the tensor's memory order.

        Raises:
            CorruptError: a block is not what was written.
            IncompleteError: a file is not there.
        """
        entry = self.tensors[key]
        dims = dims_in(entry.order, len(entry.shape))
        wanted, size = box.permuted(dims), entry.itemsize
        for chunk in entry.chunks:
            held = chunk.box.permuted(dims)
            overlap = held.overlap(wanted)
            if overlap is None:
                continue
            source = _ChunkBytes(self, key, entry, chunk)
            strides = strides_of(chunk.box.sizes, chunk.order or entry.order)
            strides = tuple(strides[dim] for dim in dims)
            for start, place, length in runs(overlap, held, wanted, strides):
                room = out[place * size : (place + length) * size]
                source.copy(start * size, room)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def fill(self, name: str, offset: int, out: memoryview) -> bool:
        """Read into ``out``; returns whether there was enough to fill it."""
        fd, done = self.descriptor(name), 0
        while done < len(out):
            count = os.preadv(fd, [out[done:]], offset + done)
            if count == 0:
                return False
            done += count
        self.bytes_read += len(out)
        return True

    def descriptor(self, name: str) -> int:
        """An open file, good until others are asked for."""
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path = self.directory / name
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise IncompleteError(
                f"{path}: expected a file of the checkpoint, got none; copy it from where the "
                "checkpoint was written, or use another step"
            ) from None
        self._open[name] = fd
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        expected, got = self._files.get(name), os.fstat(fd).st_size
        if expected is not None and expected.size != got:
            raise CorruptError(f"{path}: expected {expected.size} bytes, got {got}; {RESTORE}")
        return fd

    def checked_block(self, key: str, entry: TensorEntry, chunk: Chunk, number: int) -> memoryview:
        """One block of a chunk, kept until another is asked for."""
        size = chunk.box.numel * entry.itemsize
        block = block_size(size)
        start = number * block
        if len(self._block) < block:
            self._block, self._block_is = bytearray(block), None
        view = memoryview(self._block)[: min(block, size - start)]
        place = chunk.file, chunk.offset + start
        if place != self._block_is:
            self._block_is = None
            self.fill_checked(key, chunk, start, view)
            self._block_is = place
        return view

    def fill_checked(self, key: str, chunk: Chunk, start: int, out: memoryview) -> None:
        """Read whole blocks of a chunk, from byte ``start`` of it on, and check each."""
        if not self.fill(chunk.file, chunk.offset + start, out):
            raise self.cut_short(key, chunk, start, len(out))
        if chunk.crcs is None:
            return
        path, entry = self.directory / chunk.file, self.tensors[key]
        block = block_size(chunk.box.numel * entry.itemsize)
        first = start // block
        for number in range(-(-len(out) // block)):
            got = zlib.crc32(out[number * block : (number + 1) * block])
            if got != chunk.crcs[first + number]:
                at = chunk.offset + start + number * block
                raise CorruptError(
                    f"{path}: tensor {key!r}, {chunk.box} of {entry}, block at byte "
                    f"{at}: expected CRC32 {chunk.crcs[first + number]:08x}, got {got:08x}; "
                    f"{RESTORE}"
                )

    def cut_short(self, key: str, chunk: Chunk, start: int, size: int) -> CorruptError:
        """A file has not all of a chunk's bytes."""
        return CorruptError(
            f"{self.directory / chunk.file}: expected {size} bytes of tensor {key!r} at byte "
            f"{chunk.offset + start}, got the end of the file; {RESTORE}"
        )


class _ChunkBytes:
    """The bytes of one chunk."""

    def __init__(self, reader: Reader, key: str, entry: TensorEntry, chunk: Chunk):
        self._reader, self._key, self._entry, self._chunk = reader, key, entry, chunk
        self._size = chunk.box.numel * entry.itemsize
        self._block = block_size(self._size)

    def copy(self, start: int, out: memoryview) -> None:
        """Fill ``out`` from byte ``start`` on; parts of a block by way of memory."""
        done, size = 0, self._block
        while done < len(out):
            at, left = start + done, len(out) - done
            whole = left - left % size if at + left < self._size else left
            if at % size == 0 and whole > 0:
                count = min(whole, PIECE)
                self._reader.fill_checked(self._key, self._chunk, at, out[done : done + count])
            else:
                number, skip = divmod(at, size)
                block = self._reader.checked_block(self._key, self._entry, self._chunk, number)
                count = min(left, len(block) - skip)
                out[done : done + count] = block[skip : skip + count]
            done += count


def runs(
    part: Box, held: Box, wanted: Box, strides: tuple[int, ...]
) -> Iterator[tuple[int, int, int]]:
    """Elements of ``part`` that lie end to end in both boxes around it, as long as they do.

    Yields where each run starts in ``held``, whose elements lie as ``strides`` say, and in
    ``wanted``, whose elements lie end to end, and its length.
    """
    there = strides_of(wanted.sizes)
    length, dim = 1, len(part.sizes)
    while dim > 0 and (part.sizes[dim - 1] == 1 or strides[dim - 1] == there[dim - 1] == length):
        dim -= 1
        length *= part.sizes[dim]
    first_held = _offset(part, held, strides)
    first_wanted = _offset(part, wanted, there)
    for index in product(*map(range, part.sizes[:dim])):
        start = first_held + sum(i * s for i, s in zip(index, strides, strict=False))
        place = first_wanted + sum(i * s for i, s in zip(index, there, strict=False))
        yield start, place, length
    assert prod(part.sizes[dim:]) == length


def _offset(part: Box, around: Box, strides: tuple[int, ...]) -> int:
    pairs = zip(part.offsets, around.offsets, strides, strict=True)
    return sum((low - origin) * stride for low, origin, stride in pairs)
