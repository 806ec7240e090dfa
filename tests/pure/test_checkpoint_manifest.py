"""The manifest: nothing in it changes unnoticed, nor does it say what cannot be."""

import gc
import json
import zlib
from array import array
from pathlib import Path

import pytest

from shardopt.checkpoint.boxes import Box
from shardopt.checkpoint.crc import BLOCK
from shardopt.checkpoint.entries import Chunk, FileEntry, TensorEntry
from shardopt.checkpoint.manifest import (
    HEADER,
    NAME,
    Manifest,
    file_header,
    parse_manifest,
    read_manifest,
)
from shardopt.checkpoint.opening import open_source
from shardopt.errors import CorruptError, IncompleteError

PATH = Path("step-4/manifest.json")


def small() -> Manifest:
    half = [Chunk(Box((row, 0), (1, 4)), f"{row}.bin", 64, array("I", [row + 1])) for row in (0, 1)]
    long = Chunk(Box((0,), (BLOCK,)), "0.bin", 128, array("I", [7, 0xFFFFFFFF]))
    return Manifest(
        run="ab12",
        step=4,
        world_size=2,
        facts={"torch": "2.9"},
        tree={"model": {"w": {"!": "tensor", "of": "w"}}},
        tensors={
            "w": TensorEntry("float32", (2, 4), None, half),
            "long": TensorEntry("float16", (BLOCK,), None, [long]),
            "turned": TensorEntry("bool", (0, 3), (1, 0), []),
        },
        files={"0.bin": FileEntry(4 * BLOCK, 5, 0), "1.bin": FileEntry(80, None, 1)},
    )


def test_a_manifest_comes_back_as_it_was():
    manifest = small()
    assert parse_manifest(manifest.to_bytes(), PATH) == manifest
    assert parse_manifest(manifest.to_bytes(), PATH).to_bytes() == manifest.to_bytes()


def test_every_flipped_bit_is_noticed():
    data = small().to_bytes()
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(CorruptError, match=r"step-4/manifest.json: expected"):
                parse_manifest(bytes(flipped), PATH)


def test_every_shorter_file_is_noticed():
    data = small().to_bytes()
    for length in range(len(data)):
        with pytest.raises(CorruptError, match="expected"):
            parse_manifest(data[:length], PATH)


def edited(*keys, to) -> bytes:
    """The small manifest with one value replaced, under a checksum that is right again."""
    body = json.loads(small().to_bytes())["manifest"]
    *way, last = keys
    at = body
    for key in way:
        at = at[key]
    at[last] = to
    text = json.dumps(body, separators=(",", ":")).encode()
    return b'{"crc32":"%08x","manifest":%s}\n' % (zlib.crc32(text), text)


def test_the_edit_alone_is_no_error():
    assert parse_manifest(edited("step", to=4), PATH) == small()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        parse_manifest(small().to_bytes(), PATH)
        assert gc.isenabled() == enabled
        with pytest.raises(CorruptError):
            parse_manifest(b"", PATH)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_a_step_under_the_name_of_another_is_refused(tmp_path):
    written = small()
    for number in (written.step, 77):
        (tmp_path / f"step-{number}").mkdir()
        (tmp_path / f"step-{number}" / NAME).write_bytes(written.to_bytes())
    assert read_manifest(tmp_path / f"step-{written.step}") == written
    with pytest.raises(CorruptError, match="expected the manifest of step-77, got that of step"):
        read_manifest(tmp_path / "step-77")


CHUNK = ("tensors", "w", 3, 1)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("tensors", "w", 1), [3, 4], "'w': expected chunks with 12 elements in all, got 8"),
        (("tensors", "w", 3), [], "'w': expected chunks with 8 elements in all, got 0"),
        ((*CHUNK, 0), [0, 0], "'w': expected chunks beside one another, got two that overlap"),
        ((*CHUNK, 0), [2, 0], "'w': expected a part of float32 .2, 4. within a file"),
        ((*CHUNK, 0), [-1, 0], "'w': expected a part of"),
        ((*CHUNK, 0), [1], "'w': expected a part of|not a manifest"),
        ((*CHUNK, 1), [-1, -4], "'w': expected a part of"),
        ((*CHUNK, 2), "2.bin", "got .* of '2.bin'"),
        ((*CHUNK, 3), 72, "got .* at byte 72"),
        ((*CHUNK, 3), -1, "got .* at byte -1"),
        ((*CHUNK, 4), "", "'w': expected 1 checksums for .*, got 0"),
        ((*CHUNK, 4), "0102", "not a manifest"),
        ((*CHUNK, 4), "zzzzzzzz", "not a manifest"),
        (("tensors", "w", 0), "float99", "not a manifest"),
        (("tensors", "w", 2), [0, 0], "'w': expected an order of 2 dims, got .0, 0."),
        (("tensors", "w", 2), [0, 5], "'w': expected an order of 2 dims"),
        (("files", "0.bin"), [70, 5, 0], "'w': expected a part of"),
        (("files", "0.bin"), ["much", 5, 0], "not a manifest"),
        (("files", "../0.bin"), [70, 5, 0], "expected names of files, got '../0.bin'"),
        (("files",), None, "not a manifest"),
        (("tree",), 3, "not a manifest"),
        (("format",), 2, "expected format 1, got 2; .* another version"),
        (("block",), 4096, "expected format 1"),
    ],
)
def test_an_edited_manifest_is_refused_even_under_a_right_checksum(keys, value, message):
    with pytest.raises(CorruptError, match=message):
        parse_manifest(edited(*keys, to=value), PATH)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": {"!": "tensor", "of": "lost"}}, "expected an entry for tensor 'lost', got none"),
        ({"w": {"!": "os.system", "of": "ls"}}, "not a tree of shardopt"),
        ({"w": {"!": "tuple"}}, "not a tree of shardopt"),
    ],
)
def test_an_edited_tree_is_refused(tmp_path, tree, message):
    (tmp_path / "manifest.json").write_bytes(edited("tree", "model", to=tree))
    with pytest.raises(CorruptError, match=message):
        open_source(tmp_path)


def test_no_manifest_is_an_incomplete_checkpoint(tmp_path):
    with pytest.raises(IncompleteError, match=r"expected a checkpoint with manifest.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"")
    with pytest.raises(CorruptError, match="got another text"):
        read_manifest(tmp_path)


def test_a_header_has_its_length_whatever_it_says():
    header = file_header("f" * 32, 10**15, 10**6)
    assert len(header) == len(file_header("a", 0, 0)) == HEADER
    assert header.startswith(b"shardopt run=ffff") and header.endswith(b"\n")
