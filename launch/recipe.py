"""From options to the optimizer and the scheduler that train."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from options import OPTIMIZERS, Options
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from shardopt import ShardedOptimizer, sched

Scheduler = lr_scheduler.LRScheduler


def optimizer_class(options: Options) -> type[Optimizer]:
    return getattr(torch.optim, options.optimizer)


def class_options(options: Options) -> dict[str, Any]:
    """What the constructor of the optimizer class is given."""
    given: dict[str, Any] = {"lr": options.lr, **OPTIMIZERS[options.optimizer].options}
    if options.weight_decay is not None:
        given["weight_decay"] = options.weight_decay
    return given


def build_optimizer(parameters: Iterable[nn.Parameter], options: Options) -> ShardedOptimizer:
    return ShardedOptimizer(
        parameters,
        optimizer_class(options),
        gradients=options.gradients,
        kernel=options.kernel,
        **class_options(options),
    )


class WarmupCosine:
    """Factor of the lr: linear warm-up, then half a cosine down to a tenth.

    An object and not a lambda, since a ``LambdaLR`` saves the former and loses the latter.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.warmup = max(1, steps // 20)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        share = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def build_scheduler(optimizer: Optimizer, options: Options) -> Scheduler:
    """The schedule by its name in the options, over all steps of the run."""
    steps = options.steps
    if options.scheduler == "cosine":
        return lr_scheduler.LambdaLR(optimizer, WarmupCosine(steps))
    if options.scheduler == "linear":
        return lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    if options.scheduler == "step":
        return lr_scheduler.StepLR(optimizer, max(1, steps // 3), gamma=0.3)
    if options.scheduler == "onecycle":
        # It cycles momentum or betas as well, where the class has either.
        cycles = bool({"momentum", "betas"} & set(optimizer.defaults))
        return lr_scheduler.OneCycleLR(
            optimizer, options.lr, total_steps=steps, cycle_momentum=cycles
        )
    if options.scheduler == "plateau":
        return sched.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
