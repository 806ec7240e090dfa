"""Read a checkpoint into a model, an optimizer and a scheduler, at any number of ranks.

Each rank reads what it holds, checked block by block, into new memory; only when all ranks have all
of it does anything change. So a load that fails leaves everything as it was.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardopt.algos.mixture import class_name
from shardopt.checkpoint.arguments import check_parts, collectives_of, given, unwrapped
from shardopt.checkpoint.fitting import Fitting
from shardopt.checkpoint.opening import open_source
from shardopt.checkpoint.saving import settle
from shardopt.checkpoint.steps import steps_in
from shardopt.checkpoint.verify import verify
from shardopt.comm import Collectives
from shardopt.comm.collectives import gather_texts
from shardopt.errors import CheckpointError, IncompleteError, UnsupportedError
from shardopt.guard import agree, all_or_none

_log = logging.getLogger("shardopt")


@dataclass
class Loaded:
    """What ``load`` has found.

    Attributes:
        path: the directory of the step, or the file.
        step: how many steps had been taken; ``None`` where the checkpoint does not say.
        extra: what was saved as such, on every rank.
        skipped: with ``strict=False``, what was not loaded and why, a line each.
    """

    path: Path
    step: int | None = None
    extra: Any = None
    skipped: list[str] = field(default_factory=list)


def load(
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    strict: bool = True,
    process_group: Any = None,
) -> Loaded:
    """Load a checkpoint that any number of ranks has written. Collective.

    Each rank reads what it is to hold, every block checked against its checksum. If anything is
    wrong on any rank, nothing changes on any; but a load hook of the model's own that raises leaves
    the model as far as it has come.

    Args:
        directory: of steps, of which the newest that verifies is taken; or of one step; or what
            ``torch.distributed.checkpoint`` has written, as with FSDP2; or a file of
            ``torch.save`` with a ``state_dict``, or with several by the names ``model``,
            ``optimizer``, ``scheduler``. Nothing in it is run.
        step: which one, if not the newest.
        model, optimizer, scheduler: what to load into; see ``save``. What is not given is not read.
        strict: refuse a checkpoint in which anything is missing, too much, or of another shape,
            dtype or order; otherwise load what fits, and say in ``skipped`` what does not.
        process_group: as for ``ShardedOptimizer``, where there is no ``optimizer``.

    Raises:
        IncompleteError: there is no checkpoint, or a file of it is missing.
        CorruptError: it is not what was written.
        MismatchError, ValueError: it does not fit; names what does not.
        AgreementError: on other ranks than the one that failed.

    Example:
        >>> loaded = shardopt.checkpoint.load("run", model=model, optimizer=optimizer)
        >>> loaded.step
        100
    """
    collectives = collectives_of(optimizer, process_group)
    with collectives.during("checkpoint.load()"):
        return _load(collectives, directory, step, model, optimizer, scheduler, strict)


def _load(
    collectives: Collectives,
    directory: str | os.PathLike[str],
    step: int | None,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    strict: bool,
) -> Loaded:
    settle(collectives)
    loaded = given(model, optimizer, scheduler)
    facts: dict[str, object] = {"strict": strict, "what is loaded": loaded}
    path = _agree_on_path(collectives, Path(directory).absolute(), step, facts)
    with all_or_none(collectives):
        check_parts(model, scheduler)
        model = unwrapped(model)
        source = open_source(path)
    with source:
        run = {"checkpoint": source.facts.get("run", str(path))}
        agree(collectives, run, "load from a file system that all ranks share")
        reading = Fitting(source, strict)
        with all_or_none(collectives):
            tensors = None if model is None else reading.model(model)
            part = None if optimizer is None else reading.optimizer(optimizer, model)
            schedule = None if scheduler is None else reading.scheduler(class_name(type(scheduler)))
            extra = reading.plain("extra") if "extra" in source.tree else None
    with _put_back_on_failure(optimizer, scheduler):
        if optimizer is not None and part is not None:
            optimizer._take_in(*part)
        with all_or_none(collectives):
            if schedule is not None:
                scheduler.load_state_dict(schedule)
        with all_or_none(collectives):  # in place, so last
            if tensors is not None:
                model.load_state_dict(tensors, strict=strict)
    for line in reading.skipped:
        _log.warning("%s: skipped %s", path, line)
    return Loaded(path, source.step, extra, reading.skipped)


@contextmanager
def _put_back_on_failure(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """What is loaded by the code of classes and schedulers may be refused by it, on any rank."""
    put_optimizer_back = None
    if optimizer is not None:
        optimizer.wait()  # or what is on its way comes after what is loaded
        put_optimizer_back = optimizer._remember()
    schedule = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
    try:
        yield
    except BaseException:
        if put_optimizer_back is not None:
            put_optimizer_back()
        if schedule is not None:
            with contextlib.suppress(Exception):  # there is an error already
                scheduler.load_state_dict(schedule)
        raise


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest step that verifies: every byte of it is read. Not collective.

    Args:
        directory: of all steps.

    Returns:
        The directory of the step, or ``None``. A step that does not verify is passed over, with a
        warning in the log.
    """
    for path in steps_in(Path(directory)):
        try:
            verify(path)
        except (CheckpointError, UnsupportedError, OSError) as problem:
            _log.warning("passed over: %s", problem)
        else:
            return path
    return None


def _agree_on_path(
    collectives: Collectives, directory: Path, step: int | None, facts: dict[str, object]
) -> Path:
    """The checkpoint that the first rank finds, where all ranks ask for the same."""
    facts = {"checkpoint directory": str(directory), "checkpoint step": step, **facts}
    agree(collectives, facts, "load alike on every rank")
    found = b""
    with all_or_none(collectives):
        if collectives.rank == collectives.replica == 0:
            found = os.fsencode(_find(directory, step))
    return Path(os.fsdecode(gather_texts(collectives, found)[0]))


def _find(directory: Path, step: int | None) -> Path:
    if step is not None:
        return directory / f"step-{step}"
    steps = steps_in(directory) if directory.is_dir() else []
    if not steps:
        return directory
    path = latest(directory)
    if path is None:
        raise IncompleteError(
            f"{directory}: expected a step that verifies, got {len(steps)} of which none does; "
            "the log says why; restore one from a copy"
        )
    return path
