"""shardopt: the sharded (ZeRO stage 1 and 2) optimizer for PyTorch.

What a plain ``torch.optim`` optimizer computes on one device, :class:`ShardedOptimizer` computes
with 1/N of the optimizer state on each of N ranks.
"""

from shardopt import algos, errors, sched
from shardopt.optimizer import ShardedOptimizer
from shardopt.policies import Guards
from shardopt.scaler import GradScaler

__all__ = ["GradScaler", "Guards", "ShardedOptimizer", "__version__", "algos", "errors", "sched"]

__version__ = "0.1.0"
