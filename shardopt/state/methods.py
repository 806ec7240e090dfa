"""The part of ``ShardedOptimizer`` that shows, saves and loads its state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from shardopt.algos.mixture import MixedGroups, parts_of
from shardopt.comm import Collectives
from shardopt.guard import all_or_none
from shardopt.local_state import LocalState
from shardopt.shard import Group, Shard
from shardopt.state.load import load, take_in
from shardopt.state.snapshot import Snapshot


class StatefulOptimizer(MixedGroups):
    """A ``torch.optim`` optimizer whose state lies in a shard, and whole in a snapshot."""

    collectives: Collectives
    _shard: Shard
    _snapshot: Snapshot
    _built = False  # torch's constructor adds the groups one by one before there are shards
    _packing = False  # ``state`` shows the full state while ``state_dict`` packs it

    @property
    def state(self) -> Any:
        """Parameter -> state of this rank's part of it. Use ``state_dict`` for the whole."""
        if self._packing:
            return self._snapshot.full(self.param_groups)
        return LocalState(self._shard, self._snapshot.drop)

    @state.setter
    def state(self, value: Any) -> None:
        if self._built:  # torch's constructor sets it, too
            self.state.clear()
            self.state.update(value)

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Put the full state together in CPU memory of rank ``to``. Collective.

        ``state_dict()`` then returns it there until the next step; one bucket at a time travels.

        Args:
            to: a rank of the group, or ``None`` for every rank.

        Raises:
            AgreementError: ranks differ in ``to``, in options, or in steps taken.
        """
        with self.collectives.during("consolidate_state_dict()"):
            self._snapshot.take(to, self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's form, with full tensors; loads into plain ``torch.optim``.

        On several ranks: the copy that ``consolidate_state_dict`` made, until the next step; ranks
        other than its target get empty state. Before any step: what the class starts with.

        Raises:
            StaleStateError: on several ranks, without a fresh copy.
        """
        if self.collectives.world_size == 1:
            return super().state_dict()
        self._packing = True
        try:
            return super().state_dict()
        finally:
            self._packing = False

    def load_state_dict(self, state_dict: Any, from_: int | None = None) -> None:
        """Load a state in torch's form, saved by any world size or by plain torch. Collective.

        Args:
            state_dict: the full state, neither changed nor kept; ``None`` on ranks but ``from_``.
            from_: the rank that has the state; ``None`` if every rank passes it.

        Raises:
            ValueError: groups or shapes do not fit, named by parameter; on every rank.
        """
        with self.collectives.during("load_state_dict()"):
            self._load_state_dict(state_dict, from_)

    def _load_state_dict(self, state_dict: Any, from_: int | None) -> None:
        with all_or_none(self.collectives):
            if state_dict is not None and (from_ is None or from_ == self.collectives.rank):
                state_dict = copy.copy(state_dict)
                for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                    changed = pre_hook(self, state_dict)
                    state_dict = state_dict if changed is None else changed
        load(self._shard, self.param_groups, state_dict, from_)
        self._loaded()

    def _take_in(self, options: list[Group], local: dict[Any, Any]) -> None:
        """Load this rank's part of a state, by parameter index. Collective."""
        take_in(self._shard, self.param_groups, options, local)
        self._loaded()

    def _remember(self) -> Callable[[], None]:
        """A function that puts state and options back to what they are now, after a load."""
        inner = [self._shard.optim, *parts_of(self._shard.optim).values()]
        before = [(optim, optim.state, optim.param_groups) for optim in inner]
        groups = [(group, dict(group)) for group in self.param_groups]

        def put_back() -> None:
            for optim, state, inner_groups in before:
                optim.state, optim.param_groups = state, inner_groups
            for group, options in groups:
                group.clear()
                group.update(options)

        return put_back

    def _loaded(self) -> None:
        self._snapshot.drop()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a process group cannot be pickled."""
        raise TypeError(
            "ShardedOptimizer cannot be pickled, since it holds a process group; save "
            "optimizer.state_dict() after optimizer.consolidate_state_dict(), and load it into a "
            "new ShardedOptimizer"
        )
