"""Raw bytes made readable by ``torch.load``: an archive of one tensor around them.

``torch.save`` of a small tensor takes 30 times as long as writing its bytes. What surrounds them
depends on dtype, shape and order alone, so it is made once for each, and the checksum that a zip
needs is the one that the manifest has anyway.
"""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import dataclass
from functools import lru_cache

from shardopt.checkpoint.archives import (
    CRC_IN_ENTRY,
    CRC_IN_HEADER,
    Over,
    ending,
    entry,
    header,
    pickled,
)
from shardopt.checkpoint.entries import TensorEntry


@dataclass(frozen=True)
class Surroundings:
    """What comes before and after the bytes of a tensor, with zeros for their CRC32.

    ``before`` is a multiple of 64 bytes long.
    """

    before: bytes
    after: bytes
    _crc_before: int  # where the CRC32 stands in each
    _crc_after: int

    def with_crc(self, crc: int) -> tuple[bytes, bytes]:
        """Both, with the CRC32 of the bytes between them."""
        value = struct.pack("<I", crc)
        return _put(self.before, self._crc_before, value), _put(self.after, self._crc_after, value)


def _put(text: bytes, at: int, value: bytes) -> bytes:
    return text[:at] + value + text[at + len(value) :]


@lru_cache(maxsize=4096)
def surroundings(dtype: str, sizes: tuple[int, ...], order: tuple[int, ...] | None) -> Surroundings:
    """Of a tensor of this dtype and shape, whose dims lie in memory in this order."""
    of = TensorEntry(dtype, sizes, order)
    before, entries, nbytes = b"", b"", of.nbytes
    for name, content in (
        ("data.pkl", pickled(Over(0, of))),
        ("byteorder", sys.byteorder.encode()),
        ("version", b"3\n"),
    ):
        crc = zlib.crc32(content)
        entries += entry(name, len(content), crc, len(before))
        before += header(name, len(content), crc, len(before), aligned=False) + content
    start, skipped = len(before), len(entries)
    before += header("data/0", nbytes, 0, start, aligned=True)
    entries += entry("data/0", nbytes, 0, start)
    after = entries + ending(4, len(entries), len(before) + nbytes)
    return Surroundings(before, after, start + CRC_IN_HEADER, skipped + CRC_IN_ENTRY)
