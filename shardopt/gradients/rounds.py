"""Rounds: each backward reduces every bucket once, from hooks, while it goes on.

[Note: Rounds] One backward is one round: every bucket is reduced once, in order, on every rank.

- A bucket starts when all its gradients and those of all buckets before it are there ([Note: Line]
  says where it waits for room). What has not started when backward ends starts then.
- Launch order is law: a round is never left half-way. If an exception ends a backward, the rest
  of its round is launched at once, with zeros and without waiting, so that no other rank waits for
  it, whatever comes next; what the round has reduced is thrown away. A round that this rank begins
  before all have agreed that they stand at one point does not wait either: others may be elsewhere.
  (On a mesh both wait for room, as a reduction there goes on only while somebody does.)
- What arrives outside of a round (a second gradient of a parameter in one backward, as reentrant
  checkpointing produces, or one that the user assigns) goes in a round that all ranks agree on in
  ``settle``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from shardopt.gradients.backward import at_end_of_backward, backward_number, is_nested
from shardopt.gradients.hooks import Hooks
from shardopt.gradients.kept import Kept
from shardopt.gradients.line import line_of
from shardopt.gradients.producers import Producers
from shardopt.gradients.reduced_shards import ReducedShards
from shardopt.gradients.report import Spoilt
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
        kept: what the means know of ``.grad``.
        present: parameters with a gradient of this rank in the means.
        num_rounds: rounds that this rank has been through.
        num_void: the first of them, which count no more: all has been forgotten since.
        num_lost: those whose backward an exception ended, since all ranks agreed.
        num_changes: grows with all that makes earlier verdicts old.
    """

    def __init__(self, shard: Shard, *, keeps: bool, looks: bool):
        self._shard, self._keeps = shard, keeps
        self.means = ReducedShards(shard, adds=not keeps, looks=looks)
        self.kept = Kept(shard)
        self.present: set[int] = set()
        self.num_rounds = self.num_void = self.num_lost = self.num_changes = 0
        self._line = line_of(shard.collectives.channel)
        self._hooks = Hooks(self.on_gradient)
        self._paused = False
        self._tasks: set[int] = set()  # of autograd: the backward under way, those within it
        self._aborted = False  # an exception has ended it, and nothing has come after that
        self._next: int | None = None  # the bucket to send next; ``None`` between rounds
        self._trained: set[int] = set()  # numbers of buckets
        self._missing: list[int] = []  # by bucket: parameters that have not got their gradient
        self._arrived: set[int] = set()
        self._producers = Producers()
        self._began_empty = True
        self._holds_rows = False  # an earlier backward has left gradients of those that are
        self._torn = False  # a lost round has added to the means

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
        """Hear of every parameter that wants a gradient by now."""
        self._hooks.follow(self._shard.parameters)

    def on_gradient(self, index: int, parameter: Tensor) -> None:
        """Autograd has added to a parameter's gradient."""
        self.num_changes += 1
        self.kept.note_added(index, parameter.grad)
        if self._paused:
            if index in self.kept:
                self.kept.note_late(index)
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
                self.kept.note_late(index)
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
            partial(self._leave_backward, task, nested), partial(self._abort_backward, task)
        )

    def _leave_backward(self, task: int, nested: bool) -> None:
        """A backward has ended well."""
        if task in self._tasks and not nested:
            self._tasks.clear()
            self.close()

    def _abort_backward(self, task: int) -> None:
        """An exception has ended a backward. What it leaves in ``.grad`` is not to be added to."""
        if task not in self._tasks:
            return
        self._tasks.clear()
        self._aborted = True
        self.num_lost += 1
        self.means.has_limit = self._shard.collectives.replicate_axis is not None
        with suppress(Exception):  # what fails here fails again in the next call, which tells of it
            self.close(lost=True)
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
        is_sent = number in self._trained or everything
        if self._keeps:  # from now on a change is too late, whether it has started or not
            self.kept.note_sent(members, gradients if is_sent else {})
            self.present.difference_update(members)
        if not is_sent:
            return
        self.present.update(gradients)
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
        """If an exception has ended a backward: forget its round if gradients come anew."""
        if not self._aborted:
            return
        if self._next is not None:
            self.close(lost=True)
        self._aborted = False
        if retries and not self._keeps and self._began_empty:
            self.forget()
        elif retries and self._keeps:  # .grad is all there is, and the user's
            self.num_void = self.num_rounds
        else:
            self._torn = True

    def forget(self, *, to_none: bool = True) -> None:
        """Start anew: with no means, or with zeros for those that have taken the place of .grad."""
        self._line.advance(to_the_end=True)
        to_zeros = not (to_none or self._keeps)
        self.means.clear(to_zeros=to_zeros)
        if not to_zeros:
            self.present.clear()
        self.kept.forget()
        self._torn = self._holds_rows = False
        self.num_void = self.num_rounds
        self.num_changes += 1

    def agreed(self) -> None:
        """All ranks stand at one point: what comes next may wait for them."""
        self.num_lost, self.means.has_limit = 0, True

    def tear(self) -> None:
        """Ranks have not gone through the same rounds: the means are of no use until forgotten."""
        self._torn = True
        self.agreed()

    def has_more(self) -> bool:
        """Whether gradients have come, or have been taken away, that the means do not know of."""
        return self._next is not None or self.kept.has_new()

    def changed(self) -> int:
        """A parameter whose gradient has changed since it was sent, plus 1, or a ``Spoilt``."""
        if self._torn:
            return Spoilt.LOST
        return Spoilt.UNSCALED if self.kept.has_undone_scaling else self.kept.first_changed() + 1

    def note_scaled(self) -> None:
        """The means have been clipped, or the like. Where ``.grad`` stays, it has not."""
        if self._keeps:
            self.kept.note_scaled()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Send nothing in here. What is freed as it is sent cannot wait."""
        before, self._paused = self._paused, self._keeps
        try:
            yield
        finally:
            self._paused = before
