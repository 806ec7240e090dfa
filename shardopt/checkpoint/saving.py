"""``save`` and ``async_save``: write a checkpoint now, or beside training."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardopt.checkpoint.arguments import collectives_of
from shardopt.checkpoint.contents import Contents
from shardopt.checkpoint.job import Job
from shardopt.comm import Collectives
from shardopt.guard import all_or_none


class _Saving(Future[Path]):
    """A save in flight."""

    asked = False  # whether its outcome is known to the caller

    def result(self, timeout: float | None = None) -> Path:
        self.asked = True
        return super().result(timeout)


_log = logging.getLogger("shardopt")
_thread = ThreadPoolExecutor(1, thread_name_prefix="shardopt.checkpoint")
_in_flight: _Saving | None = None
_staging: list[Tensor] = []  # what an asynchronous save writes from; used again


def save(
    directory: str | os.PathLike[str],
    *,
    step: int,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    extra: Any = None,
    keep: int | None = None,
    process_group: Any = None,
) -> Path:
    """Write a checkpoint to ``directory/step-N``: all of it, or nothing. Collective.

    Every rank writes its shards; ``directory`` is on a file system that all of them see. Any number
    of ranks loads it (``load``), and so does ``torch.distributed.checkpoint``.

    Args:
        directory: of all steps; made if it is not there.
        step: how many steps have been taken; names the checkpoint.
        model: a module, whose ``state_dict`` is saved; also gives parameters their names.
        optimizer: a ``ShardedOptimizer``; its state is not put together first.
        scheduler: anything with ``state_dict()``, alike on every rank.
        extra: plain Python values and tensors, of the first rank: numbers, strings, bytes, lists,
            tuples, sets, dicts with any keys, ``Counter``, ``OrderedDict``, ``deque``.
        keep: remove older steps than the last so many, once this one is complete.
        process_group: as for ``ShardedOptimizer``, where there is no ``optimizer``.

    Returns:
        The directory of the step.

    Raises:
        CheckpointError: the step is there already.
        UnsupportedError: something that cannot be kept, named by its place.
        AgreementError: ranks differ in the arguments, in options, or in steps taken.
        OSError: where writing failed; an ``AgreementError`` that quotes it on other ranks.

    Example:
        >>> shardopt.checkpoint.save("run", step=100, model=model, optimizer=optimizer, keep=2)
    """
    collectives = collectives_of(optimizer, process_group)
    with collectives.during("checkpoint.save()"):
        settle(collectives)
        job = Job(directory, step, keep, collectives, "save()")
        contents = job.collect(model, optimizer, scheduler, extra)
        return job.write(contents, job.collectives)


def async_save(
    directory: str | os.PathLike[str],
    *,
    step: int,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    extra: Any = None,
    keep: int | None = None,
    process_group: Any = None,
) -> Future[Path]:
    """Copy what ``save`` would write, and write it while training goes on. Collective.

    One save is in flight at a time: the next one, or ``load``, waits for it, and raises what it
    has raised. The copies stay in CPU memory for the next save: a rank's shards of parameters and
    state.

    Args:
        directory, step, model, optimizer, scheduler, extra, keep, process_group: see ``save``.

    Returns:
        A future of the step's directory: ``result()`` waits for it, and raises what went wrong.

    Example:
        >>> saving = shardopt.checkpoint.async_save("run", step=100, optimizer=optimizer)
        >>> train_on()
        >>> saving.result()
    """
    global _in_flight
    collectives = collectives_of(optimizer, process_group)
    with collectives.during("checkpoint.async_save()"):
        settle(collectives)
        job = Job(directory, step, keep, collectives, "async_save()")
        contents = job.collect(model, optimizer, scheduler, extra)
        aside = job.collectives.aside("checkpoint")
    _stage(contents)
    _in_flight = _Saving()
    _thread.submit(_finish, _in_flight, job, contents, aside)
    return _in_flight


def settle(collectives: Collectives) -> None:
    """Wait for the save in flight, if there is one, and raise what it raised. Collective.

    Not if every rank has asked for its result and knows.
    """
    global _in_flight
    with all_or_none(collectives):
        saving, _in_flight = _in_flight, None
        if saving is not None and (not saving.asked or not saving.done()):
            saving.result()


def _finish(saving: _Saving, job: Job, contents: Contents, collectives: Collectives) -> None:
    try:
        saving.set_result(job.write(contents, collectives))
    except BaseException as problem:
        _log.error("an asynchronous save failed: %s", problem)  # nobody may ask for the result
        saving.set_exception(problem)


def _stage(contents: Contents) -> None:
    """Copy every piece to CPU memory, to that of the last save where all of it fits."""
    pieces = [piece.data for piece in contents.pieces]
    if [(b.shape, b.dtype) for b in _staging] != [(data.shape, data.dtype) for data in pieces]:
        _staging.clear()
        for data in pieces:
            pinned = data.device.type != "cpu"
            _staging.append(torch.empty(data.shape, dtype=data.dtype, pin_memory=pinned))
    if pieces:
        torch._foreach_copy_(_staging, pieces, non_blocking=True)
    for piece, buffer in zip(contents.pieces, _staging, strict=True):
        piece.data = buffer
    for device in {data.device for data in pieces} - {torch.device("cpu")}:
        torch.get_device_module(device).synchronize(device)
