"""torch's ``clip_grad_norm_`` on gradients that have been freed raises, instead of doing nothing.

It finds no ``.grad``, takes the norm of nothing, and training goes on unclipped. Nothing of a
parameter is asked but ``.grad``, so the one place to notice is the function that torch calls with
the parameters. It is private: where a torch has none of that name nothing is watched, and a test
says so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from shardopt.errors import GradientError


class Watched(Protocol):
    """One who frees gradients."""

    def name_if_freed(self, parameter: Tensor) -> str | None:
        """The name of a parameter whose gradient has been freed and not used yet."""


_WATCHED: WeakSet[Watched] = WeakSet()


def watch(one: Watched) -> None:
    """From now on torch's clipping of what ``one`` has freed raises ``GradientError``."""
    _WATCHED.add(one)
    inner = getattr(clip_grad, "_clip_grads_with_norm_", None)
    if inner is None or hasattr(inner, "_by_shardopt"):
        return

    @functools.wraps(inner)
    def refuse_freed(parameters: Tensor | Iterable[Tensor], *args: Any, **options: Any) -> Any:
        held = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for parameter in held:
            for one in _WATCHED:
                if parameter.grad is None and (name := one.name_if_freed(parameter)):
                    raise GradientError(
                        f"the gradient of {name!r} has been reduced and freed, so torch.nn.utils."
                        "clip_grad_norm_ finds none; use optimizer.clip_grad_norm_"
                    )
        return inner(held, *args, **options)

    refuse_freed._by_shardopt = True  # type: ignore[attr-defined]
    clip_grad._clip_grads_with_norm_ = refuse_freed
