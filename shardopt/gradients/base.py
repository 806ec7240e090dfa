"""What the optimizer asks of the gradients of a step, whoever has averaged them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from shardopt.gradients.report import Verdict
from shardopt.policies import Guards
from shardopt.shard import Shard

Facts = Callable[[float | None], Mapping[str, object]]  # of a norm's order, or of a step


class Gradients(ABC):
    """The averaged gradients of this rank's segments.

    Args:
        shard: the parameters they belong to.
        guards: what is checked of them.
        facts: what ranks must agree on at each step, by name.

    Attributes:
        num_passes: backward passes in the last evaluation of a closure, in this step or before.
    """

    reduces = False  # whether ranks bring gradients of their own, to be averaged here

    def __init__(self, shard: Shard, guards: Guards, facts: Facts):
        self.shard, self.guards, self.facts = shard, guards, facts
        self.num_passes = 1

    def extend(self) -> None:  # noqa: B027
        """The shard has new parameters."""

    def paused(self) -> AbstractContextManager[None]:
        """A backward in here only adds to ``.grad``."""
        return nullcontext()

    @abstractmethod
    def settle(self, problem: Exception | None = None) -> Verdict:
        """Return when all gradients are there and every rank says of them the same. Collective.

        Args:
            problem: what this rank has refused before it; raised here, and told on every other.

        Raises:
            GradientError, AgreementError: on every rank; nothing has been updated.
        """

    @abstractmethod
    def of(self, index: int) -> Tensor | None:
        """The gradient of this rank's segment of a parameter, shaped as the segment's tensor."""

    def sparse(self) -> frozenset[int]:
        """Indices of parameters cut at elements whose gradients are sparse; alike on all ranks."""
        return frozenset()

    @abstractmethod
    def clip_norm(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
        """Scale the gradients of all ranks to a norm of at most ``max_norm``. Collective.

        Returns:
            The norm before that, 0-dim.
        """

    @abstractmethod
    def clip_value(self, clip_value: float) -> None:
        """Clamp every element of the gradients to ``[-clip_value, clip_value]``. Collective."""

    def unscale(self, inverse: Tensor, found: Tensor) -> None:
        """Multiply gradients by ``inverse``; ``found`` becomes 1 if one here is not finite."""
        raise AssertionError("GradScaler of torch does it where gradients are replicated")

    def reduced(self) -> set[int]:
        """Indices of parameters with a gradient of this rank that has been reduced."""
        return set()

    @property
    def num_rounds(self) -> int:
        """How many backward passes have been reduced here."""
        return 0

    def lose(self, num_rounds: int) -> None:  # noqa: B027
        """A rank has failed: go on to as many rounds as the others; what is reduced is of no use.

        Until ``zero``, a step raises.
        """

    def zero(self, *, to_none: bool = True) -> None:  # noqa: B027
        """Forget what has been reduced since the last step; or make it zeros, if it is freed."""

    def consume(self) -> None:  # noqa: B027
        """A step has used the gradients."""
