"""Archives of ``torch.save``, written without it: one pickle, and one record for each storage.

An archive is a zip of stored records; see ``torch.serialization``. Every record has 64-bit sizes,
as ``torch.save`` has for what is large, so that one form serves all.
"""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any

import torch

from shardopt.checkpoint.boxes import strides_of
from shardopt.checkpoint.entries import TensorEntry

ALIGNMENT = 64  # bytes: where storages start, in their archive
CRC_IN_HEADER, CRC_IN_ENTRY = 14, 16  # where a record's CRC32 stands, four bytes, in both
_NO_DATE = 0x21 << 16  # 1980-01-01, as zip counts
_EVERYWHERE_64 = 0xFFFFFFFF  # "see the extra field"


class Over:
    """Pickles as a tensor that takes a whole storage, whose bytes are the record ``data/<number>``.

    Args:
        entry: of the tensor; its chunks do not matter.
    """

    __slots__ = ("entry", "number")

    def __init__(self, number: int, entry: TensorEntry):
        self.number, self.entry = number, entry

    def __reduce__(self) -> tuple[Any, ...]:
        of = self.entry
        storage = _Storage((str(self.number), of.nbytes))
        strides, dtype = strides_of(of.shape, of.order), getattr(torch, of.dtype)
        arguments = (storage, 0, of.shape, strides, False, None, dtype)
        return torch._utils._rebuild_tensor_v3, arguments


class _Storage(tuple[str, int]):
    """Key and number of bytes."""

    __slots__ = ()


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, _Storage):
            key, nbytes = obj
            return "storage", torch.storage.UntypedStorage, key, "cpu", nbytes
        return None


def pickled(value: Any) -> bytes:
    """The content of ``data.pkl``; what the value holds twice is written twice."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=2)
    pickler.fast = True  # no memo, which would hold all that was pickled
    pickler.dump(value)
    return buffer.getvalue()


def header(name: str, size: int, crc: int, start: int, aligned: bool) -> bytes:
    """What stands before the ``size`` bytes of a record that starts at ``start``.

    With ``aligned`` it ends on a multiple of 64.
    """
    path = _path(name)
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    if aligned:
        padding = -(start + 30 + len(path) + len(extra) + 4) % ALIGNMENT
        extra += struct.pack("<HH", 0x4246, padding) + bytes(padding)
    sizes = (_EVERYWHERE_64, _EVERYWHERE_64, len(path), len(extra))
    fields = (0x04034B50, 45, 0, 0, _NO_DATE, crc, *sizes)
    return struct.pack("<IHHHIIIIHH", *fields) + path + extra


def entry(name: str, size: int, crc: int, start: int) -> bytes:
    """What the directory at the end says of the same record."""
    path, extra = _path(name), struct.pack("<HHQQQ", 1, 24, size, size, start)
    sizes = (_EVERYWHERE_64, _EVERYWHERE_64, len(path), len(extra))
    fields = (0x02014B50, 45, 45, 0, 0, _NO_DATE, crc, *sizes, 0, 0, 0, 0, _EVERYWHERE_64)
    return struct.pack("<IHHHHIIIIHHHHHII", *fields) + path + extra


def ending(count: int, length: int, start: int) -> bytes:
    """What follows ``count`` entries, of ``length`` bytes in all, that begin at ``start``."""
    end = (0x06064B50, 44, 45, 45, 0, 0, count, count, length, start)
    last = (0x06054B50, 0, 0, 0xFFFF, 0xFFFF, _EVERYWHERE_64, _EVERYWHERE_64, 0)
    return (
        struct.pack("<IQHHIIQQQQ", *end)
        + struct.pack("<IIQI", 0x07064B50, 0, start + length, 1)
        + struct.pack("<IHHHHIIH", *last)
    )


def _path(name: str) -> bytes:
    return f"archive/{name}".encode()
