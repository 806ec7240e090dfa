"""What a run of ``launch/train.py`` has saved, as plain torch reads it; and ways to damage it."""

import tempfile
from pathlib import Path

import torch

from shardopt import checkpoint
from shardopt.checkpoint.manifest import read_manifest


def saved(out: Path, step: int) -> dict:
    """One step, by way of one file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.pt"
        checkpoint.consolidate(out / f"step-{step}", file)
        return torch.load(file, weights_only=True)


def steps_in(out: Path) -> list[str]:
    """Names of steps, and of what is left of any."""
    return sorted(path.name for path in out.glob("step-*"))


def flip_a_bit(path: Path) -> None:
    """In a tensor of a rank's file, or in the middle of another file."""
    data = bytearray(path.read_bytes())
    tensors = read_manifest(path.parent).tensors.values()
    chunks = [chunk for entry in tensors for chunk in entry.chunks if chunk.file == path.name]
    data[chunks[0].offset if chunks else len(data) // 2] ^= 16
    path.write_bytes(data)
