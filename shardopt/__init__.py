"""shardopt: the sharded (ZeRO stage 1 and 2) optimizer for PyTorch.

What a plain ``torch.optim`` optimizer computes on one device, :class:`ShardedOptimizer` computes
with 1/N of the optimizer state on each of N ranks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardopt import algos, checkpoint, errors, sched
    from shardopt.optimizer import ShardedOptimizer
    from shardopt.policies import Guards
    from shardopt.scaler import GradScaler

__all__ = [
    "GradScaler",
    "Guards",
    "ShardedOptimizer",
    "__version__",
    "algos",
    "checkpoint",
    "errors",
    "sched",
]

__version__ = "0.1.0"

_HOMES = {"GradScaler": "scaler", "Guards": "policies", "ShardedOptimizer": "optimizer"}


def __getattr__(name: str) -> Any:
    """Import a public name, or a part of shardopt, when it is first asked for.

    ``shardopt --help`` answers at once because torch is not imported before.
    """
    if name in _HOMES:
        value = getattr(importlib.import_module(f"shardopt.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        part = f"shardopt.{name}"
        try:
            return importlib.import_module(part)
        except ModuleNotFoundError as problem:
            if problem.name != part:
                raise
    raise AttributeError(f"module 'shardopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
