"""State in torch's form: put together from shards, and cut into shards again.

=================  ===========================  ==================================================
from               to                           by
=================  ===========================  ==================================================
shards             full state on one rank       ``consolidate``: sends, one bucket at a time
full, every rank   shards                       ``load``: each rank cuts its own, nothing travels
full, one rank     shards                       ``load``: sends, one bucket at a time
=================  ===========================  ==================================================

What describes the state (names, dtypes, shapes, plain values) travels as text; tensors travel as
they are, never pickled.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from shardopt.buffers import dense_strides, in_memory_order
from shardopt.comm.collectives import broadcast_text, gather_texts
from shardopt.comm.transfer import receive_tensors, send_tensors
from shardopt.errors import UnsupportedError
from shardopt.guard import agree_on_success
from shardopt.layout import Segment
from shardopt.shard import Group, Shard

State = dict[Any, Any]  # of one parameter: name -> tensor or plain value


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of the state looks like, in place of the tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """Describe ``tensor`` as a dense copy of it would be."""
        return TensorSpec(tuple(tensor.shape), tuple(dense_strides(tensor)), tensor.dtype)

    def empty(self) -> Tensor:
        """A tensor like that, on the CPU."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype)


# -- shards -> full --------------------------------------------------------------------------------


def consolidate(shard: Shard, to: int | None) -> dict[Any, State]:
    """Key (parameter index, or the class's own) -> full state, on the CPU of rank ``to``.

    Collective. Other ranks get an empty dict; ``to=None`` serves every rank in turn.
    """
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
    state = shard.optim.state
    held = {i: state[tensor] for i, (_, tensor) in shard.segments.items() if tensor in state}
    return held | {key: value for key, value in state.items() if not isinstance(key, Tensor)}


def _exchange_outlines(shard: Shard, mine: Mapping[Any, State]) -> list[dict[Any, State]]:
    """For each rank, its local states with a ``TensorSpec`` for every tensor."""
    error, text = None, b""
    try:
        for state in mine.values():
            _check_sendable(state)
        text = pickle.dumps(tree_map_only(Tensor, TensorSpec.of, dict(mine)))
    except Exception as problem:  # whatever a third-party class keeps: raised on every rank
        error = problem
    agree_on_success(shard.collectives, error)
    return [pickle.loads(rank) for rank in gather_texts(shard.collectives, text)]


def _check_sendable(state: State) -> None:
    for tensor in tree_flatten(state)[0]:
        if isinstance(tensor, Tensor) and (tensor.layout != torch.strided or tensor.is_quantized):
            raise UnsupportedError(
                f"expected dense tensors in the optimizer's state, got {tensor.layout}; "
                "shardopt cannot move these between ranks"
            )


def _segments_of_bucket(shard: Shard, bucket: int, rank: int, states: Mapping[Any, State]):
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
        leaves = [state[name] for name in state if name in shard.algorithm.per_element]
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
        return [in_memory_order(out, out.stride()) for out in _travelling(shard, segment, full[index])]
    per_element = shard.algorithm.per_element
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


# -- full -> shards --------------------------------------------------------------------------------


def load(shard: Shard, groups: Sequence[Group], saved: Any, source: int | None) -> list[Group]:
    """Cut ``saved`` into this rank's part and let the class load it; return the saved options.

    Collective. ``source`` is the rank that brings ``saved``, or ``None`` if every rank does. The
    caller's dict is neither changed nor kept: every tensor is cloned.
    """
    collectives = shard.collectives
    brings = source is None or source == collectives.rank
    error = None
    try:
        if brings:
            _check(shard, groups, saved)
    except Exception as problem:
        error = problem
    agree_on_success(collectives, error)
    if source is None or collectives.world_size == 1:
        options, full = copy.deepcopy(saved["param_groups"]), _by_index(shard, groups, saved)
        local = _cut_all(shard, full, collectives.rank)
    else:
        options, local = _scatter(shard, groups, saved, source)
    _load_into_class(shard, groups, options, local)
    return options


def _check(shard: Shard, groups: Sequence[Group], saved: Any) -> None:
    """Refuse what does not fit, in torch's words where torch refuses it too."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise TypeError(
            "expected a state_dict with 'state' and 'param_groups', got "
            f"{type(saved).__name__}; on ranks that have none pass None and from_=<rank that has it>"
        )
    if len(groups) != len(saved["param_groups"]):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: expected "
            f"{len(groups)}, got {len(saved['param_groups'])}"
        )
    for number, (group, other) in enumerate(zip(groups, saved["param_groups"], strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: group {number} has {len(group['params'])} parameters, got "
                f"{len(other['params'])}"
            )
    for index, state in _by_index(shard, groups, saved).items():
        if _is_index(shard, index):
            _check_shapes(shard, index, state)


def _check_shapes(shard: Shard, index: int, state: State) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        shape = tuple(shard.parameters[index].shape)
        expected = shard.algorithm.state_shape(name, shape)
        if expected is not None and value.shape != expected and not (
            expected == () and value.numel() == 1
        ):
            raise ValueError(
                f"state {name!r} of parameter {shard.layout.parameters[index].name!r}: expected "
                f"shape {expected}, got {tuple(value.shape)}; the state was saved for another model"
            )


def _by_index(shard: Shard, groups: Sequence[Group], saved: Any) -> dict[Any, State]:
    """The saved state by our parameter index instead of the ids it was saved with."""
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    ours = [shard.index(p) for group in groups for p in group["params"]]
    index_of = dict(zip(ids, ours, strict=True))
    for key in saved["state"]:
        if isinstance(key, int) and key not in index_of:
            raise ValueError(f"loaded state dict has state for parameter {key}, which no group lists")
    return {index_of.get(key, key): state for key, state in saved["state"].items()}


def _cut_all(shard: Shard, full: Mapping[Any, State], rank: int) -> dict[Any, State]:
    """A rank's part of the full state, cloned; of parameters it holds no part of, nothing."""
    parts = {}
    for key, state in full.items():
        if not _is_index(shard, key):
            parts[key] = tree_map_only(Tensor, torch.clone, copy.copy(state))
            continue
        bucket, _ = shard.layout.place(key)
        for segment in shard.layout.buckets[bucket].segments(rank):
            if segment.parameter == key:
                parts[key] = _cut_to(shard, segment, state)
    return parts


def _is_index(shard: Shard, key: Any) -> bool:
    """Whether a key of the state is a parameter's index, not one of the class's own keys."""
    return isinstance(key, int) and key < len(shard.parameters)


def _cut_to(shard: Shard, segment: Segment, state: State) -> State:
    if segment.whole:
        return tree_map_only(Tensor, torch.clone, copy.copy(state))
    per_element = shard.algorithm.per_element
    return {
        name: shard.buffers.segment_of(value, segment).clone()
        if name in per_element and isinstance(value, Tensor)
        else tree_map_only(Tensor, torch.clone, value)
        for name, value in state.items()
    }


def _scatter(
    shard: Shard, groups: Sequence[Group], saved: Any, source: int
) -> tuple[list[Group], dict[Any, State]]:
    """Options and every rank's part, from the rank that has the full state."""
    collectives, brings = shard.collectives, shard.collectives.rank == source
    content: Any = None
    if brings:
        options = copy.deepcopy(saved["param_groups"])
        content = (options, _by_index(shard, groups, saved))
    text = pickle.dumps(tree_map_only(Tensor, TensorSpec.of, content)) if brings else b""
    outline = pickle.loads(broadcast_text(collectives, text, source))
    options = _broadcast_tree(shard, content[0] if brings else outline[0], source)
    keys = list(outline[1])
    local: dict[Any, State] = {}
    for key in keys:  # the class's own state, of no parameter
        if not _is_index(shard, key):
            local[key] = _broadcast_tree(shard, (content if brings else outline)[1][key], source)
    for bucket in range(len(shard.layout.buckets)):
        members = {slot.parameter for slot in shard.layout.buckets[bucket].slots}
        here = [key for key in keys if key in members]
        if brings:
            _send_parts(shard, {key: content[1][key] for key in here}, local)
        else:
            _receive_parts(shard, {key: outline[1][key] for key in here}, local, source)
    return options, local


def _send_parts(shard: Shard, full: dict[Any, State], local: dict[Any, State]) -> None:
    handles = []
    for rank in range(shard.collectives.world_size):
        parts = _cut_all(shard, full, rank)
        if rank == shard.collectives.rank:
            local.update(parts)
        else:
            leaves = [leaf for leaf in tree_flatten(parts)[0] if isinstance(leaf, Tensor)]
            flat = [in_memory_order(leaf, dense_strides(leaf)) for leaf in leaves]
            handles.append(send_tensors(shard.collectives, flat, rank))
    for handle in handles:
        handle.wait()


def _receive_parts(
    shard: Shard, outline: dict[Any, State], local: dict[Any, State], source: int
) -> None:
    parts: dict[Any, State] = {}
    for key, specs in outline.items():
        if key not in shard.segments:
            continue
        segment, _ = shard.segments[key]
        if not segment.whole:
            specs = {
                name: TensorSpec((segment.numel,), (1,), spec.dtype)
                if name in shard.algorithm.per_element and isinstance(spec, TensorSpec)
                else spec
                for name, spec in specs.items()
            }
        parts[key] = tree_map_only(TensorSpec, TensorSpec.empty, specs)
    leaves = [leaf for leaf in tree_flatten(parts)[0] if isinstance(leaf, Tensor)]
    flat = [in_memory_order(leaf, leaf.stride()) for leaf in leaves]
    receive_tensors(shard.collectives, flat, source).wait()
    local.update(parts)


def _broadcast_tree(shard: Shard, tree: Any, source: int) -> Any:
    """A tree of plain values and small tensors (options such as a tensor ``lr``), on every rank."""
    wire = shard.collectives.wire_device

    def share(leaf: Any) -> Tensor:
        message = leaf.empty() if isinstance(leaf, TensorSpec) else leaf.detach().contiguous()
        message = message.to(wire, copy=True)
        shard.collectives.broadcast(message, source).wait()
        return message.cpu()

    return tree_map_only((Tensor, TensorSpec), share, tree)


def _load_into_class(
    shard: Shard, groups: Sequence[Group], options: list[Group], local: dict[Any, State]
) -> None:
    """Let the class's own ``load_state_dict`` take in this rank's part, at its own indices."""
    next_id, ids, local_groups = 0, {}, []
    for group, loaded in zip(groups, shard.load_groups(options), strict=True):
        held = [shard.index(p) for p in group["params"] if shard.index(p) in shard.segments]
        local_groups.append({**loaded, "params": list(range(next_id, next_id + len(held)))})
        ids.update(zip(held, range(next_id, next_id + len(held)), strict=True))
        next_id += len(held)
    state = {ids.get(key, key): value for key, value in local.items()}
    shard.optim.load_state_dict({"state": state, "param_groups": local_groups})
