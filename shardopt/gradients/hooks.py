"""Hooks on parameters: who hears of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from weakref import WeakMethod, WeakSet

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class Hooks:
    """Tells of every gradient that autograd has added to a parameter.

    Nobody else hears of the parameter any more: an optimizer that another one takes the place of
    may live on for a while, on some ranks.

    Args:
        on_gradient: a method that is told the parameter's index and the parameter; its object is
            not kept alive.
    """

    def __init__(self, on_gradient: Callable[[int, Tensor], None]):
        self._on_gradient = WeakMethod(on_gradient)
        self._handles: dict[int, RemovableHandle] = {}  # by id of a parameter
        _ALIVE.add(self)

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Hear of every one that wants a gradient; one may want it from now on only."""
        for index, parameter in enumerate(parameters):
            if id(parameter) in self._handles or not parameter.requires_grad:
                continue
            for other in _ALIVE:
                if handle := other._handles.get(id(parameter)):
                    handle.remove()
            hook = partial(_call, self._on_gradient, index)
            self._handles[id(parameter)] = parameter.register_post_accumulate_grad_hook(hook)


_ALIVE: WeakSet[Hooks] = WeakSet()


def _call(
    on_gradient: WeakMethod[Callable[[int, Tensor], None]], index: int, parameter: Tensor
) -> None:
    if (method := on_gradient()) is not None:
        method(index, parameter)
