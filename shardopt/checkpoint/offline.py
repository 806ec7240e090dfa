"""One file, or a few, out of a checkpoint of any size: no ranks, no model, little memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from shardopt.checkpoint import safetensors_file, torch_file
from shardopt.checkpoint.opening import open_source
from shardopt.checkpoint.source import Source
from shardopt.checkpoint.steps import naming, sync
from shardopt.checkpoint.trees import chosen, tensors_by_path
from shardopt.errors import UnsupportedError

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def consolidate(
    source: Path | str,
    out: Path | str,
    *,
    format: str = "torch",
    keys: str = "index",
    only: str | None = None,
    max_shard_size: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write a checkpoint as files that need no shardopt, checking every block that is read.

    What is written stands under its name only when it is whole, and nothing is overwritten. With
    ``only``, the part stands bare: a model's ``state_dict``, or an optimizer's.

    Args:
        source: what ``open_source`` opens.
        out: the file to write.
        format: ``"torch"``, for ``torch.load(weights_only=True)``: ``{"model": ..., "optimizer":
            ..., "scheduler": ..., "extra": ..., "step": ...}``, those there are; or
            ``"safetensors"``, where tensors are named ``model.<name>`` and
            ``optimizer.state.<key>.<name>``, and the rest is JSON in ``__metadata__``.
        keys: ``"index"``: the optimizer's state by number, as plain ``torch.optim`` loads it;
            ``"name"``: by parameter name.
        only: ``"model"`` or ``"optimizer"``.
        max_shard_size: bytes of tensors in one file, at most, with safetensors: if that needs more
            than one, ``out`` becomes ``<out>-00001-of-0000N.safetensors`` and so on, and an index,
            as Hugging Face has them.
        progress: is told how many bytes are written, and how many there are.

    Returns:
        What had to be written as something else, in words.

    Raises:
        FileExistsError: a file to be written is there.
        CorruptError, IncompleteError: the checkpoint is not what was written.
        UnsupportedError: the format cannot hold a value, or an argument is none of these.
    """
    out = Path(out)
    _known("format", format, ("torch", "safetensors"))
    _known("keys", keys, ("index", "name"))
    _known("only", only, (None, "model", "optimizer"))
    if max_shard_size is not None and (format == "torch" or max_shard_size <= 0):
        raise UnsupportedError(
            "max_shard_size: expected a size above 0 and the format safetensors, got "
            f"{max_shard_size} and {format}; leave it out"
        )
    with open_source(Path(source)) as opened, _Files(out) as files:
        tree = chosen(opened, keys, only)
        total = sum(opened.tensors[key].nbytes for key in set(tensors_by_path(tree).values()))
        told = _counted(total, progress)
        if format == "torch":
            step = {} if only or opened.step is None else {"step": opened.step}
            with files.new(out) as file:
                body = tree[only] if only else tree | step
                return torch_file.write(opened, body, file, told)
        _write_safetensors(opened, tree, only, files, max_shard_size, told)
        return []


def _known(name: str, value: str | None, among: tuple[str | None, ...]) -> None:
    if value not in among:
        raise UnsupportedError(f"{name}: expected one of {among}, got {value!r}; correct it")


def _counted(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    return told


def _write_safetensors(
    source: Source,
    tree: dict[str, Any],
    only: str | None,
    files: _Files,
    max_shard_size: int | None,
    told: Callable[[int], None],
) -> None:
    bare = only is not None
    names = safetensors_file.names(source, tree, bare)
    about = safetensors_file.metadata(tree, source.step, bare)
    out = files.out
    shards = _shards(source, names, max_shard_size)
    if len(shards) == 1:
        with files.new(out) as file:
            safetensors_file.write(source, names, about, file, told)
        return
    stem = out.name.removesuffix(".safetensors")
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        where.update(dict.fromkeys(shard, name))
        with files.new(out.with_name(name)) as file:
            text = about if number == 1 else {"format": "pt"}
            safetensors_file.write(source, shard, text, file, told)
    total = sum(source.tensors[key].nbytes for key in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    with files.new(out.with_name(f"{stem}.safetensors.index.json")) as file:
        file.write(json.dumps(index, indent=2).encode() + b"\n")


def _shards(source: Source, names: dict[str, str], limit: int | None) -> list[dict[str, str]]:
    """The names in order, cut before the tensor that would be too much; one alone may be."""
    shards: list[dict[str, str]] = [{}]
    room = limit
    for name, key in names.items():
        nbytes = source.tensors[key].nbytes
        if limit is not None and room is not None:
            if shards[-1] and nbytes > room:
                shards.append({})
                room = limit
            room -= nbytes
        shards[-1][name] = key
    return shards


class _Files:
    """New files that get their names together, when all of them are whole; else none stays."""

    def __init__(self, out: Path):
        self.out = out
        self._written: list[tuple[Path, Path]] = []  # temporary, final

    def __enter__(self) -> _Files:
        return self

    @contextmanager
    def new(self, path: Path) -> Iterator[BinaryIO]:
        """A file to write, which is on disk afterwards, under another name."""
        self._refuse_existing(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._written.append((temporary, path))
        with naming(path), open(temporary, "xb", buffering=1 << 16) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def __exit__(self, kind: type[BaseException] | None, *problem: object) -> None:
        named: list[Path] = []
        try:
            if kind is None:
                for temporary, path in self._written:
                    self._refuse_existing(path)
                    os.replace(temporary, path)
                    named.append(path)
                named.clear()
                sync(self.out.parent)
        finally:
            for path in [temporary for temporary, _ in self._written] + named:
                path.unlink(missing_ok=True)

    def _refuse_existing(self, path: Path) -> None:
        if path.exists():
            raise FileExistsError(
                f"{path}: expected a name that is not taken, got one that is; nothing is "
                "overwritten: name another, or remove it"
            )
