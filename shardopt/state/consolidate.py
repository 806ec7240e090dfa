"""Shards to full state, on one rank, one bucket at a time."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from shardopt.buffers import dense_strides, in_memory_order
from shardopt.comm.collectives import gather_texts
from shardopt.comm.transfer import receive_tensors, send_tensors
from shardopt.errors import AgreementError, UnsupportedError
from shardopt.guard import all_or_none
from shardopt.layout import Segment
from shardopt.local_state import states_of
from shardopt.shard import Shard
from shardopt.state.flat import consolidate_flat
from shardopt.state.outline import State, TensorSpec


def consolidate(shard: Shard, to: int | None) -> dict[Any, State]:
    """Key (parameter index, or the class's own) -> full state, on the CPU of rank ``to``.

    Collective. Other ranks get an empty dict; ``to=None`` serves every rank in turn.
    """
    if shard.flat:
        return consolidate_flat(shard, to)
    mine = _local_states(shard)
    outlines = _exchange_outlines(shard, mine)
    targets = range(shard.collectives.world_size) if to is None else [to]
    full: dict[Any, State] = {}
    for target in targets:
        if target == shard.collectives.rank:
            full = _receive_full(shard, mine, outlines)
        else:
            _send_local(shard, mine, target)
    return full


def _local_states(shard: Shard) -> dict[Any, State]:
    """Key -> state of this rank's segment; only of segments that have state."""
    own = {key: s for key, s in shard.optim.state.items() if not isinstance(key, Tensor)}
    return states_of(shard) | own


def _exchange_outlines(shard: Shard, mine: Mapping[Any, State]) -> list[dict[Any, State]]:
    """For each rank, its local states with a ``TensorSpec`` for every tensor."""
    text = b""
    with all_or_none(shard.collectives):  # whatever a third-party class keeps
        for key, state in mine.items():
            _check_sendable(state)
            check_declared(shard, key, state)
        text = pickle.dumps(tree_map_only(Tensor, TensorSpec.of, dict(mine)))
    outlines = [pickle.loads(rank) for rank in gather_texts(shard.collectives.shard_axis, text)]
    _check_whole(shard, outlines)
    return outlines


def _check_whole(shard: Shard, outlines: Sequence[Mapping[Any, State]]) -> None:
    """Every segment of a cut parameter must have the same state; each rank sees if not."""
    names: dict[Any, tuple[int, list[Any]]] = {}
    for rank, outline in enumerate(outlines):
        for bucket in shard.layout.buckets:
            for segment in bucket.segments(rank):
                state = list(outline.get(segment.parameter, ()))
                first, expected = names.setdefault(segment.parameter, (rank, state))
                if state != expected:
                    raise AgreementError(
                        f"ranks differ in the state of parameter "
                        f"{shard.names[segment.parameter]!r}: rank "
                        f"{rank} has {state}, rank {first} has {expected}; load one complete "
                        "state_dict on every rank, or from_= the rank that has it"
                    )


def _check_sendable(state: State) -> None:
    for tensor in tree_flatten(state)[0]:
        if isinstance(tensor, Tensor) and (tensor.layout != torch.strided or tensor.is_quantized):
            raise UnsupportedError(
                f"expected dense tensors in the optimizer's state, got {tensor.layout}; "
                "shardopt cannot move these between ranks"
            )


def check_declared(shard: Shard, key: Any, state: State) -> None:
    """Refuse state of a cut parameter that has its part's size and was not declared per element."""
    if key not in shard.segments or shard.segments[key][0].whole:
        return
    segment, algorithm = shard.segments[key][0], shard.algorithm_of(key)
    known = algorithm.per_element
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel() == segment.numel > 1 and name not in known:
            raise UnsupportedError(
                f"state {name!r} of parameter {shard.names[key]!r}: expected one value for the "
                f"parameter as a whole, got one for each of the {segment.numel} elements of this "
                "rank's part; declare it: shardopt.algos.register("
                f"{algorithm.optimizer_class.__name__}, "
                f"per_element={sorted({*known, name})})"
            )


def _segments_of_bucket(
    shard: Shard, bucket: int, rank: int, states: Mapping[Any, State]
) -> Iterator[tuple[Segment, State]]:
    """The segments of ``rank`` in a bucket that have state, with that state."""
    for segment in shard.layout.buckets[bucket].segments(rank):
        if segment.parameter in states:
            yield segment, states[segment.parameter]


def _travelling(shard: Shard, segment: Segment, state: State) -> list[Any]:
    """The leaves of a segment's state that are sent, in an order both sides know.

    What belongs to a cut parameter as a whole, like ``step``, is sent by its first segment only.
    """
    if segment.whole or segment.offset == 0:
        leaves = tree_flatten(state)[0]
    else:
        per_element = shard.algorithm_of(segment.parameter).per_element
        leaves = [state[name] for name in state if name in per_element]
    return [leaf for leaf in leaves if isinstance(leaf, (Tensor, TensorSpec))]


def _send_local(shard: Shard, mine: Mapping[Any, State], target: int) -> None:
    rank = shard.collectives.rank
    for bucket in range(len(shard.layout.buckets)):
        leaves = [
            in_memory_order(leaf, dense_strides(leaf))
            for segment, state in _segments_of_bucket(shard, bucket, rank, mine)
            for leaf in _travelling(shard, segment, state)
        ]
        send_tensors(shard.collectives, leaves, target).wait()


def _receive_full(
    shard: Shard, mine: Mapping[Any, State], outlines: Sequence[Mapping[Any, State]]
) -> dict[Any, State]:
    rank = shard.collectives.rank
    full = {key: value for key, value in mine.items() if key not in shard.segments}
    full = tree_map_only(Tensor, _cpu_copy, full)
    for bucket in range(len(shard.layout.buckets)):
        under_way = []
        for source, outline in enumerate(outlines):
            outs, local = [], []
            for segment, specs in _segments_of_bucket(shard, bucket, source, outline):
                outs += _places_in_full(shard, segment, specs, full)
                if source == rank:
                    local += _travelling(shard, segment, mine[segment.parameter])
            if source == rank:
                for out, leaf in zip(outs, local, strict=True):
                    out.copy_(in_memory_order(leaf.detach(), dense_strides(leaf)))
            else:
                under_way.append(receive_tensors(shard.collectives, outs, source))
        for handle in under_way:
            handle.wait()
    by_index = sorted(full, key=lambda key: key if isinstance(key, int) else len(shard.parameters))
    return {key: full[key] for key in by_index}


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _places_in_full(
    shard: Shard, segment: Segment, specs: State, full: dict[Any, State]
) -> list[Tensor]:
    """Where a segment's travelling leaves go, as flat views; makes room on the first segment."""
    index = segment.parameter
    if segment.whole:
        full[index] = tree_map_only(TensorSpec, TensorSpec.empty, specs)
        return [
            in_memory_order(out, out.stride()) for out in _travelling(shard, segment, full[index])
        ]
    per_element = shard.algorithm_of(index).per_element
    names = {n for n, spec in specs.items() if n in per_element and isinstance(spec, TensorSpec)}
    if segment.offset == 0:
        shape, strides = tuple(shard.parameters[index].shape), shard.buffers.strides[index]
        room = {name: TensorSpec(shape, strides, specs[name].dtype) for name in names}
        full[index] = tree_map_only(TensorSpec, TensorSpec.empty, {**specs, **room})
    places = []
    for name in specs:
        value = full[index][name]
        if name in names:
            flat = in_memory_order(value, value.stride())
            places.append(flat[segment.offset : segment.offset + segment.numel])
        elif segment.offset == 0 and isinstance(value, Tensor):
            places.append(value.view(-1))
    return places
