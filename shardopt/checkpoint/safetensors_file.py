"""Files of the safetensors format, written tensor by tensor.

Eight bytes, the length of the header; the header, JSON with the dtype, shape and place of each
tensor; the bytes of all tensors, row-major. What is not a tensor stands as JSON text in the
header's ``__metadata__``, with types kept as ``plain.py`` does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import torch

from shardopt.checkpoint.boxes import Box, cut, strides_of
from shardopt.checkpoint.entries import TensorEntry
from shardopt.checkpoint.plain import TensorKey, TreePath, dotted, encode
from shardopt.checkpoint.reader import PIECE
from shardopt.checkpoint.source import ReadsBoxes, Source
from shardopt.checkpoint.stream import Stream
from shardopt.checkpoint.trees import changed, leaves, refused, tensors_by_path

# Their names of torch's dtypes.
DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
    "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


def names(source: Source, tree: dict[str, Any], bare: bool) -> dict[str, str]:
    """Name in the file -> key in the checkpoint, for every tensor of a tree.

    Args:
        bare: the tree is one part, whose name is left out.

    Raises:
        UnsupportedError: a dtype that the format does not have, or two tensors of one name.
    """
    found: dict[str, str] = {}
    for path, key in tensors_by_path(tree).items():
        name, entry = dotted(path[bare:]), source.tensors[key]
        if entry.dtype not in DTYPES:
            raise refused(
                path,
                "a dtype that safetensors has",
                f"torch.{entry.dtype}",
                "use --format torch",
            )
        if name in found or name == "__metadata__":
            raise refused(path, "names that differ", f"{name!r} twice", "use --format torch")
        found[name] = key
    return found


def metadata(tree: dict[str, Any], step: int | None, bare: bool) -> dict[str, str]:
    """``__metadata__``: what is no tensor, as JSON; ``{"!": "tensor"}`` names one of the file."""
    text = {"format": "pt"}
    if step is not None:
        text["step"] = str(step)
    for part, value in tree.items():
        if part == "model" and all(isinstance(leaf, TensorKey) for _, leaf in leaves(value)):
            continue
        named = changed(value, lambda path, leaf: _named(path[bare:], leaf), (part,))
        text[part] = json.dumps(encode(named, (part,)), allow_nan=False)
    return text


def _named(path: TreePath, leaf: Any) -> Any:
    return TensorKey(dotted(path)) if isinstance(leaf, TensorKey) else leaf


def write(
    source: Source,
    tensors: dict[str, str],
    about: dict[str, str],
    file: BinaryIO,
    told: Callable[[int], None],
) -> None:
    """Write a file.

    Args:
        tensors: name in the file -> key in the checkpoint, see ``names``.
        about: see ``metadata``.
        told: is given the number of bytes after each piece.
    """
    # The largest elements first, so that all of them start on a multiple of their size.
    order = sorted(tensors, key=lambda name: -source.tensors[tensors[name]].itemsize)
    header: dict[str, Any] = {"__metadata__": about}
    at = 0
    for name in order:
        entry = source.tensors[tensors[name]]
        header[name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    straight = Stream(source.reader)
    for name in order:
        key = tensors[name]
        turned = source.tensors[key].order is not None
        for piece in _row_major(source.reader, key) if turned else straight.pieces(key):
            file.write(piece)
            told(len(piece))


def _row_major(reader: ReadsBoxes, key: str) -> Iterator[memoryview]:
    """The bytes of a tensor whose elements lie in another order, each piece turned.

    Pieces are large, since each may need a little of many blocks.
    """
    entry, stream = reader.tensors[key], Stream(reader, 4 * PIECE)
    dtype = getattr(torch, entry.dtype)
    room = memoryview(bytearray(4 * PIECE))
    for box in cut(Box.whole(entry.shape), 4 * PIECE // entry.itemsize):
        if data := stream.read(key, box):
            piece = room[: len(data)]
            torch.frombuffer(piece, dtype=dtype).view(box.sizes).copy_(logical(data, entry, box))
            yield piece


def logical(data: memoryview, entry: TensorEntry, box: Box) -> torch.Tensor:  # (*box.sizes,)
    """A box's bytes, end to end in memory order, as a tensor with dims in their own order."""
    flat = torch.frombuffer(data, dtype=getattr(torch, entry.dtype))
    return flat.as_strided(box.sizes, strides_of(box.sizes, entry.order))
