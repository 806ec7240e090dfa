"""The truth about a checkpoint: ``manifest.json``, itself under a checksum. No torch.

What a checkpoint holds is a tree of plain values (see ``plain.py``) in which tensors are keys, and
for each key where its bytes lie. A part of a tensor is a ``Chunk``: the bytes of one box, end to
end in memory order, in one file, with a CRC32 to every block.
"""

from __future__ import annotations

import json
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardopt.checkpoint.boxes import Box
from shardopt.checkpoint.covered import check_covered
from shardopt.checkpoint.crc import BLOCK
from shardopt.checkpoint.entries import ITEMSIZE, RESTORE, Chunk, FileEntry, TensorEntry
from shardopt.checkpoint.garbage import no_collection
from shardopt.checkpoint.steps import number_of
from shardopt.errors import CorruptError, IncompleteError

NAME = "manifest.json"
FORMAT = 1
HEADER = 128  # bytes at the start of each file that a rank writes, see file_header


def file_header(run: str, step: int, rank: int) -> bytes:
    """What a rank's file begins with: one line of ASCII."""
    return f"shardopt run={run} step={step} rank={rank}".ljust(HEADER - 1).encode() + b"\n"


def is_ours(directory: Path) -> bool:
    """Whether a rank of shardopt has written a file there, be the manifest lost or not."""
    for path in directory.glob("__*.distcp"):
        with path.open("rb") as file:
            if file.read(9) == b"shardopt ":
                return True
    return False


@dataclass
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        run: a random name of the save, which every file of it begins with.
        step: how many steps had been taken.
        world_size: number of ranks that wrote.
        facts: more about the save, for readers: the optimizer's class, versions.
        tree: ``{"model": ..., "optimizer": ..., "scheduler": ..., "extra": ...}``, those that were
            saved, as ``plain.encode`` writes them.
        tensors: key -> entry.
        files: name -> entry; all but the manifest.
    """

    run: str
    step: int
    world_size: int
    facts: dict[str, Any] = field(default_factory=dict)
    tree: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file: one JSON object whose first member is the CRC32 of the rest."""
        body = {
            "format": FORMAT,
            "run": self.run,
            "step": self.step,
            "world_size": self.world_size,
            "block": BLOCK,
            "facts": self.facts,
            "tree": self.tree,
            "tensors": {key: tensor_to_json(entry) for key, entry in self.tensors.items()},
            "files": {
                name: [entry.size, entry.crc, entry.rank] for name, entry in self.files.items()
            },
        }
        text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        return b'{"crc32":"%08x","manifest":%s}\n' % (zlib.crc32(text), text)


def tensor_to_json(entry: TensorEntry) -> list[Any]:
    """``[dtype, shape, order, chunks]``; a chunk is ``[offsets, sizes, file, offset, crcs]``."""
    chunks = [
        [
            list(chunk.box.offsets),
            list(chunk.box.sizes),
            chunk.file,
            chunk.offset,
            _big_endian(array("I", chunk.crcs or ())).tobytes().hex(),
        ]
        for chunk in entry.chunks
    ]
    return [entry.dtype, list(entry.shape), entry.order and list(entry.order), chunks]


def tensor_from_json(data: Sequence[Any]) -> TensorEntry:
    """What ``tensor_to_json`` was given. Raises ``ValueError``, ``TypeError`` or ``KeyError``."""
    dtype, shape, order, chunks = data
    ITEMSIZE[dtype]  # known
    return TensorEntry(
        dtype,
        _integers(shape),
        None if order is None else _integers(order),
        [
            Chunk(
                _box(offsets, sizes),
                str(file),
                int(offset),
                _big_endian(array("I", bytes.fromhex(crcs))),
            )
            for offsets, sizes, file, offset, crcs in chunks
        ],
    )


def _box(offsets: Sequence[Any], sizes: Sequence[Any]) -> Box:
    if len(offsets) != len(sizes):
        raise ValueError(f"expected as many offsets as sizes, got {offsets} and {sizes}")
    return Box(_integers(offsets), _integers(sizes))


def _integers(values: Sequence[Any]) -> tuple[int, ...]:
    if not {*map(type, values)} <= {int}:
        raise ValueError(f"expected integers, got {values}")
    return tuple(values)


def _file_from_json(entry: Sequence[Any]) -> FileEntry:
    size, crc, rank = entry
    return FileEntry(
        int(size), None if crc is None else int(crc), rank if rank is None else int(rank)
    )


def _big_endian(crcs: array[int]) -> array[int]:
    """From this machine's order of bytes to the manifest's, or back."""
    if sys.byteorder == "little":
        crcs.byteswap()
    return crcs


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, checked against its own checksum and for completeness.

    Raises:
        IncompleteError: there is none.
        CorruptError: it is not what was written.
    """
    path = directory / NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise IncompleteError(
            f"{directory}: expected a checkpoint with {NAME}, got none; name the directory of one "
            "step (step-N)"
        ) from None
    manifest = parse_manifest(data, path)
    if number_of(directory) not in (None, manifest.step):
        raise CorruptError(
            f"{path}: expected the manifest of {directory.name}, got that of step "
            f"{manifest.step}; if the directory was renamed, give it its own name back, else use a "
            "copy"
        )
    return manifest


@no_collection()
def parse_manifest(data: bytes, path: Path) -> Manifest:
    """See ``read_manifest``."""
    head, tail = b'{"crc32":"', b'","manifest":'
    start = len(head) + 8 + len(tail)
    text = memoryview(data)[start:-2]
    if not data.startswith(head) or data[start - len(tail) : start] != tail or data[-2:] != b"}\n":
        raise CorruptError(f"{path}: expected a manifest of shardopt, got another text; {RESTORE}")
    expected, got = data[len(head) : len(head) + 8].decode("ascii", "replace"), zlib.crc32(text)
    if expected != f"{got:08x}":
        raise CorruptError(f"{path}: expected CRC32 {expected}, got {got:08x}; {RESTORE}")
    try:
        body = json.loads(str(text, "utf-8"))
        if body["format"] != FORMAT or body["block"] != BLOCK:
            raise CorruptError(
                f"{path}: expected format {FORMAT}, got {body['format']}; it was written by "
                "another version of shardopt: read it with that one"
            )
        manifest = Manifest(
            run=str(body["run"]),
            step=int(body["step"]),
            world_size=int(body["world_size"]),
            facts=dict(body["facts"]),
            tree=dict(body["tree"]),
            tensors={key: tensor_from_json(entry) for key, entry in body["tensors"].items()},
            files={name: _file_from_json(entry) for name, entry in body["files"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise CorruptError(f"{path}: not a manifest of shardopt ({problem}); {RESTORE}") from None
    check_covered(path, manifest.tensors, manifest.files)
    ranks = sorted(entry.rank for entry in manifest.files.values() if entry.rank is not None)
    if ranks != list(range(manifest.world_size)):
        raise CorruptError(
            f"{path}: expected a file of each of {manifest.world_size} ranks, got files of ranks "
            f"{ranks}; {RESTORE}"
        )
    return manifest
