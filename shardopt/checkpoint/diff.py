"""What two checkpoints do not have in common, read block by block whoever has written them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shardopt.checkpoint.boxes import Box, slices
from shardopt.checkpoint.entries import TensorEntry
from shardopt.checkpoint.opening import open_source
from shardopt.checkpoint.plain import TensorKey, place
from shardopt.checkpoint.safetensors_file import logical
from shardopt.checkpoint.source import Source
from shardopt.checkpoint.stream import Stream
from shardopt.checkpoint.trees import leaves

_NUMEL = 1 << 18  # elements compared at once: 2 MB where they are compared in double
_LARGEST = 16  # bytes of an element


@dataclass
class TensorDifference:
    """Two tensors of one shape and dtype, at one place.

    Attributes:
        bit_equal: all bytes are the same.
        num_different: elements; NaN equals NaN, and 0 equals -0.
        largest: absolute difference, where both are finite, else inf.
    """

    numel: int
    bit_equal: bool = True
    num_different: int = 0
    largest: float = 0.0


@dataclass
class Difference:
    """What differs between two checkpoints, by place: ``optimizer['state']['w']['exp_avg']``.

    Attributes:
        only: what is in one only -> in which of both, 0 or 1.
        kinds: both sides in words, where shape or dtype differ, or one is no tensor.
        values: tensors with elements that differ.
        plain: both sides, of values that are no tensors.
        num_bit_equal: tensors whose bytes are the same.
        num_equal: tensors whose elements are equal, and bytes are not.
    """

    only: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: dict[str, TensorDifference] = field(default_factory=dict)
    plain: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    num_bit_equal: int = 0
    num_equal: int = 0

    def __bool__(self) -> bool:
        return bool(self.only or self.kinds or self.values or self.plain)

    def lines(self, names: tuple[str, str]) -> Iterator[str]:
        """In words; ``names`` of the two checkpoints."""
        for where, side in self.only.items():
            yield f"{where}: only in {names[side]}"
        for where, (one, other) in self.kinds.items():
            yield f"{where}: {one} and {other}"
        for where, found in self.values.items():
            yield (
                f"{where}: {found.num_different} of {found.numel} elements differ, by at most "
                f"{found.largest:.6g}"
            )
        for where, values in self.plain.items():
            yield f"{where}: {values[0]!r} and {values[1]!r}"
        also = f", {self.num_equal} equal but for the sign of zeros or NaN" * bool(self.num_equal)
        yield (
            f"{self.num_bit_equal} tensors are equal bit by bit{also}, "
            f"{len(self.values) + len(self.kinds)} differ"
        )


def diff(
    one: Path | str, other: Path | str, progress: Callable[[int, int], None] | None = None
) -> Difference:
    """Compare two checkpoints, of any world sizes and layouts, at the same places of their trees.

    Args:
        one, other: what ``open_source`` opens.
        progress: is told how many tensors have been compared, and how many there are.

    Raises:
        CorruptError, IncompleteError: one of them is not what was written.
    """
    with open_source(Path(one)) as a, open_source(Path(other)) as b:
        sides = [dict(leaves(source.tree)) for source in (a, b)]
        found = Difference()
        if a.step != b.step and None not in (a.step, b.step):
            found.plain["step"] = a.step, b.step
        for side in (0, 1):
            missing = (path for path in sides[side] if path not in sides[1 - side])
            found.only.update((place(path), side) for path in missing)
        both = [path for path in sides[0] if path in sides[1]]
        comparison = _Comparison(a, b, found)
        for done, path in enumerate(both, 1):
            comparison.add(place(path), sides[0][path], sides[1][path])
            if progress is not None:
                progress(done, len(both))
    return found


class _Comparison:
    def __init__(self, a: Source, b: Source, found: Difference):
        self._a, self._b, self._found = a, b, found
        size = _NUMEL * _LARGEST
        self._streams = Stream(a.reader, size), Stream(b.reader, size)

    def add(self, where: str, x: Any, y: Any) -> None:
        """Compare what two checkpoints have at one place."""
        if not (isinstance(x, TensorKey) and isinstance(y, TensorKey)):
            if isinstance(x, TensorKey) or isinstance(y, TensorKey):
                self._found.kinds[where] = _word(self._a, x), _word(self._b, y)
            elif not _equal(x, y):
                self._found.plain[where] = x, y
            return
        mine, theirs = self._a.tensors[x.key], self._b.tensors[y.key]
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            self._found.kinds[where] = str(mine), str(theirs)
            return
        result = self._tensors((x.key, mine), (y.key, theirs))
        if result.num_different:
            self._found.values[where] = result
        else:
            self._found.num_bit_equal += result.bit_equal
            self._found.num_equal += not result.bit_equal

    def _tensors(self, *both: tuple[str, TensorEntry]) -> TensorDifference:
        entry = both[0][1]
        result = TensorDifference(entry.numel)
        for box in slices(Box.whole(entry.shape), entry.order, _NUMEL):
            if box.numel:
                x, y = (
                    logical(stream.read(key, box), of, box)
                    for stream, (key, of) in zip(self._streams, both, strict=True)
                )
                _compare(x, y, result)
        return result


def _word(source: Source, value: Any) -> str:
    return str(source.tensors[value.key]) if isinstance(value, TensorKey) else repr(value)


def _equal(x: Any, y: Any) -> bool:
    if type(x) is type(y) is float and math.isnan(x) and math.isnan(y):
        return True
    return type(x) is type(y) and x == y


def _compare(x: torch.Tensor, y: torch.Tensor, into: TensorDifference) -> None:
    """Add what differs between two tensors of one shape and dtype."""
    if torch.equal(_bytes(x), _bytes(y)):
        return
    into.bit_equal = False
    if x.dtype in (torch.int64, torch.uint64):
        differ, distance = _exactly(x, y)
    else:
        wide = torch.complex128 if x.is_complex() else torch.float64
        p, q = x.to(wide), y.to(wide)
        differ = (p != q) & ~(p.isnan() & q.isnan())
        distance = (p - q).abs()
    if count := int(differ.sum()):
        into.num_different += count
        largest = distance[differ].nan_to_num(nan=math.inf, posinf=math.inf).max()
        into.largest = max(into.largest, float(largest))


def _exactly(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which integers differ, and by how much, where double has too few digits for them."""
    low = torch.iinfo(torch.int64).min
    # With the highest bit turned, unsigned ones are in order as signed ones are.
    p, q = (z.view(torch.int64) ^ (low if z.dtype is torch.uint64 else 0) for z in (x, y))
    distance = torch.where(p > q, p - q, q - p).view(torch.uint64)
    return p != q, distance.to(torch.float64)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
