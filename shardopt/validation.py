"""What is refused before anything moves: bad options, parameters and gradients.

Everything here is local and cheap; the optimizer tells the other ranks what one of them refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from shardopt.algos import Algorithm
from shardopt.algos.mixture import instance_of
from shardopt.comm import Collectives
from shardopt.errors import UnsupportedError
from shardopt.layout import Atom
from shardopt.policies import Guards
from shardopt.shard import NOT_OPTIONS, Group, by_parameter, unique_parameters


def listed(params: Any) -> Any:
    """The constructor's ``params`` as a list, generators in groups listed too.

    Raises:
        TypeError: a tensor, or a set, whose order changes between runs; in torch's words.
    """
    if isinstance(params, Tensor):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, but "
            f"got {torch.typename(params)}"
        )
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but the ordering of "
            "tensors in sets will change between runs. Please use a list instead."
        )
    if not isinstance(params, Iterable):
        return params  # the class refuses it in its own words, after bad options
    entries = list(params)
    for entry in entries:
        list_group(entry)
    return entries


def list_group(group: Any) -> None:
    """List a group's ``params`` in place, as torch does: an iterator can be read only once."""
    if isinstance(group, dict) and not isinstance(group["params"], (Tensor, set)):
        group["params"] = list(group["params"])


def probe(
    optimizer_class: type[Optimizer],
    entries: Sequence[Any],
    options: Mapping[str, Any],
    device: str = "meta",
) -> Optimizer:
    """An instance of the real class over stand-ins without memory: it raises its own errors.

    Raises:
        TypeError: ``optimizer_class`` is not an optimizer class, or what it raises itself.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(
            "optimizer_class: expected a subclass of torch.optim.Optimizer, got "
            f"{optimizer_class!r}"
        )
    known: dict[int, Tensor] = {}

    def replace(entry: Any) -> Any:
        if isinstance(entry, dict):
            params = entry["params"]
            many = isinstance(params, (list, tuple))
            return {**entry, "params": [replace(p) for p in params] if many else replace(params)}
        if isinstance(entry, tuple):
            return tuple(replace(part) for part in entry)
        if isinstance(entry, Tensor):
            return known.setdefault(id(entry), stand_in(entry, device))
        return entry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of, the real construction warns of
        held = [replace(entry) for entry in entries] if isinstance(entries, list) else entries
        try:
            return instance_of(optimizer_class, held, options)
        except (NotImplementedError, RuntimeError):
            if device != "meta":
                raise
    return probe(optimizer_class, entries, options, "cpu")  # it looked at values


def stand_in(parameter: Tensor, device: str) -> Tensor:
    """A tensor that looks like ``parameter``, with values that do not matter."""
    if torch.nn.parameter.is_lazy(parameter):  # it has no shape yet
        return torch.empty(0, device=device)
    if parameter.layout is not torch.strided:
        return parameter.detach().to(device)
    twin = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device
    )
    return twin.requires_grad_(parameter.requires_grad)


def refuse_policies(*, gradients: Any, kernel: Any, guards: Any, bucket_cap_mb: Any) -> None:
    """Refuse bad arguments of ``ShardedOptimizer`` itself."""
    _one_of("gradients", gradients, ["replicated", "local", "sharded"], later=[])
    _one_of("kernel", kernel, ["auto", "torch"], later=["compiled"])
    if not isinstance(guards, Guards):
        raise TypeError(f"guards: expected shardopt.Guards, got {type(guards).__name__}")
    if not isinstance(bucket_cap_mb, (int, float)) or not 0 < bucket_cap_mb < float("inf"):
        raise ValueError(f"bucket_cap_mb: expected a positive number of MiB, got {bucket_cap_mb!r}")


def _one_of(argument: str, value: Any, allowed: list[str], later: list[str]) -> None:
    expected = " or ".join(repr(choice) for choice in allowed)
    if isinstance(value, str) and value in later:
        raise UnsupportedError(
            f"{argument}={value!r} is not supported yet; use {argument}={expected}"
        )
    if value not in allowed:
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")


def refuse_parameters(groups: Sequence[Group], algorithms: Sequence[Algorithm]) -> None:
    """Refuse parameters that cannot become views of buckets, or be cut between rows."""
    if any(group.get("differentiable") for group in groups):
        raise UnsupportedError(
            "differentiable=True is not supported, since the update runs on detached shards; use "
            "the optimizer class itself"
        )
    names, parameters = parameter_names(groups), unique_parameters(groups)
    per_parameter = by_parameter(groups, algorithms)
    for name, parameter, algorithm in zip(names, parameters, per_parameter, strict=True):
        if torch.nn.parameter.is_lazy(parameter):
            raise UnsupportedError(
                f"parameter {name!r} is not initialized; run a first forward pass before "
                "constructing ShardedOptimizer"
            )
        ordinary = type(parameter.data) is Tensor and parameter.layout is torch.strided
        if not ordinary or parameter.is_meta:
            raise UnsupportedError(
                f"parameter {name!r}: expected an ordinary dense tensor with memory, got "
                f"{type(parameter.data).__name__}, {parameter.layout}, on {parameter.device}"
            )
        if algorithm.atom is Atom.ROW and not parameter.is_contiguous():
            raise UnsupportedError(
                f"parameter {name!r}: expected a contiguous tensor, which can be cut between rows, "
                f"got strides {parameter.stride()}; make it so: p.data = p.data.contiguous()"
            )
    _refuse_overlaps(parameters, names)


def _refuse_overlaps(parameters: Sequence[Tensor], names: Sequence[str]) -> None:
    """Two Parameter objects over one memory, as after ``a.data = b.data``, cannot both move."""
    spans = []
    for name, parameter in zip(names, parameters, strict=True):
        dims = zip(parameter.shape, parameter.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in dims)
        if parameter.numel():
            start = parameter.data_ptr()
            stop = start + (last + 1) * parameter.dtype.itemsize
            spans.append((str(parameter.device), start, stop, name))
    for (device, _, stop, name), (next_device, start, _, next_name) in pairwise(sorted(spans)):
        if device == next_device and start < stop:
            raise UnsupportedError(
                f"parameters {name!r} and {next_name!r} share memory but are two Parameter "
                "objects; use one Parameter in both places (a.weight = b.weight)"
            )


def refuse_late_ranks(collectives: Collectives) -> None:
    """Refuse an optimizer that was to use all ranks and was constructed before there were any."""
    num_ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_ranks > 1 and collectives.world_size == 1:
        raise UnsupportedError(
            f"the state is not sharded: expected ShardedOptimizer to be constructed after "
            f"torch.distributed.init_process_group, which made {num_ranks} ranks since; construct "
            "it after that, or pass process_group=shardopt.comm.SoloCollectives() to mean one rank"
        )


def check_rank(argument: str, rank: Any, world_size: int) -> None:
    """Refuse what is neither ``None`` nor a rank of the group."""
    if rank is not None and not (isinstance(rank, int) and 0 <= rank < world_size):
        raise ValueError(
            f"{argument}: expected a rank from 0 to {world_size - 1}, or None, got {rank!r}"
        )


class _Unnamed(str):
    """What stands for a name: in messages after the word parameter, and without quotes."""

    __repr__ = str.__str__


def parameter_names(groups: Sequence[Group]) -> list[str]:
    """A name for every parameter, for messages: the user's, or its number and shape."""
    names: dict[int, str] = {}
    for group in groups:
        given = group.get("param_names") or [None] * len(group["params"])
        for parameter, name in zip(group["params"], given, strict=True):
            lazy = torch.nn.parameter.is_lazy(parameter)
            shape = "unknown shape" if lazy else f"shape {tuple(parameter.shape)}"
            names.setdefault(id(parameter), name or _Unnamed(f"{len(names)} of {shape}"))
    return list(names.values())


def option_facts(
    groups: Sequence[Group], first: int = 0, wait_for_device: bool = True
) -> dict[str, object]:
    """The options of ``groups``, by group and name; without those that lie on a GPU, if wanted."""
    return {
        f"group {number}, {key}": value
        for number, group in enumerate(groups, first)
        for key, value in group.items()
        if key not in NOT_OPTIONS
        and (wait_for_device or not isinstance(value, Tensor) or value.device.type == "cpu")
    }


def group_facts(
    groups: Sequence[Group],
    names: Sequence[str],  # of their parameters
    first: int,  # the number of the first of the groups
    first_parameter: int,
) -> dict[str, object]:
    """What every rank must bring alike of ``groups``."""
    facts: dict[str, object] = {}
    for number, group in enumerate(groups, first):
        facts[f"the number of parameters of group {number}"] = len(group["params"])
    facts |= option_facts(groups, first)
    named = zip(names, unique_parameters(groups), strict=True)
    for number, (name, parameter) in enumerate(named, first_parameter):
        facts[f"parameter {number}"] = (
            f"{name}: {tuple(parameter.shape)} {parameter.dtype} on {parameter.device.type}, "
            f"strides {parameter.stride()}, requires_grad={parameter.requires_grad}"
        )
    return facts
