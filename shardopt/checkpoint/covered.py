"""A manifest cannot say what is not so: its chunks make up every tensor. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from shardopt.checkpoint.boxes import overlapping
from shardopt.checkpoint.crc import block_size
from shardopt.checkpoint.entries import RESTORE, Chunk, FileEntry, TensorEntry
from shardopt.errors import CorruptError


def check_covered(
    path: Path, tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry]
) -> None:
    """Raise ``CorruptError`` unless chunks make up every tensor, within their files.

    Args:
        path: of the manifest, for messages.
    """
    for name in files:
        if not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII) or name in (".", ".."):
            raise CorruptError(f"{path}: expected names of files, got {name!r}; {RESTORE}")
    for key, entry in tensors.items():
        if entry.order is not None and sorted(entry.order) != list(range(len(entry.shape))):
            raise CorruptError(
                f"{path}: tensor {key!r}: expected an order of {len(entry.shape)} dims, got "
                f"{entry.order}; {RESTORE}"
            )
        held = 0
        for chunk in entry.chunks:
            held += _checked_numel(path, key, entry, chunk, files.get(chunk.file))
        if held != entry.numel:
            raise CorruptError(
                f"{path}: tensor {key!r}: expected chunks with {entry.numel} elements in all, "
                f"got {held}; {RESTORE}"
            )
        # Chunks of the right number of elements leave a gap only where two of them overlap.
        if len(entry.chunks) > 1 and overlapping([chunk.box for chunk in entry.chunks]):
            raise CorruptError(
                f"{path}: tensor {key!r}: expected chunks beside one another, got two that "
                f"overlap; {RESTORE}"
            )


def _checked_numel(
    path: Path, key: str, entry: TensorEntry, chunk: Chunk, file: FileEntry | None
) -> int:
    """How many elements a chunk has, if it is a part of its tensor and lies in its file."""
    box, numel = chunk.box, chunk.box.numel
    size = numel * entry.itemsize
    is_whole = box.sizes == entry.shape and not any(box.offsets)
    inside = is_whole or (
        len(box.offsets) == len(entry.shape)
        and all(
            offset + length <= whole
            for offset, length, whole in zip(box.offsets, box.sizes, entry.shape, strict=True)
        )
    )
    if not inside or file is None or not 0 <= chunk.offset <= file.size - size:
        raise CorruptError(
            f"{path}: tensor {key!r}: expected a part of {entry} within a file of the checkpoint, "
            f"got {box} at byte {chunk.offset} of {chunk.file!r}; {RESTORE}"
        )
    if chunk.crcs is not None and len(chunk.crcs) != (wanted := -(-size // block_size(size))):
        raise CorruptError(
            f"{path}: tensor {key!r}: expected {wanted} checksums for {box}, got "
            f"{len(chunk.crcs)}; {RESTORE}"
        )
    return numel
