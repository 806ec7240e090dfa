"""SIGTERM or SIGUSR1: the notice that a job has to end soon, from Slurm, torchrun or a cloud."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """The run has been told to end, and is saved."""

    def __init__(self, number: int, saved: str):
        super().__init__(f"ended by {signal.Signals(number).name}; {saved} is saved")
        self.exit_code = 128 + number  # as shells put it


class Notice:
    """Whether a signal has come to any rank, which all ranks learn after the same step.

    ::

        with notice:
            while ...:
                notice.ask()       # one number, on the CPU, while the step goes on
                step()
                if notice.came(): ...

    Args:
        ranks: those who are asked. Making it is collective.
    """

    def __init__(self, ranks: Ranks):
        self._here = 0  # the last signal to this rank
        self._anywhere = torch.zeros(1, dtype=torch.int64)
        self._group: Any = None
        if ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=ranks.timeout)
        self._asked: dist.Work | None = None

    def __enter__(self) -> None:
        self._before = [signal.signal(number, self._note) for number in SIGNALS]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._here = number

    def ask(self) -> None:
        """Start to ask all ranks."""
        self._anywhere.fill_(self._here)
        if self._group is not None:
            self._asked = dist.all_reduce(
                self._anywhere, dist.ReduceOp.MAX, group=self._group, async_op=True
            )

    def came(self) -> int:
        """The signal that has come, or 0; the same on every rank."""
        if self._asked is not None:
            self._asked.wait()
        return int(self._anywhere)
