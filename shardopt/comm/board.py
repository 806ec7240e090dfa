"""A board in a store: every rank writes on it what it does, and that it lives; see ``watch``."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

from shardopt.comm.collectives import Collectives, gather_texts

BEAT = 0.2  # seconds between two signs of life
_PATIENCE = 1.0  # seconds for the store to answer
_LONGEST = 500  # characters of an error that others quote
_CLOSED = "closed"


@dataclass(frozen=True)
class Sign:
    """What a rank does at a moment.

    Attributes:
        what: the call, ``"step()"``.
        step: the number of the last step that it has begun.
        inside: whether the call is under way, or the rank has left it.
        since: when that began, in seconds of its own clock.
        passes: how many backward passes it has been through, where their results are waited for.
        problem: the error with which it left.
        ended: whether the process has come to its end.
        now: when this was written.
    """

    what: str = "the constructor"
    step: int = 0
    inside: bool = False
    since: float = 0.0
    passes: int | None = None
    problem: str = ""
    ended: bool = False
    now: float = 0.0

    @property
    def place(self) -> str:
        """Of the call among the steps."""
        number = f", number {self.step}" if self.what == "step()" else f" after step {self.step}"
        return f"{self.what}{number}"

    def __str__(self) -> str:
        seconds = max(self.now - self.since, 0.0)
        if self.ended:
            return f"has ended, after {self.place}"
        if self.inside:
            after = "" if self.passes is None else f", after {self.passes} backward passes"
            return f"has been in {self.place}{after}, for {seconds:.1f} s"
        # Of a backward only the reductions are told: it may go on where nobody hears of it.
        goes_on = self.what == "backward()" and not self.problem
        return f"{'was in' if goes_on else 'has left'} {self.place}, {seconds:.1f} s ago"


class Board:
    """Every rank's sign, in a store to which a thread of each rank writes.

    Attributes:
        sign: this rank's; written at the next beat, or when ``hurry`` is called.
    """

    def __init__(self, collectives: Collectives, rank: int):
        self.sign = Sign(since=time.time())
        self._rank, self._num_ranks = rank, collectives.num_ranks
        self._held, store = _store_of(collectives)
        name = gather_texts(collectives, uuid.uuid4().hex.encode())[0].decode()
        self._store: Any = dist.PrefixStore(f"shardopt/watch/{name}", store)
        self._last: list[Sign] | None = None  # what was read before the store went
        self._pid = os.getpid()  # a fork is no rank
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="shardopt.watch", daemon=True)
        self._thread.start()
        _BOARDS.add(self)

    def hurry(self) -> None:
        """Write the sign now; does not wait for the store."""
        self._wake.set()

    def read(self) -> list[Sign] | None:
        """Every rank's last sign, or ``None`` if the store is gone, or does not answer in time."""
        signs: list[Sign] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                signs.extend(self._read())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        return signs or self._last

    def _read(self) -> list[Sign]:
        keys = [str(rank) for rank in range(self._num_ranks)]
        if self._store.has_extended_api():
            texts = self._store.multi_get(keys)
        else:
            texts = [self._store.get(key) for key in keys]
        return [Sign(*json.loads(text)) for text in texts]

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # who holds the store is gone
            while True:
                sign = replace(self.sign, now=time.time())
                self._store.set(str(self._rank), json.dumps(astuple(sign)))
                if sign.ended:
                    break
                if self._store.check([_CLOSED]):
                    self._last = self._read()
                    return
                self._wake.wait(BEAT)
                self._wake.clear()
            if self._rank == 0:
                self._store.set(_CLOSED, "")

    def end(self) -> bool:
        """Write the last sign; whether the store may go with this process."""
        if self.sign.ended or os.getpid() != self._pid:
            return False
        uncaught = getattr(sys, "last_value", None)
        problem = self.sign.problem or in_words(uncaught)
        self.sign = replace(self.sign, problem=problem, ended=True)
        self.hurry()
        if threading.current_thread() is not self._thread:  # which may collect garbage, too
            self._thread.join(_PATIENCE)
        return self._rank == 0


_BOARDS: WeakSet[Board] = WeakSet()


@atexit.register
def _leave() -> None:
    """Say that this process ends, while its threads still can."""
    closes = [board.end() for board in list(_BOARDS)]
    if any(closes):
        time.sleep(2 * BEAT)  # in which the others read it


def in_words(error: BaseException | None) -> str:
    """What others are told of an error."""
    return "" if error is None else f"{type(error).__name__}: {error}"[:_LONGEST]


def _store_of(collectives: Collectives) -> tuple[Any, Any]:
    """A store that every rank reaches: what has to be held, and this rank's access to it."""
    if dist.is_initialized():
        held: Any = dist.distributed_c10d._get_default_store()
        store = held
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        # A connection of our own, where there can be one: else a sign waits for whatever else this
        # process waits for.
        clone = getattr(store, "clone", None) if isinstance(store, dist.TCPStore) else None
        return held, clone() if clone else store
    first = collectives.rank == collectives.replica == 0
    opened = partial(dist.TCPStore, timeout=timedelta(seconds=60), wait_for_workers=False)
    held = opened(socket.gethostname(), 0, is_master=True) if first else None
    address = f"{held.host} {held.port}" if held else ""
    host, port = gather_texts(collectives, address.encode())[0].decode().split()
    return held, opened(host, int(port), is_master=False)
