"""What has been sent of ``.grad`` where it stays there, and what has become of it since."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from torch import Tensor
from torch.utils.weak import TensorWeakRef


class Sent:
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
