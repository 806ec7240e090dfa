"""A manifest cannot say what is not so: its chunks make up every tensor. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardopt.checkpoint.boxes import overlapping
from shardopt.checkpoint.crc import BLOCK
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
        if Path(name).name != name:
            raise CorruptError(f"{path}: expected names of files, got {name!r}; {RESTORE}")
    for key, entry in tensors.items():
        if entry.order is not None and sorted(entry.order) != list(range(len(entry.shape))):
            raise CorruptError(
                f"{path}: tensor {key!r}: expected an order of {len(entry.shape)} dims, got "
                f"{entry.order}; {RESTORE}"
            )
        held = sum(chunk.box.numel for chunk in entry.chunks)
        if held != entry.numel:
            raise CorruptError(
                f"{path}: tensor {key!r}: expected chunks with {entry.numel} elements in all, "
                f"got {held}; {RESTORE}"
            )
        for chunk in entry.chunks:
            _check_chunk(path, key, entry, chunk, files)
        # Chunks of the right number of elements leave a gap only where two of them overlap.
        if overlapping([chunk.box for chunk in entry.chunks]):
            raise CorruptError(
                f"{path}: tensor {key!r}: expected chunks beside one another, got two that "
                f"overlap; {RESTORE}"
            )


def _check_chunk(
    path: Path, key: str, entry: TensorEntry, chunk: Chunk, files: Mapping[str, FileEntry]
) -> None:
    box, size = chunk.box, chunk.box.numel * entry.itemsize
    is_whole = box.sizes == entry.shape and not any(box.offsets)
    inside = is_whole or (
        len(box.offsets) == len(entry.shape)
        and all(
            0 <= offset <= offset + length <= whole
            for offset, length, whole in zip(box.offsets, box.sizes, entry.shape, strict=True)
        )
    )
    known = chunk.file in files
    if not inside or not known or not 0 <= chunk.offset <= files[chunk.file].size - size:
        raise CorruptError(
            f"{path}: tensor {key!r}: expected a part of {entry} within a file of the checkpoint, "
            f"got {box} at byte {chunk.offset} of {chunk.file!r}; {RESTORE}"
        )
    if chunk.crcs is not None and len(chunk.crcs) != -(-size // BLOCK):
        raise CorruptError(
            f"{path}: tensor {key!r}: expected {-(-size // BLOCK)} checksums for {box}, got "
            f"{len(chunk.crcs)}; {RESTORE}"
        )
