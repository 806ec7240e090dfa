"""What has been sent of ``.grad`` where it stays, and what has become of it since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from shardopt.shard import Shard


class Noted:
    """Gradients as they were when they were noted, by the index of their parameter."""

    def __init__(self) -> None:
        self._noted: dict[int, tuple[TensorWeakRef, int]] = {}

    def note(self, index: int, gradient: Tensor) -> None:
        """It counts as it is now."""
        self._noted[index] = TensorWeakRef(gradient), gradient._version

    def forget(self, indices: Iterable[int] | None = None) -> None:
        """These have not been noted, or none."""
        for index in list(self._noted) if indices is None else indices:
            self._noted.pop(index, None)

    def __contains__(self, index: int) -> bool:
        return index in self._noted

    def is_new(self, index: int, gradient: Tensor | None) -> bool:
        """Whether ``.grad`` is another tensor than the noted one, or there is none of the two."""
        if index not in self._noted:
            return gradient is not None
        return gradient is None or self._noted[index][0]() is not gradient

    def num_changes(self, index: int, gradient: Tensor | None) -> float:
        """How often the noted tensor has been written to; infinity if it is not this one."""
        if gradient is None or index not in self._noted or self.is_new(index, gradient):
            return inf
        return gradient._version - self._noted[index][1]


class Kept:
    """What the means know of ``.grad`` where it stays, and what they do not know.

    Where it is freed as it is sent, nothing is noted here, and all that is in ``.grad`` is new.

    Args:
        shard: the parameters.

    Attributes:
        has_undone_scaling: whether ``.grad``, which stays as it is when the means are clipped, has
            been sent again after that, or been added to.
    """

    has_undone_scaling = False

    def __init__(self, shard: Shard):
        self._shard = shard
        self._sent, self._scaled = Noted(), Noted()
        self._late: set[int] = set()  # what has got more since it was sent

    def forget(self) -> None:
        """Nothing has been sent."""
        self._sent.forget()
        self._scaled.forget()
        self._late.clear()
        self.has_undone_scaling = False

    def note_added(self, index: int, gradient: Tensor | None) -> None:
        """Autograd has just added to a gradient."""
        self.has_undone_scaling |= self._scaled.num_changes(index, gradient) == 1

    def note_late(self, index: int) -> None:
        """It has been changed by who may, after it was sent."""
        self._late.add(index)

    def __contains__(self, index: int) -> bool:
        return index in self._sent

    def note_sent(self, members: Iterable[int], gradients: Mapping[int, Tensor]) -> None:
        """What ``members`` of a bucket have now, takes the place of what they had before."""
        self._late.difference_update(members)
        self._sent.forget(members)
        for index, gradient in gradients.items():
            self._sent.note(index, gradient)
        self.note_sending(gradients)

    def note_sending(self, indices: Iterable[int]) -> None:
        """These are sent as they are."""
        parameters = self._shard.parameters
        same = (self._scaled.num_changes(index, parameters[index].grad) == 0 for index in indices)
        self.has_undone_scaling |= any(same)

    def note_scaled(self) -> None:
        """The means have been clipped, or the like."""
        for index, parameter in enumerate(self._shard.parameters):
            if parameter.grad is not None:
                self._scaled.note(index, parameter.grad)

    def has_new(self) -> bool:
        """Whether something else is in ``.grad`` than was sent, or nothing any more."""
        return any(
            index in self._late or self._sent.is_new(index, parameter.grad)
            for index, parameter in enumerate(self._shard.parameters)
            if index not in self._shard.layout.by_rows
        )

    def first_changed(self) -> int:
        """A parameter whose gradient has been written to since it was sent; -1 for none."""
        for index, parameter in enumerate(self._shard.parameters):
            changes = self._sent.num_changes(index, parameter.grad)
            if index not in self._late and 0 < changes < inf:
                return index
        return -1
