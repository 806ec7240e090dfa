"""Rounds: each backward reduces every bucket once, from hooks, while it goes on.

[Note: Rounds] One backward is one round: every bucket is reduced once, in order, on every rank.

- A bucket starts when all its gradients and those of all buckets before it are there ([Note: Line]
  says where it waits for room). What has not started when backward ends starts then.
- Launch order is law: a round is never left half-way. If an exception ends a backward, the rest
  of its round is launched before anything else, with zeros, and what it reduced is thrown away.
- What arrives outside of a round (a second gradient of a parameter in one backward, as reentrant
  checkpointing produces, or one that the user assigns) goes in a round that all ranks agree on in
  ``settle``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from shardopt.gradients.backward import at_end_of_backward, backward_number, is_nested
from shardopt.gradients.line import line_of
from shardopt.gradients.producers import Producers
from shardopt.gradients.reduced_shards import ReducedShards
from shardopt.gradients.torch_clip import watch
from shardopt.layout import Atom
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
        self.means = ReducedShards(shard, adds=not keeps, looks=looks)
        self.present: set[int] = set()
        self.num_rounds = self.num_lost = self.num_changes = 0
        self._line = line_of(shard.collectives.channel)
        self._handles: dict[int, RemovableHandle] = {}  # id of a parameter -> its hook
        self._paused = False
        self._tasks: set[int] = set()  # of autograd: the backward under way, those within it
        self._aborted = False  # an exception has ended it
        self._next: int | None = None  # the bucket to send next; ``None`` between rounds
        self._trained: set[int] = set()  # numbers of buckets
        self._missing: list[int] = []  # by bucket: parameters that have not got their gradient
        self._arrived: set[int] = set()
        self._producers = Producers()
        # Where .grad stays: what was sent and its version; what has got more since.
        self._sent: dict[int, tuple[TensorWeakRef, int]] = {}
        self._late: set[int] = set()
        self._began_empty = True
        self._holds_rows = False  # an earlier backward has left gradients of those that are
        self._torn = False  # a lost round has added to the means
        _ALIVE.add(self)
        if not keeps:
            watch(self)

    # -- hooks ---------------------------------------------------------------------------------

    def extend(self) -> None:
        """The shard has new parameters."""
        self.means.extend()
        if self._next is not None:
            self._missing += self._num_trained()[len(self._missing) :]
        self.follow_training()
        self.hook()

    def follow_training(self) -> None:
        """Ranks agree on which parameters are trained: rounds reduce the buckets of these."""
        self._trained = {number for number, count in enumerate(self._num_trained()) if count}

    def hook(self) -> None:
        """Hear of every parameter that wants a gradient; one may want it from now on only.

        Nobody else hears of it any more: an optimizer that another one takes the place of may live
        on for a while, on some ranks.
        """
        for index, parameter in enumerate(self._shard.parameters):
            if id(parameter) in self._handles or not parameter.requires_grad:
                continue
            for other in _ALIVE:
                if handle := other._handles.get(id(parameter)):
                    handle.remove()
            hook = partial(_call, ref(self), index)
            self._handles[id(parameter)] = parameter.register_post_accumulate_grad_hook(hook)

    def on_gradient(self, index: int, parameter: Tensor) -> None:
        """Autograd has added to a parameter's gradient."""
        self.num_changes += 1
        if self._paused:
            if index in self._sent:
                self._late.add(index)
            return
        self._enter_backward()
        if self._next is None:
            self._open()
        self._producers.note(index, parameter)
        number, _ = self._shard.layout.place(index)
        assert self._next is not None
        if index in self._shard.layout.by_rows:
            return
        if index in self._arrived or number < self._next:
            if self._keeps:
                self._late.add(index)
            return
        self._arrived.add(index)
        self._missing[number] -= 1
        while self._next < len(self._missing) and self._missing[self._next] <= 0:
            self._send()
        self._line.advance(to_the_end=not self._keeps)

    def _enter_backward(self) -> None:
        """Arrange to hear of the end of this backward, whatever ends it."""
        task = backward_number()
        if task in self._tasks:
            return
        self.abandon(retries=True)
        self._tasks.add(task)
        nested = is_nested()
        at_end_of_backward(
            partial(self.leave_backward, task, nested), partial(self.abort_backward, task)
        )

    def leave_backward(self, task: int, nested: bool) -> None:
        """A backward has ended well."""
        if task in self._tasks and not nested:
            self._tasks.clear()
            self.close()

    def abort_backward(self, task: int) -> None:
        """An exception has ended a backward. What it leaves in ``.grad`` is not to be added to."""
        if task in self._tasks:
            self._aborted = True
            self._line.advance(to_the_end=True)
            if not self._keeps:  # else .grad is the user's to put right, as in torch
                for parameter in self._shard.parameters:
                    parameter.grad = None

    # -- rounds --------------------------------------------------------------------------------

    def _open(self) -> None:
        self._next, self._arrived = 0, set()
        self._began_empty = self.means.is_empty and not self._holds_rows
        self._missing = self._num_trained()

    def _num_trained(self) -> list[int]:
        """How many parameters of each bucket want a gradient that is reduced here."""
        parameters = self._shard.parameters
        return [
            sum(parameters[slot.parameter].requires_grad for slot in bucket.slots)
            * (bucket.atom is not Atom.ROW)
            for bucket in self._shard.layout.buckets
        ]

    def close(self, *, lost: bool = False, everything: bool = False) -> None:
        """Send the rest of a round: zeros if it is lost, and untrained buckets if everything."""
        if self._next is None:
            self._open()
        while self._next is not None and self._next < len(self._shard.layout.buckets):
            self._send(lost, everything)
        self._line.advance(to_the_end=True)
        self._next = None
        self.num_rounds += 1
        by_rows = (self._shard.parameters[index] for index in self._shard.layout.by_rows)
        self._holds_rows |= any(parameter.grad is not None for parameter in by_rows)

    def _send(self, lost: bool = False, everything: bool = False) -> None:
        """Put the next bucket in line, unless ranks have agreed that nothing in it is trained."""
        assert self._next is not None
        number = self._next
        if self._shard.layout.buckets[number].atom is Atom.ROW:
            self._next += 1
            return
        members = [slot.parameter for slot in self._shard.layout.buckets[number].slots]
        parameters = {index: self._shard.parameters[index] for index in members}
        gradients = {i: p.grad for i, p in parameters.items() if p.grad is not None and not lost}
        self.means.refuse(gradients)
        self._next += 1
        if self._keeps:  # the mean of what .grad holds now takes the place of the one before
            self.present.difference_update(members)
            self._late.difference_update(members)
            for index in members:
                self._sent.pop(index, None)
        if number not in self._trained and not everything:
            return
        self.present.update(gradients)
        if self._keeps:  # from now on a change is too late, whether it has started or not
            for index, gradient in gradients.items():
                self._sent[index] = TensorWeakRef(gradient), gradient._version
        start = partial(self._launch, number, gradients)
        self._line.join(start, partial(self.means.has_room, number))

    def _launch(self, number: int, gradients: dict[int, Tensor]) -> None:
        """Reduce a bucket."""
        self._producers.wait_for(gradients)
        with torch.no_grad():
            self.means.launch(number, gradients)
        if not self._keeps:
            for index in gradients:
                self._shard.parameters[index].grad = None

    def abandon(self, *, retries: bool) -> None:
        """If an exception ended a backward: end its round, and forget it if gradients come anew."""
        if not self._aborted:
            return
        began_empty = self._began_empty
        self._aborted = False
        self._tasks.clear()
        self.num_lost += 1
        self.close(lost=True)
        if retries and not self._keeps and began_empty:
            self.forget()
        elif not (retries and self._keeps):  # else .grad is all there is, and the user's
            self._torn = True

    def forget(self) -> None:
        """Start anew, with no means."""
        self._line.advance(to_the_end=True)
        self.means.clear()
        self.present.clear()
        self._sent.clear()
        self._late.clear()
        self._torn = self._holds_rows = False
        self.num_changes += 1

    def tear(self) -> None:
        """Ranks have not gone through the same rounds: the means are of no use until forgotten."""
        self._torn, self.num_lost = True, 0

    def has_more(self) -> bool:
        """Whether gradients have come, or have been taken away, that the means do not know of."""
        return self._next is not None or any(
            self._is_new(index, parameter.grad)
            for index, parameter in enumerate(self._shard.parameters)
            if index not in self._shard.layout.by_rows
        )

    def _is_new(self, index: int, gradient: Tensor | None) -> bool:
        if index not in self._sent:
            return gradient is not None
        return index in self._late or self._sent[index][0]() is not gradient

    def changed(self) -> int:
        """A parameter whose gradient has changed since it was sent, plus 1; -1 for a torn mean."""
        if self._torn:
            return -1
        for index, (_, version) in self._sent.items():
            gradient = self._shard.parameters[index].grad
            if gradient is None or self._is_new(index, gradient):
                continue
            if gradient._version != version:
                return index + 1
        return 0

    def name_if_freed(self, parameter: Tensor) -> str | None:
        """The name of a parameter whose gradient is in the means, and nowhere else."""
        if not self._shard.holds(parameter):
            return None
        index = self._shard.index(parameter)
        return self._shard.names[index] if index in self.present else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Send nothing in here. What is freed as it is sent cannot wait."""
        before, self._paused = self._paused, self._keeps
        try:
            yield
        finally:
            self._paused = before


_ALIVE: WeakSet[Rounds] = WeakSet()


def _call(rounds: ref[Rounds], index: int, parameter: Tensor) -> None:
    """A hook does not keep the optimizer alive."""
    alive = rounds()
    if alive is not None:
        alive.on_gradient(index, parameter)
