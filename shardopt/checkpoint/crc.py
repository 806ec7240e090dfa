"""CRC32 of blocks, and of blocks put together without looking at their bytes again. No torch."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from functools import lru_cache

BLOCK = 1 << 16  # bytes: the least that is checked, so the least that is read


def block_crcs(data: memoryview) -> array[int]:  # one for each block, the last may be short
    """CRC32 of each block of some bytes."""
    crc32 = zlib.crc32
    blocks = range(0, len(data), BLOCK)
    return array("I", [crc32(data[start : start + BLOCK]) for start in blocks])


def crc_of_blocks(crcs: Sequence[int], length: int) -> int:
    """CRC32 of all ``length`` bytes, from those of their blocks."""
    total = 0
    for number, crc in enumerate(crcs):
        total = joined(total, crc, min(BLOCK, length - number * BLOCK))
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
