"""Saved runs: directories of steps, complete or absent, that any number of ranks goes on from.

::

    runs/
        step-500/      one save; --resume runs takes the newest that verifies,
        step-1000/     --resume runs/step-500 that one

Torch and shardopt are imported late: checking a new run needs neither.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choices import OPTIMIZERS, SCHEDULERS, SIZES
from options import AUTO, HABITS, IDENTITY, Options, Refused, fill_in

if TYPE_CHECKING:
    from shardopt import checkpoint
    from shardopt.comm.torch_group import TorchCollectives

FIELDS = ("options", "history", "text")  # what a run saves beside model, optimizer and scheduler


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        options: all of them.
        step: how many steps are done.
        saved: the directory of the step to go on from.
        history: the curves so far, by name.
        text: the hash of what was read so far.
    """

    options: Options
    step: int = 0
    saved: Path | None = None
    history: dict[str, Any] = field(default_factory=dict)
    text: str | None = None


def newest_step(given: Mapping[str, Any]) -> Path | None:
    """What ``--resume`` goes on from; ``None`` for a new run. Not collective.

    With ``auto``, later steps that do not verify make room: they are renamed.
    """
    if given.get("resume") != AUTO:
        return Path(given["resume"]) if "resume" in given else None
    directory = Path(given.get("save", given.get("out", Options.out)))
    numbers = _steps_in(directory) if directory.is_dir() else []
    if not numbers:
        return None
    from shardopt import checkpoint

    newest = checkpoint.latest(directory)
    if newest is None:
        return directory  # which is refused: rather than start anew where there is a run to save
    for number in numbers:
        if number > int(newest.name.removeprefix("step-")):
            damaged = directory / f"step-{number}"
            aside = damaged.rename(f"{damaged}.damaged-{uuid.uuid4().hex[:8]}")
            print(f"train.py: {damaged} does not verify; it is now {aside.name}", file=sys.stderr)
    return newest


def prepare_run(
    given: Mapping[str, Any],
    place: Path | None,
    world_size: int,
    process_group: TorchCollectives | None = None,
) -> Start:
    """Fill in and check the options, make directories. Collective where a run is resumed.

    Args:
        given: the options that were given, by name.
        place: what to go on from, see :func:`newest_step`.
        world_size: how many ranks there are.
        process_group: those ranks.
    """
    automatic = given.get("resume") == AUTO
    if place is not None:
        loaded = _read(place, process_group)
        options = fill_in(given, loaded.extra["options"], world_size=world_size)
        rest = {name: loaded.extra[name] for name in ("history", "text")}
        start = Start(options, loaded.step or 0, loaded.path, **rest)
    else:
        if not automatic and not {"out", "save"} & set(given):
            given = {**given, "out": _unused(Options.out)}
        start = Start(fill_in(given, world_size=world_size))
    options = start.options
    if start.step > options.steps or (start.step == options.steps and not automatic):
        raise Refused(
            f"--steps: expected more than the {start.step} steps that the resumed run has done,"
            f" got {options.steps}; there is nothing left to train"
        )
    option = "--save" if "save" in given else "--out"
    _prepare_directory(Path(options.save), option)
    _prepare_directory(Path(options.plot).parent, "--plot")
    _check_later_steps(Path(options.save), start.step, option)
    return start


def check_place(path: Path) -> None:
    """Refuse what cannot be a saved run."""
    expected = "--resume: expected the directory of a run, or of one of its steps (step-N)"
    if not path.exists():
        raise Refused(f"{expected}, got {path}, which does not exist; correct the path")
    if not path.is_dir():
        raise Refused(
            f"{expected}, got {path}, which is a file; name the directory that train.py saved to"
        )
    if not (path / "manifest.json").exists() and not _steps_in(path):
        raise Refused(
            f"{expected}, got none in {path}; name another, or start a new run without --resume"
        )


def extra_of(options: Options, history: Any, text: str) -> dict[str, Any]:
    """What is saved beside model, optimizer and scheduler."""
    return {"options": asdict(options), "history": asdict(history), "text": text}


def load_run(start: Start, **parts: Any) -> None:
    """Load ``model=``, ``optimizer=`` and ``scheduler=`` of the step to go on from. Collective."""
    assert start.saved is not None
    _load(start.saved, **parts)


def _read(path: Path, process_group: TorchCollectives | None) -> checkpoint.Loaded:
    """What was saved beside the tensors."""
    loaded = _load(path, process_group=process_group)
    if not _is_run(loaded.extra):
        raise Refused(
            f"--resume: expected a run saved by train.py, got {loaded.path}, which is none; name"
            " another"
        )
    return loaded


def _load(path: Path, **parts: Any) -> checkpoint.Loaded:
    from shardopt import checkpoint
    from shardopt.errors import ShardoptError

    try:
        return checkpoint.load(path, **parts)
    except (ShardoptError, OSError) as problem:  # on every rank
        raise Refused(f"--resume: {problem}") from None


def _is_run(extra: Any) -> bool:
    if not isinstance(extra, dict) or set(FIELDS) - set(extra):
        return False
    options = extra["options"]
    if not isinstance(options, dict) or set(IDENTITY + HABITS) - set(options):
        return False
    tables: dict[str, Mapping[str, Any]]
    tables = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULERS, "size": SIZES}
    return all(options[name] in table for name, table in tables.items())


def _prepare_directory(path: Path, option: str) -> None:
    """Make a directory for what ``option`` writes, now rather than after hours of training."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise Refused(
            f"{option}: expected a directory that can be written, got {path}; choose another"
        )


def _check_later_steps(directory: Path, step: int, option: str) -> None:
    """Steps are never overwritten, and this run is to write later ones."""
    if later := [number for number in _steps_in(directory) if number > step]:
        raise Refused(
            f"{option}: expected a directory without saved steps later than {step}, got"
            f" {directory}, which has step-{max(later)}; go on from there (--resume), remove them,"
            " or choose another"
        )


def _unused(name: str) -> str:
    """The first of ``runs``, ``runs-2``, ``runs-3``, ... that no run has saved to."""
    number = 1
    while Path(unused := f"{name}-{number}" if number > 1 else name).is_dir() and _steps_in(
        Path(unused)
    ):
        number += 1
    return unused


def _steps_in(directory: Path) -> list[int]:
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in directory.iterdir())
    return [int(name[1]) for name in names if name]
