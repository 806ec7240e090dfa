"""Entries of tensors as text, one line each. No torch.

::

    float32 40,64|__0_0.distcp 512 c9b36bc8 0,0 31,64|__1_0.distcp 512 43ccf47d 31,0 9,64

dtype and shape, and the order of dims in memory if it is not their own; for each chunk its file,
first byte, and the CRC32 of each block in hex, and unless it is the whole tensor its offsets and
sizes. A manifest of lists of lists takes longer to read, and ten times the memory.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache

from shardopt.checkpoint.boxes import Box
from shardopt.checkpoint.entries import ITEMSIZE, Chunk, TensorEntry


def to_text(entry: TensorEntry) -> str:
    """What ``from_text`` reads."""
    whole = Box.whole(entry.shape)
    order = () if entry.order is None else (_joined(entry.order),)
    parts = [" ".join((entry.dtype, _joined(entry.shape), *order))]
    for chunk in entry.chunks:
        crcs = _big_endian(array("I", chunk.crcs or ())).tobytes().hex()
        box = () if chunk.box == whole else map(_joined, chunk.box)
        parts.append(" ".join((chunk.file, str(chunk.offset), crcs, *box)))
    return "|".join(parts)


def from_text(text: str) -> TensorEntry:
    """What ``to_text`` was given. Raises ``ValueError``, ``TypeError`` or ``KeyError``."""
    most, *place = text.rsplit(" ", 2)
    if (known := _whole_chunk(most)) is not None:
        dtype, whole, file = known
        return TensorEntry(dtype, whole.sizes, None, [_chunk(whole, file, *place)])
    head, *chunks = text.split("|")
    dtype, shape, *order = head.split(" ")
    ITEMSIZE[dtype]  # known
    whole = Box.whole(_integers(shape))
    entry = TensorEntry(sys.intern(dtype), whole.sizes, _integers(*order) if order else None)
    for chunk in chunks:
        file, offset, crcs, *box = chunk.split(" ")
        part = _box(*box) if box else whole
        entry.chunks.append(_chunk(part, sys.intern(file), offset, crcs))
    return entry


@lru_cache(maxsize=4096)  # most tensors of a checkpoint are of a few kinds
def _whole_chunk(text: str) -> tuple[str, Box, str] | None:
    """Dtype, shape and file of a tensor that is row-major, and in one chunk, if it is."""
    head, _, file = text.partition("|")
    dtype, _, shape = head.partition(" ")
    if not file or " " in shape + file or "|" in file:
        return None
    ITEMSIZE[dtype]  # known
    return sys.intern(dtype), Box.whole(_integers(shape)), sys.intern(file)


def _chunk(box: Box, file: str, offset: str, crcs: str) -> Chunk:
    if not (offset.isascii() and offset.isdigit() and len(offset) < 19):
        raise ValueError(f"expected the first byte of a chunk, got {offset[:40]!r}")
    return Chunk(box, file, int(offset), _big_endian(array("I", bytes.fromhex(crcs))))


def _box(offsets: str, sizes: str) -> Box:
    box = Box(_integers(offsets), _integers(sizes))
    if len(box.offsets) != len(box.sizes):
        raise ValueError(f"expected as many offsets as sizes, got {offsets} and {sizes}")
    return box


def _joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _integers(text: str) -> tuple[int, ...]:
    values = tuple(map(int, text.split(","))) if text else ()
    if any(not 0 <= value < 1 << 63 for value in values):
        raise ValueError(f"expected integers from 0 on, below 2**63, got {text[:80]}")
    return values


def _big_endian(crcs: array[int]) -> array[int]:
    """From this machine's order of bytes to the text's, or back."""
    if sys.byteorder == "little":
        crcs.byteswap()
    return crcs
