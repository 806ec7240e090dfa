"""What ``optimizer.state`` shows: this rank's part, live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from shardopt.shard import Shard


class LocalState(MutableMapping[Any, Any]):
    """The user's parameter -> the state of this rank's part of it, live.

    True even when empty: ``torch.distributed.checkpoint`` takes an empty state for a reason to
    run a phantom ``step()``.
    """

    def __init__(self, shard: Shard, changed: Callable[[], None]):
        self._shard = shard
        self._changed = changed  # called before an entry is set or deleted

    def _tensor(self, key: Any) -> Any:
        """The local segment of a parameter; any other key stands for itself."""
        if not isinstance(key, Tensor):
            return key
        segment = self._shard.segments.get(self._shard.index(key))
        return None if segment is None else segment[1]

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
        state = self._shard.optim.state
        for index, (_, tensor) in sorted(self._shard.segments.items()):
            if tensor in state:
                yield self._shard.parameters[index]
        yield from (key for key in state if not isinstance(key, Tensor))

    def __len__(self) -> int:
        return len(self._shard.optim.state)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"LocalState({dict(self)!r})"
