"""The part of ``ShardedOptimizer`` that a user calls between ``backward()`` and ``step()``."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor
from torch.optim import Optimizer

from shardopt.comm import Collectives
from shardopt.errors import UnsupportedError
from shardopt.gradients.base import Gradients
from shardopt.gradients.norms import a_number, norm_order


class GradientMethods(Optimizer):
    """A ``torch.optim`` optimizer whose gradients are averaged over ranks."""

    collectives: Collectives
    _gradients: Gradients
    _amp_scaling_agreed = False  # while shardopt.GradScaler steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, on every rank those that have been averaged so far, too.

        Args:
            set_to_none: whether ``.grad`` becomes ``None`` or zeros.
        """
        super().zero_grad(set_to_none)
        self._gradients.zero(to_none=set_to_none)

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate: with ``gradients="local"``, backward passes in here communicate nothing.

        The first one outside averages the sum. With ``"sharded"`` each backward adds its average
        to the shard, in here or not, since nothing else is kept; with ``"replicated"`` use the
        ``no_sync`` of DDP.

        Example:
            >>> with optimizer.no_sync():
            ...     loss_fn(model(first), target).backward()
            >>> loss_fn(model(second), target).backward()
            >>> optimizer.step()
        """
        return self._gradients.paused()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scale the gradients to a norm of at most ``max_norm``, taken over all ranks. Collective.

        What ``torch.nn.utils.clip_grad_norm_`` does to averaged gradients on one device, within
        rounding (a relative 1e-5 in fp32). Each parameter counts once.

        Args:
            max_norm: the largest norm allowed.
            norm_type: the order ``p > 0`` of the norm; ``float("inf")`` for the largest element.
            error_if_nonfinite: raise ``GradientError`` if the norm is an inf or a NaN; this waits
                for a GPU, and nothing else here does.

        Returns:
            The norm before clipping, 0-dim.
        """
        with self.collectives.during("clip_grad_norm_()"):
            limit, order = a_number("max_norm", max_norm), norm_order(norm_type)
            return self._gradients.clip_norm(limit, order, error_if_nonfinite)

    def clip_grad_value_(self, clip_value: float) -> None:
        """Clamp each element of the averaged gradients to ``[-clip_value, clip_value]``."""
        with self.collectives.during("clip_grad_value_()"):
            limit = a_number("clip_value", clip_value)
            self._gradients.clip_value(limit)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch's GradScaler asks before it steps; ours stands in ``_amp_scaling_agreed``."""
        if self._gradients.reduces and not self._amp_scaling_agreed:
            raise UnsupportedError(
                "torch's GradScaler looks at .grad, and with gradients='local' or 'sharded' each "
                "rank would decide for itself; use shardopt.GradScaler"
            )
        return False
