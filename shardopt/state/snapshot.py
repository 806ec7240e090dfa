"""The consolidated copy that ``state_dict()`` shows, and how long it is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from shardopt.algos.mixture import joined
from shardopt.errors import StaleStateError
from shardopt.guard import agree
from shardopt.shard import Group, Shard
from shardopt.state.consolidate import State, consolidate
from shardopt.validation import check_rank, option_facts, stand_in


class Snapshot:
    """The full state as of the last consolidation, until something changes the state.

    ==================================  ============================================
    on several ranks                    ``full`` gives
    ==================================  ============================================
    before any step or load             what the class has at construction
    after ``take(to)``                  the full state on rank ``to``, none elsewhere
    after a step, a load, a new group   StaleStateError
    ==================================  ============================================
    """

    def __init__(self, shard: Shard):
        self._shard = shard
        self._state: dict[Any, State] | None = None
        self._changes = 0  # steps and loads so far

    def of(self, shard: Shard) -> Snapshot:
        """The snapshot of a copy of the shard: as old, with nothing taken."""
        twin = Snapshot(shard)
        twin._changes = self._changes
        return twin

    def drop(self) -> None:
        """The state is about to change: a mixture of old and new must never be saved."""
        self._state = None
        self._changes += 1

    def forget(self) -> None:
        """The groups have changed and the state has not."""
        self._state = None

    def take(self, to: int | None, groups: Sequence[Group]) -> None:
        """Put the full state together on rank ``to``, or on every rank. Collective."""
        collectives, parameters = self._shard.collectives, self._shard.parameters
        self.agree({"consolidate_state_dict(to=)": to}, groups)
        check_rank("to", to, collectives.world_size)
        if collectives.world_size > 1:
            full = consolidate(self._shard, to)
            self._state = {
                parameters[key] if isinstance(key, int) else key: state
                for key, state in full.items()
            }

    def agree(self, facts: Mapping[str, object], groups: Sequence[Group]) -> None:
        """Raise on every rank unless all save alike: ``facts``, steps, options. Collective."""
        collectives = self._shard.collectives
        facts = {**facts, "the number of steps and loads": self._changes}
        agree(collectives, facts, "call it alike on every rank, after the same step")
        remedy = (
            "set options alike on every rank; a class that makes options out of all its parameters "
            "cannot be sharded"
        )
        agree(collectives, option_facts(groups), remedy)

    def full(self, groups: Sequence[Group]) -> Mapping[Any, State]:
        """Parameter -> full state, for a ``state_dict`` of ``groups``."""
        if self._state is not None:
            return self._state
        if self._changes == 0:
            return _state_at_construction(self._shard, groups)
        raise StaleStateError(
            f"the state is sharded over {self._shard.collectives.world_size} ranks and no fresh "
            "copy is here; call optimizer.consolidate_state_dict(to=0) on every rank before "
            "state_dict()"
        )


def _state_at_construction(shard: Shard, groups: Sequence[Group]) -> dict[Any, State]:
    """What the class has before any step, made without communication (Adagrad has some)."""
    fresh: Optimizer | None = None
    ours: dict[Tensor, Tensor] = {}
    first = 0
    for number in shard.num_added:
        fresh_groups: list[Group] = []
        for group in groups[first : first + number]:
            held = [stand_in(parameter, "cpu") for parameter in group["params"]]
            ours.update(zip(held, group["params"], strict=True))
            options = {key: value for key, value in group.items() if key != "param_names"}
            fresh_groups.append({**options, "params": held})
        added = shard.instance(fresh_groups, first)
        fresh = joined(fresh, added, shard.options) if fresh else added
        first += number
    assert fresh is not None, "an optimizer has groups"
    return {ours.get(key, key): state for key, state in fresh.state.items()}
