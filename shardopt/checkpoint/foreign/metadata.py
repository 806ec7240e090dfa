"""What the file ``.metadata`` of torch's distributed checkpoint says, as plain values. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardopt.checkpoint.boxes import Box, overlapping
from shardopt.checkpoint.entries import ITEMSIZE, RESTORE, FileEntry
from shardopt.checkpoint.foreign.unpickler import Record, ints, metadata_globals, unpickle
from shardopt.errors import CorruptError, IncompleteError, UnsupportedError

METADATA = ".metadata"


@dataclass(frozen=True)
class Stored:
    """Where an archive of ``torch.save`` lies."""

    file: str  # name within the directory
    offset: int  # of the first byte
    length: int  # bytes


@dataclass
class StoredParts:
    """A tensor in parts, each in an archive of its own."""

    dtype: str
    shape: tuple[int, ...]
    parts: list[tuple[Box, Stored]]


@dataclass
class DcpMetadata:
    """What a directory holds.

    Attributes:
        tensors: key -> tensor.
        values: key -> where any other value lies, as ``torch.save`` writes it.
        paths: key -> where it stood in the nested dicts and lists; those that say so.
        files: name -> size.
    """

    tensors: dict[str, StoredParts] = field(default_factory=dict)
    values: dict[str, Stored] = field(default_factory=dict)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)


def read_metadata(directory: Path) -> DcpMetadata:
    """Read ``.metadata`` of a directory, running nothing that is in it.

    Raises:
        CorruptError: it is not what torch writes, or a tensor is not whole.
        IncompleteError: a file is not there.
        UnsupportedError: bytes are transformed (compressed), or of a dtype that is not known here.
    """
    path = directory / METADATA
    root = unpickle(path.read_bytes(), metadata_globals(), str(path))
    try:
        metadata = _parsed(root, path)
    except (CorruptError, UnsupportedError):
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as problem:
        raise CorruptError(
            f"{path}: expected the metadata of torch.distributed.checkpoint, got "
            f"{type(problem).__name__}: {problem}; {RESTORE}"
        ) from None
    for key, stored in _everything(metadata):
        _check_file(directory, key, stored, metadata.files)
    for key, tensor in metadata.tensors.items():
        _check_covered(path, key, tensor)
    return metadata


def _parsed(root: Any, path: Path) -> DcpMetadata:
    fields = _fields(root, "Metadata")
    places = {
        (index["fqn"], _offsets(index.get("offset"))): _stored(info, index["fqn"], path)
        for index, info in (
            (_fields(key, "MetadataIndex"), value) for key, value in fields["storage_data"].items()
        )
    }
    found = DcpMetadata()
    for key, record in fields["state_dict_metadata"].items():
        if type(record).__name__ == "BytesStorageMetadata":
            found.values[str(key)] = _place(places, key, None, path)
            continue
        entry = _fields(record, "TensorStorageMetadata")
        dtype = entry["properties"].state[0]
        if dtype not in ITEMSIZE:
            raise TypeError(f"the dtype of {key!r} is {dtype!r}")
        parts = []
        for chunk in entry["chunks"]:
            ends = _fields(chunk, "ChunkStorageMetadata")
            box = Box(ints(ends["offsets"]), ints(ends["sizes"]))
            parts.append((box, _place(places, key, box.offsets, path)))
        found.tensors[str(key)] = StoredParts(dtype, ints(entry["size"]), parts)
    for key, steps in (fields.get("planner_data") or {}).items():
        if not isinstance(steps, tuple) or not all(type(step) in (str, int) for step in steps):
            raise TypeError(f"the path of {key!r} is {steps!r}")
        found.paths[key] = steps
    return found


def _fields(record: Any, name: str) -> dict[str, Any]:
    """The attributes of an object of torch's class of this name."""
    if not isinstance(record, Record) or type(record).__name__ != name:
        raise TypeError(f"expected {name}, got {type(record).__name__}")
    state = record.state
    if not isinstance(state, dict):
        raise TypeError(f"expected the attributes of {name}, got {type(state).__name__}")
    return state


def _offsets(value: Any) -> tuple[int, ...] | None:
    return None if value is None else ints(value)


def _stored(info: Any, key: str, path: Path) -> Stored:
    fields = _fields(info, "_StorageInfo")
    if transforms := fields.get("transform_descriptors"):
        raise UnsupportedError(
            f"{path}: {key!r}: expected bytes as they are, got transformed ones ({transforms}): "
            "load them with torch.distributed.checkpoint and save them without extensions"
        )
    file = fields["relative_path"]
    if not isinstance(file, str) or Path(file).name != file:
        raise ValueError(f"{key!r} lies in {file!r}, which is no name of a file in the directory")
    offset, length = ints((fields["offset"], fields["length"]))
    return Stored(file, offset, length)


def _place(
    places: Mapping[Any, Stored], key: str, offsets: tuple[int, ...] | None, path: Path
) -> Stored:
    if (place := places.get((key, offsets))) is None:
        part = "" if offsets is None else f", the part at {offsets}"
        raise CorruptError(
            f"{path}: {key!r}{part}: expected where its bytes lie, got nothing; {RESTORE}"
        )
    return place


def _everything(metadata: DcpMetadata) -> Iterator[tuple[str, Stored]]:
    yield from metadata.values.items()
    for key, tensor in metadata.tensors.items():
        yield from ((key, stored) for _, stored in tensor.parts)


def _check_file(directory: Path, key: str, stored: Stored, files: dict[str, FileEntry]) -> None:
    """Raise unless the file is there and long enough; note its size."""
    path = directory / stored.file
    if stored.file not in files:
        try:
            files[stored.file] = FileEntry(path.stat().st_size, None, None)
        except FileNotFoundError:
            raise IncompleteError(
                f"{path}: expected a file with {key!r}, got none; copy it from where the "
                "checkpoint was written, or use another step"
            ) from None
    end, size = stored.offset + stored.length, files[stored.file].size
    if end > size:
        raise CorruptError(
            f"{path}: expected {end} bytes at least, the last of {key!r}, got {size}; {RESTORE}"
        )


def _check_covered(path: Path, key: str, tensor: StoredParts) -> None:
    """Raise unless the parts make up the tensor, each element once."""
    whole = Box.whole(tensor.shape)
    boxes = [box for box, _ in tensor.parts if box.numel]
    for box in boxes:
        if len(box.offsets) != len(tensor.shape) or box.overlap(whole) != box:
            raise CorruptError(
                f"{path}: tensor {key!r}: expected parts of shape {tensor.shape}, got {box}; "
                f"{RESTORE}"
            )
    held = sum(box.numel for box in boxes)
    if held != whole.numel:
        raise CorruptError(
            f"{path}: tensor {key!r}: expected parts with {whole.numel} elements in all, got "
            f"{held}; {RESTORE}"
        )
    if twice := overlapping(boxes):
        raise CorruptError(
            f"{path}: tensor {key!r}: expected parts that share no element, got {twice[0]} and "
            f"{twice[1]}; {RESTORE}"
        )
