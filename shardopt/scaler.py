"""Loss scaling for fp16, where each rank has gradients of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardopt.optimizer import ShardedOptimizer


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` whose ranks agree: an inf on one makes all skip and shrink alike.

    For ``ShardedOptimizer`` with ``gradients="local"`` or ``"sharded"``, whose gradients torch's
    class cannot see. With ``"replicated"`` gradients, and over any other optimizer, it is torch's.

    Args:
        arguments: torch's: ``device="cuda"``, ``init_scale=65536.0``, ``growth_factor=2.0``,
            ``backoff_factor=0.5``, ``growth_interval=2000`` (steps), ``enabled=True``.

    Example:
        >>> scaler = shardopt.GradScaler("cuda")
        >>> with torch.autocast("cuda", torch.float16):
        ...     loss = loss_fn(model(input), target)
        >>> scaler.scale(loss).backward()
        >>> scaler.unscale_(optimizer)
        >>> optimizer.clip_grad_norm_(1.0)
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step unless a gradient of any rank is not finite. Collective."""
        if not isinstance(optimizer, ShardedOptimizer):
            return super().step(optimizer, *args, **kwargs)
        optimizer._amp_scaling_agreed = True
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            optimizer._amp_scaling_agreed = False

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not (isinstance(optimizer, ShardedOptimizer) and optimizer._gradients.reduces):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p.dtype is torch.float16 for p in held) and not allow_fp16:
            raise ValueError("Attempting to unscale FP16 gradients.")
        optimizer._gradients.unscale(inv_scale, found_inf)
        collectives = optimizer.collectives
        row = found_inf.double().reshape(1)
        found_inf.fill_(float(collectives.all_gather_rows(row).max()))  # step() waits for it, too
        return {found_inf.device: found_inf}
