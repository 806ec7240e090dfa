"""State that is vectors over all parameters, in order of registration: cut, and put together.

Each rank has of each vector the parts that belong to its segments, end to end. One vector travels
at a time; a complex element counts as two.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from shardopt.comm.transfer import receive_tensors, send_tensors
from shardopt.guard import agree
from shardopt.local_state import states_of
from shardopt.shard import Shard
from shardopt.state.outline import State, TensorSpec

Span = tuple[slice, slice]  # of a whole vector, and of a rank's part of it


def consolidate_flat(shard: Shard, to: int | None) -> dict[Any, State]:
    """Parameter index -> full state, on the CPU of rank ``to`` (``None``: of each). Collective."""
    mine = states_of(shard)
    facts = {
        f"state {name!r} of the optimizer": _outline(value) if name in shard.flat else value
        for state in mine.values()
        for name, value in state.items()
    }
    remedy = "load one complete state_dict on every rank, or from_= the rank that has it"
    agree(shard.collectives, facts, remedy)
    targets = range(shard.collectives.world_size) if to is None else [to]
    full: dict[Any, State] = {}
    for target in targets:
        if target == shard.collectives.rank:
            full = {index: _receive_full(shard, state) for index, state in mine.items()}
        else:
            for state in mine.values():
                _send_parts(shard, state, target)
    return full


def _outline(value: Any) -> Any:
    """The dtypes of vectors in place of them; on each rank they have another length."""
    return tree_map_only(Tensor, lambda tensor: str(tensor.dtype), value)


def _send_parts(shard: Shard, state: State, target: int) -> None:
    for name in state:
        if name in shard.flat:
            for part in tree_flatten(state[name])[0]:
                pieces = [part[here] for _, here in spans_of(shard, shard.collectives.rank)]
                send_tensors(shard.collectives, pieces, target).wait()


def _receive_full(shard: Shard, state: State) -> State:
    def put_together(part: Tensor) -> Tensor:
        whole = torch.empty(vector_starts(shard)[-1], dtype=part.dtype, device="cpu")
        under_way = []
        for rank in range(shard.collectives.world_size):
            pieces = [whole[there] for there, _ in spans_of(shard, rank)]
            if rank == shard.collectives.rank:
                for piece, (_, here) in zip(pieces, spans_of(shard, rank), strict=True):
                    piece.copy_(part[here])
            else:
                under_way.append(receive_tensors(shard.collectives, pieces, rank))
        for handle in under_way:
            handle.wait()
        return whole

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    flat = shard.flat
    return {
        name: tree_map_only(Tensor, put_together if name in flat else copied, value)
        for name, value in state.items()
    }


def check_flat(shard: Shard, index: int, state: State) -> None:
    """Refuse a state that is not that of the first parameter, or whose vectors do not fit."""
    name_of = shard.optimizer_class.__name__
    if index != 0:
        raise ValueError(
            f"state of parameter {shard.names[index]!r}: expected all state under the first "
            f"parameter, as {name_of} has it; the state was saved by another class"
        )
    for name, value in state.items():
        expected = (vector_starts(shard)[-1],) if name in shard.flat else ()
        for tensor in tree_flatten(value)[0]:
            if not isinstance(tensor, Tensor) or tensor.shape == expected:
                continue
            if expected or tensor.numel() != 1:
                raise ValueError(
                    f"state {name!r}: expected shape {expected}, got {tuple(tensor.shape)}; the "
                    f"state was saved for another model or by another class than {name_of}"
                )


def cut_flat(shard: Shard, state: State) -> State:
    """This rank's part of a full state, cloned."""

    def cut(whole: Tensor) -> Tensor:
        return _part(shard, whole, shard.collectives.rank)

    flat = shard.flat
    return {
        name: tree_map_only(Tensor, cut if name in flat else torch.clone, value)
        for name, value in state.items()
    }


def scatter_flat(shard: Shard, value: Any, source: int) -> Any:
    """This rank's parts of vectors that rank ``source`` has, from their outline elsewhere."""
    collectives = shard.collectives

    def share(whole: Tensor | TensorSpec) -> Tensor:
        if isinstance(whole, Tensor):
            handles = [
                send_tensors(
                    collectives, [whole[there] for there, _ in spans_of(shard, rank)], rank
                )
                for rank in range(collectives.world_size)
                if rank != source
            ]
            for handle in handles:
                handle.wait()
            return _part(shard, whole, source)
        spans = list(spans_of(shard, collectives.rank))
        numel = spans[-1][1].stop if spans else 0
        part = torch.empty(numel, dtype=whole.dtype, device="cpu")
        receive_tensors(collectives, [part[here] for _, here in spans], source).wait()
        return part

    return tree_map_only((Tensor, TensorSpec), share, value)


def _part(shard: Shard, whole: Tensor, rank: int) -> Tensor:
    pieces = [whole[there] for there, _ in spans_of(shard, rank)]
    return torch.cat(pieces) if pieces else whole.new_empty(0)


def vector_starts(shard: Shard) -> list[int]:
    """Where each parameter begins in a whole vector, and where the last one ends."""
    sizes = [_width(spec.dtype) * spec.numel for spec in shard.layout.parameters]
    return list(accumulate(sizes, initial=0))


def _width(dtype: torch.dtype) -> int:
    return 2 if dtype.is_complex else 1


def spans_of(shard: Shard, rank: int) -> Iterator[Span]:
    """Which stretches of a whole vector a rank has, and where they lie in its part."""
    starts, layout = vector_starts(shard), shard.layout
    segments = [segment for bucket in layout.buckets for segment in bucket.segments(rank)]
    low = high = length = 0  # the stretch so far, and what lies before it in the part
    for segment in sorted(segments, key=lambda segment: segment.parameter):
        width = _width(layout.parameters[segment.parameter].dtype)
        start = starts[segment.parameter] + width * segment.offset
        if start != high:
            if low < high:
                yield slice(low, high), slice(length, length + high - low)
            length += high - low
            low = start
        high = start + width * segment.numel
    if low < high:
        yield slice(low, high), slice(length, length + high - low)
