"""Buckets whose gradients are all there, in the order in which their reductions start.

[Note: Line] Where ``.grad`` stays, a bucket need not be copied at once, so a hook does not wait for
room: the bucket stands in line, and a later hook starts it, or the end of backward. When there is
room differs from rank to rank, and launch order is law: so all optimizers that share a channel
stand in one line, in the order in which their buckets were ready, and nobody passes anybody by. At
the end of a backward no line is left, as others (a gather, a broadcast) do not stand in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary


@dataclass(frozen=True)
class _Ready:
    start: Callable[[], None]
    has_room: Callable[[], bool]


class Line:
    """First come, first started."""

    def __init__(self) -> None:
        self._ready: deque[_Ready] = deque()

    def join(self, start: Callable[[], None], has_room: Callable[[], bool]) -> None:
        """Stand behind all others.

        Args:
            start: waits for room if there is none.
            has_room: whether it would not wait.
        """
        self._ready.append(_Ready(start, has_room))

    def advance(self, *, to_the_end: bool) -> None:
        """Start those for whom there is room, or all, with waiting."""
        while self._ready and (to_the_end or self._ready[0].has_room()):
            self._ready.popleft().start()


_LINES: WeakKeyDictionary[object, Line] = WeakKeyDictionary()


def line_of(channel: object) -> Line:
    """The line of all who start their communications on ``channel``."""
    return _LINES.setdefault(channel, Line())
