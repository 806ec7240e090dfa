"""torch's clipping of gradients that have been freed raises, instead of doing nothing.

``clip_grad_norm_`` and ``clip_grad_value_`` find no ``.grad``, and training goes on unclipped.
Nothing of a parameter is asked but ``.grad``, so the one place to notice is the function that torch
calls with the parameters, behind the wrapper that switches autograd off: there it is replaced for
all who have imported it, under whatever name. The wrapper is private: where a torch has none of its
make nothing is watched, and a test says so. (``get_total_norm`` gets gradients, not parameters:
what it has not been given it cannot notice.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import CellType, FunctionType
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from shardopt.errors import GradientError

# A function of torch -> the one to name instead, of the optimizer and of ``torch.nn.utils``.
_CLIPPERS = {
    "_clip_grads_with_norm_": "clip_grad_norm_",
    "clip_grad_value_": "clip_grad_value_",
}


class Watched(Protocol):
    """One who frees gradients."""

    def name_if_freed(self, parameter: Tensor) -> str | None:
        """The name of a parameter whose gradient has been freed and not used yet."""


_WATCHED: WeakSet[Watched] = WeakSet()


def watch(one: Watched) -> None:
    """From now on torch's clipping of what ``one`` has freed raises ``GradientError``."""
    _WATCHED.add(one)
    for name, remedy in _CLIPPERS.items():
        cell = cell_of(name)
        if cell is not None and not hasattr(cell.cell_contents, "_by_shardopt"):
            cell.cell_contents = _refusing_freed(cell.cell_contents, remedy)


def cell_of(name: str) -> CellType | None:
    """What torch's wrapper holds the function of that name in; ``None`` in a torch without one."""
    wrapper = getattr(clip_grad, name, None)
    if not isinstance(wrapper, FunctionType) or not wrapper.__closure__:
        return None
    return dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__, strict=True)).get("func")


def _refusing_freed(inner: Callable[..., Any], remedy: str) -> Callable[..., Any]:
    @functools.wraps(inner)
    def refuse_freed(parameters: Tensor | Iterable[Tensor], *args: Any, **options: Any) -> Any:
        held = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for parameter in held:
            for one in _WATCHED:
                if parameter.grad is None and (name := one.name_if_freed(parameter)):
                    raise GradientError(
                        f"the gradient of parameter {name!r} has been reduced and freed, so "
                        f"torch.nn.utils.{remedy} finds none; use optimizer.{remedy}"
                    )
        return inner(held, *args, **options)

    refuse_freed._by_shardopt = True  # type: ignore[attr-defined]
    return refuse_freed
