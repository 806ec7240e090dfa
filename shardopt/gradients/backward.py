"""When a backward ends, and whatever ends it; whether it runs within another one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction


def backward_number() -> int:
    """The number of the backward under way in this thread."""
    return int(torch._C._current_graph_task_id())


def at_end_of_backward(ended: Callable[[], None], aborted: Callable[[], None]) -> None:
    """Arrange to hear of the end of the backward under way: by itself, or by an exception."""
    Variable._execution_engine.queue_callback(_End(ended, aborted))


class _End:
    """Autograd calls it at the end of a backward; if an exception ends it, drops it uncalled."""

    def __init__(self, ended: Callable[[], None], aborted: Callable[[], None]):
        self._ended, self._aborted = ended, aborted
        self._called = False

    def __call__(self) -> None:
        self._called = True
        self._ended()

    def __del__(self) -> None:
        if not self._called:
            self._aborted()


def is_nested() -> bool:
    """Whether this backward runs within another one, as reentrant checkpointing's does."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not BackwardCFunction.apply.__code__:
        frame = frame.f_back
    return frame is not None
