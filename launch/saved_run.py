"""Saved runs: one file to a save, complete or absent, that any number of ranks goes on from.

Torch is imported late: checking a new run needs none of it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from choices import OPTIMIZERS, SCHEDULERS, SIZES
from options import Refused, fill_in

FIELDS = ("model", "optimizer", "scheduler", "step", "options", "history", "text")


def prepare_run(given: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """The run to go on with, its options filled in and checked, its directories made."""
    run: dict[str, Any] = {"step": 0, "history": {}, "options": None, "text": None}
    if "resume" in given:
        run = read_run(Path(given["resume"]))
    options = fill_in(given, run["options"], world_size=world_size)
    if run["step"] >= options.steps:
        raise Refused(
            f"--steps: expected more than the {run['step']} steps that the resumed run has done,"
            f" got {options.steps}; there is nothing left to train"
        )
    _prepare_directory(Path(options.save), "--save" if "save" in given else "--out")
    _prepare_directory(Path(options.plot).parent, "--plot")
    return {**run, "options": options}


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


def write_run(directory: Path, run: dict[str, Any]) -> Path:
    """Write ``run`` to ``directory/step-N.pt``: the whole file or, if it is cut short, none."""
    import torch

    path = directory / f"step-{run['step']:06}.pt"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(run, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def read_run(path: Path) -> dict[str, Any]:
    """A saved run, onto the CPU; from a directory, the one with the most steps."""
    if path.is_dir():
        saves = sorted(path.glob("step-*.pt"), key=lambda save: (len(save.name), save.name))
        if not saves:
            raise Refused(
                f"--resume: expected a directory with saved runs (step-N.pt), got none in {path};"
                " name another, or start a new run without --resume"
            )
        path = saves[-1]
    if not path.is_file():
        raise Refused(
            f"--resume: expected a saved run (step-N.pt) or a directory of them, got {path},"
            " which does not exist; correct the path"
        )
    import torch

    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch reads a foreign file as a pickle, and then anything can go wrong
        run = None
    if not isinstance(run, dict) or set(FIELDS) - set(run) or not _is_known(run["options"]):
        raise Refused(
            f"--resume: expected a run saved by train.py, got {path}, which is none, or is damaged;"
            " name another"
        )
    return run


def _is_known(options: dict[str, Any]) -> bool:
    tables: dict[str, Mapping[str, Any]]
    tables = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULERS, "size": SIZES}
    return all(options.get(name) in table for name, table in tables.items())
