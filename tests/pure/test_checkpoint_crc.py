"""Checksums of blocks, put together, against zlib on all bytes."""

import os
import random
import zlib

import pytest

from shardopt.checkpoint.crc import BLOCK, block_crcs, block_size, crc_of_blocks, joined

LENGTHS = [0, 1, 2, 3, 63, 64, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5]


@pytest.mark.parametrize("second", LENGTHS)
def test_two_pieces_have_the_checksum_of_both_end_to_end(second):
    rng = random.Random(second)
    for first in LENGTHS:
        one, other = rng.randbytes(first), rng.randbytes(second)
        expected = zlib.crc32(one + other)
        assert joined(zlib.crc32(one), zlib.crc32(other), second) == expected


@pytest.mark.parametrize("power", range(31))
def test_a_piece_of_any_length_counts_as_so_many_bytes(power):
    # CRC32 of 2^power zeros, doubled step by step, against the joined one of two halves.
    crc, length = zlib.crc32(b"\0"), 1
    for _ in range(power):
        crc, length = joined(crc, crc, length), 2 * length
    if length <= 1 << 22:
        assert crc == zlib.crc32(bytes(length))
    assert joined(joined(0x1234, crc, length), 0x77, 1) == joined(
        0x1234, joined(crc, 0x77, 1), length + 1
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_add_up_to_all_bytes(length):
    data = os.urandom(length)
    crcs = block_crcs(memoryview(data))
    assert len(crcs) == -(-length // BLOCK)
    assert list(crcs) == [zlib.crc32(data[i : i + BLOCK]) for i in range(0, length, BLOCK)]
    assert crc_of_blocks(crcs, length) == zlib.crc32(data)


@pytest.mark.parametrize(
    ("num_bytes", "size"),
    [
        (0, 1 << 16),
        (8 << 20, 1 << 16),
        ((8 << 20) + 1, 1 << 17),
        (22 << 20, 1 << 18),
        (256 << 20, 1 << 21),
        (10 << 40, 4 << 20),
    ],
)
def test_a_long_chunk_has_long_blocks_and_few_checksums(num_bytes, size):
    assert block_size(num_bytes) == size


def test_checksums_of_a_long_chunk_are_those_of_its_bytes():
    data = random.Random(0).randbytes((20 << 20) + 77)
    crcs = block_crcs(memoryview(data))
    assert len(crcs) == 81
    assert crcs[80] == zlib.crc32(data[80 << 18 :])
    assert crc_of_blocks(crcs, len(data)) == zlib.crc32(data)
