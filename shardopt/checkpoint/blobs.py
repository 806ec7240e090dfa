"""Raw bytes made readable by ``torch.load``: a zip archive around them, in torch's format.

``torch.save`` of a small tensor takes 30 times as long as writing its bytes. What surrounds them
depends on dtype, shape and order alone, so it is made once for each, and the checksum that a zip
needs is the one that the manifest has anyway.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections import OrderedDict
from functools import lru_cache

import torch

from shardopt.checkpoint.boxes import contiguous_strides

ALIGNMENT = 64  # bytes: where blobs and the data in them start, in their file
_DATA = b"archive/data/0"
_NO_DATE = 0x21 << 16  # 1980-01-01, as zip counts


@lru_cache(maxsize=4096)
def surroundings(
    dtype: str,
    sizes: tuple[int, ...],
    order: tuple[int, ...] | None,
    nbytes: int,
) -> tuple[bytes, bytes]:
    """What comes before and after the bytes of a tensor, with zeros for their CRC32.

    The first part is a multiple of 64 bytes long; ``patched`` puts the CRC32 in.
    """
    records = [
        (b"archive/data.pkl", _pickled(dtype, sizes, order)),
        (b"archive/byteorder", sys.byteorder.encode()),
        (b"archive/version", b"3\n"),
    ]
    before, entries = b"", []
    for name, content in records:
        crc = pickle_crc(content)
        entries.append(_central(name, crc, len(content), len(before)))
        before += _local(name, crc, len(content), 0) + content
    start = len(before)
    padding = -(start + 30 + len(_DATA) + 4) % ALIGNMENT
    before += _local(_DATA, 0, nbytes, padding)
    entries.append(_central(_DATA, 0, nbytes, start))
    directory = b"".join(entries)
    end = struct.pack(
        "<IHHHHIIH", 0x06054B50, 0, 0, len(entries), len(entries), len(directory),
        len(before) + nbytes, 0,
    )  # fmt: skip
    return before, directory + end


def patched(before: bytes, after: bytes, crc: int) -> tuple[bytes, bytes]:
    """Both parts with the CRC32 of the data where a zip wants it."""
    value = struct.pack("<I", crc)
    at = before.rindex(_DATA) - 16
    entry = after.rindex(_DATA) - 30
    return (
        before[:at] + value + before[at + 4 :],
        after[:entry] + value + after[entry + 4 :],
    )


def pickle_crc(content: bytes) -> int:
    """CRC32 of a small record."""
    import zlib

    return zlib.crc32(content)


def _local(name: bytes, crc: int, size: int, padding: int) -> bytes:
    """The header before a record; an extra field of zeros pads it."""
    extra = (
        struct.pack("<HH", 0x4246, padding) + bytes(padding) if padding or name == _DATA else b""
    )
    fields = (0x04034B50, 20, 0, 0, _NO_DATE, crc, size, size, len(name), len(extra))
    return struct.pack("<IHHHIIIIHH", *fields) + name + extra


def _central(name: bytes, crc: int, size: int, start: int) -> bytes:
    """The entry of a record in the directory at the end."""
    fields = (0x02014B50, 20, 20, 0, 0, _NO_DATE, crc, size, size, len(name), 0, 0, 0, 0, 0, start)
    return struct.pack("<IHHHHIIIIHHHHHII", *fields) + name


class _Storage:
    """Stands for the storage whose bytes are the record ``data/0``."""

    def __init__(self, numel: int):
        self.numel = numel


class _Tensor:
    """Pickles as a tensor over that storage."""

    def __init__(self, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...]):
        self.dtype, self.sizes, self.strides = dtype, sizes, strides

    def __reduce__(self):  # type: ignore[no-untyped-def]
        nbytes = torch.Size(self.sizes).numel() * self.dtype.itemsize
        arguments: tuple[object, ...] = (
            _Storage(nbytes),
            0,
            self.sizes,
            self.strides,
            False,
            OrderedDict(),
        )
        return torch._utils._rebuild_tensor_v3, (*arguments, self.dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, _Storage):
            return "storage", torch.storage.UntypedStorage, "0", "cpu", obj.numel
        return None


def _pickled(dtype: str, sizes: tuple[int, ...], order: tuple[int, ...] | None) -> bytes:
    order = order or tuple(range(len(sizes)))
    in_order = contiguous_strides([sizes[dim] for dim in order])
    by_dim = dict(zip(order, in_order, strict=True))
    strides = tuple(by_dim[dim] for dim in range(len(sizes)))
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_Tensor(getattr(torch, dtype), sizes, strides))
    return buffer.getvalue()
