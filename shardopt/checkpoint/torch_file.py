"""A file for ``torch.load(weights_only=True)``, written tensor by tensor.

``torch.save`` wants all tensors in memory. The file is a zip archive of one pickle, in which
storages are numbers, and one record for each storage; see ``torch.serialization``. All sizes are
known before the first byte is read, so that only checksums are filled in at the end. Every record
has 64-bit sizes, as ``torch.save`` has for what is large.
"""

from __future__ import annotations

import codecs
import io
import os
import pickle
import struct
import sys
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import torch

from shardopt.checkpoint.blobs import ALIGNMENT
from shardopt.checkpoint.boxes import contiguous_strides
from shardopt.checkpoint.manifest import TensorEntry
from shardopt.checkpoint.plain import TensorKey
from shardopt.checkpoint.source import Source
from shardopt.checkpoint.stream import Stream
from shardopt.checkpoint.trees import Path, place, refused

_NO_DATE = 0x21 << 16  # 1980-01-01, as zip counts
_EVERYWHERE_64 = 0xFFFFFFFF  # "see the extra field"
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
    skeleton = _Skeleton(source)
    content = skeleton.pickled(tree)
    archive, stream = _Archive(file), Stream(source.reader)
    archive.add("data.pkl", len(content), iter([content]))
    order = sys.byteorder.encode()
    archive.add("byteorder", len(order), iter([order]))
    for storage in skeleton.storages:
        pieces = _reported(stream.pieces(storage.source), told)
        archive.add(f"data/{storage.key}", storage.nbytes, pieces)
    archive.add("version", 2, iter([b"3\n"]))
    archive.close()
    return skeleton.notes


def _reported(pieces: Iterator[memoryview], told: Callable[[int], None]) -> Iterator[memoryview]:
    for piece in pieces:
        yield piece
        told(len(piece))


class _Storage:
    """Stands for the storage whose bytes are record ``data/<key>``."""

    def __init__(self, key: str, source: str, nbytes: int):
        self.key, self.source, self.nbytes = key, source, nbytes


class _Tensor:
    """Pickles as a tensor that takes a whole storage."""

    def __init__(self, entry: TensorEntry, storage: _Storage, hooks: OrderedDict[str, Any]):
        order = entry.order or tuple(range(len(entry.shape)))
        in_order = contiguous_strides([entry.shape[dim] for dim in order])
        by_dim = dict(zip(order, in_order, strict=True))
        strides = tuple(by_dim[dim] for dim in range(len(order)))
        dtype = getattr(torch, entry.dtype)
        self._arguments = (storage, 0, entry.shape, strides, False, hooks, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v3, self._arguments


class _NoBytes:
    """Pickles as ``b""``, which the restricted unpickler otherwise refuses."""

    def __reduce__(self) -> tuple[Any, ...]:
        return codecs.encode, ("", "latin1")


class _Skeleton:
    """A tree as a pickle, and the storages it speaks of.

    Attributes:
        storages: in order.
        notes: what was written as something else.
    """

    def __init__(self, source: Source):
        self.storages: list[_Storage] = []
        self.notes: list[str] = []
        self._source = source
        self._hooks: OrderedDict[str, Any] = OrderedDict()
        self._known: dict[object, _Tensor] = {}

    def pickled(self, tree: dict[str, Any]) -> bytes:
        """The bytes of ``data.pkl``."""
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=2).dump(self._readable(tree, ()))
        return buffer.getvalue()

    def _tensor(self, key: str) -> _Tensor:
        entry = self._source.tensors[key]
        lies = tuple((chunk.file, chunk.offset, chunk.box) for chunk in entry.chunks)
        same = (entry.dtype, entry.shape, entry.order, lies) if lies else key
        if same not in self._known:
            storage = _Storage(str(len(self.storages)), key, entry.nbytes)
            self.storages.append(storage)
            self._known[same] = _Tensor(entry, storage, self._hooks)
        return self._known[same]

    def _readable(self, value: Any, path: Path) -> Any:
        """The value made of what ``weights_only`` reads."""
        if isinstance(value, TensorKey):
            return self._tensor(value.key)
        if type(value) in (deque, frozenset):
            kind = list if type(value) is deque else tuple
            self.notes.append(f"{place(path)}: {type(value).__name__} written as {kind.__name__}")
            value = kind(value)
        if type(value) in (list, tuple, set):
            items = [self._readable(item, (*path, i)) for i, item in enumerate(value)]
            return type(value)(items)
        if type(value) in (dict, OrderedDict, Counter):
            pairs = (
                (self._readable(key, (*path, key)), self._readable(item, (*path, key)))
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


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, _Storage):
            return "storage", torch.storage.UntypedStorage, obj.key, "cpu", obj.nbytes
        return None


class _Archive:
    """A zip archive of stored records, in order."""

    def __init__(self, file: BinaryIO):
        self._file, self._at = file, 0
        self._entries: list[bytes] = []
        self._crcs: list[tuple[int, int]] = []  # where a local header wants its CRC32

    def add(self, name: str, size: int, pieces: Iterator[bytes | memoryview]) -> None:
        """One record of ``size`` bytes, whose data start on a multiple of 64."""
        path, start = f"archive/{name}".encode(), self._at
        padding = -(start + 30 + len(path) + 20 + 4) % ALIGNMENT
        extra = struct.pack("<HHQQHH", 1, 16, size, size, 0x4246, padding) + bytes(padding)
        self._write(_local(path, extra))
        crc, data = 0, self._at
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            self._write(piece)
        assert self._at == data + size, f"{name}: {self._at - data} bytes, not {size}"
        self._crcs.append((start + 14, crc))
        self._entries.append(_central(path, crc, size, start))

    def close(self) -> None:
        """The directory at the end, and checksums in the headers."""
        start, directory, count = self._at, b"".join(self._entries), len(self._entries)
        self._write(directory)
        end = (0x06064B50, 44, 45, 45, 0, 0, count, count, len(directory), start)
        self._file.write(struct.pack("<IQHHIIQQQQ", *end))
        self._file.write(struct.pack("<IIQI", 0x07064B50, 0, self._at, 1))
        last = (0x06054B50, 0, 0, 0xFFFF, 0xFFFF, _EVERYWHERE_64, _EVERYWHERE_64, 0)
        self._file.write(struct.pack("<IHHHHIIH", *last))
        self._file.flush()
        for place_of, crc in self._crcs:
            os.pwrite(self._file.fileno(), struct.pack("<I", crc), place_of)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._at += len(data)


def _local(name: bytes, extra: bytes) -> bytes:
    """The header before a record, without a CRC32 yet."""
    size = _EVERYWHERE_64
    fields = (0x04034B50, 45, 0, 0, _NO_DATE, 0, size, size, len(name), len(extra))
    return struct.pack("<IHHHIIIIHH", *fields) + name + extra


def _central(name: bytes, crc: int, size: int, start: int) -> bytes:
    """The entry of a record in the directory at the end."""
    extra = struct.pack("<HHQQQ", 1, 24, size, size, start)
    all_ones = _EVERYWHERE_64
    sizes = (all_ones, all_ones, len(name), len(extra))
    fields = (0x02014B50, 45, 45, 0, 0, _NO_DATE, crc, *sizes, 0, 0, 0, 0, all_ones)
    return struct.pack("<IHHHHIIIIHHHHHII", *fields) + name + extra
