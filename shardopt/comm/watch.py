"""Who is missing: errors of communications name the rank that is late, stopped or gone.

[Note: Watch] A rank that waits for another one hears from its backend that time is up, or that a
connection has ended, and not whose. So with ``Guards(deadline=)`` a thread of each rank writes a
sign of life to the store of the process group every ``BEAT`` seconds: what the rank does, for how
long. A step itself writes nothing. When a communication fails, the rank reads all signs twice, and
tells who is silent, who has left with an error, or who has not come::

    rank 0   step() ---- waits for rank 1 -------- time is up -> reads the signs -> DeadlineError
    rank 1   step() -- leaves -- validates for ever
    store    rank 0: in step(), number 8, for 5.0 s;  rank 1: left step(), number 7, 5.2 s ago

Over MPI (MPICH, one host) no look at what is under way waits for a rank that is stopped, wherever
it was. What cannot be told there: of a rank that is killed, ``mpirun`` ends the others before they
can say anything; and under ``-m mpi4py`` the first rank that raises ends those that have not yet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from weakref import finalize

import torch.distributed as dist

from shardopt.comm.board import BEAT, Board, Sign, in_words
from shardopt.comm.collectives import Collectives
from shardopt.errors import AgreementError, DeadlineError, GradientError

_SILENCE = 4 * BEAT  # seconds in which a rank that lives gives a sign
_REMEDY = "; look for the cause there, end the job, and resume from the last checkpoint"
_BACKEND = (  # what they say, without a type of its own
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout",
    "Timed out waiting",
    "has not ended within",  # over MPI
)


def watch(collectives: Collectives, deadline: float | None) -> None:
    """Let errors of ``collectives`` name the rank that is missing. Collective.

    Args:
        collectives: whose ``during`` tells from now on what this rank does; of a world of one
            nothing changes.
        deadline: how long they wait, in seconds, for messages; ``None``: nothing changes.
    """
    if deadline is not None and collectives.num_ranks > 1 and collectives.watch is None:
        collectives.watch = Watch(collectives, deadline)


class Watch:
    """What this rank does, and what the others have said of themselves."""

    def __init__(self, collectives: Collectives, deadline: float):
        self._deadline = deadline
        self._rank = collectives.replica * collectives.world_size + collectives.rank
        self._board = Board(collectives, self._rank)
        self._depth = 0
        finalize(self, self._board.end).atexit = False

    @contextmanager
    def during(self, what: str, step: int | None = None) -> Iterator[None]:
        """Tell that this rank is in ``what``, unless it is within another call already.

        Raises:
            DeadlineError: a communication has failed.
        """
        board, outermost = self._board, not self._depth
        if board.sign.ended:  # what a process collects at its end, when no thread starts
            yield
            return
        self._depth += 1
        if outermost:
            number = board.sign.step if step is None else step
            board.sign = Sign(what, number, inside=True, since=time.time())
        problem = ""
        try:
            yield
        except Exception as error:
            if _is_of_the_backend(error):
                lost = DeadlineError(self._tell())
                problem = in_words(lost).partition(_REMEDY)[0]
                raise lost from error
            if not isinstance(error, (AgreementError, GradientError)):  # which all ranks raise
                problem = in_words(error)
            raise
        finally:
            self._depth -= 1
            if outermost:
                number = board.sign.step
                board.sign = Sign(what, number, since=time.time(), problem=problem)
                if problem:
                    board.hurry()

    def waits_for(self, passes: int) -> None:
        """See ``Watching``."""
        self._board.sign = replace(self._board.sign, passes=passes)

    def _tell(self) -> str:
        mine, told = self._board.sign, ""
        if before := self._board.read():
            time.sleep(_SILENCE)
            after = self._board.read()
            told = missing(before, after, self._rank, mine) if after else ""
        told = told or (
            "the store where ranks say what they do does not answer either: who holds it "
            f"({_holder()}) is gone or stopped"
        )
        return (
            f"rank {self._rank} in {mine.place}: expected every rank to take part within "
            f"{self._deadline:g} s, but {told}{_REMEDY}"
        )


def missing(before: Sequence[Sign], after: Sequence[Sign], rank: int, mine: Sign) -> str:
    """Why ``rank`` waits in ``mine``: which ranks are missing, and where they were last.

    Only the surest cause is named: who has failed or ended, or else who gives no sign of life, or
    else who is elsewhere, or has been through more or fewer backward passes, or else who has waited
    in vain, too.

    Args:
        before: every rank's sign.
        after: the same, when each rank that lives has given another one.
    """
    failed, silent, late, in_vain = [], [], [], []
    for other, (first, sign) in enumerate(zip(before, after, strict=True)):
        told = f"rank {other} {sign}"
        if other == rank:
            continue
        if sign.problem.startswith(DeadlineError.__name__):
            in_vain.append(f"{told}, with {sign.problem}")
        elif sign.problem or sign.ended:
            failed.append(f"{told}, with {sign.problem}" if sign.problem else told)
        elif first.now == sign.now:
            ago = max(time.time() - sign.now, 0.0)
            silent.append(
                f"rank {other} is gone or stopped: {ago:.1f} s ago it last said it {sign}"
            )
        elif (sign.what, sign.step, sign.inside) != (mine.what, mine.step, True):
            late.append(f"{told}, and does not come")
        elif None not in (sign.passes, mine.passes) and sign.passes != mine.passes:
            late.append(f"{told}, and this rank, after {mine.passes}")
    named = failed or silent or late or in_vain
    more = f" (and {len(named) - 4} more ranks)" if len(named) > 4 else ""
    return "; ".join(named[:4]) + more or "all are there: the network has failed, or is too slow"


def _holder() -> str:
    """Whose process the default store is in."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return "the agent of torchrun" if by_agent else "rank 0 by default"


def _is_of_the_backend(error: Exception) -> bool:
    """Whether a communication has failed, and nothing else."""
    if isinstance(error, (TimeoutError, dist.DistError)) or type(error).__module__ == "mpi4py.MPI":
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in _BACKEND)
