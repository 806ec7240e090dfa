"""A checkpoint opened for reading, whoever has written it."""

from __future__ import annotations

from pathlib import Path

from shardopt.checkpoint.manifest import NAME, is_ours, read_manifest
from shardopt.checkpoint.reader import Reader
from shardopt.checkpoint.source import Source
from shardopt.checkpoint.steps import steps_in
from shardopt.errors import IncompleteError


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
        return Source(path, manifest.tree, reader, manifest.step, facts, manifest.files)
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
    got = "none of these" if path.exists() else "nothing at all"
    raise IncompleteError(
        f"{path}: expected a directory of steps or of one step (step-N), a directory of "
        f"torch.distributed.checkpoint, or a file of torch.save, got {got}; correct the path"
    )
