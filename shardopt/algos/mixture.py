"""Groups that name an optimizer class of their own, and one optimizer over several classes.

>>> groups = [
...     {"params": matrices, "optimizer_class": torch.optim.Muon, "lr": 0.02},
...     {"params": others},  # of the main class
... ]

A group that names a class has that class's defaults, whatever the main class has, and shows the
class by its full name: ``"torch.optim.Muon"``.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

CLASS = "optimizer_class"  # the key under which a group names its class
Group = dict[str, Any]


def class_name(optimizer_class: type[Optimizer]) -> str:
    """How a class is named in a state, which holds no classes: torch's by their public name."""
    if getattr(torch.optim, optimizer_class.__name__, None) is optimizer_class:
        return f"torch.optim.{optimizer_class.__name__}"  # wherever that torch version defines it
    return f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"


def named_class(group: Any) -> type[Optimizer] | None:
    """The class that a group names, or ``None`` where it names none.

    Raises:
        TypeError: what it names is no optimizer class.
    """
    if not isinstance(group, dict) or CLASS not in group:
        return None
    named = group[CLASS]
    if not (isinstance(named, type) and issubclass(named, Optimizer)):
        raise TypeError(
            f"{CLASS} of a group: expected a subclass of torch.optim.Optimizer, got {named!r}; "
            f"name the class itself, as in {{'params': ..., '{CLASS}': torch.optim.Muon}}"
        )
    return named


def classes_of(entries: Sequence[Any], main: type[Optimizer]) -> list[type[Optimizer]]:
    """The class of each group of a constructor's list of groups or parameters."""
    groups = entries if isinstance(entries[0], dict) else [{}]
    return [named_class(group) or main for group in groups]


def instance_of(
    optimizer_class: type[Optimizer], groups: Any, options: Mapping[str, Any]
) -> Optimizer:
    """An instance of the class over ``groups``; a ``Mixture`` where one of them names a class.

    Args:
        optimizer_class: the main class.
        groups: what its constructor takes.
        options: of the main class, as its constructor takes them.
    """
    if not (isinstance(groups, list) and any(named_class(group) for group in groups)):
        return optimizer_class(groups, **options)
    main = optimizer_class([{"params": []}], **options)
    main.param_groups.clear()
    mixture = Mixture(main, options)
    for group in groups:
        mixture.add_param_group(group)
    return mixture


def joined(known: Optimizer, fresh: Optimizer, options: Mapping[str, Any]) -> Optimizer:
    """``known`` with the groups of ``fresh``, and with what that keeps beside their parameters.

    A parameter of a class that is known has no state before its first gradient, even where the
    constructor makes some (Adagrad): the class has been constructed without it, as in torch.
    """
    classes = parts_of(known)
    for chosen, part in parts_of(fresh).items():
        if chosen in classes:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                fresh.state.pop(parameter, None)
    if isinstance(fresh, Mixture) and not isinstance(known, Mixture):
        known = Mixture(known, options)
    if isinstance(known, Mixture):
        known.absorb(fresh)
        return known
    for group in fresh.param_groups:
        known.add_param_group(group)
    known.state.update(_unknown(fresh, known))
    return known


def parts_of(optimizer: Optimizer) -> dict[type[Optimizer], Optimizer]:
    """Class -> its instance in a mixture; any other optimizer is the only one of its own."""
    return optimizer._parts if isinstance(optimizer, Mixture) else {type(optimizer): optimizer}


def step_without_hooks(optimizer: Optimizer, *closure: Callable[[], Any]) -> Any:
    """``optimizer.step()`` without torch's hook wrapper: global hooks fire for an outer step."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step(optimizer, *closure)


class MixedGroups(Optimizer):
    """An optimizer whose groups may name a class, and then have the defaults of that class."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as torch does. One that names a class is copied first."""
        named = named_class(param_group)
        if named is None:
            super().add_param_group(param_group)
            return
        main_defaults = self.defaults
        self.defaults = _construct(named, {**param_group, "params": []}).defaults
        try:
            super().add_param_group({**param_group, CLASS: class_name(named)})
        finally:
            self.defaults = main_defaults


class Mixture(MixedGroups):
    """One optimizer made of an instance of each class; their groups and their state are its own.

    The groups are the very dicts of the instances, in the order in which they were added, and all
    share one state.

    Args:
        main: an instance of the class of groups that name none; it becomes a part of this.
        options: of that class, as its constructor takes them.
    """

    _built = False  # torch's constructor wants a group

    def __init__(self, main: Optimizer, options: Mapping[str, Any]):
        super().__init__([{"params": []}], {})
        self.defaults, self.state = main.defaults, main.state
        self.param_groups = list(main.param_groups)
        self._main, self._options = type(main), dict(options)
        self._parts: dict[type[Optimizer], Optimizer] = {type(main): main}
        self._classes: list[type[Optimizer]] = [type(main)] * len(main.param_groups)  # by group
        self._built = True

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of the class that it names, or of the main one."""
        named = named_class(param_group)
        super().add_param_group(param_group)
        if not self._built:
            return
        group = self.param_groups.pop()
        self.absorb(_construct(named, group) if named else self._main([group], **self._options))

    def absorb(self, other: Optimizer) -> None:
        """Take in the groups of another optimizer, and what it keeps for their parameters."""
        alone = [type(other)] * len(other.param_groups)
        self._classes += other._classes if isinstance(other, Mixture) else alone
        self.state.update(_unknown(other, self))
        for chosen, part in parts_of(other).items():
            known = self._parts.setdefault(chosen, part)
            if known is not part:
                for group in part.param_groups:
                    known.add_param_group(group)
            known.state = self.state
        self.param_groups += other.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each class."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            step_without_hooks(part)
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        """Let each class load its groups and the state of their parameters."""
        saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
        listed = {key for group in saved_groups for key in group["params"]}
        for chosen, part in self._parts.items():
            pairs = zip(saved_groups, self._classes, strict=True)
            groups = [group for group, its_class in pairs if its_class is chosen]
            keys = {key for group in groups for key in group["params"]}
            if chosen is self._main:
                keys |= saved_state.keys() - listed  # what is no parameter's
            state = {key: saved_state[key] for key in saved_state if key in keys}
            part.load_state_dict({"state": state, "param_groups": groups})
        self.state = defaultdict(dict)
        for part in self._parts.values():
            self.state.update(part.state)
            part.state = self.state
        loaded = {chosen: iter(part.param_groups) for chosen, part in self._parts.items()}
        self.param_groups = [next(loaded[chosen]) for chosen in self._classes]


def _construct(named: type[Optimizer], group: Group) -> Optimizer:
    """An instance over one group; the constructor gets the options that it knows, and sees them."""
    known = inspect.signature(named).parameters
    return named([group], **{k: v for k, v in group.items() if k in known and k != "params"})


def _unknown(fresh: Optimizer, known: Optimizer) -> dict[Any, Any]:
    return {key: state for key, state in fresh.state.items() if key not in known.state}
