"""Rounds: each backward reduces every bucket once, from hooks, while it goes on.

[Note: Rounds] One backward is one round: every bucket is reduced once, in order, on every rank.

- A bucket starts when every parameter of it has its gradient and all buckets before it have
  started. What has not started when backward ends starts then, with what there is.
- Launch order is law: a round is never left half-way. If an exception ends a backward, the rest
  of its round is launched before anything else, and what it reduced is thrown away.
- What arrives outside of a round (a second gradient of a parameter in one backward, as reentrant
  checkpointing produces, or one that the user assigns) goes in a round that all ranks agree on in
  ``settle``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction

from shardopt.errors import UnsupportedError
from shardopt.gradients.reduced_shards import MAX_IN_FLIGHT, ReducedShards
from shardopt.shard import Shard


class Rounds:
    """Hooks on the parameters, and the order in which they launch reductions.

    Args:
        shard: the parameters.
        keeps: whether ``.grad`` stays after it is sent, and its mean is then taken anew in every
            round; otherwise it is freed, and means add up.
        looks: whether to look for what is not finite as it arrives.

    Attributes:
        means: what has been reduced.
        present: parameters with a gradient of this rank in the means.
        num_rounds: rounds that this rank has been through.
        num_lost: those of them whose backward an exception ended.
        num_changes: grows with all that makes earlier verdicts old.
    """

    def __init__(self, shard: Shard, *, keeps: bool, looks: bool):
        self._shard, self._keeps = shard, keeps
        in_flight = None if keeps else MAX_IN_FLIGHT
        self.means = ReducedShards(shard, adds=not keeps, max_in_flight=in_flight, looks=looks)
        self.present: set[int] = set()
        self.num_rounds = self.num_lost = self.num_changes = 0
        self._hooked: set[int] = set()
        self._paused = False
        self._task: int | None = None  # the backward that has not ended yet
        self._next: int | None = None  # the bucket to launch next; ``None`` between rounds
        self._missing: list[int] = []  # by bucket: parameters that have not got their gradient
        self._arrived: set[int] = set()
        self._streams: set[torch.cuda.Stream] = set()
        # Where .grad stays: where it lay when it was sent and its version; what has got more since.
        self._sent: dict[int, tuple[int, int]] = {}
        self._late: set[int] = set()
        self._began_empty = True
        self._torn = False  # a lost round has added to the means

    # -- hooks ---------------------------------------------------------------------------------

    def extend(self) -> None:
        """The shard has new parameters."""
        self.means.extend()
        self.hook()

    def hook(self) -> None:
        """Hear of every parameter that wants a gradient; one may want it from now on only."""
        for index, parameter in enumerate(self._shard.parameters):
            if index not in self._hooked and parameter.requires_grad:
                hook = partial(_call, ref(self), index)
                parameter.register_post_accumulate_grad_hook(hook)
                self._hooked.add(index)

    def receive(self, index: int, parameter: Tensor) -> None:
        """Autograd has added to a parameter's gradient."""
        if self._paused:
            if index in self._sent:
                self._late.add(index)
            return
        self._enter_backward()
        if self._next is None:
            self._open()
        if parameter.is_cuda:
            self._streams.add(torch.cuda.current_stream(parameter.device))
        number, _ = self._shard.layout.place(index)
        assert self._next is not None
        if index in self._arrived or number < self._next:
            if self._keeps:
                self._late.add(index)
            return
        self._arrived.add(index)
        self._missing[number] -= 1
        while self._next < len(self._missing) and self._missing[self._next] <= 0:
            self._launch()

    def _enter_backward(self) -> None:
        """Note the end of this backward, and whether the one before has had one."""
        task = torch._C._current_graph_task_id()
        if task == self._task or _is_nested():
            return
        self.num_changes += 1
        self.abandon()
        self._task = task
        Variable._execution_engine.queue_callback(partial(self._leave_backward, task))

    def _leave_backward(self, task: int) -> None:
        if task == self._task:
            self._task = None
            self.close()

    # -- rounds --------------------------------------------------------------------------------

    def _open(self) -> None:
        self._next, self._arrived = 0, set()
        self._began_empty = self.means.is_empty
        self._missing = [
            sum(self._shard.parameters[slot.parameter].requires_grad for slot in bucket.slots)
            for bucket in self._shard.layout.buckets
        ]

    def close(self) -> None:
        """Launch what has not been launched in this round."""
        if self._next is None:
            self._open()
        while self._next is not None and self._next < len(self._shard.layout.buckets):
            self._launch()
        self._next = None
        self.num_rounds += 1

    def _launch(self) -> None:
        """Reduce the next bucket, unless none of its parameters is trained."""
        assert self._next is not None
        number, self._next = self._next, self._next + 1
        members = [slot.parameter for slot in self._shard.layout.buckets[number].slots]
        parameters = {index: self._shard.parameters[index] for index in members}
        gradients = {i: p.grad for i, p in parameters.items() if p.grad is not None}
        if self._keeps:  # the mean of what .grad holds now takes the place of the one before
            self.present.difference_update(members)
            self._late.difference_update(members)
            for index in members:
                self._sent.pop(index, None)
        if not gradients and not any(p.requires_grad for p in parameters.values()):
            return
        for index, gradient in gradients.items():
            self._check(index, gradient)
        for stream in self._streams:  # every producer of a gradient (DeepSpeed#8061)
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        self._streams.clear()
        with torch.no_grad():
            self.means.launch(number, gradients)
        self.present.update(gradients)
        for index, gradient in gradients.items():
            if self._keeps:
                self._sent[index] = _mark(gradient)
            else:
                parameters[index].grad = None

    def _check(self, index: int, gradient: Tensor) -> None:
        name, dtype = self._shard.names[index], self._shard.parameters[index].dtype
        if gradient.requires_grad and not self._keeps:
            raise UnsupportedError(
                f"parameter {name!r}: backward(create_graph=True) is not supported with "
                "gradients='sharded', which frees the gradient; use torch.autograd.grad, or "
                "gradients='local' or 'replicated'"
            )
        if gradient.dtype != dtype:
            raise UnsupportedError(
                f"parameter {name!r}: expected a gradient of {dtype}, got {gradient.dtype}; use "
                "gradients='replicated'"
            )

    def abandon(self) -> None:
        """If an exception ended a backward: end its round, and forget what it has reduced."""
        if self._task is None:
            return
        began_empty = self._began_empty
        self._task = None
        self.num_lost += 1
        if not self._keeps:  # else .grad is the user's to put right, as in torch
            for parameter in self._shard.parameters:
                parameter.grad = None
        self.close()
        if not self._keeps and began_empty:
            self.forget()
        elif not self._keeps:
            self._torn = True

    def forget(self) -> None:
        """Start anew, with no means."""
        self.means.clear()
        self.present.clear()
        self._sent.clear()
        self._late.clear()
        self._torn = False
        self.num_changes += 1

    def has_more(self) -> bool:
        """Whether gradients have come, or have been taken away, that the means do not know of."""
        return self._next is not None or any(
            (parameter.grad is None) == (index in self._sent) or index in self._late
            for index, parameter in enumerate(self._shard.parameters)
        )

    def changed(self) -> int:
        """A parameter whose gradient has changed since it was sent, plus 1; -1 for a torn mean."""
        if self._torn:
            return -1
        for index, mark in self._sent.items():
            gradient = self._shard.parameters[index].grad
            if gradient is not None and index not in self._late and _mark(gradient) != mark:
                return index + 1
        return 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Send nothing in here. What is freed as it is sent cannot wait."""
        before, self._paused = self._paused, self._keeps
        try:
            yield
        finally:
            self._paused = before


def _call(rounds: ref[Rounds], index: int, parameter: Tensor) -> None:
    """A hook does not keep the optimizer alive."""
    alive = rounds()
    if alive is not None:
        alive.receive(index, parameter)


def _mark(gradient: Tensor) -> tuple[int, int]:
    return gradient.data_ptr(), gradient._version


def _is_nested() -> bool:
    """Whether this backward runs within another one, as reentrant checkpointing's does."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not BackwardCFunction.apply.__code__:
        frame = frame.f_back
    return frame is not None
