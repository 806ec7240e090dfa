"""From options to the optimizer and the scheduler that train."""

import math
from typing import Any

import torch
from choices import COMPANION, OPTIMIZERS, SIZES
from options import Options, default_lr
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from shardopt import Guards, ShardedOptimizer, sched
from shardopt.algos import algorithm_for

Scheduler = lr_scheduler.LRScheduler
Group = dict[str, Any]


def classes(options: Options) -> list[type[Optimizer]]:
    """The class of each group of parameters: the chosen one, then that of the rest, if any."""
    takes_all = OPTIMIZERS[options.optimizer].takes == "everything"
    chosen = [options.optimizer] if takes_all else [options.optimizer, COMPANION]
    return [getattr(torch.optim, name) for name in chosen]


def names(options: Options) -> str:
    return " and ".join(chosen.__name__ for chosen in classes(options))


def stepping_class(chosen: type[Optimizer], options: Options) -> type[Optimizer]:
    """What computes a step: with ``--kernel auto`` a faster Muon, a subclass of torch's."""
    return algorithm_for(chosen).class_for(options.kernel)


def class_options(chosen: type[Optimizer], options: Options) -> dict[str, Any]:
    """What the constructor of one of the classes is given."""
    name = chosen.__name__
    lr = options.lr if name == options.optimizer else default_lr(name, SIZES[options.size])
    given: dict[str, Any] = {"lr": lr, **OPTIMIZERS[name].options}
    if options.weight_decay is not None:
        given["weight_decay"] = options.weight_decay
    return given


def groups_of(model: nn.Module, options: Options) -> list[Group]:
    """The parameters of each class."""
    takes = OPTIMIZERS[options.optimizer].takes
    if takes == "everything":
        return [{"params": list(model.parameters())}]
    taken: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_embedding = "embedding" in name  # that of bytes may be the output layer, too
        fits = is_embedding if takes == "embeddings" else parameter.dim() == 2 and not is_embedding
        (taken if fits else rest).append(parameter)
    return [{"params": taken}, {"params": rest}]


def build_optimizer(model: nn.Module, options: Options, deadline: float) -> ShardedOptimizer:
    """The chosen class; where it does not take all of the model, in a group beside the rest's.

    Args:
        deadline: in seconds; an error names the rank that does not keep it.
    """
    groups, (*named, main) = groups_of(model, options), classes(options)
    for group, chosen in zip(groups, named, strict=False):
        group.update(optimizer_class=chosen, **class_options(chosen, options))
    return ShardedOptimizer(
        groups,
        main,
        gradients=options.gradients,
        kernel=options.kernel,
        guards=Guards(deadline=deadline),
        **class_options(main, options),
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
        # It cycles momentum or betas as well, where all groups have the same of them.
        groups = optimizer.param_groups
        cycles = any(all(key in group for group in groups) for key in ("momentum", "betas"))
        peaks = [float(group["lr"]) for group in groups]
        return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, cycle_momentum=cycles)
    if options.scheduler == "plateau":
        return sched.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
