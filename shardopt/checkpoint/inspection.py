"""What a checkpoint holds, without its numbers. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from shardopt.checkpoint.plain import TensorKey, dotted
from shardopt.checkpoint.source import Source
from shardopt.checkpoint.trees import tensors_by_path


def describe(source: Source) -> dict[str, Any]:
    """Everything as values that JSON has.

    Returns:
        ``path``, ``step``, ``run``, ``world_size``, ``facts``, ``bytes`` (of all tensors),
        ``bytes_per_rank`` (of files), ``groups`` (class, options, number of parameters),
        ``parameters`` (of the model: name, dtype, shape), ``state`` (parameter -> name -> dtype and
        shape, or the value), and ``others``, the tensors that are neither.
    """
    facts = dict(source.facts)
    groups, state = _optimizer(source)
    tensors = tensors_by_path(source.tree)
    per_rank: dict[str, int] = {}
    for entry in source.files.values():
        rank = "shared" if entry.rank is None else str(entry.rank)
        per_rank[rank] = per_rank.get(rank, 0) + entry.size
    return {
        "path": str(source.path),
        "step": source.step,
        "run": facts.pop("run", None),
        "world_size": facts.pop("world_size", None),
        "facts": _plain(facts, source),
        "bytes": sum(source.tensors[key].nbytes for key in set(tensors.values())),
        "bytes_per_rank": per_rank,
        "groups": [_group(group, facts) for group in groups],
        "parameters": [
            {"name": dotted(path[1:]), **_tensor(source, key)}
            for path, key in tensors.items()
            if path[0] == "model"
        ],
        "state": {
            str(key): {str(name): _plain(value, source) for name, value in entries.items()}
            for key, entries in state.items()
        },
        "others": [
            {"name": dotted(path), **_tensor(source, key)}
            for path, key in tensors.items()
            if path[0] != "model" and (path[:2] != ("optimizer", "state") or not state)
        ],
    }


def _optimizer(source: Source) -> tuple[list[dict[str, Any]], dict[Any, dict[Any, Any]]]:
    """Groups and state, where they have torch's form."""
    optimizer = source.tree.get("optimizer")
    if not isinstance(optimizer, dict) or "param_groups" not in optimizer:
        return [], {}
    return optimizer["param_groups"], optimizer.get("state", {})


def _group(group: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    hidden = ("params", "param_names", "optimizer_class")
    return {
        "class": group.get("optimizer_class", facts.get("optimizer_class")),
        "num_parameters": len(group["params"]),
        "options": {name: _plain(value) for name, value in group.items() if name not in hidden},
    }


def _tensor(source: Source, key: str) -> dict[str, Any]:
    entry = source.tensors[key]
    return {"dtype": entry.dtype, "shape": list(entry.shape)}


def _plain(value: Any, source: Source | None = None) -> Any:
    """The value as JSON has it: inf, bytes and sets as text."""
    if isinstance(value, TensorKey):
        return _tensor(source, value.key) if source else value.key
    if isinstance(value, dict):
        return {str(key): _plain(item, source) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, source) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return repr(value)


def table(about: dict[str, Any]) -> Iterator[str]:
    """The lines of what ``describe`` gives, for people."""
    for name in ("path", "step", "run", "world_size"):
        if about[name] is not None:
            yield f"{name.replace('_', ' '):<16}{about[name]}"
    for name, value in about["facts"].items():
        yield f"{name.replace('_', ' '):<16}{value}"
    yield f"{'tensors':<16}{size(about['bytes'])}"
    for rank, count in about["bytes_per_rank"].items():
        yield f"{rank if rank == 'shared' else 'rank ' + rank:<16}{size(count)}"
    for number, group in enumerate(about["groups"]):
        options = ", ".join(f"{name}={value}" for name, value in group["options"].items())
        kind = group["class"] or "group"
        yield ""
        yield f"group {number}: {kind}, {group['num_parameters']} parameters: {options}"
    names = [entry["name"] for entry in about["parameters"]]
    state = about["state"]
    rows = [
        [entry["name"], *_kind(entry), _state(state.get(entry["name"], {}))]
        for entry in about["parameters"]
    ]
    rows += [[key, "", "", _state(state[key])] for key in state if key not in names]
    yield from _columns("parameter", "dtype", "shape", "state", rows=rows)
    others = [[entry["name"], *_kind(entry)] for entry in about["others"]]
    yield from _columns("other tensor", "dtype", "shape", rows=others)


def _kind(entry: dict[str, Any]) -> list[str]:
    return [entry["dtype"], "×".join(map(str, entry["shape"])) or "scalar"]


def _state(state: dict[str, Any]) -> str:
    def word(name: str, value: Any) -> str:
        if isinstance(value, list):
            return f"{name} ({len(value)})"
        return f"{name} {value.get('dtype', '')}" if isinstance(value, dict) else f"{name}={value}"

    return ", ".join(word(name, value) for name, value in state.items())


def _columns(*titles: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if rows:
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        yield ""
        for row in (titles, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            yield "  ".join(cells).rstrip()


def size(count: int) -> str:
    """Bytes for people: ``12.3 MB``."""
    if count < 1000:
        return f"{count} bytes"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} TB"
