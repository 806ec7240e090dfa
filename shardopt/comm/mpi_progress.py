"""What MPI has under way: brought forward by a thread, and waited for with a time limit.

[Note: Progress] MPI need not move anything but inside of its calls, so what is started and left
alone starts in truth when it is waited for: on two ranks of one host (MPICH 5.0.2, 64 MB) an
all-gather took 10 ms of waiting, right away or after half a second. So while anything is under way,
a thread looks at it every millisecond: two or three looks move all of it, and the wait is 0.02 ms.
Refused: to look from backward hooks only, since none comes while the next forward runs or a file is
written; and ``MPICH_ASYNC_PROGRESS=1``, which keeps a core of every rank busy and is MPICH's alone.

MPI has no time limit either, so nobody waits inside of it.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mpi4py import MPI

LOOK_EVERY = 1e-3  # seconds


class UnderWay:
    """A request of MPI, from its start to ``wait``. The memory is kept until MPI has done with it.

    Args:
        request: what MPI has started.
        memory: what it reads and writes.
        what: it is, for the error.
        timeout: how long it may take before ``wait`` raises.
        finish: what is left to do when it has ended.
    """

    def __init__(
        self,
        request: MPI.Request,
        *memory: Tensor,
        what: str,
        timeout: timedelta,
        finish: Callable[[], object] = lambda: None,
    ):
        self._request, self._memory = request, memory
        self._what, self._timeout, self._finish = what, timeout, finish
        self._ended = False
        self._error: RuntimeError | None = None
        _PROGRESS.add(self, next((t.device for t in memory if t.is_cuda), None))

    def look(self) -> bool:
        """Whether it has ended; for ``Progress``, one thread at a time."""
        try:
            self._ended = self._request.Test()
        except RuntimeError as error:  # MPI.Exception
            self._error, self._ended = error, True
        return self._ended

    def is_completed(self) -> bool:
        """Whether ``wait`` would not wait."""
        if not self._ended:
            _PROGRESS.advance()
        return self._ended

    def wait(self) -> None:
        """Return when it has ended.

        Raises:
            RuntimeError: not within the time limit, or what MPI says of it.
        """
        start = time.monotonic()
        while not self.is_completed():
            waited = time.monotonic() - start
            if waited > self._timeout.total_seconds():
                raise RuntimeError(
                    f"{self._what} has not ended within {self._timeout.total_seconds():g} s: a "
                    "rank has failed, or takes no part in it. This job cannot go on; start it by "
                    "'mpirun -n N python -m mpi4py job.py', so that an error on one rank ends it "
                    "on all"
                )
            time.sleep(min(LOOK_EVERY, waited / 10))
        if self._error is not None:
            raise self._error
        self._finish()


class Progress:
    """Looks at all that is under way until it has ended. See [Note: Progress]."""

    def __init__(self) -> None:
        self._under_way: list[UnderWay] = []
        self._lock = threading.Lock()  # MPI lets one thread at a time complete a request
        self._news: queue.SimpleQueue[bool] = queue.SimpleQueue()  # whether to go on
        self._thread: threading.Thread | None = None
        self._device: torch.device | None = None  # whose memory MPI reads and writes

    def add(self, started: UnderWay, device: torch.device | None) -> None:
        """Look at this one, too, which may be in the memory of an accelerator."""
        with self._lock:
            self._under_way.append(started)
            self._device = device or self._device
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shardopt MPI", daemon=True)
                self._thread.start()
                atexit.register(self._end)
        self._news.put(True)

    def advance(self) -> None:
        """Look once."""
        with self._lock:
            self._under_way = [each for each in self._under_way if not each.look()]

    def _run(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                if not self._news.get(timeout=LOOK_EVERY if self._under_way else None):
                    return
            if self._device is not None:
                torch.cuda.set_device(self._device)  # each thread has its own
            self.advance()

    def _end(self) -> None:
        """End the thread, before mpi4py ends MPI."""
        self._news.put(False)
        if self._thread is not None:
            self._thread.join()


_PROGRESS = Progress()
