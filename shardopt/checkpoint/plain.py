"""Python values as JSON that keeps their types, and refuses what it cannot keep. No torch.

JSON knows strings, numbers, lists and dicts with strings for keys. All else is written as a dict
with the one key ``"!"`` or with it among others::

    (1, 2)                 {"!": "tuple", "of": [1, 2]}
    {3: "a"}               {"!": "dict", "of": [[3, "a"]]}
    Counter("aab")         {"!": "Counter", "of": [["a", 2], ["b", 1]]}
    inf, nan, -0.0         {"!": "float", "of": "inf"}
    a tensor               {"!": "tensor", "of": its key in the checkpoint}

Nothing here can run code when it is read.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardopt.errors import UnsupportedError

MARK = "!"
_SEQUENCES: dict[Any, str] = {kind: kind.__name__ for kind in (tuple, set, frozenset, deque)}
_MAPPINGS: dict[Any, str] = {kind: kind.__name__ for kind in (dict, Counter, OrderedDict)}
_KINDS: dict[str, Any] = {name: kind for kind, name in (_SEQUENCES | _MAPPINGS).items()}


@dataclass(slots=True, unsafe_hash=True)  # frozen ones take twice as long to make
class TensorKey:
    """Stands for a tensor that lies in the checkpoint under this key."""

    key: str


TreePath = tuple[Any, ...]  # the keys and indices that lead to a value


def dotted(path: TreePath) -> str:
    """``optimizer.state.w.exp_avg``: how files, and torch, name a tensor."""
    return ".".join(map(str, path))


def place(path: TreePath) -> str:
    """``extra['seeds'][0]``: how messages name a value."""
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:]) if path else "it"


def _none(value: Any, key: str) -> None:
    """Keys hold no tensors, which would come back as others."""


def encode(
    value: Any, path: TreePath = (), refer: Callable[[Any, str], TensorKey | None] = _none
) -> Any:
    """What ``json`` can write for ``value``.

    Args:
        path: where the value is: ``("extra",)``, then ``("extra", "seeds", 0)``.
        refer: gives the key under which a tensor is kept, or ``None`` for any other object; also
            gets the path, joined by dots, as torch's distributed checkpoint names what it keeps.

    Raises:
        UnsupportedError: a value that cannot be kept, named by its place.
    """
    kind: Any = type(value)
    if value is None or kind in (bool, str, int):
        return value
    if kind is float:
        plain = math.isfinite(value) and not (value == 0 and math.copysign(1, value) < 0)
        return value if plain else {MARK: "float", "of": repr(value)}
    if kind is complex:
        return {MARK: "complex", "of": [encode(x, path, refer) for x in (value.real, value.imag)]}
    if kind is bytes:
        return {MARK: "bytes", "of": value.hex()}
    if kind in _SEQUENCES or kind is list:
        items = [encode(item, (*path, i), refer) for i, item in enumerate(value)]
        if kind is list:
            return items
        length = {"maxlen": value.maxlen} if kind is deque else {}
        return {MARK: _SEQUENCES[kind], "of": items, **length}
    if kind in _MAPPINGS:
        if kind is dict and MARK not in value and all(type(key) is str for key in value):
            return {key: encode(item, (*path, key), refer) for key, item in value.items()}
        pairs = [
            [encode(key, (*path, "a key"), _none), encode(item, (*path, key), refer)]
            for key, item in value.items()
        ]
        return {MARK: _MAPPINGS[kind], "of": pairs}
    if kind is TensorKey:
        return {MARK: "tensor", "of": value.key}
    if (reference := refer(value, dotted(path))) is not None:
        return {MARK: "tensor", "of": reference.key}
    raise UnsupportedError(
        f"{place(path)}: expected plain Python values (numbers, strings, bytes, lists, tuples, "
        "sets, dicts, Counter, OrderedDict, deque) and tensors, got "
        f"{kind.__module__}.{kind.__qualname__}, which a checkpoint cannot keep without running "
        "code when it is read; save what it is made of"
    )


def decode(value: dict[str, Any]) -> Any:
    """What ``encode`` was given, as ``json.loads`` reads it: its ``object_hook``.

    Raises ``ValueError``, ``TypeError`` or ``KeyError``.
    """
    if MARK not in value:
        return value
    kind, of = value[MARK], value["of"]
    if kind == "tensor":
        return TensorKey(sys.intern(of))
    if kind == "float":
        return float(of)
    if kind == "complex":
        return complex(*of)
    if kind == "bytes":
        return bytes.fromhex(of)
    if kind == "deque":
        return deque(of, value["maxlen"])
    if kind in _MAPPINGS.values():
        items = dict(of)
        if any(isinstance(key, TensorKey) for key in items):
            raise ValueError("expected keys without tensors, got one")
        return _KINDS[kind](items)
    if kind in _KINDS:
        return _KINDS[kind](of)
    raise ValueError(f"expected a kind of value that shardopt writes, got {kind!r}")


def map_tensors(value: Any, change: Callable[[TensorKey], Any]) -> Any:
    """The value with something else in place of every ``TensorKey``; containers are kept."""
    if isinstance(value, TensorKey):
        return change(value)
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map_tensors(item, change) for item in value)
    if type(value) is deque:
        return deque((map_tensors(item, change) for item in value), value.maxlen)
    if isinstance(value, dict):
        return type(value)({key: map_tensors(item, change) for key, item in value.items()})
    return value
