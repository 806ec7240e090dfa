"""Every checksum of a checkpoint, looked at. No torch."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from shardopt.checkpoint.entries import RESTORE, FileEntry
from shardopt.checkpoint.manifest import HEADER, NAME, Manifest, file_header, is_ours, read_manifest
from shardopt.checkpoint.reader import PIECE, Reader
from shardopt.errors import CheckpointError, CorruptError, IncompleteError, UnsupportedError

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_PIECE = 1 << 18  # bytes: what stays in the cache of a core


def problems(directory: Path, progress: Progress | None = None) -> list[CheckpointError]:
    """What is wrong with a checkpoint: at most one error for each of its files.

    Args:
        directory: of one step.
        progress: is told how many bytes have been looked at, and how many there are.

    Raises:
        UnsupportedError: it is there, and was not written by ``shardopt.checkpoint``.
    """
    return list(_problems(Path(directory), progress))


def verify(directory: Path, progress: Progress | None = None) -> None:
    """Raise the first of ``problems``.

    Raises:
        IncompleteError: the manifest or a file is not there.
        CorruptError: something is not what was written.
        UnsupportedError: it is there, and was not written by ``shardopt.checkpoint``.
    """
    for problem in _problems(Path(directory), progress):
        raise problem


def _problems(directory: Path, progress: Progress | None) -> Iterator[CheckpointError]:
    foreign = directory.is_file() or (directory / ".metadata").is_file()
    if foreign and not (directory / NAME).exists() and not is_ours(directory):
        raise UnsupportedError(
            f"{directory}: expected a checkpoint of shardopt, got one that has no checksums; only "
            "what shardopt.checkpoint.save writes can be verified"
        )
    try:
        manifest = read_manifest(directory, values=False)
    except CheckpointError as problem:
        yield problem
        return
    total, done = sum(entry.size for entry in manifest.files.values()), 0
    buffer = memoryview(bytearray(_PIECE))
    for name, entry in manifest.files.items():

        def told(count: int, before: int = done) -> None:
            if progress is not None:
                progress(before + count, total)

        try:
            _check_file(directory, manifest, name, buffer, told)
        except CheckpointError as problem:
            yield problem
        done += entry.size
        told(entry.size)


def _check_file(
    directory: Path,
    manifest: Manifest,
    name: str,
    buffer: memoryview,
    told: Callable[[int], None],
) -> None:
    path, entry = directory / name, manifest.files[name]
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError:
        of = "" if entry.rank is None else f" of rank {entry.rank}"
        raise IncompleteError(
            f"{path}: expected a file{of}, got none; copy it from where the checkpoint was "
            "written, or use another step"
        ) from None
    with file:
        if entry.rank is not None:
            check_header(path, file.read(HEADER), manifest, entry.rank)
            file.seek(0)
        if (size := os.fstat(file.fileno()).st_size) != entry.size:
            raise CorruptError(f"{path}: expected {entry.size} bytes, got {size}; {RESTORE}")
        crc = done = 0
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            done += count
            told(done)
    if entry.crc is not None and crc != entry.crc:
        raise _what_differs(directory, manifest, name, entry, crc)


def check_header(path: Path, got: bytes, manifest: Manifest, rank: int) -> None:
    """Raise ``CorruptError`` unless a file begins as that of this rank, step and run does."""
    if got == file_header(manifest.run, manifest.step, rank):
        return
    known = re.fullmatch(rb"shardopt run=(\S+) step=(-?\d+) rank=(\d+) *\n", got)
    if known is None:
        raise CorruptError(
            f"{path}: expected a file that begins with 'shardopt run={manifest.run}', got "
            f"{got[:24]!r}; {RESTORE}"
        )
    theirs = [part.decode("ascii", "replace") for part in known.groups()]
    for what, mine, other in zip(
        ("step", "rank", "run"),
        (manifest.step, rank, manifest.run),
        (theirs[1], theirs[2], theirs[0]),
        strict=True,
    ):
        if str(mine) != other:
            raise CorruptError(
                f"{path}: expected a file of {what} {mine}, got one of {what} {other}; {RESTORE}"
            )
    raise CorruptError(f"{path}: expected a header of {HEADER} bytes, got {got!r}; {RESTORE}")


def _what_differs(
    directory: Path, manifest: Manifest, name: str, file: FileEntry, crc: int
) -> CorruptError:
    """The block whose checksum is wrong, by the tensor it belongs to."""
    buffer = memoryview(bytearray(PIECE))
    with Reader(directory, manifest.tensors) as reader:
        for key, entry in manifest.tensors.items():
            for chunk in entry.chunks:
                size = chunk.box.numel * entry.itemsize if chunk.file == name else 0
                try:
                    for start in range(0, size, PIECE):
                        reader.fill_checked(key, chunk, start, buffer[: size - start])
                except CorruptError as problem:
                    return problem
    return CorruptError(
        f"{directory / name}: expected CRC32 {file.crc:08x}, got {crc:08x}, while the bytes of "
        f"every tensor are right: it differs between them; {RESTORE}"
    )
