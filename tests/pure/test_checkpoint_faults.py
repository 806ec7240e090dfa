"""Damage of every kind to what ``save`` has written: noticed and named, or without effect."""

import os
import random
import shutil
from pathlib import Path

import pytest

from shardopt.checkpoint.manifest import HEADER, NAME, read_manifest
from shardopt.errors import CorruptError, IncompleteError
from tests.checkpoint_damage import METADATA, RANKS_FILE, VALUES, assert_noticed, write
from tests.checkpoints import flip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with two steps, and what each holds."""
    directory = tmp_path_factory.mktemp("written")
    return directory, write(directory)


@pytest.fixture
def run(written, tmp_path):
    return Path(shutil.copytree(written[0], tmp_path / "run"))


def places(step):
    """A byte of each region of each file -> whether a load must notice it."""
    manifest = read_manifest(step)
    weight = manifest.tensors["model.0.weight"].chunks[0]
    moments = manifest.tensors["optimizer.state.0.weight.exp_avg"].chunks[0]
    size = {name: (step / name).stat().st_size for name in (NAME, VALUES, METADATA)}
    nbytes = manifest.tensors["model.0.weight"].nbytes
    return {
        "header": (RANKS_FILE, 20, False),
        "padding after the header": (RANKS_FILE, HEADER - 2, False),
        "zip before a tensor": (RANKS_FILE, weight.offset - 100, False),
        "last byte before a tensor": (RANKS_FILE, weight.offset - 1, False),
        "first byte of a tensor": (RANKS_FILE, weight.offset, True),
        "second block of a tensor": (RANKS_FILE, weight.offset + 70_000, True),
        "last byte of a tensor": (RANKS_FILE, weight.offset + nbytes - 1, True),
        "zip after a tensor": (RANKS_FILE, weight.offset + nbytes + 30, False),
        "a moment": (RANKS_FILE, moments.offset + 999, True),
        "checksum of the manifest": (NAME, 12, True),
        "manifest": (NAME, size[NAME] // 2, True),
        "end of the manifest": (NAME, size[NAME] - 1, True),
        "values": (VALUES, size[VALUES] // 2, False),
        "metadata": (METADATA, size[METADATA] // 2, False),
    }


REGIONS = [
    "header", "padding after the header", "zip before a tensor", "last byte before a tensor",
    "first byte of a tensor", "second block of a tensor", "last byte of a tensor",
    "zip after a tensor", "a moment", "checksum of the manifest", "manifest", "end of the manifest",
    "values", "metadata",
]  # fmt: skip


@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_bit_in_each_region(region, run, written):
    assert list(places(run / "step-2")) == REGIONS
    name, at, noticed = places(run / "step-2")[region]
    flip(run / "step-2" / name, at)
    words = [name]
    if "of a tensor" in region:
        words += ["model.0.weight", "expected CRC32", "got"]
    assert_noticed(run, written[1], CorruptError, words, when_loaded=noticed)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_anywhere(seed, run, written):
    draw = random.Random(seed)
    files = sorted(run.glob("step-2/*"))
    path = draw.choices(files, [file.stat().st_size ** 0.5 for file in files])[0]
    flip(path, draw.randrange(path.stat().st_size), 1 << draw.randrange(8))
    assert_noticed(run, written[1], CorruptError, [path.name], when_loaded=None)


@pytest.mark.parametrize("name", [RANKS_FILE, VALUES, METADATA, NAME])
@pytest.mark.parametrize("size", [0, 1, 0.5, -1])
def test_a_truncated_file(name, size, run, written):
    path = run / "step-2" / name
    whole = path.stat().st_size
    os.truncate(path, int(size * whole) if size == 0.5 else size % whole)
    needed = name in (RANKS_FILE, NAME)
    words = [name] if name == NAME or size in (0, 1) else [name, f"expected {whole} bytes"]
    assert_noticed(run, written[1], CorruptError, words, when_loaded=needed)


def test_a_longer_file(run, written):
    with (run / "step-2" / RANKS_FILE).open("ab") as file:
        file.write(b"\0")
    assert_noticed(run, written[1], CorruptError, [RANKS_FILE, "bytes, got"])


@pytest.mark.parametrize("page", [1, 10, -1])
def test_a_zeroed_page(page, run, written):
    path = run / "step-2" / RANKS_FILE
    data = bytearray(path.read_bytes())
    start = page * 4096 if page > 0 else len(data) // 4096 * 4096
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)
    assert_noticed(run, written[1], CorruptError, [RANKS_FILE], when_loaded=None)


@pytest.mark.parametrize("name", [RANKS_FILE, VALUES, METADATA, NAME])
def test_a_missing_file(name, run, written):
    (run / "step-2" / name).unlink()
    needed = name in (RANKS_FILE, NAME)
    assert_noticed(run, written[1], IncompleteError, [name], when_loaded=needed)


@pytest.mark.parametrize("name", [RANKS_FILE, VALUES])
def test_a_file_of_another_step(name, run, written):
    """Of the same size and form. (``.metadata`` is the same in both.)"""
    shutil.copyfile(run / "step-1" / name, run / "step-2" / name)
    is_ranks = name == RANKS_FILE
    words = [name, "of step 2", "of step 1"] if is_ranks else [name]
    assert_noticed(run, written[1], CorruptError, words, when_loaded=is_ranks)


def test_the_manifest_of_another_step(run, written):
    shutil.copyfile(run / "step-1" / NAME, run / "step-2" / NAME)
    assert_noticed(run, written[1], CorruptError, ["step-2, got that of step 1"])
