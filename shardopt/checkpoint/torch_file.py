"""A file for ``torch.load(weights_only=True)``, written tensor by tensor.

``torch.save`` wants all tensors in memory. All sizes are known before the first byte is read, so
that only checksums are filled in at the end.
"""

from __future__ import annotations

import codecs
import os
import struct
import sys
import zlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from shardopt.checkpoint.archives import (
    CRC_IN_HEADER,
    Over,
    ending,
    entry,
    header,
    pickled,
)
from shardopt.checkpoint.plain import TensorKey, TreePath, place
from shardopt.checkpoint.source import Source
from shardopt.checkpoint.stream import Stream
from shardopt.checkpoint.trees import refused

_MAX_INT_BITS = 8 * 255 - 1  # what the restricted unpickler reads


def write(
    source: Source,
    tree: dict[str, Any],
    file: BinaryIO,
    told: Callable[[int], None],
) -> list[str]:
    """Write a tree into a new file.

    Args:
        tree: with a ``TensorKey`` for each tensor; keys with the same bytes share a storage.
        told: is given the number of bytes after each piece.

    Returns:
        What was written as something else, since ``weights_only`` cannot read it, in words.

    Raises:
        UnsupportedError: a value that ``weights_only`` cannot read, and has no stand-in.
    """
    content, keys, notes = _outline(source, tree)
    archive, stream = _Archive(file), Stream(source.reader)
    archive.add("data.pkl", len(content), iter([content]))
    order = sys.byteorder.encode()
    archive.add("byteorder", len(order), iter([order]))
    for number, key in enumerate(keys):
        pieces = _reported(stream.pieces(key), told)
        archive.add(f"data/{number}", source.tensors[key].nbytes, pieces)
    archive.add("version", 2, iter([b"3\n"]))
    archive.close()
    return notes


def _outline(source: Source, tree: dict[str, Any]) -> tuple[bytes, list[str], list[str]]:
    """The pickle of a tree, and what ``_Skeleton`` has noted, of which no more is kept."""
    skeleton = _Skeleton(source)
    return pickled(skeleton.readable(tree, ())), skeleton.keys, skeleton.notes


def _reported(pieces: Iterator[memoryview], told: Callable[[int], None]) -> Iterator[memoryview]:
    for piece in pieces:
        yield piece
        told(len(piece))


class _NoBytes:
    """Pickles as ``b""``, which the restricted unpickler otherwise refuses."""

    def __reduce__(self) -> tuple[Any, ...]:
        return codecs.encode, ("", "latin1")


class _Skeleton:
    """A tree as ``weights_only`` reads it, and the storages it speaks of.

    Attributes:
        keys: of the tensors whose bytes the storages have, in their order.
        notes: what was written as something else.
    """

    def __init__(self, source: Source):
        self.keys: list[str] = []
        self.notes: list[str] = []
        self._source = source
        self._known: dict[object, Over] = {}

    def _tensor(self, key: str) -> Over:
        of = self._source.tensors[key]
        first = (of.chunks[0].file, of.chunks[0].offset) if of.chunks else key
        known = self._known.get(first)
        if known is not None and known.entry == of:
            return known
        self._known[first] = new = Over(len(self.keys), of)
        self.keys.append(key)
        return new

    def readable(self, value: Any, path: TreePath) -> Any:
        """The value made of what ``weights_only`` reads."""
        if isinstance(value, TensorKey):
            return self._tensor(value.key)
        if type(value) in (deque, frozenset):
            kind = list if type(value) is deque else tuple
            self.notes.append(f"{place(path)}: {type(value).__name__} written as {kind.__name__}")
            value = kind(value)
        if type(value) in (list, tuple, set):
            items = [self.readable(item, (*path, i)) for i, item in enumerate(value)]
            return type(value)(items)
        if type(value) in (dict, OrderedDict, Counter):
            pairs = (
                (self.readable(key, (*path, key)), self.readable(item, (*path, key)))
                for key, item in value.items()
            )
            return type(value)(dict(pairs))
        if type(value) is int and value.bit_length() > _MAX_INT_BITS:
            raise refused(
                path,
                f"integers of at most {_MAX_INT_BITS} bits, as weights_only reads",
                f"one of {value.bit_length()}",
                "save it as a string",
            )
        return _NoBytes() if type(value) is bytes and not value else value


class _Archive:
    """Records one after the other into a file, whose checksums are filled in at the end."""

    def __init__(self, file: BinaryIO):
        self._file, self._at = file, 0
        self._entries = bytearray()
        self._starts, self._crcs = array("Q"), array("I")  # of each record

    def add(self, name: str, size: int, pieces: Iterator[bytes | memoryview]) -> None:
        """One record of ``size`` bytes, whose data start on a multiple of 64."""
        start = self._at
        self._write(header(name, size, 0, start, aligned=True))
        crc, data = 0, self._at
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            self._write(piece)
        assert self._at == data + size, f"{name}: {self._at - data} bytes, not {size}"
        self._starts.append(start)
        self._crcs.append(crc)
        self._entries += entry(name, size, crc, start)

    def close(self) -> None:
        """The directory at the end, and checksums in the headers."""
        end = ending(len(self._starts), len(self._entries), self._at)
        self._write(self._entries)
        self._write(end)
        self._file.flush()
        for start, crc in zip(self._starts, self._crcs, strict=True):
            os.pwrite(self._file.fileno(), struct.pack("<I", crc), start + CRC_IN_HEADER)

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        self._file.write(data)
        self._at += len(data)
