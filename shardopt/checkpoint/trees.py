"""Trees of plain values and tensors, walked by path. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from shardopt.checkpoint.plain import TensorKey, TreePath, place
from shardopt.checkpoint.source import Source
from shardopt.errors import MismatchError, UnsupportedError

PARTS = ("model", "optimizer", "scheduler", "extra")


def leaves(value: Any, path: TreePath = ()) -> Iterator[tuple[TreePath, Any]]:
    """Everything that holds nothing, with the keys and indices that lead to it.

    A set is one of them, unless it has tensors.
    """
    children = _children(value)
    for key, item in children:
        yield from leaves(item, (*path, key))
    if not children:
        yield path, value


def _children(value: Any) -> list[tuple[Any, Any]]:
    """What a value holds, by key or index."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple | deque):
        return list(enumerate(value))
    if isinstance(value, set | frozenset) and any(
        isinstance(leaf, TensorKey) for item in value for _, leaf in leaves(item)
    ):
        return list(enumerate(sorted(value, key=repr)))
    return []


def chosen(source: Source, keys: str, only: str | None) -> dict[str, Any]:
    """The parts of a checkpoint that are asked for, by name.

    Args:
        keys: ``"index"``: the optimizer's state by number in the order of its groups, as
            ``torch.optim`` has it; ``"name"``: by parameter name, where it is known.
        only: ``"model"`` or ``"optimizer"``; ``None`` for all.

    Raises:
        MismatchError: there is no such part.
    """
    there = {part: value for part, value in source.tree.items() if part in PARTS}
    if only is not None:
        if only not in there:
            raise MismatchError(
                f"{source.path}: expected a checkpoint with {only!r}, got one of "
                f"{', '.join(there) or 'nothing'}; leave out --{only}-only"
            )
        there = {only: there[only]}
    optimizer = there.get("optimizer")
    if isinstance(optimizer, dict) and "param_groups" in optimizer:
        there["optimizer"] = _as_torch_has_it(optimizer, keys == "index")
    return there


def _as_torch_has_it(optimizer: dict[str, Any], by_index: bool) -> dict[str, Any]:
    """A ``state_dict``; what the optimizer keeps of its own stands among the state."""
    groups = optimizer["param_groups"]
    names = [name for group in groups for name in group["params"]]
    key_of = {name: index if by_index else name for index, name in enumerate(names)}
    state = {**optimizer["state"], **optimizer.get("own", {})}
    return {
        "state": {key_of.get(name, name): value for name, value in state.items()},
        "param_groups": [
            {
                **{name: value for name, value in group.items() if name != "params"},
                "params": [key_of[name] for name in group["params"]],
            }
            for group in groups
        ],
    }


def changed(value: Any, change: Callable[[TreePath, Any], Any], path: TreePath = ()) -> Any:
    """The value with ``change(path, leaf)`` for every leaf; what holds them is kept."""
    items = {key: changed(item, change, (*path, key)) for key, item in _children(value)}
    if not items:
        return change(path, value)
    if isinstance(value, dict):
        return type(value)(items)
    if isinstance(value, deque):
        return deque(items.values(), value.maxlen)
    return type(value)(items.values())


def tensors_by_path(tree: dict[str, Any]) -> dict[TreePath, str]:
    """Where each tensor stands -> its key in the checkpoint."""
    return {path: leaf.key for path, leaf in leaves(tree) if isinstance(leaf, TensorKey)}


def refused(path: TreePath, expected: str, got: str, remedy: str) -> UnsupportedError:
    """A value that a format cannot hold."""
    return UnsupportedError(f"{place(path)}: expected {expected}, got {got}; {remedy}")
