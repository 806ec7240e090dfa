"""Full state, from every rank or from one, to shards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from shardopt.buffers import dense_strides, in_memory_order
from shardopt.comm.collectives import broadcast_text
from shardopt.comm.transfer import receive_tensors, send_tensors
from shardopt.guard import agree, all_or_none
from shardopt.layout import Segment
from shardopt.local_state import key_of
from shardopt.shard import Group, Shard
from shardopt.state.flat import check_flat, cut_flat, scatter_flat
from shardopt.state.outline import State, TensorSpec
from shardopt.validation import check_rank


def load(shard: Shard, groups: Sequence[Group], saved: Any, source: int | None) -> None:
    """Cut ``saved`` into this rank's part and let the class load it, options into ``groups`` too.

    Collective. ``source`` is the rank that brings ``saved``, or ``None`` if every rank does. The
    caller's dict is neither changed nor kept: every tensor is cloned.
    """
    collectives = shard.collectives
    brings = source is None or source == collectives.rank
    remedy = "pass the same from_ on every rank"
    agree(collectives, {"load_state_dict(from_=)": source}, remedy)
    check_rank("from_", source, collectives.world_size)
    with all_or_none(collectives):
        if brings:
            check_groups(shard, groups, saved)
            for index, state in _by_index(shard, groups, saved).items():
                if _is_index(shard, index):
                    check_state(shard, index, state)
    if source is None:
        agree(collectives, _facts(saved), "load the same file on every rank, or pass from_=0")
    if source is None or collectives.world_size == 1:
        options, full = copy.deepcopy(saved["param_groups"]), _by_index(shard, groups, saved)
        held = [segment for segment, _ in shard.segments.values()]
        local = _cut_all(shard, full, held)
    else:
        options, local = _scatter(shard, groups, saved, source)
    take_in(shard, groups, options, local)


def take_in(
    shard: Shard, groups: Sequence[Group], options: list[Group], local: dict[Any, State]
) -> None:
    """Let the class load this rank's part of a state, and ``groups`` take the options. Collective.

    ``local`` is by parameter index, or by the class's own keys.
    """
    with all_or_none(shard.collectives):
        _load_into_class(shard, options, local)
    for group, saved_group, new in zip(
        groups, options, shard.options_after_load(options), strict=True
    ):
        kept = {"params": group["params"]}
        if names := saved_group.get("param_names", group.get("param_names")):
            kept["param_names"] = names
        group.clear()
        group.update({**new, **kept})


def _facts(saved: Any) -> dict[str, object]:
    """What tells two saved states apart at a glance: options, shapes, and steps taken."""
    facts: dict[str, object] = {}
    for number, group in enumerate(saved["param_groups"]):
        facts |= {f"saved group {number}, {key}": value for key, value in group.items()}
    for key, state in saved["state"].items():
        entries = state.items() if isinstance(state, Mapping) else [("", state)]
        for name, value in entries:
            facts[f"saved {name} of parameter {key}"] = tree_map_only(Tensor, _at_a_glance, value)
    return facts


def _at_a_glance(tensor: Tensor) -> Tensor | str:
    return tensor if tensor.numel() == 1 else f"{tensor.dtype} {tuple(tensor.shape)}"


def check_groups(shard: Shard, groups: Sequence[Group], saved: Any) -> None:
    """Refuse groups that do not fit, in torch's words where torch refuses them too."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise TypeError(
            f"expected a state_dict with 'state' and 'param_groups', got {type(saved).__name__}; "
            "on ranks that have none pass None and from_=<rank that has it>"
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
        if shard.class_of(group) != shard.class_of(other):
            raise ValueError(
                f"optimizer_class of group {number}: expected {shard.class_of(group)}, got "
                f"{shard.class_of(other)}; the state was saved by another class"
            )


def check_state(shard: Shard, index: int, state: State) -> None:
    """Refuse the state of a parameter that has another shape."""
    (check_flat if shard.flat else _check_shapes)(shard, index, state)


def _check_shapes(shard: Shard, index: int, state: State) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        shape = tuple(shard.parameters[index].shape)
        algorithm = shard.algorithm_of(index)
        expected = algorithm.state_shape(name, shape)
        if (
            expected is not None
            and value.shape != expected
            and not (expected == () and value.numel() == 1)
        ):
            raise ValueError(
                f"state {name!r} of parameter {shard.layout.parameters[index].name!r}: expected "
                f"shape {expected}, got {tuple(value.shape)}; the state was saved for another "
                f"model or by another class than {algorithm.optimizer_class.__name__}"
            )


def _by_index(shard: Shard, groups: Sequence[Group], saved: Any) -> dict[Any, State]:
    """The saved state by our parameter index instead of the ids it was saved with."""
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    ours = [shard.index(p) for group in groups for p in group["params"]]
    index_of = dict(zip(ids, ours, strict=True))
    for key in saved["state"]:
        if isinstance(key, int) and key not in index_of:
            raise ValueError(
                f"loaded state dict has state for parameter {key}, which no group lists"
            )
    return {index_of.get(key, key): state for key, state in saved["state"].items()}


def _cut_all(
    shard: Shard, full: Mapping[Any, State], segments: Iterable[Segment]
) -> dict[Any, State]:
    """The part of the state that belongs to ``segments``, and what is no parameter's; cloned."""
    segment_of = {segment.parameter: segment for segment in segments}
    if shard.flat:
        return {index: cut_flat(shard, state) for index, state in full.items()}
    parts = {}
    for key, state in full.items():
        if not _is_index(shard, key):
            parts[key] = tree_map_only(Tensor, torch.clone, copy.copy(state))
        elif key in segment_of:
            parts[key] = _cut_to(shard, segment_of[key], state)
    return parts


def _is_index(shard: Shard, key: Any) -> bool:
    """Whether a key of the state is a parameter's index, not one of the class's own keys."""
    return isinstance(key, int) and key < len(shard.parameters)


def _cut_to(shard: Shard, segment: Segment, state: State) -> State:
    if segment.whole:
        return tree_map_only(Tensor, torch.clone, copy.copy(state))
    per_element = shard.algorithm_of(segment.parameter).per_element
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
    text = b""
    with all_or_none(collectives):
        if brings:
            text = pickle.dumps(tree_map_only(Tensor, TensorSpec.of, content))
    outline = pickle.loads(broadcast_text(collectives.shard_axis, text, source))
    options = _broadcast_tree(shard, content[0] if brings else outline[0], source)
    keys = list(outline[1])
    local: dict[Any, State] = {}
    for key in keys:  # the class's own state, of no parameter
        if not _is_index(shard, key):
            local[key] = _broadcast_tree(shard, (content if brings else outline)[1][key], source)
    if shard.flat:
        for key, state in (content if brings else outline)[1].items():
            local[key] = {
                name: (scatter_flat if name in shard.flat else _broadcast_tree)(
                    shard, value, source
                )
                for name, value in state.items()
            }
        return options, local
    for bucket in range(len(shard.layout.buckets)):
        members = {slot.parameter for slot in shard.layout.buckets[bucket].slots}
        here = [key for key in keys if key in members]
        if brings:
            _send_parts(shard, bucket, {key: content[1][key] for key in here}, local)
        else:
            _receive_parts(shard, {key: outline[1][key] for key in here}, local, source)
    return options, local


def _send_parts(shard: Shard, bucket: int, full: dict[Any, State], local: dict[Any, State]) -> None:
    handles = []
    for rank in range(shard.collectives.world_size):
        parts = _cut_all(shard, full, shard.layout.buckets[bucket].segments(rank))
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
                name: TensorSpec.contiguous(shard.layout.shape_of(segment), spec.dtype)
                if name in shard.algorithm_of(key).per_element and isinstance(spec, TensorSpec)
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
        message = leaf.empty() if isinstance(leaf, TensorSpec) else leaf.detach()
        message = message.contiguous().to(wire, copy=True)
        shard.collectives.shard_axis.broadcast(message, source).wait()
        return message.cpu()

    return tree_map_only((Tensor, TensorSpec), share, tree)


def _load_into_class(shard: Shard, options: list[Group], local: dict[Any, State]) -> None:
    """Let the class's own ``load_state_dict`` take in this rank's part, at its own indices."""
    next_id, local_groups = 0, []
    ids: dict[int, int] = {}  # id of a tensor of the class -> its number
    for inner, loaded in zip(shard.optim.param_groups, shard.load_groups(options), strict=True):
        numbers = list(range(next_id, next_id + len(inner["params"])))
        local_groups.append({**loaded, "params": numbers})
        ids.update(zip(map(id, inner["params"]), numbers, strict=True))
        next_id += len(numbers)
    state = {
        ids[id(key_of(shard, key))] if _is_index(shard, key) else key: value
        for key, value in local.items()
    }
    shard.optim.load_state_dict({"state": state, "param_groups": local_groups})
