"""One save: what each rank writes, what the first one makes of it, and how it ends.

::

    every rank   contents -> step-N.tmp-run/__r_0.distcp, flushed to the disk
    gather       what each rank has written, with checksums, or its error
    first rank   values.distcp, .metadata, manifest.json -> rename to step-N -> older steps go

What fails on one rank fails on all, and leaves nothing of this step.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shardopt.algos.mixture import class_name
from shardopt.checkpoint.arguments import check_numbers, check_parts, given
from shardopt.checkpoint.contents import Contents, contents_of
from shardopt.checkpoint.dcp_metadata import VALUES, dcp_files
from shardopt.checkpoint.entries import FileEntry, TensorEntry
from shardopt.checkpoint.entry_text import from_text, to_text
from shardopt.checkpoint.garbage import no_collection
from shardopt.checkpoint.manifest import (
    NAME,
    Manifest,
    file_header,
)
from shardopt.checkpoint.plain import decode
from shardopt.checkpoint.steps import NewStep, write_synced
from shardopt.checkpoint.writer import write_pieces
from shardopt.comm import Collectives
from shardopt.comm.collectives import gather_texts
from shardopt.errors import CheckpointError
from shardopt.guard import agree, all_or_none


class Job:
    """One save: where to, and among which ranks."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        step: int,
        keep: int | None,
        collectives: Collectives,
        call: str,
    ):
        self.collectives, self._call = collectives, call
        with all_or_none(self.collectives):
            check_numbers(step, keep)
            self._path = Path(directory).absolute()
        self._step, self._keep = step, keep
        self._is_first = self.collectives.rank == self.collectives.replica == 0
        self._facts = {"torch": str(torch.__version__)}

    def collect(self, model: Any, optimizer: Any, scheduler: Any, extra: Any) -> Contents:
        """What this rank is to write, after ranks have agreed that they save the same."""
        facts: dict[str, object] = {
            "checkpoint directory": str(self._path),
            "checkpoint step": self._step,
            "checkpoint keep": self._keep,
            "the call": self._call,
            "what is saved": given(model, optimizer, scheduler),
        }
        with all_or_none(self.collectives):
            check_parts(model, scheduler)
            if scheduler is not None:
                facts["the scheduler's state"] = scheduler.state_dict()
        if optimizer is None:
            agree(self.collectives, facts, "save alike on every rank")
        else:
            optimizer._snapshot.agree(facts, optimizer.param_groups)
            self._facts["optimizer_class"] = optimizer._shard.class_of({})
        if scheduler is not None:
            self._facts["scheduler_class"] = class_name(type(scheduler))
        with all_or_none(self.collectives):
            contents = contents_of(self.collectives, model, optimizer, scheduler, extra)
        return contents

    def write(self, contents: Contents, collectives: Collectives) -> Path:
        """Write, gather what was written, commit."""
        run = gather_texts(collectives, uuid.uuid4().hex.encode())[0].decode()
        new, number = NewStep(self._path, self._step, run), collectives.rank
        try:
            with all_or_none(collectives):
                if self._is_first:
                    new.begin()
            written = b""
            with all_or_none(collectives):
                if collectives.replica == 0:
                    written = _write_file(
                        new, file_header(run, self._step, number), contents, number
                    )
            texts = gather_texts(collectives, written)[: collectives.world_size]
            with all_or_none(collectives):
                if self._is_first:
                    self._commit(new, run, texts)
        except BaseException:
            new.give_up()
            raise
        return new.final

    def _commit(self, new: NewStep, run: str, texts: Sequence[bytes]) -> None:
        for name, data in self._described(new, run, texts).items():
            write_synced(new.temporary / name, data)
        new.commit()
        if self._keep is not None:
            new.keep_last(self._keep)

    @no_collection()
    def _described(self, new: NewStep, run: str, texts: Sequence[bytes]) -> dict[str, bytes]:
        """The files that say what ranks have written, in the order of writing."""
        manifest = Manifest(run, self._step, len(texts), self._facts)
        for text in texts:
            _merge(manifest, json.loads(text, object_hook=decode))
        _in_order(manifest)
        _check_whole(manifest)
        for name, entry in manifest.files.items():
            _check_seen(new.temporary / name, entry.size)
        metadata, values = dcp_files({**manifest.tree, "step": self._step}, manifest.tensors)
        files = {VALUES: values, ".metadata": metadata}
        for name, data in files.items():
            manifest.files[name] = FileEntry(len(data), zlib.crc32(data), None)
        return {**files, NAME: manifest.to_bytes()}


def _write_file(new: NewStep, header: bytes, contents: Contents, number: int) -> bytes:
    """This rank's file; returns what the first rank is to know of it."""
    new.enter()
    path = new.temporary / f"__{number}_0.distcp"
    entries, file = write_pieces(path, header, contents.pieces, number)
    told = {
        "tree": contents.tree,
        "tensors": {key: to_text(entry) for key, entry in entries.items()},
        "files": {path.name: [file.size, file.crc, file.rank]},
    }
    return json.dumps(told, separators=(",", ":"), allow_nan=False).encode()


def _merge(manifest: Manifest, told: dict[str, Any]) -> None:
    """Add what one rank tells."""
    for name, part in told["tree"].items():
        known = manifest.tree.setdefault(name, part)
        if name == "optimizer" and known is not part:
            known["state"].update(part["state"])
    for key, text in told["tensors"].items():
        entry = from_text(text)
        known = manifest.tensors.setdefault(key, TensorEntry(entry.dtype, entry.shape, entry.order))
        if (known.dtype, known.shape, known.order) != (entry.dtype, entry.shape, entry.order):
            raise CheckpointError(
                f"tensor {key!r}: expected the same on every rank, got {known} and {entry}; load "
                "one complete state_dict on every rank, or from_= the rank that has it"
            )
        known.chunks += entry.chunks
    manifest.files |= {name: FileEntry(*file) for name, file in told["files"].items()}


def _in_order(manifest: Manifest) -> None:
    """The optimizer's state in the order of its parameters, whoever has told it."""
    if "optimizer" in manifest.tree:
        optimizer = manifest.tree["optimizer"]
        keys = [key for group in optimizer["param_groups"] for key in group["params"]]
        state = optimizer["state"]
        optimizer["state"] = {key: state[key] for key in dict.fromkeys(keys) if key in state}


def _check_whole(manifest: Manifest) -> None:
    for key, entry in manifest.tensors.items():
        if (got := sum(chunk.box.numel for chunk in entry.chunks)) != entry.numel:
            raise CheckpointError(
                f"tensor {key!r}: expected {entry.numel} elements from all ranks together, got "
                f"{got}: some have it, others have not; load one complete state_dict on every "
                "rank, or from_= the rank that has it"
            )


def _check_seen(path: Path, size: int) -> None:
    got = path.stat().st_size if path.exists() else None
    if got != size:
        raise CheckpointError(
            f"{path}: expected {size} bytes as its rank has written, the first rank sees {got}; "
            "save to a directory on a file system that all ranks share"
        )
