"""``.metadata``: what ``torch.distributed.checkpoint`` reads, so that its tools read our files.

shardopt itself never reads it: the manifest is the truth.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils._pytree import tree_flatten

from shardopt.checkpoint.blobs import surroundings
from shardopt.checkpoint.entries import TensorEntry
from shardopt.checkpoint.plain import TensorKey, map_tensors

VALUES = "values.distcp"  # plain values, each as torch saves it


def dcp_files(
    tree: Mapping[str, Any],  # decoded
    tensors: Mapping[str, TensorEntry],
) -> tuple[bytes, bytes]:
    """The contents of ``.metadata`` and of the file with plain values."""
    stand_ins: dict[int, tuple[Tensor, TensorEntry]] = {}

    def stand_in(key: TensorKey) -> Tensor:
        tensor = torch.empty(0, device="meta")
        stand_ins[id(tensor)] = tensor, tensors[key.key]
        return tensor

    flat, paths = flatten_state_dict(map_tensors(tree, stand_in))
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    values = io.BytesIO()
    for name, value in flat.items():
        if isinstance(value, Tensor):
            _, entry = stand_ins[id(value)]
            described[name] = _described(entry)
            places.update(_places(name, entry))
        elif any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0]):
            del paths[name]  # a tuple of tensors, say, of which torch keeps each by itself, or none
        else:
            start = values.tell()
            torch.save(value, values)
            described[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = _StorageInfo(VALUES, start, values.tell() - start)
    metadata = Metadata(described, planner_data=paths, storage_data=places)
    metadata.version = "1.0.0"  # torch 2.9 knows no such argument
    return pickle.dumps(metadata), values.getvalue()


def _described(entry: TensorEntry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        _properties(entry.dtype),
        _size(entry.shape),
        [_chunk(chunk.box.offsets, chunk.box.sizes) for chunk in entry.chunks],
    )


# Tensors are alike, and what is shared is pickled once.


@lru_cache(maxsize=64)
def _properties(dtype: str) -> TensorProperties:
    return TensorProperties(dtype=getattr(torch, dtype))


@lru_cache(maxsize=4096)
def _size(shape: tuple[int, ...]) -> torch.Size:
    return torch.Size(shape)


@lru_cache(maxsize=4096)
def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(_size(offsets), _size(sizes))


def _places(name: str, entry: TensorEntry) -> Iterator[tuple[MetadataIndex, _StorageInfo]]:
    """Where the archive around each chunk lies."""
    for chunk in entry.chunks:
        around = surroundings(entry.dtype, chunk.box.sizes, entry.order)
        nbytes = chunk.box.numel * entry.itemsize
        length = len(around.before) + nbytes + len(around.after)
        start = chunk.offset - len(around.before)
        yield MetadataIndex(name, _size(chunk.box.offsets)), _StorageInfo(chunk.file, start, length)
