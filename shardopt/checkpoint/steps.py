"""A directory of steps, in which each step is complete or absent. No torch.

::

    run/
        step-100/                 complete
        step-200.tmp-9c02/        being written, by the save of this name
        step-200.gone-4f1c/       given up, on its way out

A step gets its name by one rename, after all of it is on the disk. Giving up is a rename, too, so
that of a rank that commits and one that gives up only one succeeds. Every attempt has a directory
of its own: what is left of an earlier job, and gives up late, takes nothing from a later one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from shardopt.errors import CheckpointError

_NAME = re.compile(r"step-(\d+)")
_LEFT_OVER = re.compile(r"step-\d+\.(tmp|gone)-\w+")


def steps_in(directory: Path) -> list[Path]:
    """The steps that were committed, newest first."""
    numbered = {path: number_of(path) for path in directory.glob("step-*") if path.is_dir()}
    found = [(number, path) for path, number in numbered.items() if number is not None]
    return [path for _, path in sorted(found, reverse=True)]


def number_of(path: Path) -> int | None:
    """The number in the name of a step's directory; ``None`` of any other."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


class NewStep:
    """The directory of one step while it is written; ``begin`` and ``commit`` are one rank's.

    Args:
        directory: of all steps.
        step: its number.
        run: a name that no other save has.
    """

    def __init__(self, directory: Path, step: int, run: str):
        self.directory = directory
        self.final = directory / f"step-{step}"
        self.temporary = directory / f"step-{step}.tmp-{run}"

    def begin(self) -> None:
        """Make room: remove what an earlier attempt has left, refuse to overwrite."""
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync(self.directory.parent)
        if os.path.lexists(self.final):
            raise CheckpointError(
                f"{self.final}: expected a step that is not there yet, got one that is; steps are "
                "never overwritten: remove it, or save under another step or directory"
            )
        for path in self.directory.glob("step-*"):
            if _LEFT_OVER.fullmatch(path.name):
                remove(path)

    def enter(self) -> None:
        """Make the directory to write in, whoever comes first.

        After a message that all ranks have sent since they know its name: then whoever is left
        after a failure can remove it.
        """
        self.temporary.mkdir(exist_ok=True)

    def commit(self) -> None:
        """Give the step its name, for good."""
        sync(self.temporary)
        self.temporary.rename(self.final)
        sync(self.directory)

    def give_up(self) -> None:
        """Remove what has been written, unless it is committed. Any rank may, at any time.

        What cannot be removed is left to the next ``begin``: there is an error already.
        """
        with contextlib.suppress(OSError):
            remove(self.temporary)
        for path in self.directory.glob(f"{self.final.name}.gone-*"):
            shutil.rmtree(path, ignore_errors=True)

    def keep_last(self, number: int) -> None:
        """Remove older steps than so many; never this one, which may be behind those there."""
        for path in steps_in(self.directory)[number:]:
            if path != self.final:
                remove(path)


def remove(path: Path) -> None:
    """Remove a step or what is left of one; at no moment does a part of it pass for a step."""
    gone = path.with_name(f"{path.name.split('.')[0]}.gone-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system name the file, which they do not when it is open."""
    try:
        yield
    except OSError as problem:
        problem.filename = problem.filename or str(path)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file, and see it to the disk."""
    with naming(path), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """See the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
