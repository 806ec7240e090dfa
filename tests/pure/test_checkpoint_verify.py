"""Whatever happens to a checkpoint's files, verify notices, and says what it is."""

import shutil

import pytest
import torch

from shardopt.checkpoint.crc import BLOCK
from shardopt.checkpoint.manifest import HEADER, file_header
from shardopt.checkpoint.verify import problems, verify
from shardopt.errors import CorruptError, IncompleteError, UnsupportedError
from tests.checkpoints import flip, write_checkpoint


@pytest.fixture
def step(tmp_path):
    tensors = {"w": torch.randn(3 * BLOCK // 4), "v": torch.randn(5, 7).to(torch.bfloat16)}
    write_checkpoint(tmp_path / "step-4", {"model": tensors}, world_size=3)
    return tmp_path / "step-4"


def test_a_whole_checkpoint_has_no_problems_and_progress_ends_at_all_bytes(step):
    told = []
    assert problems(step, lambda *where: told.append(where)) == []
    total = sum(path.stat().st_size for path in step.iterdir() if path.name != "manifest.json")
    assert told[-1] == (total, total)
    assert told == sorted(told)
    verify(step)


def test_every_flipped_byte_of_every_file_is_noticed(tmp_path):
    tree = {"model": {"w": torch.arange(20.0), "v": torch.arange(3)}}
    write_checkpoint(tmp_path / "step-4", tree, world_size=2)
    for path in sorted((tmp_path / "step-4").iterdir()):
        for at in range(path.stat().st_size):
            flip(path, at, 1 << at % 8)
            (problem,) = problems(tmp_path / "step-4")
            assert isinstance(problem, CorruptError)
            assert str(problem).startswith(f"{path}: ")
            flip(path, at, 1 << at % 8)
    assert problems(tmp_path / "step-4") == []


def test_a_flipped_bit_is_named_by_tensor_box_and_block(tmp_path):
    tree = {"model": {"other": torch.ones(4), "w": torch.ones(2 * BLOCK)}}
    manifest = write_checkpoint(tmp_path / "step-4", tree, world_size=1)
    (chunk,) = manifest.tensors["model.w"].chunks
    flip(tmp_path / "step-4" / chunk.file, chunk.offset + BLOCK + 17)
    with pytest.raises(
        CorruptError,
        match=rf"rank-0.bin: tensor 'model.w', \[0:{2 * BLOCK}\] of float32 \({2 * BLOCK},\), "
        rf"block at byte {chunk.offset + BLOCK}: expected CRC32 [0-9a-f]{{8}}, got [0-9a-f]{{8}}; "
        "the checkpoint is damaged: use another step, or a copy",
    ):
        verify(tmp_path / "step-4")


def test_a_bit_between_tensors_is_said_to_be_there(step):
    path = step / "rank-0.bin"
    flip(path, HEADER + 1) if path.read_bytes()[HEADER : HEADER + 1] == b"-" else None
    flip(step / ".metadata", 3)
    (problem,) = problems(step)
    assert ".metadata: expected CRC32" in str(problem)
    assert "the bytes of every tensor are right: it differs between them" in str(problem)


def test_a_truncated_file_is_named_with_both_sizes(step):
    path = step / "rank-1.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(CorruptError, match=rf"expected {len(data)} bytes, got {len(data) - 5}"):
        verify(step)
    path.write_bytes(data + b"x")
    with pytest.raises(CorruptError, match=rf"expected {len(data)} bytes, got {len(data) + 1}"):
        verify(step)


def test_a_zeroed_page_is_noticed(step):
    path = next(p for p in sorted(step.glob("rank-*")) if p.stat().st_size > 3 * 4096)
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=rf"{path.name}: tensor 'model.w'"):
        verify(step)


def test_every_missing_file_is_named(step):
    (step / "rank-1.bin").unlink()
    (step / ".metadata").unlink()
    first, second = problems(step)
    assert type(first) is type(second) is IncompleteError
    assert "rank-1.bin: expected a file of rank 1, got none" in str(first)
    assert ".metadata: expected a file, got none" in str(second)


def test_a_directory_without_a_manifest_is_incomplete(tmp_path, step):
    (step / "manifest.json").unlink()
    (step / ".metadata").unlink()
    for path in (step, tmp_path / "nothing"):
        with pytest.raises(IncompleteError, match=r"expected a checkpoint with manifest.json"):
            verify(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("5eed5eed", 3, 1), "expected a file of step 4, got one of step 3"),
        (("5eed5eed", 4, 2), "expected a file of rank 1, got one of rank 2"),
        (("0ther", 4, 1), "expected a file of run 5eed5eed, got one of run 0ther"),
    ],
)
def test_the_file_of_another_save_is_told_by_its_header(step, header, message):
    path = step / "rank-1.bin"
    path.write_bytes(file_header(*header) + path.read_bytes()[HEADER:])
    with pytest.raises(CorruptError, match=rf"rank-1.bin: {message}"):
        verify(step)


def test_the_file_of_the_step_before_is_told_whatever_its_size(tmp_path, step):
    tree = {"model": {"w": torch.randn(100)}}
    write_checkpoint(tmp_path / "step-3", tree, step=3, world_size=3)
    shutil.copy(tmp_path / "step-3" / "rank-2.bin", step)
    with pytest.raises(CorruptError, match="expected a file of step 4, got one of step 3"):
        verify(step)


def test_another_file_under_the_name_is_told(step):
    (step / "rank-2.bin").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(CorruptError, match=r"begins with 'shardopt run=5eed5eed', got b'PK"):
        verify(step)


def test_what_has_no_checksums_is_refused(tmp_path, step):
    (step / "manifest.json").unlink()  # leaves .metadata, as torch writes it
    torch.save({}, tmp_path / "file.pt")
    for path in (step, tmp_path / "file.pt"):
        with pytest.raises(UnsupportedError, match="got one that has no checksums"):
            verify(path)
