"""What learning-rate schedules need on top of torch's once they are replicated.

Every scheduler of ``torch.optim.lr_scheduler`` runs unchanged over a ``ShardedOptimizer``: each
rank steps its own copy, and since a schedule is a function of the step count the copies stay
equal without a word between them. Two things break that, and this package has an answer to each:

- a decision taken from a number that differs from rank to rank, such as a validation loss over
  each rank's own samples: :class:`ReduceLROnPlateau` decides on the mean;
- one rank that steps once more, resumes from another epoch, or was given another option:
  :func:`check_schedules` names the rank and both values.
"""

from shardopt.sched.agreement import check_schedules
from shardopt.sched.plateau import ReduceLROnPlateau

__all__ = ["ReduceLROnPlateau", "check_schedules"]
