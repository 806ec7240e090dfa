"""The manifest: nothing in it changes unnoticed, nor does it say what cannot be."""

import gc
import json
import math
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
from shardopt.checkpoint.plain import TensorKey
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
        tree={"model": {"w": TensorKey("w")}},
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


def test_entries_are_a_line_each():
    told = json.loads(small().to_bytes())["manifest"]["tensors"]
    assert told == {
        "w": "float32 2,4|0.bin 64 00000001 0,0 1,4|1.bin 64 00000002 1,0 1,4",
        "long": f"float16 {BLOCK}|0.bin 128 00000007ffffffff",
        "turned": "bool 0,3 1,0",
    }


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
    return with_crc(json.dumps(body, separators=(",", ":")).encode())


def with_crc(text: bytes) -> bytes:
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


W, CHUNKS = ("tensors", "w"), "0.bin 64 00000001 0,0 1,4|1.bin 64 00000002 1,0 1,4"


def with_second(place: str) -> str:
    """The entry of a tensor whose second chunk is another."""
    return f"float32 2,4|0.bin 64 00000001 0,0 1,4|{place}"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (W, f"float32 3,4|{CHUNKS}", "'w': expected chunks with 12 elements in all, got 8"),
        (W, "float32 2,4", "'w': expected chunks with 8 elements in all, got 0"),
        (W, with_second("1.bin 64 00000002 0,0 1,4"), "'w': expected chunks beside one another"),
        (W, with_second("1.bin 64 00000002 2,0 1,4"), "'w': expected a part of float32 .2, 4. wi"),
        (
            W,
            with_second("1.bin 64 00000002 -1,0 1,4"),
            "not a manifest of shardopt .expected integers",
        ),
        (W, with_second("1.bin 64 00000002 1,0 -1,-4"), "not a manifest"),
        (W, with_second("1.bin 64 00000002 1 1,4"), "not a manifest"),
        (W, with_second("1.bin 64 00000002 1 4"), "'w': expected a part of"),
        (W, with_second("1.bin 64 00000002 1,0"), "not a manifest"),
        (W, with_second("2.bin 64 00000002 1,0 1,4"), "got .* of '2.bin'"),
        (W, with_second("1.bin 72 00000002 1,0 1,4"), "got .* at byte 72"),
        (W, with_second("1.bin -1 00000002 1,0 1,4"), "not a manifest"),
        (W, with_second("1.bin 64.5 00000002 1,0 1,4"), "not a manifest"),
        (W, with_second("1.bin 64  1,0 1,4"), "'w': expected 1 checksums for .*, got 0"),
        (W, with_second("1.bin 64 0102 1,0 1,4"), "not a manifest"),
        (W, with_second("1.bin 64 zzzzzzzz 1,0 1,4"), "not a manifest"),
        (W, f"float99 2,4|{CHUNKS}", "not a manifest"),
        (W, f"float32 2,4 0,0|{CHUNKS}", "'w': expected an order of 2 dims, got .0, 0."),
        (W, f"float32 2,4 0,5|{CHUNKS}", "'w': expected an order of 2 dims"),
        (W, f"float32 2,4 1,0 1,0|{CHUNKS}", "not a manifest"),
        (W, "", "not a manifest"),
        (W, "float32", "not a manifest"),
        (W, "float32 -2,-4", "not a manifest"),
        (W, ["float32", [2, 4], None, []], "not a manifest"),
        (
            ("tensors", "long"),
            f"float16 {BLOCK}|0.bin 128 00000007",
            "'long': expected 2 checksums",
        ),
        (("tensors", "long"), f"float16 {BLOCK}|0.bin -1 00000007ffffffff", "not a manifest"),
        (("tensors", "long"), f"float16 {BLOCK}|0.bin 1e3 00000007ffffffff", "not a manifest"),
        (("tensors", "long"), f"float16 -{BLOCK}|0.bin 128 00000007ffffffff", "not a manifest"),
        (("tensors", "long"), f"float99 {BLOCK}|0.bin 128 00000007ffffffff", "not a manifest"),
        (("tensors", "long"), f"float16 {BLOCK}|../0.bin 128 00000007ffffffff", "of '../0.bin'"),
        (("tensors", "turned"), f"bool 0,{10**30}", "not a manifest"),
        (("tensors",), {"!": "dict", "of": [[5, "float32 0"]]}, "not a manifest"),
        (("files", "0.bin"), [70, 5, 0], "'w': expected a part of"),
        (("files", "0.bin"), ["much", 5, 0], "not a manifest"),
        (("files", "../0.bin"), [70, 5, 0], "expected names of files, got '../0.bin'"),
        (("files", ".."), [70, 5, 0], "expected names of files, got '..'"),
        (("files", ""), [70, 5, 0], "expected names of files, got ''"),
        (("files", "a\0b"), [70, 5, 0], "expected names of files"),
        (("files",), {"!": "dict", "of": [[5, [1, 2, 0]]]}, "not a manifest"),
        (("files",), None, "not a manifest"),
        (("facts",), {"torch": {"!": "deque", "of": [], "maxlen": 1 << 70}}, "not a manifest"),
        (("facts",), 3, "not a manifest"),
        (("step",), 4.0, "not a manifest"),
        (("step",), math.inf, "not a manifest"),
        (("world_size",), 10**13, "expected a file of each of 10000000000000 ranks"),
        (("tree",), 3, "not a manifest"),
        (("format",), 1, "expected format 3, got 1; .* another version"),
        (("blocks",), [4096, 1 << 22, 128], "expected format 3"),
    ],
)
def test_an_edited_manifest_is_refused_even_under_a_right_checksum(keys, value, message):
    with pytest.raises(CorruptError, match=message):
        parse_manifest(edited(*keys, to=value), PATH)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": {"!": "tensor", "of": "lost"}}, "expected an entry for tensor 'lost', got none"),
        ({"w": {"!": "os.system", "of": "ls"}}, "not a manifest of shardopt"),
        ({"w": {"!": "tuple"}}, "not a manifest of shardopt"),
        ({"w": {"!": "float", "of": 10**400}}, "not a manifest of shardopt"),
        ({"w": {"!": "set", "of": [{"!": "tensor", "of": "lost"}]}}, "expected an entry for"),
        ({"w": {"!": "dict", "of": [[{"!": "tensor", "of": "w"}, 1]]}}, "keys without tensors"),
    ],
)
def test_an_edited_tree_is_refused(tmp_path, tree, message):
    (tmp_path / "manifest.json").write_bytes(edited("tree", "model", to=tree))
    with pytest.raises(CorruptError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"param_groups": 5, "state": {}},
        {"param_groups": [{"lr": 1}], "state": {}},
        {"param_groups": [["params"]], "state": {}},
        {"param_groups": [{"params": [[]]}], "state": {}},
        {"param_groups": [{"params": ["w"]}], "state": [1]},
        {"param_groups": [{"params": ["w"]}], "state": {}, "own": 3},
        {"param_groups": []},
    ],
)
def test_an_optimizer_that_is_none_is_refused(optimizer):
    with pytest.raises(CorruptError, match="not a manifest of shardopt"):
        parse_manifest(edited("tree", "optimizer", to=optimizer), PATH)


def test_a_text_that_python_does_not_read_is_refused():
    text = small().to_bytes()[len('{"crc32":"00000000","manifest":') : -2]
    assert parse_manifest(with_crc(text), PATH) == small()
    with pytest.raises(CorruptError, match="not a manifest of shardopt"):
        parse_manifest(with_crc(text.replace(b"ab12", b"\xff\xfe12")), PATH)
    deep = text.replace(b'"tree":{', b'"tree":{"extra":%s,' % (b"[" * 100000 + b"]" * 100000))
    with pytest.raises(CorruptError, match="not a manifest of shardopt"):
        parse_manifest(with_crc(deep), PATH)


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
