"""One rank's file of a checkpoint: its pieces, box by box, each an archive that torch reads."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from shardopt.checkpoint.archives import ALIGNMENT
from shardopt.checkpoint.blobs import surroundings
from shardopt.checkpoint.boxes import Box, stretch
from shardopt.checkpoint.contents import Piece
from shardopt.checkpoint.crc import BLOCK, block_crcs, crc_of_blocks, joined
from shardopt.checkpoint.entries import Chunk, FileEntry, TensorEntry
from shardopt.checkpoint.steps import naming
from shardopt.checkpoint.tensors import bytes_of


def write_pieces(
    path: Path, header: bytes, pieces: Sequence[Piece], rank: int
) -> tuple[dict[str, TensorEntry], FileEntry]:
    """Write a new file, and see it to the disk.

    Returns:
        Key -> entry with the chunks in this file; and what the file is.
    """
    entries: dict[str, TensorEntry] = {}
    with naming(path), path.open("xb", buffering=1 << 20) as file:
        out = _Checked(file)
        out.write(header)
        for piece in pieces:
            known = entries.setdefault(piece.key, _without_chunks(piece.entry))
            data = piece.data.cpu()
            for box, part in _boxes(piece, data):
                known.chunks.append(_write_box(out, piece.entry, box, part, path.name))
        file.flush()
        os.fsync(file.fileno())
    return entries, FileEntry(out.size, out.crc, rank)


class _Checked:
    """A file that knows its size and CRC32 so far."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.size = self.crc = 0

    def write(self, data: bytes | memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self._write(data)

    def write_known(self, data: memoryview, crc: int) -> None:
        """Bytes whose CRC32 is known, which few bytes need not be."""
        if len(data) < BLOCK:
            self.write(data)
            return
        self.crc = joined(self.crc, crc, len(data))
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.size += len(data)


def _without_chunks(entry: TensorEntry) -> TensorEntry:
    return TensorEntry(entry.dtype, entry.shape, entry.order)


def _boxes(piece: Piece, data: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """The boxes of a piece, in the tensor's own dims, each with its elements."""
    entry, done, stop = piece.entry, 0, piece.start + data.numel()
    for box in stretch(entry.shape, entry.order, piece.start, stop):
        yield box, data[done : done + box.numel]
        done += box.numel


def _write_box(out: _Checked, entry: TensorEntry, box: Box, data: Tensor, file: str) -> Chunk:
    view = bytes_of(data)
    crcs = block_crcs(view)
    crc = crc_of_blocks(crcs, len(view))
    before, after = surroundings(entry.dtype, box.sizes, entry.order).with_crc(crc)
    out.write(bytes(-out.size % ALIGNMENT) + before)
    chunk = Chunk(box, file, out.size, crcs)
    out.write_known(view, crc)
    out.write(after)
    return chunk
