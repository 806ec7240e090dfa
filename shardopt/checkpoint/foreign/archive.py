"""Where the elements of a tensor lie in an archive of ``torch.save``. No torch.

An archive is a zip, stored and not compressed: ``data.pkl`` says what the tensor is, ``data/0``
holds its elements, as they lay in memory.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from shardopt.checkpoint.boxes import order_of, strides_of
from shardopt.checkpoint.entries import ITEMSIZE, RESTORE
from shardopt.checkpoint.foreign.unpickler import StoredTensor, tensor_globals, unpickle
from shardopt.errors import CorruptError, UnsupportedError

Fill = Callable[[int, memoryview], bool]  # fills memory from an offset on, if there is enough

_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class Elements:
    """Where elements lie, end to end.

    Attributes:
        offset: of the first byte in the archive.
        order: dims from outermost to innermost; ``None`` where that is their own order.
    """

    offset: int
    order: tuple[int, ...] | None


def find_elements(
    fill: Fill, length: int, dtype: str, sizes: tuple[int, ...], where: str
) -> Elements:
    """Look into the archive of one tensor.

    Args:
        fill: reads the archive.
        length: of the archive, in bytes.
        dtype: expected.
        sizes: expected.
        where: file and tensor, for errors.

    Raises:
        CorruptError: it is no such archive, or of another tensor.
        UnsupportedError: the elements do not lie end to end, or are not what the tensor shows.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Slice(fill, length), 2048)) as archive:
            folder = archive.namelist()[0].partition("/")[0]
            pickled = archive.read(f"{folder}/data.pkl")
            stored = unpickle(pickled, tensor_globals(), f"{where}, {folder}/data.pkl")
            _check_tensor(stored, dtype, sizes, where)
            if f"{folder}/byteorder" in archive.namelist():
                _check_byte_order(archive.read(f"{folder}/byteorder"), where)
            record = archive.getinfo(f"{folder}/data/{stored.record}")
    except (CorruptError, UnsupportedError):
        raise
    except Exception as problem:  # zipfile raises anything
        raise CorruptError(
            f"{where}: expected an archive of torch.save, got {type(problem).__name__}: {problem}; "
            f"{RESTORE}"
        ) from None
    begin = _data_offset(fill, record, where)
    skip, nbytes = stored.offset * ITEMSIZE[dtype], prod(sizes) * ITEMSIZE[dtype]
    held = min(record.file_size, length - begin)
    if skip + nbytes > held:
        raise CorruptError(
            f"{where}: expected a record of {skip + nbytes} bytes at least, got {held}; {RESTORE}"
        )
    return Elements(begin + skip, _order(stored, where))


def memory_order(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Dims from outermost to innermost, ``None`` where that is their own order.

    Raises:
        ValueError: the elements do not lie end to end, or lie on top of each other.
    """
    if 0 in sizes:
        return None
    order = order_of(sizes, strides)
    for size, stride, dense in zip(sizes, strides, strides_of(sizes, order), strict=True):
        if size > 1 and stride != dense:
            raise ValueError(f"sizes {tuple(sizes)} with strides {tuple(strides)}")
    return order


def _order(stored: StoredTensor, where: str) -> tuple[int, ...] | None:
    problem = " and ".join(stored.flags)
    if not problem:
        try:
            return memory_order(stored.sizes, stored.strides)
        except ValueError as found:
            problem = str(found)
    raise UnsupportedError(
        f"{where}: expected elements end to end, as they are, got {problem}: load the checkpoint "
        "with torch.distributed.checkpoint and save it again after .contiguous() and "
        ".resolve_conj()"
    )


def _check_tensor(stored: object, dtype: str, sizes: tuple[int, ...], where: str) -> None:
    if not isinstance(stored, StoredTensor) or (stored.dtype, stored.sizes) != (dtype, sizes):
        got = stored
        if isinstance(stored, StoredTensor):
            got = f"{stored.dtype} {stored.sizes}"
        raise CorruptError(f"{where}: expected {dtype} {sizes}, got {got}; {RESTORE}")


def _check_byte_order(order: bytes, where: str) -> None:
    if order != b"little":
        raise UnsupportedError(
            f"{where}: expected bytes in little-endian order, got {order!r}: save the checkpoint "
            "again on a little-endian machine"
        )


def _data_offset(fill: Fill, record: zipfile.ZipInfo, where: str) -> int:
    """Where the content of a record begins: its own header says, not the directory at the end."""
    header = bytearray(_LOCAL_HEADER.size)
    whole = record.header_offset >= 0 and fill(record.header_offset, memoryview(header))
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if not whole or signature != b"PK\3\4" or record.compress_type != zipfile.ZIP_STORED:
        raise CorruptError(
            f"{where}: expected the record {record.filename!r}, not compressed, at byte "
            f"{record.header_offset} of the archive, got none; {RESTORE}"
        )
    return record.header_offset + _LOCAL_HEADER.size + name_length + extra_length


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, fill: Fill, length: int):
        self._fill, self._length, self._at = fill, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError(f"expected a place within {self._length} bytes, got {start + offset}")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._length - self._at)]
        if len(room) and not self._fill(self._at, room):
            raise EOFError(f"the end of the file before byte {self._at + len(room)}")
        self._at += len(room)
        return len(room)
