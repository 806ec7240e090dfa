"""What the class keeps of each parameter on this rank, live; ``optimizer.state`` shows it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from shardopt.shard import Group, Shard


def key_of(shard: Shard, index: int) -> Tensor | None:
    """Under which tensor the class keeps this rank's part of a parameter's state, if it does.

    A class with flat state keeps it under its first tensor, on every rank.
    """
    if shard.flat:
        return shard.optim.param_groups[0]["params"][0] if index == 0 else None
    return shard.segments[index][1] if index in shard.segments else None


def states_of(shard: Shard) -> dict[int, Any]:
    """Parameter index -> the state that the class keeps of it here."""
    keys = ((index, key_of(shard, index)) for index in range(len(shard.parameters)))
    state = shard.optim.state
    return {index: state[key] for index, key in keys if key is not None and key in state}


def clone(shard: Shard, groups: Sequence[Group]) -> Shard:
    """A shard of its own over copies of the parameters, in ``groups``, with equal state."""
    twin = Shard(
        shard.optimizer_class,
        shard.collectives,
        kernel=shard.kernel,
        bucket_bytes=shard.bucket_bytes,
        options=shard.options,
    )
    twin.extend(shard.layout, groups, shard.algorithms)
    twin.num_added = list(shard.num_added)
    twin.optim.state.clear()
    for index, state in states_of(shard).items():
        key = key_of(twin, index)
        assert key is not None, "the layout is the same"
        twin.optim.state[key] = copy.deepcopy(state)
    own = {key: s for key, s in shard.optim.state.items() if not isinstance(key, Tensor)}
    twin.optim.state.update(copy.deepcopy(own))
    return twin


class LocalState(MutableMapping[Any, Any]):
    """The user's parameter -> the state of this rank's part of it, live.

    True even when empty: ``torch.distributed.checkpoint`` takes an empty state for a reason to
    run a phantom ``step()``.
    """

    def __init__(self, shard: Shard, changed: Callable[[], None]):
        self._shard = shard
        self._changed = changed  # called before an entry is set or deleted

    def _tensor(self, key: Any) -> Any:
        """What a parameter's state is kept under here; any other key stands for itself."""
        if not isinstance(key, Tensor):
            return key
        return key_of(self._shard, self._shard.index(key))

    def __getitem__(self, key: Any) -> Any:
        tensor = self._tensor(key)
        return MappingProxyType({}) if tensor is None else self._shard.optim.state[tensor]

    def __setitem__(self, key: Any, value: Any) -> None:
        tensor = self._tensor(key)
        if tensor is None:
            raise KeyError("this rank holds no part of the parameter; use load_state_dict")
        self._changed()
        self._shard.optim.state[tensor] = value

    def __delitem__(self, key: Any) -> None:
        self._changed()
        del self._shard.optim.state[self._tensor(key)]

    def __iter__(self) -> Iterator[Any]:
        for index in states_of(self._shard):
            yield self._shard.parameters[index]
        yield from (key for key in self._shard.optim.state if not isinstance(key, Tensor))

    def __len__(self) -> int:
        return len(self._shard.optim.state)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"LocalState({dict(self)!r})"
