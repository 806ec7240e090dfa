"""CRC32 of blocks, and of blocks put together without looking at their bytes again. No torch."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from functools import lru_cache

BLOCK = 1 << 16  # bytes: the least that is checked, so the least that is read
MAX_BLOCK = 4 << 20  # bytes
MAX_BLOCKS = 128  # of what has no more than MAX_BLOCK for each


def block_size(num_bytes: int) -> int:
    """Bytes in a block of a chunk: few in a short one, so that checksums of a long one are few."""
    block = BLOCK
    while block < MAX_BLOCK and block * MAX_BLOCKS < num_bytes:
        block *= 2
    return block


def block_crcs(data: memoryview) -> array[int]:  # one for each block, the last may be short
    """CRC32 of each block of a chunk."""
    crc32, block = zlib.crc32, block_size(len(data))
    blocks = range(0, len(data), block)
    return array("I", [crc32(data[start : start + block]) for start in blocks])


def crc_of_blocks(crcs: Sequence[int], length: int) -> int:
    """CRC32 of all ``length`` bytes, from those of their blocks."""
    total, block = 0, block_size(length)
    for number, crc in enumerate(crcs):
        total = joined(total, crc, min(block, length - number * block))
    return total


def joined(first: int, second: int, second_length: int) -> int:
    """CRC32 of two pieces end to end, from the CRC32 of each."""
    if second_length == 0:
        return first
    return _times(_zeros(second_length), first) ^ second


# A CRC's bits are the remainder of a polynomial over GF(2): appending zero bytes multiplies it by a
# matrix. A matrix is 32 numbers, each what becomes of one bit (Adler, crc32_combine of zlib).


def _times(matrix: Sequence[int], vector: int) -> int:
    total = 0
    for column in matrix:
        if vector & 1:
            total ^= column
        vector >>= 1
        if not vector:
            break
    return total


def _product(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(_times(one, column) for column in other)


@lru_cache(maxsize=4096)
def _zeros(num_bytes: int) -> tuple[int, ...]:
    """The matrix of so many zero bytes."""
    if num_bytes == 1:
        bit = (0xEDB88320, *(1 << i for i in range(31)))  # one zero bit
        two = _product(bit, bit)
        four = _product(two, two)
        return _product(four, four)
    half = _zeros(num_bytes // 2)
    even = _product(half, half)
    return _product(_zeros(1), even) if num_bytes % 2 else even
