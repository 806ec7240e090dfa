"""What a checkpoint is once it is open for reading, whoever has written it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shardopt.checkpoint.boxes import Box
from shardopt.checkpoint.entries import FileEntry, TensorEntry


class ReadsBoxes(Protocol):
    """What ``Reader`` does, for tensors that lie elsewhere."""

    tensors: Mapping[str, TensorEntry]

    def read(self, key: str, box: Box, out: memoryview) -> None:
        """Fill ``out`` with a box's elements, end to end in the tensor's memory order."""

    def close(self) -> None:
        """Close all files."""


@dataclass
class Source:
    """What a checkpoint holds, and a reader of its tensors.

    Attributes:
        path: the directory of one step, or a file.
        tree: ``{"model": ..., "optimizer": ..., "scheduler": ..., "extra": ...}``, those there are,
            with a ``TensorKey`` for each tensor.
        step: how many steps had been taken, if it says so.
        facts: what it says of itself.
        files: name -> entry, where a manifest tells.
    """

    path: Path
    tree: dict[str, Any]
    reader: ReadsBoxes
    step: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Key -> entry."""
        return self.reader.tensors

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *problem: object) -> None:
        self.reader.close()
