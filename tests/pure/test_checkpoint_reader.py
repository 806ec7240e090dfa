"""Boxes out of chunks: any box out of any chunks in any memory order; damage is named."""

import random

import pytest
import torch

from shardopt.checkpoint import reader as reader_module
from shardopt.checkpoint.boxes import Box
from shardopt.checkpoint.crc import BLOCK
from shardopt.checkpoint.opening import open_source
from shardopt.errors import CorruptError, IncompleteError
from tests.checkpoints import flip, raw, write_checkpoint
from tests.pure.test_checkpoint_boxes import index, some_box

DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64, torch.uint8]


def some_tensor(rng: random.Random, most: int) -> torch.Tensor:
    """Of any dtype, shape, and order of its dims in memory."""
    ndim = rng.randint(0, 4)
    shape = [rng.randint(1, max(1, int(most ** (1 / ndim)))) for _ in range(ndim)]
    order = rng.sample(range(ndim), ndim)
    stored = torch.randint(0, 2, [shape[dim] for dim in order]).to(rng.choice(DTYPES))
    stored = stored * torch.arange(stored.numel()).view(stored.shape).to(stored.dtype)
    return stored.permute([order.index(dim) for dim in range(ndim)])


def check_box(source, key: str, tensor: torch.Tensor, box: Box) -> None:
    entry = source.tensors[key]
    out = memoryview(bytearray(box.numel * entry.itemsize))
    source.reader.read(key, box, out)
    assert bytes(out) == raw(tensor[index(box)], entry.order)


@pytest.mark.parametrize("seed", range(60))
def test_any_box_is_read_out_of_any_chunks(tmp_path, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tensors = {f"t{n}": some_tensor(rng, rng.choice([60, 3 * BLOCK])) for n in range(5)}
    write_checkpoint(tmp_path / "step-4", {"model": tensors}, world_size=rng.randint(1, 6))
    with open_source(tmp_path / "step-4") as source:
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            check_box(source, f"model.{name}", tensor, Box.whole(shape))
            for _ in range(5):
                check_box(source, f"model.{name}", tensor, some_box(rng, shape))


def test_what_is_read_is_hardly_more_than_what_is_asked_for(tmp_path):
    tensor = torch.arange(1 << 20)
    write_checkpoint(tmp_path / "step-4", {"model": {"w": tensor}}, world_size=5)
    with open_source(tmp_path / "step-4") as source:
        check_box(source, "model.w", tensor, Box((300_001,), (400_000,)))
        assert source.reader.bytes_read <= 1.1 * 400_000 * 8


def test_more_files_than_may_be_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "_MAX_OPEN", 2)
    tensor = torch.arange(1000).view(10, 100)
    write_checkpoint(tmp_path / "step-4", {"model": {"w": tensor}}, world_size=7)
    with open_source(tmp_path / "step-4") as source:
        for row in range(10):
            check_box(source, "model.w", tensor, Box((row, 0), (1, 100)))
        check_box(source, "model.w", tensor, Box.whole((10, 100)))


@pytest.fixture
def two_blocks(tmp_path):
    """A checkpoint with one tensor of a little more than two blocks in one file."""
    tensor = torch.arange(2 * BLOCK // 4 + 10, dtype=torch.int32)
    manifest = write_checkpoint(tmp_path / "step-4", {"model": {"w": tensor}}, world_size=1)
    (chunk,) = manifest.tensors["model.w"].chunks
    return tmp_path / "step-4", tensor, chunk


def test_each_flipped_bit_is_named_by_file_tensor_and_block(two_blocks):
    directory, tensor, chunk = two_blocks
    size = tensor.numel() * 4
    for at in [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, size - 1]:
        flip(directory / chunk.file, chunk.offset + at)
        start = chunk.offset + at // BLOCK * BLOCK
        with (
            open_source(directory) as source,
            pytest.raises(
                CorruptError,
                match=rf"rank-0.bin: tensor 'model.w', .*, block at byte {start}: expected CRC32",
            ),
        ):
            check_box(source, "model.w", tensor, Box.whole(tensor.shape))
        flip(directory / chunk.file, chunk.offset + at)
    with open_source(directory) as source:
        check_box(source, "model.w", tensor, Box.whole(tensor.shape))


def test_a_flipped_bit_is_noticed_beside_the_elements_asked_for_too(two_blocks):
    directory, tensor, chunk = two_blocks
    flip(directory / chunk.file, chunk.offset + 400)
    with open_source(directory) as source:
        check_box(source, "model.w", tensor, Box((BLOCK // 4,), (20,)))
        for _ in range(2):  # a block that was refused is not taken for one that was read
            with pytest.raises(CorruptError, match="block at byte"):
                check_box(source, "model.w", tensor, Box((7,), (20,)))
        check_box(source, "model.w", tensor, Box((BLOCK // 4,), (20,)))  # nor for another


def test_a_zeroed_page_is_noticed(two_blocks):
    directory, tensor, chunk = two_blocks
    data = bytearray((directory / chunk.file).read_bytes())
    data[8192:12288] = bytes(4096)
    (directory / chunk.file).write_bytes(data)
    with (
        open_source(directory) as source,
        pytest.raises(CorruptError, match=r"tensor 'model.w', .* block"),
    ):
        check_box(source, "model.w", tensor, Box.whole(tensor.shape))


def test_a_truncated_file_is_named_with_both_sizes(two_blocks):
    directory, tensor, chunk = two_blocks
    path = directory / chunk.file
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with (
        open_source(directory) as source,
        pytest.raises(CorruptError, match=rf"rank-0.bin: expected {size} bytes, got {size - 1}"),
    ):
        check_box(source, "model.w", tensor, Box((0,), (1,)))


def test_a_missing_file_is_named(two_blocks):
    directory, tensor, chunk = two_blocks
    (directory / chunk.file).unlink()
    with (
        open_source(directory) as source,
        pytest.raises(IncompleteError, match=r"rank-0.bin: expected a file of the checkpoint"),
    ):
        check_box(source, "model.w", tensor, Box((0,), (1,)))
