"""What of a checkpoint fits a model and an optimizer, read into new memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from shardopt.checkpoint.boxes import order_of
from shardopt.checkpoint.contents import parameter_keys
from shardopt.checkpoint.entries import TensorEntry
from shardopt.checkpoint.plain import TensorKey, map_tensors
from shardopt.checkpoint.source import Source
from shardopt.checkpoint.tensor_reader import TensorReader
from shardopt.checkpoint.tensors import dtype_name
from shardopt.errors import MismatchError
from shardopt.shard import Shard
from shardopt.state.load import check_groups, check_state


class Fitting:
    """Reads into new memory what fits, and collects what does not.

    Args:
        source: the checkpoint.
        strict: whether to raise at the first thing that does not fit.

    Attributes:
        skipped: what does not fit, a line each.
    """

    def __init__(self, source: Source, strict: bool):
        self._source, self._strict = source, strict
        self._tensors = TensorReader(source)
        self.skipped: list[str] = []

    def model(self, model: nn.Module) -> dict[str, Any] | None:
        """The ``state_dict`` to load."""
        saved = self._part("model")
        if saved is None:
            return None
        own = model.state_dict(keep_vars=True)
        tensors = {}
        for name in [name for name in own if name not in saved]:
            self._misfit(f"model.{name}: expected it in the checkpoint, got none")
        for name, value in saved.items():
            if name not in own:
                self._misfit(f"model.{name}: the model has no such entry")
            elif not isinstance(value, TensorKey):
                tensors[name] = value
            elif self._fits(name, own[name], self._source.tensors[value.key]):
                tensors[name] = self._tensors.whole(value)
        return tensors

    def _fits(self, name: str, own: Any, entry: TensorEntry) -> bool:
        expected = str(TensorEntry(dtype_name(own.dtype), tuple(own.shape)))
        if expected != str(entry):
            self._misfit(f"model.{name}: expected {expected} as the model has, got {entry}")
        return expected == str(entry)

    def optimizer(
        self, optimizer: Any, model: nn.Module | None
    ) -> tuple[list[dict[str, Any]], dict[Any, Any]] | None:
        """Options of groups, and this rank's part of the state, by index of parameter."""
        saved = self._part("optimizer")
        if saved is None:
            return None
        shard: Shard = optimizer._shard
        expected = shard.class_of({})
        if (got := self._source.facts.get("optimizer_class", expected)) != expected:
            self._misfit(f"optimizer class: expected {expected}, got the state of {got}")
            return None
        saved = self._in_our_order(saved, optimizer.param_groups, shard, model)
        if not self._passes(check_groups, shard, optimizer.param_groups, saved):
            return None
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        ours = [shard.index(p) for group in optimizer.param_groups for p in group["params"]]
        options = map_tensors(saved["param_groups"], self._tensors.whole)
        local: dict[Any, Any] = map_tensors(saved.get("own", {}), self._tensors.whole)
        for key, index in dict(zip(ids, ours, strict=True)).items():
            if (state := saved["state"].get(key)) is None:
                continue
            outline = map_tensors(state, self._tensors.outline)
            fits = self._passes(check_state, shard, index, outline)
            if fits and (shard.flat or index in shard.segments):
                local[index] = self._part_of_state(shard, index, state)
        return options, local

    def _in_our_order(
        self, saved: Any, groups: list[dict[str, Any]], shard: Shard, model: nn.Module | None
    ) -> Any:
        """The saved state with its groups' parameters as ours list them: by name where both have
        names, else by order, as torch does.
        """
        keys = parameter_keys(shard, model)
        ours = [[keys[shard.index(p)] for p in group["params"]] for group in groups]
        theirs = [list(group["params"]) for group in saved["param_groups"]]
        if ours == theirs or not (_are_names(ours) and _are_names(theirs)):
            return saved
        if len(ours) != len(theirs):
            if self._strict:
                return saved  # and refused as torch does
            self._misfit(f"optimizer groups: expected {len(ours)}, got {len(theirs)}: options stay")
            return self._listed(saved, ours, groups)
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            for name in [name for name in mine if name not in other]:
                self._misfit(f"optimizer group {number}: expected parameter {name!r}, got none")
            for name in [name for name in other if name not in mine]:
                self._misfit(f"optimizer group {number}: has no parameter {name!r}")
            both = [name for name in other if name in mine], [n for n in mine if n in other]
            if both[0] != both[1]:
                first = next(pair for pair in zip(*both, strict=True) if pair[0] != pair[1])
                self._misfit(
                    f"optimizer group {number}: expected parameter {first[1]!r} where it has "
                    f"{first[0]!r}: another order"
                )
        return self._listed(saved, ours, saved["param_groups"])

    def _listed(self, saved: Any, ours: list[list[str]], options: list[dict[str, Any]]) -> Any:
        """The saved state of our parameters, by name, under groups of ours with these options."""
        reordered = [{**group, "params": names} for group, names in zip(options, ours, strict=True)]
        listed = {name for names in ours for name in names}
        state = {key: entries for key, entries in saved["state"].items() if key in listed}
        return {**saved, "state": state, "param_groups": reordered}

    def _part_of_state(self, shard: Shard, index: int, state: Mapping[Any, Any]) -> dict[Any, Any]:
        """This rank's part of a parameter's state."""
        if shard.flat:
            return {
                name: map_tensors(
                    value,
                    self._tensors.stretches(shard) if name in shard.flat else self._tensors.whole,
                )
                for name, value in state.items()
            }
        segment, _ = shard.segments[index]
        if segment.whole:
            return map_tensors(dict(state), self._tensors.whole)
        per_element = shard.algorithm_of(index).per_element
        shape = shard.layout.shape_of(segment)
        order = order_of(shard.layout.parameters[index].shape, shard.buffers.strides[index])
        start, stop = segment.offset, segment.offset + segment.numel
        return {
            name: self._tensors.part(value, order, start, stop).view(shape)
            if name in per_element and isinstance(value, TensorKey)
            else map_tensors(value, self._tensors.whole)
            for name, value in state.items()
        }

    def scheduler(self, expected: str) -> Any:
        """The state of a scheduler of this class."""
        if (got := self._source.facts.get("scheduler_class", expected)) != expected:
            self._misfit(f"scheduler class: expected {expected}, got the state of {got}")
            return None
        return self.plain("scheduler")

    def plain(self, name: str) -> Any:
        """A part of the tree, its tensors read."""
        return map_tensors(self._part(name), self._tensors.whole)

    def _part(self, name: str) -> Any:
        if name not in self._source.tree:
            held = ", ".join(self._source.tree) or "nothing"
            self._misfit(f"{name}: expected it in the checkpoint, got {held}")
        return self._source.tree.get(name)

    def _passes(self, check: Callable[..., None], *what: Any) -> bool:
        """Whether a check raises no ``ValueError``; where strict, it raises."""
        try:
            check(*what)
        except ValueError as problem:
            if self._strict:
                raise
            self._misfit(str(problem))
            return False
        return True

    def _misfit(self, line: str) -> None:
        if self._strict:
            raise MismatchError(
                f"{self._source.path}: {line}; load what was saved, or pass strict=False to skip "
                "what does not fit"
            )
        self.skipped.append(line)


def _are_names(groups: list[list[Any]]) -> bool:
    """Whether parameters are known by names, not by numbers."""
    return all(type(k) is str and not k.isdecimal() for keys in groups for k in keys)
