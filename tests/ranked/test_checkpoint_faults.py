"""What fails on one rank while a step is written is raised on all, and leaves the step before."""

import errno
import os
import resource
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

from shardopt import ShardedOptimizer
from shardopt.checkpoint import async_save, latest, load, save
from shardopt.checkpoint.steps import NewStep
from shardopt.checkpoint.verify import verify
from shardopt.errors import AgreementError, CheckpointError, CorruptError, IncompleteError
from tests import faults
from tests.ranks import on_ranks
from tests.twins import assert_same

SAVES = {
    "save": lambda *args, **kwargs: save(*args, **kwargs),
    "async_save": lambda *args, **kwargs: async_save(*args, **kwargs).result(),
}


def begin(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Linear(300, 301)
    optimizer = ShardedOptimizer(model.parameters(), AdamW, lr=0.1, bucket_cap_mb=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_intact(directory, parts):
    """Step 1 is all there is, it verifies and loads, and the next save works."""
    dist.barrier()
    assert names(directory) == ["step-1"]
    verify(directory / "step-1")
    assert latest(directory) == directory / "step-1"
    again = begin(seed=3)
    assert load(directory, **again).step == 1
    assert_same(again["model"].state_dict(), parts["model"].state_dict())
    save(directory, step=3, **again)
    assert load(directory, **parts).step == 3
    dist.barrier()
    assert names(directory) == ["step-1", "step-3"]


@contextmanager
def file_size_limit(limit):
    """``write`` fails as on a full disk, with EFBIG for ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@on_ranks(2, 3)
@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("how", SAVES)
def test_a_file_that_cannot_grow(how, on, rank, tmp_path):
    parts = begin()
    save(tmp_path, step=1, **parts)
    limit = 100_000 if rank == on else resource.RLIM_INFINITY
    kind, named = OSError if rank == on else AgreementError, f"File too large.*__{on}_0.distcp"
    with file_size_limit(limit), pytest.raises(kind, match=named):
        SAVES[how](tmp_path, step=2, **parts)
    assert_intact(tmp_path, parts)


@contextmanager
def small_disk(directory, size):
    """A file system of so many bytes; skips where it cannot be made."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        made = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("no permission to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("free", [0.1, 0.6, 0.99])
def test_a_full_disk(free, tmp_path):
    """In one process: a mount is seen by all ranks or by none."""
    parts = begin()
    whole = save(tmp_path / "elsewhere", step=1, **parts)
    size = sum(-(-file.stat().st_size // 4096) * 4096 for file in whole.iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, int(size * (1 + free))):
        save(disk, step=1, **parts)
        for how in SAVES.values():
            with pytest.raises(OSError, match="No space left on device"):
                how(disk, step=2, **parts)
            assert names(disk) == ["step-1"]
            assert load(disk, **parts).step == 1


def fail_on_first_rank(patch, rank, step, error):
    """Let one kind of operation of the first rank fail: what comes after its own file."""
    if rank == 0:

        def fail(*args, **kwargs):
            raise error

        patch.setattr(*step, fail)


@on_ranks(2)
@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize(
    "step",
    [
        (NewStep, "begin"),
        (NewStep, "commit"),
        ("shardopt.checkpoint.job.write_synced",),
        ("shardopt.checkpoint.job.dcp_files",),
        (Path, "rename"),
    ],
    ids=["begin", "commit", "manifest", "metadata", "rename"],
)
def test_every_part_of_the_first_rank_may_fail(step, how, rank, tmp_path):
    parts = begin()
    save(tmp_path, step=1, **parts)
    with pytest.MonkeyPatch.context() as patch:
        fail_on_first_rank(patch, rank, step, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OSError if rank == 0 else AgreementError, match="Input/output error"):
            SAVES[how](tmp_path, step=2, **parts)
    assert_intact(tmp_path, parts)


@on_ranks(2)
@pytest.mark.parametrize("on", [0, 1])
def test_a_flush_that_fails(on, rank, tmp_path):
    parts = begin()
    save(tmp_path, step=1, **parts)
    with pytest.MonkeyPatch.context() as patch:
        if rank == on:

            def fail(descriptor):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError if rank == on else AgreementError, match="No space left"):
            save(tmp_path, step=2, **parts)
    assert_intact(tmp_path, parts)


@on_ranks(1, 2)
@pytest.mark.parametrize("how", SAVES)
def test_a_directory_that_cannot_be_written(how, rank, tmp_path):
    """Root may write where others may not, but not into a file, nor into /proc."""
    parts = begin()
    if rank == 0:
        (tmp_path / "file").write_bytes(b"mine")
    for directory, error in ((tmp_path / "file", "File exists"), (Path("/proc/x"), "No such file")):
        with pytest.raises((OSError, AgreementError), match=error) as caught:
            SAVES[how](directory, step=2, **parts)
        assert str(directory) in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"mine"


@on_ranks(2)
def test_a_name_that_is_taken(rank, tmp_path):
    """By an empty directory, which a rename would take the place of, a file, or a broken link."""
    parts = begin()
    if rank == 0:
        (tmp_path / "step-1").mkdir()
        (tmp_path / "step-2").write_bytes(b"")
        (tmp_path / "step-3").symlink_to("nowhere")
    dist.barrier()
    for step in (1, 2, 3):
        with pytest.raises((CheckpointError, AgreementError), match="never overwritten"):
            save(tmp_path, step=step, **parts)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    assert latest(tmp_path) is None
    save(tmp_path, step=4, **parts)
    assert load(tmp_path, **parts).step == 4


@on_ranks(2, 3)
@pytest.mark.parametrize("damage", ["missing", "of another step", "flipped"])
def test_the_file_of_one_rank(damage, rank, world_size, tmp_path):
    """With another number of ranks, that is: each loads what others wrote."""
    parts = begin()
    for step in (1, 2):
        save(tmp_path, step=step, **parts)
        for parameter in parts["model"].parameters():
            parameter.grad = torch.ones_like(parameter)
        parts["optimizer"].step()
    file = f"__{world_size - 1}_0.distcp"
    dist.barrier()
    if rank == 0:
        path = tmp_path / "step-2" / file
        data = bytearray((tmp_path / "step-1" / file).read_bytes())
        if damage == "flipped":
            data = bytearray(path.read_bytes())
            data[data.rindex(b"PK\x01\x02") - 3000] ^= 1
        path.unlink()
        if damage != "missing":
            path.write_bytes(data)
    dist.barrier()
    with pytest.raises(IncompleteError if damage == "missing" else CorruptError, match=file):
        verify(tmp_path / "step-2")
    again = begin(seed=3)
    before = {name: value.clone() for name, value in again["model"].state_dict().items()}
    with pytest.raises((CheckpointError, AgreementError), match=file):
        load(tmp_path, step=2, **again)
    assert_same(dict(again["model"].state_dict()), before)
    assert load(tmp_path, **again).step == 1


@pytest.mark.slow
def test_ranks_killed_at_random_moments(tmp_path):
    found = faults.run(tmp_path, kills=12, seed=1)
    assert found.total() == 12 and found["under way"] > 0, found
