"""What shardopt raises beside torch's own errors.

::

    ShardoptError
    ├── UnsupportedError     (ValueError)    asked for something shardopt does not do, or not yet
    ├── AgreementError       (RuntimeError)  ranks differ where they must not; raised on every rank
    ├── GradientError        (RuntimeError)  a gradient is missing, not finite, or changed too late
    ├── ParameterError       (RuntimeError)  a parameter left its bucket and cannot be taken back
    ├── DeadlineError        (RuntimeError)  a rank is late, stopped, or gone
    ├── CheckpointError      (RuntimeError)  a checkpoint cannot be written, or not be read
    │   ├── CorruptError                     what lies there is not what was written
    │   ├── IncompleteError                  a part of it is not there
    │   └── MismatchError    (ValueError)    it is whole, and of another model or optimizer
    └── StaleStateError      (RuntimeError)  the full state is asked for and is spread over ranks

Bad arguments of the optimizer class itself raise what the class raises (``ValueError``,
``TypeError``, ``RuntimeError``). Every message says what was expected, what was got, and what to
do about it. So does every warning, at the line of the user's that led to it.
"""

from __future__ import annotations

import sys
import warnings

_OURS = ("shardopt", "torch", "contextlib")  # packages whose lines say nothing to a user


def warn(text: str) -> None:
    """Warn at the innermost line that is neither ours nor torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


class ShardoptError(Exception):
    """Base of every error that is shardopt's own."""


class UnsupportedError(ShardoptError, ValueError):
    """The request is understood and refused; the message names what to use instead."""


class AgreementError(ShardoptError, RuntimeError):
    """Ranks brought different facts to a point where they must agree.

    Raised on every rank of the group. The message names the first difference, the rank that differs
    and both values; or the rank on which something failed, and its error.
    """


class GradientError(ShardoptError, RuntimeError):
    """A gradient cannot be used: missing, not finite, or changed after it was sent.

    Raised on every rank of the group, before anything is updated.
    """


class ParameterError(ShardoptError, RuntimeError):
    """A parameter is no longer where the optimizer keeps it, and was not silently ignored."""


class DeadlineError(ShardoptError, RuntimeError):
    """A rank was not where the others waited for it: it is late, stopped, or gone.

    Raised with ``Guards(deadline=)`` in place of what the backend says, which is its cause. The
    message names the rank, and where it was last.
    """


class StaleStateError(ShardoptError, RuntimeError):
    """``state_dict()`` needs all shards and no fresh consolidated copy is at hand."""


class CheckpointError(ShardoptError, RuntimeError):
    """A checkpoint cannot be written, or not be read; the message names file and tensor."""


class CorruptError(CheckpointError):
    """A checkpoint is not what was written: a checksum, a size or a name differs."""


class IncompleteError(CheckpointError):
    """A checkpoint, or a file of one, is not there."""


class MismatchError(CheckpointError, ValueError):
    """A checkpoint is whole and does not fit: something is missing, too much, or of another kind.

    The message names what differs, and both sides.
    """
