"""Finds model, optimizer and scheduler in what others have saved, whatever its name. No torch.

::

    {"model": ..., "optimizer": ..., "epoch": 3}        names that are usual, see below
    {"app": {"model": ..., "optim": ...}}               all of it one level down
    {"w": tensor, "b": tensor}                          a model alone
    {"state": ..., "param_groups": ...}                 an optimizer alone
    {"w": tensor, "optimizer": {"state.w.exp_avg": ...,  a model's tensors beside an optimizer
                                "param_groups.w.lr": ...}}  that was flattened

becomes ``{"model": ..., "optimizer": {"state": ..., "param_groups": ...}, "scheduler": ...,
"extra": all the rest}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardopt.checkpoint.plain import TensorKey, map_tensors

MODEL = ("model", "model_state_dict", "state_dict")
OPTIMIZER = ("optimizer", "optim", "optimizer_state_dict", "optim_state_dict")
SCHEDULER = ("scheduler", "lr_scheduler", "scheduler_state_dict", "lr_scheduler_state_dict")
STEP = ("step", "global_step")
_STATE, _GROUPS = "state.", "param_groups."

Tree = dict[str, Any]
Content = Callable[[TensorKey], Any]  # what a tensor holds, as something that can be compared


def arranged(tree: Mapping[Any, Any], content: Content) -> tuple[Tree, int | None]:
    """What was saved, under the names of shardopt, and the step if it is said."""
    if is_optimizer(tree):
        return {"optimizer": optimizer_of(tree, content)}, None
    if is_model(tree) and not any(_named(tree).values()):
        return {"model": dict(tree)}, None
    rest = dict(tree)
    inner = None if any(_named(tree).values()) else _one_level_down(tree)
    found = dict(rest.pop(inner)) if inner is not None else rest
    parts: Tree = {}
    for part, name in _named(found).items():
        if name is not None:
            parts[part] = found.pop(name)
    if "optimizer" in parts:
        parts["optimizer"] = optimizer_of(parts["optimizer"], content)
        if "model" not in parts and (model := _beside(found, parts["optimizer"])):
            parts["model"] = model
    step = next((found.pop(name) for name in STEP if type(found.get(name)) is int), None)
    if inner is not None and found:
        rest[inner] = found
    if rest:
        parts["extra"] = rest["extra"] if set(rest) == {"extra"} else rest
    order = ("model", "optimizer", "scheduler", "extra")
    return {part: parts[part] for part in order if part in parts}, step


def is_model(value: Any) -> bool:
    """Whether this is a module's state_dict: tensors by name."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, TensorKey) for item in value.values())
        and all(
            isinstance(key, str) and (isinstance(item, TensorKey) or key.endswith("_extra_state"))
            for key, item in value.items()
        )
    )


def is_optimizer(value: Any) -> bool:
    """Whether this is an optimizer's state_dict, nested or flattened."""
    if not isinstance(value, Mapping):
        return False
    groups = value.get("param_groups")
    if isinstance(groups, list):
        return all(isinstance(group, Mapping) and "params" in group for group in groups)
    return _is_flattened(value)


def _is_flattened(value: Mapping[Any, Any]) -> bool:
    """As by ``StateDictOptions(flatten_optimizer_state_dict=True)``."""
    keys = list(value)
    return all(isinstance(key, str) and key.startswith((_STATE, _GROUPS)) for key in keys) and any(
        key.startswith(_GROUPS) for key in keys
    )


def _named(tree: Mapping[Any, Any]) -> dict[str, str | None]:
    """Part -> the name under which it stands here, if it does."""

    def first(names: tuple[str, ...], fits: Callable[[Any], bool]) -> str | None:
        return next((name for name in names if fits(tree.get(name))), None)

    model, optimizer = first(MODEL, is_model), first(OPTIMIZER, is_optimizer)
    scheduler = first(SCHEDULER, lambda value: isinstance(value, Mapping))
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def _one_level_down(tree: Mapping[Any, Any]) -> Any:
    """The key of the first value that has a model or an optimizer in it."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            names = _named(value)
            if names["model"] or names["optimizer"]:
                return key
    return None


def _beside(found: Tree, optimizer: Tree) -> Tree:
    """Takes out the model whose tensors stand beside the optimizer, if its parameters do."""
    params = {name for group in optimizer["param_groups"] for name in group["params"]}
    if params.isdisjoint(found):
        return {}
    names = [
        key
        for key, value in found.items()
        if key in params or (isinstance(value, TensorKey) and key not in STEP)
    ]
    return {name: found.pop(name) for name in names}


def optimizer_of(value: Mapping[str, Any], content: Content) -> Tree:
    """An optimizer's state_dict, nested, whose parameters are names or numbers throughout."""
    if _is_flattened(value):
        return _unflattened(value, content)
    rest = {key: item for key, item in value.items() if key not in ("state", "param_groups")}
    groups, state = value["param_groups"], value.get("state", {})
    numbered = all(type(name) is int for group in groups for name in group["params"])
    if numbered:  # torch's distributed checkpoint makes strings of the keys of dicts
        state = {_number(key): item for key, item in state.items()}
    return {"state": state, "param_groups": groups, **rest}


def _number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _unflattened(value: Mapping[str, Any], content: Content) -> Tree:
    options: dict[str, Tree] = {}
    for key, item in value.items():
        if key.startswith(_GROUPS):
            name, _, option = key.removeprefix(_GROUPS).rpartition(".")
            options.setdefault(name, {})[option] = item
    state: dict[str, Tree] = {}
    for key, item in value.items():
        if key.startswith(_STATE):
            name, steps = _split(key.removeprefix(_STATE), options)
            place = state.setdefault(name, {})
            for step in steps[:-1]:
                place = place.setdefault(step, {})
            place[steps[-1]] = item
    groups: dict[str, Tree] = {}
    for name, of_name in options.items():
        alike = repr(sorted(map_tensors(of_name, content).items()))
        groups.setdefault(alike, {**of_name, "params": []})["params"].append(name)
    return {"state": state, "param_groups": list(groups.values())}


def _split(key: str, names: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The parameter's name, and the path in its state; both may have dots."""
    words = key.split(".")
    for count in range(len(words) - 1, 0, -1):
        if (name := ".".join(words[:count])) in names:
            return name, words[count:]
    return ".".join(words[:-1]), words[-1:]
