"""The truth about a checkpoint: ``manifest.json``, itself under a checksum. No torch.

What a checkpoint holds is a tree of plain values (see ``plain.py``) in which tensors are keys, and
for each key where its bytes lie. A part of a tensor is a ``Chunk``: the bytes of one box, end to
end in memory order, in one file, with a CRC32 to every block.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardopt.checkpoint.covered import check_covered
from shardopt.checkpoint.crc import BLOCK, MAX_BLOCK, MAX_BLOCKS
from shardopt.checkpoint.entries import RESTORE, FileEntry, TensorEntry
from shardopt.checkpoint.entry_text import from_text, to_text
from shardopt.checkpoint.garbage import no_collection
from shardopt.checkpoint.plain import MARK, TensorKey, decode, encode
from shardopt.checkpoint.steps import number_of
from shardopt.errors import CorruptError, IncompleteError

NAME = "manifest.json"
FORMAT = 3
BLOCKS = [BLOCK, MAX_BLOCK, MAX_BLOCKS]
_WRONG = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
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
            saved, with a ``TensorKey`` for each tensor.
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
            "blocks": BLOCKS,
            "facts": self.facts,
            "tree": encode(self.tree),
            "tensors": {key: to_text(entry) for key, entry in self.tensors.items()},
            "files": {
                name: [entry.size, entry.crc, entry.rank] for name, entry in self.files.items()
            },
        }
        text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        return b'{"crc32":"%08x","manifest":%s}\n' % (zlib.crc32(text), text)


def _check_optimizer(value: Any) -> None:
    """A ``state_dict``, if it has groups: of dicts whose parameters have names."""
    if isinstance(value, dict) and "param_groups" in value:
        for group in value["param_groups"]:
            set({**group}["params"])
        {**value["state"], **value.get("own", {})}


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"expected an integer from 0 on, got {value!r}")
    return value


def _file(size: Any, crc: Any, rank: Any) -> FileEntry:
    optional = (None if number is None else _integer(number) for number in (crc, rank))
    return FileEntry(_integer(size), *optional)


def read_manifest(directory: Path, *, values: bool = True) -> Manifest:
    """The manifest of a checkpoint, checked against its own checksum and for completeness.

    Args:
        values: whether its tree is to be made; else it is left as JSON has it, which takes less
            time.

    Raises:
        IncompleteError: there is none.
        CorruptError: it is not what was written.
    """
    path = directory / NAME
    try:
        manifest = parse_manifest(path.read_bytes(), path, values)
    except (FileNotFoundError, NotADirectoryError):
        raise IncompleteError(
            f"{directory}: expected a checkpoint with {NAME}, got none; name the directory of one "
            "step (step-N)"
        ) from None
    if number_of(directory) not in (None, manifest.step):
        raise CorruptError(
            f"{path}: expected the manifest of {directory.name}, got that of step "
            f"{manifest.step}; if the directory was renamed, give it its own name back, else use a "
            "copy"
        )
    return manifest


def parse_manifest(data: bytes, path: Path, values: bool = True) -> Manifest:
    """See ``read_manifest``."""
    with no_collection():
        try:
            text = _checked(data, path)
            del data  # is as large
            manifest = _made(text, path, values)
        except _WRONG as problem:
            raise CorruptError(
                f"{path}: not a manifest of shardopt ({problem}); {RESTORE}"
            ) from None
        check_covered(path, manifest.tensors, manifest.files)
    ranks = sorted(entry.rank for entry in manifest.files.values() if entry.rank is not None)
    if len(ranks) != manifest.world_size or ranks != list(range(len(ranks))):
        raise CorruptError(
            f"{path}: expected a file of each of {manifest.world_size} ranks, got files of ranks "
            f"{ranks}; {RESTORE}"
        )
    return manifest


def _checked(data: bytes, path: Path) -> str:
    """What the first member is the CRC32 of."""
    head, tail = b'{"crc32":"', b'","manifest":'
    start = len(head) + 8 + len(tail)
    text = memoryview(data)[start:-2]
    if not data.startswith(head) or data[start - len(tail) : start] != tail or data[-2:] != b"}\n":
        raise CorruptError(f"{path}: expected a manifest of shardopt, got another text; {RESTORE}")
    expected, got = data[len(head) : len(head) + 8].decode("ascii", "replace"), zlib.crc32(text)
    if expected != f"{got:08x}":
        raise CorruptError(f"{path}: expected CRC32 {expected}, got {got:08x}; {RESTORE}")
    return str(text, "utf-8")


def _made(text: str, path: Path, values: bool) -> Manifest:
    body, named = _decoded(text) if values else (json.loads(text), [])
    if body["format"] != FORMAT or body["blocks"] != BLOCKS:
        raise CorruptError(
            f"{path}: expected format {FORMAT}, got {body['format']}; it was written by another "
            "version of shardopt: read it with that one"
        )
    tensors = {sys.intern(key): from_text(text) for key, text in body["tensors"].items()}
    if lost := [key for key in named if key not in tensors]:
        raise ValueError(f"expected an entry for tensor {lost[0]!r}, got none")
    if values:
        _check_optimizer(body["tree"].get("optimizer"))
    return Manifest(
        run=str(body["run"]),
        step=_integer(body["step"]),
        world_size=_integer(body["world_size"]),
        facts={sys.intern(name): str(fact) for name, fact in body["facts"].items()},
        tree=dict(body["tree"]),
        tensors=tensors,
        files={sys.intern(name): _file(*entry) for name, entry in body["files"].items()},
    )


def _decoded(text: str) -> tuple[Any, list[str]]:
    """JSON with values as they were, each made as it is read, and the tensors that they name.

    So the dicts that they are written as are never there all at once.
    """
    named: list[str] = []

    def revive(data: dict[str, Any]) -> Any:
        value = decode(data) if MARK in data else data
        if type(value) is TensorKey:
            named.append(value.key)
        return value

    return json.loads(text, object_hook=revive), named
