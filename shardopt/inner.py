"""The class inside ``ShardedOptimizer``: its local instance, and the methods it has of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from shardopt import update
from shardopt.algos.mixture import parts_of
from shardopt.arrivals import Arrivals
from shardopt.comm import Collectives
from shardopt.guard import agree, all_or_none
from shardopt.shard import Shard
from shardopt.state import Snapshot
from shardopt.validation import option_facts


class InnerMethods(Optimizer):
    """An optimizer that has the public methods of its class which torch's base class lacks."""

    collectives: Collectives
    _shard: Shard
    _snapshot: Snapshot
    _arrivals: Arrivals

    @property
    def optim(self) -> Optimizer:
        """The local optimizer over this rank's segments, for tools that look."""
        return self._shard.optim

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method that the class has of its own, such as schedule-free's ``eval``. Collective."""
        if not name.startswith("_") and "_shard" in self.__dict__:
            if _that_have(name, self.optim):
                return partial(self._call, name)
            classes = " and ".join(type(part).__name__ for part in parts_of(self.optim).values())
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}, nor has {classes} a "
                "method of this name",
                name=name,
                obj=self,
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Let the class run its method on every rank's segments, with the user's options.

        It may change parameters, state and options. It sees no gradients.
        """
        with self.collectives.during(f"{name}()"):
            return self._call_together(name, args, kwargs)

    def _call_together(self, name: str, args: Any, kwargs: Any) -> Any:
        shard, groups = self._shard, self.param_groups
        self._arrivals.wait()
        facts = {"the method called": name, "its arguments": [args, kwargs], **option_facts(groups)}
        agree(self.collectives, facts, "call it alike on every rank, after the same step")
        self._snapshot.drop()
        with all_or_none(self.collectives):
            shard.check_groups(groups)
            shard.buffers.take_back(shard.names)
            pushed = update.push_options(shard, groups)
            parts = _that_have(name, shard.optim)
            results = [getattr(part, name)(*args, **kwargs) for part in parts]
        update.pull_options(shard, groups, pushed)
        self._arrivals.expect(update.gather_everything(shard))
        return self if results[0] is parts[0] else results[0]


def _that_have(name: str, optim: Optimizer) -> list[Optimizer]:
    """The instances of classes that have a method of this name."""
    classes = parts_of(optim).items()
    return [part for its, part in classes if inspect.isfunction(getattr(its, name, None))]
