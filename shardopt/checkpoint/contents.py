"""What this rank brings to a checkpoint: its pieces of tensors, and a tree of all else.

Each tensor is written once. Parameters of the optimizer and their state are cut as the optimizer
has cut them; other parameters of the model go to the ranks in turn; buffers, the scheduler's state
and ``extra`` are the first rank's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardopt.buffers import dense_strides, in_memory_order
from shardopt.checkpoint.arguments import unwrapped
from shardopt.checkpoint.entries import TensorEntry
from shardopt.checkpoint.garbage import no_collection
from shardopt.checkpoint.plain import TensorKey, encode
from shardopt.checkpoint.tensors import entry_of
from shardopt.comm import Collectives
from shardopt.errors import UnsupportedError
from shardopt.local_state import states_of
from shardopt.shard import Shard
from shardopt.state.consolidate import check_declared
from shardopt.state.flat import spans_of, vector_starts


@dataclass
class Piece:
    """A stretch of a tensor's elements, as they lie in memory.

    Attributes:
        key: of the tensor.
        entry: the whole tensor, without chunks.
        start: the first element, counted in memory order.
        data: the elements, 1-D and contiguous, on any device.
    """

    key: str
    entry: TensorEntry
    start: int
    data: Tensor


@dataclass
class Contents:
    """What one rank brings.

    Attributes:
        tree: plain values, encoded; of the optimizer's state what this rank is to tell.
        pieces: what this rank writes.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)


@no_collection()
def contents_of(
    collectives: Collectives, model: Any, optimizer: Any, scheduler: Any, extra: Any
) -> Contents:
    """Collect what this rank is to write; nothing is copied.

    Raises:
        UnsupportedError: something that cannot be kept, named by its place.
    """
    collector = _Collector(collectives)
    model = unwrapped(model)
    shard = None if optimizer is None else optimizer._shard
    if model is not None:
        collector.add_model(model, shard)
    if shard is not None:
        collector.add_optimizer(shard, optimizer.param_groups, parameter_keys(shard, model))
    if scheduler is not None:
        collector.add_plain("scheduler", scheduler.state_dict())
    if extra is not None:
        collector.add_plain("extra", extra)
    return collector.contents


def parameter_keys(shard: Shard, model: nn.Module | None) -> list[str]:
    """By what a parameter of the optimizer is known: its name in the model, or what the groups
    call it, or else its number.
    """
    named = () if model is None else model.named_parameters()
    in_model = {id(parameter): name for name, parameter in named}
    ours = [id(parameter) for parameter in shard.parameters]
    if model is not None and ours and not in_model.keys() & set(ours):
        raise ValueError(
            f"model: expected the module whose parameters the optimizer has, got a "
            f"{type(model).__name__} with none of them; pass the one it was constructed from"
        )
    keys = []
    for index, parameter in enumerate(shard.parameters):
        name = shard.names[index]
        keys.append(in_model.get(id(parameter)) or (name if type(name) is str else str(index)))
    return keys


class _Collector:
    def __init__(self, collectives: Collectives):
        self._rank, self._world_size = collectives.rank, collectives.world_size
        self._writes = collectives.replica == 0
        self.contents = Contents()

    def add_plain(self, name: str, value: Any) -> None:
        """The first rank's plain values, and tensors among them."""
        if self._is_first:
            try:
                self.contents.tree[name] = encode(value, (name,), self._refer)
            except RecursionError:
                raise UnsupportedError(
                    f"{name}: expected values within values up to some hundred levels, got more, "
                    "or one that holds itself; a checkpoint cannot keep that"
                ) from None

    def add_model(self, model: nn.Module, shard: Shard | None) -> None:
        """A model's ``state_dict``, shared out; tied tensors are written once."""
        entries: dict[str, Any] = {}
        known: dict[int, TensorKey] = {}
        for number, (name, value) in enumerate(model.state_dict(keep_vars=True).items()):
            if not isinstance(value, Tensor):
                entries[name] = value
                continue
            key = TensorKey(f"model.{name}")
            entries[name] = known.setdefault(id(value), key)
            if entries[name] is not key:
                continue
            if shard is not None and shard.holds(value):
                self._add_parameter(key.key, shard, shard.index(value))
            elif self._rank == (
                number % self._world_size if isinstance(value, nn.Parameter) else 0
            ):
                self._add_whole(key.key, value)
        if self._is_first:
            self.contents.tree["model"] = encode(entries, ("model",), self._refer)

    def _add_parameter(self, key: str, shard: Shard, index: int) -> None:
        """This rank's segment of one of the optimizer's parameters."""
        if index in shard.segments:
            segment, _ = shard.segments[index]
            parameter, strides = shard.parameters[index].detach(), shard.buffers.strides[index]
            data = in_memory_order(parameter, strides)
            part = data[segment.offset : segment.offset + segment.numel]
            entry = entry_of(key, parameter.dtype, parameter.shape, strides)
            self._add(Piece(key, entry, segment.offset, part))

    def add_optimizer(self, shard: Shard, groups: list[dict[str, Any]], keys: list[str]) -> None:
        """Options, and this rank's part of the state."""
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UnsupportedError(
                f"expected one name for each parameter, got {twice!r} for two; construct the "
                "optimizer from model.named_parameters(), and pass model="
            )
        state, path = dict(self._states(shard, keys)), ("optimizer", "state")
        self.contents.tree["optimizer"] = {"state": encode(state, path, self._refer)}
        if self._is_first:
            saved_groups = [
                {**group, "params": [keys[shard.index(p)] for p in group["params"]]}
                for group in groups
            ]
            path = ("optimizer", "param_groups")
            self.contents.tree["optimizer"] |= {
                "param_groups": encode(saved_groups, path, self._refer),
                "own": encode(
                    {k: s for k, s in shard.optim.state.items() if not isinstance(k, Tensor)},
                    ("optimizer", "own"),
                    self._refer,
                ),
            }

    def _states(self, shard: Shard, keys: list[str]) -> Iterator[tuple[str, dict[Any, Any]]]:
        """Parameter's key -> its state, where this rank is the one to tell; adds what is cut."""
        for index, state in states_of(shard).items():
            prefix = f"optimizer.state.{keys[index]}"
            if shard.flat:
                entries = self._flat_state(shard, prefix, state)
                tells = self._is_first
            else:
                check_declared(shard, index, state)
                entries = self._cut_state(shard, index, prefix, state)
                segment, _ = shard.segments[index]
                tells = segment.whole or segment.offset == 0
            if tells and self._writes:
                yield keys[index], entries

    def _cut_state(
        self, shard: Shard, index: int, prefix: str, state: Mapping[Any, Any]
    ) -> dict[Any, Any]:
        segment, _ = shard.segments[index]
        if segment.whole:
            return dict(state)
        parameter, strides = shard.parameters[index], shard.buffers.strides[index]
        entries = dict(state)
        for name in shard.algorithm_of(index).per_element & set(state):
            if isinstance(value := state[name], Tensor):
                key = TensorKey(f"{prefix}.{name}")
                _check_dense(value, key.key)
                entry = entry_of(key.key, value.dtype, parameter.shape, strides)
                data = in_memory_order(value.detach(), dense_strides(value))
                self._add(Piece(key.key, entry, segment.offset, data))
                entries[name] = key
        return entries

    def _flat_state(self, shard: Shard, prefix: str, state: Mapping[Any, Any]) -> dict[Any, Any]:
        """State that is vectors over all parameters, of which every rank has stretches."""
        length = vector_starts(shard)[-1]

        def cut(vector: Any, key: str) -> Any:
            if isinstance(vector, list):
                return [cut(item, f"{key}.{number}") for number, item in enumerate(vector)]
            if not isinstance(vector, Tensor):
                return vector
            entry = entry_of(key, vector.dtype, (length,))
            for there, here in spans_of(shard, self._rank):
                self._add(Piece(key, entry, there.start, vector.detach()[here]))
            return TensorKey(key)

        return {
            name: cut(value, f"{prefix}.{name}") if name in shard.flat else value
            for name, value in state.items()
        }

    @property
    def _is_first(self) -> bool:
        return self._rank == 0 and self._writes

    def _refer(self, value: Any, key: str) -> TensorKey | None:
        """The key of a tensor among plain values, which only this rank brings."""
        if not isinstance(value, Tensor):
            return None
        self._add_whole(key, value)
        return TensorKey(key)

    def _add_whole(self, key: str, tensor: Tensor) -> None:
        _check_dense(tensor, key)
        tensor = tensor.detach().resolve_conj().resolve_neg()
        # Most are row-major, and a save may have thousands of them.
        strides = None if tensor.is_contiguous() else dense_strides(tensor)
        data = tensor.view(-1) if strides is None else in_memory_order(tensor, strides)
        self._add(Piece(key, entry_of(key, tensor.dtype, tensor.shape, strides), 0, data))

    def _add(self, piece: Piece) -> None:
        if self._writes:
            self.contents.pieces.append(piece)


def _check_dense(tensor: Tensor, key: str) -> None:
    distributed = hasattr(tensor, "device_mesh")
    if tensor.layout is not torch.strided or tensor.is_quantized or distributed:
        raise UnsupportedError(
            f"{key}: expected a dense tensor, got {type(tensor).__name__} "
            f"({tensor.layout}); a checkpoint keeps no others: convert it"
        )
