"""ReduceLROnPlateau whose ranks decide as one."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from shardopt.errors import AgreementError
from shardopt.sched.agreement import check_schedules


class ReduceLROnPlateau(lr_scheduler.ReduceLROnPlateau):
    """Reduce the lr when the mean of the ranks' metrics has stopped improving.

    torch's class decides from the metric it is given. Ranks that validate on their own samples
    bring different metrics, one of them reduces an epoch before another, and from then on each
    rank updates its shard at a lr of its own. Here every rank decides from the same number, the
    mean over ranks in float64, summed in rank order, and ranks whose counters have already come
    apart (one resumed without its scheduler's state) are named instead of led further astray.

    A NaN on any rank makes the mean NaN on every rank, and NaN is no improvement: the epoch counts
    as a bad one, as in torch. So does a mean of +inf and -inf. A rank without validation samples
    has no metric to bring; give it the metric of another rank rather than NaN or 0. Where all ranks
    bring one and the same number, that number is used, not the rounded quotient of its sum.

    Over a plain ``torch.optim`` optimizer, or in a world of one, it is torch's class.

    Args:
        optimizer: a ``ShardedOptimizer``, or any other.
        arguments: torch's, by position or by name: ``mode="min"``, ``factor=0.1``, ``patience=10``
            (epochs), ``threshold=1e-4``, ``threshold_mode="rel"``, ``cooldown=0`` (epochs),
            ``min_lr=0`` (a number, or one for each group), ``eps=1e-8``. Passed on as they come, so
            that torch's defaults hold, whatever they are in the torch at hand.
        verbose: print a line to stdout for each group whose lr is reduced, on rank 0. torch had it
            in fifth place until it was dropped; here it goes by name only, and it is no part of
            ``state_dict()``, so that ``verbose=rank == 0`` stays harmless.

    Example:
        >>> scheduler = shardopt.sched.ReduceLROnPlateau(optimizer, "min", patience=2, verbose=True)
        >>> for epoch in range(10):
        ...     train(...)
        ...     scheduler.step(validate(...))  # each rank on its own samples
        Epoch     4: reducing learning rate of group 0 to 1.0000e-02.
    """

    def __init__(
        self, optimizer: Optimizer, *arguments: Any, verbose: bool = False, **named_arguments: Any
    ):
        super().__init__(optimizer, *arguments, **named_arguments)
        self.verbose = verbose

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Count one epoch; reduce the lr of every group if it was one bad epoch too many.

        A collective over a ``ShardedOptimizer``: every rank calls it, once an epoch.

        Args:
            metrics: this rank's metric: anything ``float()`` takes.
            epoch: deprecated by torch.

        Raises:
            AgreementError: on every rank, when a rank brought what is no number (that rank raises
                what ``float()`` raised), or when ranks have counted differently so far. Nothing
                has been changed then.
        """
        metric = self._mean_over_ranks(metrics)
        before = [float(group["lr"]) for group in self.optimizer.param_groups]
        super().step(metric, epoch)
        if self.verbose and getattr(self._collectives, "rank", 0) == 0:
            self._print_reduced(before)

    def state_dict(self) -> dict[str, Any]:
        """torch's state, key by key: it loads into torch's class, and torch's into this one."""
        return {key: value for key, value in super().state_dict().items() if key != "verbose"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what either class saved; ``verbose``, once part of it, stays as constructed."""
        super().load_state_dict({key: v for key, v in state_dict.items() if key != "verbose"})

    @property
    def _collectives(self) -> Any:  # those of the optimizer; None for a plain one
        return getattr(self.optimizer, "collectives", None)

    def _mean_over_ranks(self, metrics: SupportsFloat) -> float:
        if self._collectives is None:
            return float(metrics)
        problem: Exception | None = None
        try:
            metric = float(metrics)
        except Exception as error:  # first tell the others, who are waiting for this rank's row
            metric, problem = math.nan, error
        counted = self.last_epoch, self.best, self.num_bad_epochs, self.cooldown_counter
        row = torch.tensor([problem is not None, metric, *counted], dtype=torch.float64)
        rows = self._collectives.all_gather_rows(row)  # (world_size, 6)
        if problem is not None:
            raise problem
        _refuse_missing(rows[:, 0])
        if (rows[:, 2:] != rows[0, 2:]).any():
            check_schedules(self)
        return _mean(rows[:, 1].tolist())

    def _print_reduced(self, before: list[float]) -> None:
        """In torch's words while it had ``verbose``; its later releases knew float epochs too."""
        epoch = self.last_epoch
        when = f"{epoch:5d}" if isinstance(epoch, int) else f"{epoch:.2f}"
        for number, (group, old) in enumerate(
            zip(self.optimizer.param_groups, before, strict=True)
        ):
            if (new := float(group["lr"])) != old:
                print(f"Epoch {when}: reducing learning rate of group {number} to {new:.4e}.")


def _refuse_missing(
    missing: Tensor,  # (world_size,), 1 where a rank's metric is no number
) -> None:
    for rank, flag in enumerate(missing.tolist()):
        if flag:
            raise AgreementError(
                f"ReduceLROnPlateau.step: expected a metric from every rank, rank {rank} brought "
                "what float() refuses; see the error of that rank"
            )


def _mean(metrics: list[float]) -> float:
    """The mean in rank order. Equal metrics are their own mean: N·m/N may round away from m."""
    if len(set(metrics)) == 1:
        return metrics[0]
    return sum(metrics) / len(metrics)
