"""Gradients between ``backward()`` and the update: where the mean over ranks comes from.

================  ================  =================================  =========================
``gradients=``    ``.grad`` holds   after ``backward()``               after ``step()``
================  ================  =================================  =========================
``"replicated"``  the mean          (DDP or the user reduces)          as it was
``"local"``       this rank's own   this rank's own, and its shard of  ``None``
                                    the mean beside it
``"sharded"``     this rank's own   ``None``; this rank has its shard  ``None``
                                    of the mean, and nothing else
================  ================  =================================  =========================
"""

from shardopt.gradients.base import Facts, Gradients
from shardopt.gradients.methods import GradientMethods
from shardopt.gradients.reducer import Reducer
from shardopt.gradients.refusals import refuse_abandoned, refuse_ddp, refuse_gradients
from shardopt.gradients.replicated import Replicated
from shardopt.gradients.report import Verdict
from shardopt.policies import Guards
from shardopt.shard import Shard

__all__ = [
    "GradientMethods",
    "Gradients",
    "Verdict",
    "gradients_of",
    "refuse_abandoned",
    "refuse_ddp",
    "refuse_gradients",
]


def gradients_of(kind: str, shard: Shard, guards: Guards, facts: Facts) -> Gradients:
    """What ``ShardedOptimizer(gradients=kind)`` works with."""
    if kind == "replicated":
        return Replicated(shard, guards, facts)
    return Reducer(shard, guards, facts, keeps=kind == "local")
