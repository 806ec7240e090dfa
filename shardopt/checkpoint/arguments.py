"""What ``save`` and ``load`` are given, and what of it is refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardopt.comm import Collectives, choose_collectives


def collectives_of(optimizer: Any, process_group: Any) -> Collectives:
    """Those of the optimizer, or of the group where there is none."""
    if optimizer is None:
        return choose_collectives(process_group)
    if not hasattr(optimizer, "_shard"):
        raise TypeError(
            f"optimizer: expected a ShardedOptimizer, got {type(optimizer).__name__}; construct "
            "ShardedOptimizer, which works in one process, too, or save a plain optimizer's "
            "state_dict() by torch.save"
        )
    return optimizer.collectives


def given(model: Any, optimizer: Any, scheduler: Any) -> str:
    """What of these there is."""
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    return " and ".join(name for name, part in parts.items() if part is not None) or "extra alone"


def check_numbers(step: int, keep: int | None) -> None:
    """Refuse a step that counts nothing, and keeping none."""
    if type(step) is not int or step < 0:
        raise ValueError(f"step: expected how many steps have been taken, 0 or more, got {step!r}")
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ValueError(f"keep: expected a number of steps, 1 or more, or None, got {keep!r}")


def check_parts(model: Any, scheduler: Any) -> None:
    """Refuse what is no module, and no scheduler."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if scheduler is not None and not hasattr(scheduler, "load_state_dict"):
        raise TypeError(
            f"scheduler: expected an object with state_dict() and load_state_dict(), got "
            f"{type(scheduler).__name__}"
        )


def unwrapped(model: Any) -> Any:
    """The module within ``DistributedDataParallel`` and ``torch.compile``, whose names count."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
