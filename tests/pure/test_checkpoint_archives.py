"""Archives of one tensor: what torch and a zip tool read of them, and where elements lie."""

import io
import itertools
import struct
import zipfile
import zlib

import pytest
import torch

from shardopt.checkpoint.archives import ALIGNMENT
from shardopt.checkpoint.blobs import surroundings
from shardopt.checkpoint.boxes import order_of, strides_of
from shardopt.checkpoint.entries import ITEMSIZE
from shardopt.checkpoint.foreign.archive import memory_order
from shardopt.checkpoint.tensors import bytes_of, dtype_name, empty

SHAPES = [(), (7,), (0, 3), (3, 4), (2, 1, 3), (2, 3, 4)]


def archive_of(tensor, order):
    data = bytes(bytes_of(tensor))
    around = surroundings(dtype_name(tensor.dtype), tuple(tensor.shape), order)
    before, after = around.with_crc(zlib.crc32(data))
    return before, data, after


def numbers(shape, order, dtype="int32"):
    tensor = empty(dtype, shape, order)
    return tensor.copy_(torch.arange(tensor.numel()).view(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_the_same_tensor_in_the_same_memory_order(shape):
    for order in [None, *itertools.permutations(range(len(shape)))]:
        tensor = numbers(shape, order)
        loaded = torch.load(io.BytesIO(b"".join(archive_of(tensor, order))), weights_only=True)
        assert torch.equal(loaded, tensor) and loaded.stride() == strides_of(shape, order)


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_torch_reads_every_dtype(dtype):
    raw = torch.randint(0, 2, (6 * ITEMSIZE[dtype],), dtype=torch.uint8)
    tensor = raw.view(getattr(torch, dtype))
    loaded = torch.load(io.BytesIO(b"".join(archive_of(tensor, None))), weights_only=True)
    assert loaded.dtype == tensor.dtype and torch.equal(loaded.view(torch.uint8), raw)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_zip_tool_finds_nothing_wrong(shape):
    before, data, after = archive_of(numbers(shape, None), None)
    assert len(before) % ALIGNMENT == 0
    with zipfile.ZipFile(io.BytesIO(before + data + after)) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/data/0") == data
        record = archive.getinfo("archive/data/0")
    # Readers that go from the front take the checksum and the sizes from the header.
    signature, crc, packed, size = struct.unpack_from("<I10xIII", before, record.header_offset)
    assert (signature, crc) == (0x04034B50, zlib.crc32(data))
    assert packed == size == 0xFFFFFFFF
    extra = record.header_offset + 30 + len("archive/data/0")
    assert struct.unpack_from("<HHQQ", before, extra) == (1, 16, len(data), len(data))


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((3,), (2,)),
        ((3,), (0,)),
        ((2, 3), (1, 1)),
        ((2, 3), (3, 0)),
        ((2, 3), (4, 1)),
        ((2, 3), (6, 2)),
        ((2, 2, 2), (4, 1, 1)),
    ],
)
def test_elements_with_gaps_or_on_top_of_each_other_have_no_order(sizes, strides):
    with pytest.raises(ValueError, match=r"sizes .* with strides"):
        memory_order(sizes, strides)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_dense_elements_is_found(shape):
    for order in itertools.permutations(range(len(shape))):
        strides = empty("int8", shape, order).stride()
        expected = None if 0 in shape else order_of(shape, strides)
        assert memory_order(shape, strides) == expected
    assert memory_order((1, 4), (99, 1)) is None  # dims of one element lie anywhere
