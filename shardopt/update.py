"""One step of the class on this rank's segments, and what it makes of them on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardopt.algos.lbfgs import SumsOverRanks
from shardopt.algos.mixture import step_without_hooks
from shardopt.comm.collectives import Handle
from shardopt.layout import Atom
from shardopt.rows import gather_rows
from shardopt.shard import NOT_OPTIONS, Group, Shard


def update_buckets(
    shard: Shard,
    groups: Sequence[Group],
    gradient_of: Callable[[int], Tensor | None],
    sparse: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """One step of the class on this rank's segments, with the options of the user's groups.

    Options flow in before it and, where the class changes them, out after it. A class that
    updates each parameter by itself goes bucket by bucket.

    Args:
        shard: whose buckets.
        groups: the user's groups.
        gradient_of: parameter index -> the gradient of its segment, if it has one.
        sparse: indices of parameters whose gradients are sparse, the same on every rank.

    Yields:
        The number of each bucket, as soon as it is updated.
    """
    pushed = push_options(shard, groups, sparse)
    if all(algorithm.separable for algorithm in shard.algorithms):
        yield from _update_one_by_one(shard, gradient_of)
    else:
        everything = range(len(shard.layout.buckets))
        _step_on(shard, everything, gradient_of)
        yield from everything
    pull_options(shard, groups, pushed)


def _update_one_by_one(shard: Shard, gradient_of: Callable[[int], Tensor | None]) -> Iterator[int]:
    inner_groups = shard.optim.param_groups
    whole = [inner["params"] for inner in inner_groups]
    try:
        for number, parts in enumerate(_by_bucket(shard)):
            for inner, tensors in zip(inner_groups, parts, strict=True):
                inner["params"] = tensors
            _step_on(shard, [number], gradient_of)
            yield number
    finally:
        for inner, tensors in zip(inner_groups, whole, strict=True):
            inner["params"] = tensors


def push_options(
    shard: Shard, groups: Sequence[Group], sparse: frozenset[int] = frozenset()
) -> list[Group]:
    """Give the class the options of the user's groups; returns what it was given."""
    pushed = [shard.inner_options(number, group, sparse) for number, group in enumerate(groups)]
    for inner, options in zip(shard.optim.param_groups, pushed, strict=True):
        inner.update(options)
    return pushed


def pull_options(shard: Shard, groups: Sequence[Group], pushed: Sequence[Group]) -> None:
    """Take over into the user's groups what the class has changed since it was ``pushed``."""
    for group, inner, options in zip(groups, shard.optim.param_groups, pushed, strict=True):
        for key, value in inner.items():
            if key not in NOT_OPTIONS and (key not in options or value is not options[key]):
                group[key] = value


def search(shard: Shard, groups: Sequence[Group], evaluate: Callable[[], Any]) -> Any:
    """One step of a class with flat state, which calls ``evaluate`` as often as it likes.

    Args:
        shard: whose segments the class moves about.
        groups: the user's groups.
        evaluate: brings the parameters, as the segments have them now, together on every rank;
            leaves the segments' gradients there, and returns the loss.

    Returns:
        What the class returns.
    """
    push_options(shard, groups)
    sums = SumsOverRanks(shard.collectives.shard_axis.all_gather_rows)

    def evaluate_outside() -> Any:
        with sums.suspended():
            return evaluate()

    try:
        with sums:
            return step_without_hooks(shard.optim, evaluate_outside)
    finally:
        give_gradients(shard, shard.segments, lambda index: None)


def _by_bucket(shard: Shard) -> list[list[list[Tensor]]]:
    """For each bucket, the tensors that each group of the class has there."""
    numbers = {
        id(tensor): shard.layout.place(index)[0] for index, (_, tensor) in shard.segments.items()
    }
    groups = shard.optim.param_groups
    parts: list[list[list[Tensor]]] = [[[] for _ in groups] for _ in shard.layout.buckets]
    for place, group in enumerate(groups):
        for tensor in group["params"]:
            parts[numbers[id(tensor)]][place].append(tensor)
    return parts


def _step_on(
    shard: Shard, numbers: Iterable[int], gradient_of: Callable[[int], Tensor | None]
) -> None:
    """Let the class step on the gradients of some buckets."""
    rank = shard.collectives.rank
    here = [s.parameter for n in numbers for s in shard.layout.buckets[n].segments(rank)]
    give_gradients(shard, here, gradient_of)
    try:
        step_without_hooks(shard.optim)
    finally:
        give_gradients(shard, here, lambda index: None)


def give_gradients(
    shard: Shard, indices: Iterable[int], gradient_of: Callable[[int], Tensor | None]
) -> None:
    """Let the segments of some parameters have their gradients."""
    for index in indices:
        tensor, grad = shard.segments[index][1], gradient_of(index)
        if grad is not None and grad.dtype != tensor.dtype:
            tensor.grad_dtype = grad.dtype  # as the user has set it on the parameter
        tensor.grad = grad


def gather(
    shard: Shard,
    numbers: Iterable[int],
    changed: Iterable[int],
    gradient_of: Callable[[int], Tensor | None] | None = None,
) -> dict[int, Handle]:
    """Start to gather buckets in the order in which they come; tell autograd what has changed.

    Args:
        shard: whose buckets.
        numbers: of the buckets.
        changed: indices of the parameters that differ from what they were.
        gradient_of: parameter index -> the gradient that has updated its segment; of parameters
            cut between rows, only rows in it travel. ``None``: all do.

    Returns:
        The number of each bucket -> its handle.
    """
    buckets, buffers = shard.layout.buckets, shard.buffers.buckets
    handles = {}
    for number in numbers:
        if buckets[number].atom is Atom.ROW and gradient_of is not None:
            handles[number] = gather_rows(shard, number, gradient_of)
        else:
            borders = buckets[number].borders
            handles[number] = shard.collectives.all_gather(buffers[number], borders)
    torch.autograd.graph.increment_version([shard.parameters[index] for index in changed])
    return handles


def gather_everything(shard: Shard) -> dict[int, Handle]:
    """Start to gather all buckets, any of whose parameters may have changed."""
    return gather(shard, range(len(shard.layout.buckets)), range(len(shard.parameters)))


def broadcast(shard: Shard, first: int) -> None:
    """Overwrite the buckets from number ``first`` on by those of rank 0."""
    handles = [shard.collectives.broadcast(bucket, 0) for bucket in shard.buffers.buckets[first:]]
    for handle in handles:
        handle.wait()
