"""Do all ranks hold the same schedule? Named when they do not."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

REMEDY = (
    "build the scheduler with the same options on every rank, call scheduler.step() equally often "
    "on every rank, and when resuming load the same scheduler.state_dict() on every rank"
)

# What is no option of a group: the tensors, and their names, which the optimizer itself compares.
_NOT_OPTIONS = frozenset({"params", "param_names"})


def check_schedules(schedulers: Any, optimizer: Optimizer | None = None) -> None:
    """Raise on every rank unless all ranks hold the same schedule.

    Compared are each scheduler's class and ``last_epoch``, the lr and every other option of each
    group, and all of ``scheduler.state_dict()``, inner schedulers of ``SequentialLR`` and
    ``ChainedScheduler`` included. Functions are compared by name, since that is all a rank can say
    of them: two lambdas that differ are found by the lr they lead to.

    A collective: call it on every rank, for instance after resuming and once an epoch.

    Args:
        schedulers: a scheduler, or a list of them. Any object with ``state_dict()`` and
            ``optimizer``, torch's or not.
        optimizer: the ``ShardedOptimizer`` whose ranks are asked. By default the first one that a
            scheduler of the list drives; needed only when all of them drive plain optimizers.

    Raises:
        AgreementError: names the first difference, the rank and both values, on every rank.
        TypeError: no ``ShardedOptimizer`` is at hand, so there is nobody to ask.

    Example:
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30)
        >>> scheduler.load_state_dict(saved)
        >>> shardopt.sched.check_schedules(scheduler)
    """
    held = list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers]
    candidates = (
        [optimizer]
        if optimizer is not None
        else [getattr(each, "optimizer", each) for each in held]
    )
    for candidate in candidates:
        if hasattr(candidate, "agree"):
            candidate.agree(schedule_facts(held), REMEDY)
            return
    got = ", ".join(sorted({type(each).__name__ for each in candidates})) or "no scheduler"
    raise TypeError(
        f"expected a scheduler that drives a ShardedOptimizer, got one that drives {got}; a plain "
        "optimizer cannot reach other ranks: pass the ShardedOptimizer to ask as optimizer="
    )


def schedule_facts(schedulers: Sequence[Any]) -> dict[str, object]:
    """What ranks must agree on, most telling first, in plain values whose repr can be compared."""
    facts: dict[str, object] = {}
    described: set[int] = set()
    for number, scheduler in enumerate(schedulers):
        facts.update(_scheduler_facts(f"scheduler {number}", scheduler))
        if id(scheduler.optimizer) not in described:
            described.add(id(scheduler.optimizer))
            facts.update(_group_facts(f"scheduler {number}", scheduler.optimizer.param_groups))
    # The order decides which difference is reported: a class before its fields, an epoch before
    # the lr that follows from it, an lr before the counters behind it.
    # Names decide the rest, as a group loaded from a file may hold its options in another order.
    return dict(sorted(facts.items(), key=lambda fact: _place_of(fact[0])))


def _place_of(name: str) -> tuple[int, str]:
    last_word = name.rpartition(" ")[2]
    telling = ("class", "last_epoch", "lr")
    return (telling.index(last_word) if last_word in telling else len(telling), name)


def _scheduler_facts(name: str, scheduler: Any) -> Iterator[tuple[str, object]]:
    yield f"{name} class", _name_of(type(scheduler))
    for key, value in scheduler.state_dict().items():
        if key != "_schedulers":
            yield from _flat(f"{name} {key}", value)
    for number, inner in enumerate(getattr(scheduler, "_schedulers", ())):
        yield from _scheduler_facts(f"{name}.{number}", inner)


def _group_facts(name: str, groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, object]]:
    for number, group in enumerate(groups):
        for key, value in group.items():
            if key not in _NOT_OPTIONS:
                yield from _flat(f"{name} group {number} {key}", value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, object]]:
    """The leaves of nested state, each under a name that leads to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}[{key!r}]", inner)
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list)) for v in value):
        for index, inner in enumerate(value):
            yield from _flat(f"{name}[{index}]", inner)
    elif isinstance(value, (list, tuple)):
        yield name, [_plain(inner) for inner in value]
    else:
        yield name, _plain(value)


def _plain(value: Any) -> object:
    """A value whose repr is the same in every process that holds an equal one."""
    if isinstance(value, Tensor):
        return value.tolist()
    if value is None or isinstance(value, (str, Number)):
        return value
    if isinstance(value, functools.partial):
        return [_plain(value.func), *map(_plain, value.args), *map(_plain, value.keywords.values())]
    return _name_of(value if hasattr(value, "__qualname__") else type(value))


def _name_of(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
