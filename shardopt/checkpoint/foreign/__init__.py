"""Checkpoints that others have written: torch's distributed checkpoint, and ``torch.save``.

Nothing in them is run: pickles go through an allow-list, ours or torch's (``weights_only=True``).
They have no checksums that reach parts of a tensor, so a flipped bit is not noticed.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from shardopt.checkpoint.boxes import Box, strides_of
from shardopt.checkpoint.entries import RESTORE, Chunk, TensorEntry
from shardopt.checkpoint.foreign.archive import Elements, find_elements
from shardopt.checkpoint.foreign.arrange import arranged
from shardopt.checkpoint.foreign.loose import LooseTensors, copy, part_of
from shardopt.checkpoint.foreign.mapped import MappedFile
from shardopt.checkpoint.foreign.metadata import METADATA, DcpMetadata, Stored, read_metadata
from shardopt.checkpoint.plain import TensorKey
from shardopt.checkpoint.reader import Reader
from shardopt.checkpoint.source import ReadsBoxes, Source
from shardopt.errors import CorruptError

_MOST_POSITIONS = 1 << 20  # of a list


def open_dcp(directory: Path) -> Source:
    """Open a directory that ``torch.distributed.checkpoint`` has written.

    Tensors are found, not read: where the elements of a part lie is looked up when it is read.

    Raises:
        CorruptError: it is not what torch writes, or holds what would run code.
        IncompleteError: a file is not there.
        UnsupportedError: bytes are transformed (compressed), or of a dtype that is not known here.
    """
    metadata = read_metadata(directory)
    reader = DcpReader(directory, metadata)
    leaves: dict[str, Any] = {key: TensorKey(key) for key in metadata.tensors}
    try:
        for key, stored in metadata.values.items():
            leaves[key] = reader.value(key, stored)
        nested = _nested(leaves, metadata, directory)
        tree, step = arranged(nested, partial(_content, reader))
    except BaseException:
        reader.close()
        raise
    return Source(directory, tree, reader, step, {"format": "torch.distributed.checkpoint"})


def open_torch_file(path: Path) -> Source:
    """Open a file of ``torch.save``: a dict of state_dicts, or one state_dict.

    The file is mapped into memory, so that ranks of one host share it, and little of it is resident
    at one time; files that torch wrote before 1.6 are read whole.

    Raises:
        CorruptError: it is no such file, or holds what would run code.
        UnsupportedError: a tensor is not dense.
    """
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\3\4"
    try:
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as problem:  # torch raises anything
        raise CorruptError(
            f"{path}: expected a file of torch.save with tensors and plain values, got "
            f"{_reason(problem)}; {_REMEDY}"
        ) from None
    if not isinstance(content, Mapping):
        raise CorruptError(
            f"{path}: expected a dict, got {type(content).__name__}; save a state_dict, or a dict "
            "of them"
        )
    reader = LooseTensors(str(path), mapped=MappedFile(path))
    tree, step = arranged(reader.taken(content, ""), partial(_content, reader))
    return Source(path, tree, reader, step, {"format": "torch.save"})


_REMEDY = (
    "nothing was run: use another copy, or, if you trust it, name what is refused to "
    "torch.serialization.add_safe_globals"
)


class DcpReader(Reader):
    """Reads tensors of a directory of torch's distributed checkpoint."""

    def __init__(self, directory: Path, metadata: DcpMetadata):
        tensors = {
            key: TensorEntry(stored.dtype, stored.shape) for key, stored in metadata.tensors.items()
        }
        super().__init__(directory, tensors, metadata.files)
        self._loose = LooseTensors(str(directory), tensors)
        self._map: tuple[Chunk, torch.Tensor, MappedFile] | None = None  # the last one
        for key, stored in metadata.tensors.items():
            tensors[key].chunks = [
                ArchivedChunk(
                    box, part.file, partial(self._find, key, stored.dtype, box.sizes, part)
                )
                for box, part in stored.parts
            ]

    def value(self, key: str, stored: Stored) -> Any:
        """Anything but a tensor; a ``TensorKey`` for each tensor in it. Raises ``CorruptError``."""
        path = self.directory / stored.file
        data = bytearray(stored.length)
        whole = self.fill(stored.file, stored.offset, memoryview(data))
        try:
            if not whole:
                raise EOFError("the end of the file")
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as problem:  # torch raises anything
            raise CorruptError(
                f"{path}: {key!r}: expected plain values and tensors, got {_reason(problem)}; "
                f"{_REMEDY}"
            ) from None
        return self._loose.taken(value, key)

    def read(self, key: str, box: Box, out: memoryview) -> None:
        """Fill ``out`` with a box's elements, end to end in the tensor's memory order.

        Raises:
            CorruptError: bytes are not what ``.metadata`` says.
            IncompleteError: a file is not there.
            UnsupportedError: elements do not lie end to end.
        """
        entry = self.tensors[key]
        if key in self._loose:
            self._loose.read(key, box, out)
        elif box.numel and any(
            chunk.order is not None for chunk in entry.chunks if chunk.box.overlap(box)
        ):
            self._read_reordered(key, entry, box, out)
        else:
            super().read(key, box, out)

    def close(self) -> None:
        """Close all files."""
        super().close()
        self._loose.close()
        self._map = None

    def _read_reordered(self, key: str, entry: TensorEntry, box: Box, out: memoryview) -> None:
        """Chunks in another memory order are mapped, and copied by torch."""
        dtype = getattr(torch, entry.dtype)
        target = torch.frombuffer(out, dtype=torch.uint8).view(dtype).view(box.sizes)
        for chunk in entry.chunks:
            if (overlap := chunk.box.overlap(box)) is None:
                continue
            source, mapped = self._view(key, chunk)
            part = part_of(source, _within(overlap, chunk.box))
            room = part_of(target, _within(overlap, box))
            if dtype.is_complex:  # where torch wants 16 bytes aligned, which files are not
                part, room = torch.view_as_real(part), torch.view_as_real(room)
            copy(part, room, mapped)

    def _view(self, key: str, chunk: Chunk) -> tuple[torch.Tensor, MappedFile]:
        """A chunk, ``(*chunk.box.sizes,)``, in its file, mapped until another is asked for.

        Who cuts the file while it is read ends this process (SIGBUS).
        """
        entry, sizes = self.tensors[key], chunk.box.sizes
        skip = chunk.offset % mmap.ALLOCATIONGRANULARITY
        nbytes, file = chunk.box.numel * entry.itemsize, self.descriptor(chunk.file)
        if os.fstat(file).st_size < chunk.offset + nbytes:
            raise self.cut_short(key, chunk, 0, nbytes)
        if self._map is None or self._map[0] is not chunk:
            where = {"offset": chunk.offset - skip, "access": mmap.ACCESS_COPY}
            memory = mmap.mmap(file, skip + nbytes, **where)
            dtype = getattr(torch, entry.dtype)
            flat = torch.frombuffer(memory, dtype=dtype, count=chunk.box.numel, offset=skip)
            view = flat.as_strided(sizes, strides_of(sizes, chunk.order))
            self._map = chunk, view, MappedFile(self.directory / chunk.file)
        return self._map[1:]

    def _find(self, key: str, dtype: str, sizes: tuple[int, ...], stored: Stored) -> Elements:
        def fill(start: int, out: memoryview) -> bool:
            return self.fill(stored.file, stored.offset + start, out)

        where = f"{self.directory / stored.file}: tensor {key!r} at byte {stored.offset}"
        found = find_elements(fill, stored.length, dtype, sizes, where)
        return Elements(stored.offset + found.offset, found.order)


class ArchivedChunk(Chunk):
    """A chunk whose bytes are looked for when they are first asked for."""

    def __init__(self, box: Box, file: str, find: Callable[[], Elements]):
        self.box, self.file, self.crcs, self._find = box, file, None, find

    @cached_property
    def _elements(self) -> Elements:
        return self._find()

    @property
    def offset(self) -> int:  # type: ignore[override]
        """Of the first byte, in the file."""
        return self._elements.offset

    @property
    def order(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """Of dims in the bytes, if not the tensor's own."""
        return self._elements.order


def _within(inner: Box, outer: Box) -> Box:
    """A box counted from where another, around it, begins."""
    pairs = zip(inner.offsets, outer.offsets, strict=True)
    return Box(tuple(low - origin for low, origin in pairs), inner.sizes)


def _content(reader: ReadsBoxes, key: TensorKey) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and bytes of a tensor."""
    entry = reader.tensors[key.key]
    data = bytearray(entry.nbytes)
    reader.read(key.key, Box.whole(entry.shape), memoryview(data))
    return entry.dtype, entry.shape, bytes(data)


class _Node(dict[str | int, Any]):
    """A dict or list that was flattened; anything else is a leaf."""


def _nested(leaves: dict[str, Any], metadata: DcpMetadata, where: Path) -> dict[str | int, Any]:
    """The dicts and lists that were flattened, in the order in which they were."""
    root, paths = _Node(), metadata.paths
    known = [key for key in paths if key in leaves]
    for key in known + [key for key in leaves if key not in paths]:
        path = paths.get(key) or (key,)
        place: Any = root
        for step in path[:-1]:
            place = place.setdefault(step, _Node()) if isinstance(place, _Node) else None
        if not isinstance(place, _Node) or path[-1] in place:
            raise CorruptError(
                f"{where / METADATA}: expected a place of its own for {key!r}, got {path}, where "
                f"something else stands; {RESTORE}"
            )
        place[path[-1]] = leaves[key]
    return {step: _unfolded(value, where) for step, value in root.items()}


def _unfolded(value: Any, where: Path) -> Any:
    if not isinstance(value, _Node):
        return value
    items = {step: _unfolded(item, where) for step, item in value.items()}
    positions = [step for step in items if isinstance(step, int)]
    if len(positions) < len(items):
        return items
    low, high = min(positions), max(positions)
    if low < 0 or high >= _MOST_POSITIONS:
        raise CorruptError(
            f"{where / METADATA}: expected positions of a list, got {low} to {high}; {RESTORE}"
        )
    return [items.get(place) for place in range(high + 1)]


def _reason(problem: Exception) -> str:
    """What torch has to say, without its advice to run the file's code."""
    text = str(problem).partition("Check the documentation of torch.load")[0].strip()
    if text.startswith("Weights only load failed"):
        text = text.rpartition("\n\n")[2].rpartition("WeightsUnpickler error:")[2].strip()
    first = text.partition("\n")[0].partition(". ")[0]
    return first or type(problem).__name__
