"""torch's own calls that look for gradients which have been reduced and freed.

``clip_grad_norm_`` and ``clip_grad_value_`` find no ``.grad``, and training would go on unclipped:
they raise. ``nn.Module.zero_grad`` finds none either, and what it wants to be forgotten would be
used: the optimizer forgets it, too.

Nothing of a parameter is asked but ``.grad``, so the one place to notice clipping is the function
that torch calls with the parameters, behind the wrapper that switches autograd off: there it is
replaced for all who have imported it, under whatever name. The wrapper is private: where a torch
has none of its make nothing is watched, and a test says so. (``get_total_norm`` gets gradients, not
parameters: what it has not been given it cannot notice.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import CellType, FunctionType
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from shardopt.errors import GradientError
from shardopt.shard import Shard

# A function of torch -> the one to name instead, of the optimizer and of ``torch.nn.utils``.
_CLIPPERS = {
    "_clip_grads_with_norm_": "clip_grad_norm_",
    "clip_grad_value_": "clip_grad_value_",
}


class Watched(Protocol):
    """One who has gradients reduced, and may free them."""

    shard: Shard

    def has_reduced(self) -> bool:
        """Whether anything has been reduced and not used yet."""

    def freed(self) -> set[int]:
        """Indices of parameters whose gradient has been reduced, and is nowhere else."""

    def zero(self, *, to_none: bool = True) -> None:
        """Forget all that has been reduced; or make it zeros, if it is freed."""


_WATCHED: WeakSet[Watched] = WeakSet()


def watch(one: Watched) -> None:
    """From now on torch's calls do not pass by what ``one`` has reduced."""
    _WATCHED.add(one)
    for name, remedy in _CLIPPERS.items():
        cell = cell_of(name)
        if cell is not None and not hasattr(cell.cell_contents, "_by_shardopt"):
            cell.cell_contents = _refusing_freed(cell.cell_contents, remedy)
    if not hasattr(nn.Module.zero_grad, "_by_shardopt"):
        nn.Module.zero_grad = _forgetting(nn.Module.zero_grad)  # type: ignore[method-assign]


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
        without = {id(parameter) for parameter in held if parameter.grad is None}
        for one in _WATCHED if without else ():
            if names := _names_of_freed(one, without):
                raise GradientError(
                    f"the gradient of parameter {names[0]!r} has been reduced and freed, so "
                    f"torch.nn.utils.{remedy} finds none; use optimizer.{remedy}"
                )
        return inner(held, *args, **options)

    refuse_freed._by_shardopt = True  # type: ignore[attr-defined]
    return refuse_freed


def _forgetting(inner: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inner)
    def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
        inner(self, set_to_none)
        for one in list(_WATCHED):
            if not one.has_reduced():
                continue
            held = {id(parameter) for parameter in self.parameters()}
            if all(id(parameter) in held for parameter in one.shard.parameters):
                one.zero(to_none=set_to_none)
            elif names := _names_of_freed(one, held):
                raise GradientError(
                    f"the gradient of parameter {names[0]!r} has been reduced and freed, and "
                    f"zero_grad() of a {type(self).__name__} that has a part of the optimizer's "
                    "parameters cannot forget it; use optimizer.zero_grad(), which forgets all"
                )

    zero_grad._by_shardopt = True  # type: ignore[attr-defined]
    return zero_grad


def _names_of_freed(one: Watched, ids: set[int]) -> list[str]:
    """The names of parameters among those with these ids whose gradient has been freed."""
    parameters, names = one.shard.parameters, one.shard.names
    return [names[index] for index in sorted(one.freed()) if id(parameters[index]) in ids]
