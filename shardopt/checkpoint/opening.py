"""A checkpoint opened for reading, whoever has written it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardopt.checkpoint.entries import RESTORE
from shardopt.checkpoint.manifest import NAME, Manifest, is_ours, read_manifest
from shardopt.checkpoint.plain import TensorKey, decode, map_tensors
from shardopt.checkpoint.reader import Reader
from shardopt.checkpoint.source import Source
from shardopt.checkpoint.steps import steps_in
from shardopt.errors import CorruptError, IncompleteError


def open_source(path: Path) -> Source:
    """Open the directory of one step, a directory of torch's distributed checkpoint, or a file.

    Nothing in it is run: what would have to be unpickled goes through an allow-list.

    Raises:
        IncompleteError: it is not there, or is none of these.
        CorruptError: it is not what was written.
    """
    if (path / NAME).is_file() or is_ours(path):
        manifest = read_manifest(path)
        reader = Reader(path, manifest.tensors, manifest.files)
        facts = {"run": manifest.run, "world_size": manifest.world_size, **manifest.facts}
        tree = _checked_tree(manifest, path / NAME)
        return Source(path, tree, reader, manifest.step, facts, manifest.files)
    if (path / ".metadata").is_file():
        from shardopt.checkpoint.foreign import open_dcp

        return open_dcp(path)
    if path.is_file():
        from shardopt.checkpoint.foreign import open_torch_file

        return open_torch_file(path)
    if steps := steps_in(path):
        raise IncompleteError(
            f"{path}: expected the directory of one step, got one of {len(steps)} steps; name one "
            f"of them: {steps[0]}"
        )
    raise IncompleteError(
        f"{path}: expected the directory of one step (step-N), a directory of "
        "torch.distributed.checkpoint, or a file of torch.save, got none of these; correct the path"
    )


def _checked_tree(manifest: Manifest, path: Path) -> dict[str, Any]:
    """The tree of a manifest, whose tensors are all there."""

    def known(reference: TensorKey) -> TensorKey:
        if reference.key not in manifest.tensors:
            raise CorruptError(
                f"{path}: expected an entry for tensor {reference.key!r}, got none; {RESTORE}"
            )
        return reference

    try:
        tree: dict[str, Any] = map_tensors(decode(manifest.tree), known)
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise CorruptError(f"{path}: not a tree of shardopt ({problem}); {RESTORE}") from None
    return tree
