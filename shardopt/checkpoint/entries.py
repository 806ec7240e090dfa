"""Where the bytes of a checkpoint lie: chunks of tensors, in files. Numbers only; no torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from math import prod

from shardopt.checkpoint.boxes import Box

RESTORE = "the checkpoint is damaged: use another step, or a copy"

# Bytes of an element, by torch's name of its dtype.
ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8,
    "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex32": 4,
    "complex64": 8, "complex128": 16, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip


@dataclass(slots=True)
class Chunk:
    """The bytes of one box of a tensor."""

    box: Box
    file: str  # name within the checkpoint
    offset: int  # of the first byte
    crcs: array[int] | None  # 4 bytes for each block; ``None`` in a checkpoint that has none
    order: tuple[int, ...] | None = None  # of dims in the bytes, if not the tensor's own


@dataclass(slots=True)
class TensorEntry:
    """A tensor, whole: what it is, and the chunks that make it up.

    Attributes:
        order: dims from outermost to innermost, as the elements lie in memory; ``None`` where that
            is their own order.
    """

    dtype: str  # torch's name, without "torch."
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * self.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class FileEntry:
    """A file of the checkpoint."""

    size: int  # bytes
    crc: int | None  # of all bytes
    rank: int | None  # who has written it
