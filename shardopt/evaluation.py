"""A closure that is called many times within a step, by a class such as LBFGS.

The class moves this rank's segments about and asks each time for the loss there. Every rank then
needs all parameters, and every rank must get the same loss, so that all go on alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from shardopt import update
from shardopt.algos import Algorithm
from shardopt.algos.mixture import CLASS, step_without_hooks
from shardopt.arrivals import Arrivals
from shardopt.errors import UnsupportedError
from shardopt.gradients import Gradients
from shardopt.guard import agree, all_or_none
from shardopt.policies import Guards
from shardopt.shard import Group, Shard, unique_parameters
from shardopt.validation import parameter_names


def refuse(algorithms: Sequence[Algorithm], groups: Sequence[Group], guards: Guards) -> None:
    """Refuse what a class whose state is vectors over all parameters does not take."""
    if not algorithms[0].flat:
        return
    name = algorithms[0].optimizer_class.__name__
    if len(groups) > 1:  # in torch's words
        raise ValueError(f"{name} doesn't support per-parameter options (parameter groups)")
    if CLASS in groups[0]:
        raise UnsupportedError(
            f"{name} has one group, which cannot name a class of its own; leave out '{CLASS}'"
        )
    if guards.nonfinite == "skip":
        raise UnsupportedError(
            f"Guards(nonfinite='skip') is not supported with {name}, which evaluates gradients all "
            "through a step and would have to undo it; use 'raise' or 'ignore'"
        )
    parameters = unique_parameters(groups)
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise UnsupportedError(
            f"{name}: expected all parameters on one device, got {' and '.join(devices)}; move the "
            "model to one, or use a class that updates each parameter by itself"
        )
    for label, parameter in zip(parameter_names(groups), parameters, strict=True):
        if not parameter.is_contiguous():
            raise UnsupportedError(
                f"parameter {label!r}: expected contiguous memory, since {name} makes one vector "
                f"of all parameters, got strides {parameter.stride()}; use "
                "model.to(memory_format=torch.contiguous_format) before constructing the optimizer"
            )


Checks = tuple[Callable[[], None], Callable[[], Exception | None], Callable[[], None]]


def search(
    closure: Callable[[], Any] | None,
    shard: Shard,
    arrivals: Arrivals,
    gradients: Gradients,
    groups: Sequence[Group],
    checks: Checks,
) -> Any:
    """One step of a class that calls its closure as often as it likes. Collective.

    Args:
        closure: the user's: clears gradients, runs the model and ``backward``, and returns this
            rank's loss.
        shard: the parameters.
        arrivals: who waits for them.
        gradients: what averages their gradients.
        groups: the user's.
        checks: what is checked before the first evaluation, together; after it, returning what
            this rank refuses; and after each of the others, on every rank by itself.

    Returns:
        The mean over all ranks of their first losses.
    """
    collectives = shard.collectives
    check_together, check_first, check = checks
    agree(collectives, gradients.facts(None), "set options and call step() alike on every rank")
    check_together()
    with all_or_none(collectives):
        parts = (shard, arrivals, gradients, check_first, check)
        evaluate = Evaluation(closure, *parts) if closure else None
        if evaluate is None:
            step_without_hooks(shard.optim)  # which raises in its own words
    assert evaluate is not None
    arrivals.wait()
    loss = update.search(shard, groups, evaluate)
    evaluate.gather()
    gradients.consume()
    return loss


class Evaluation:
    """Loss and gradients where the segments are now, over all ranks; ``search`` has the words."""

    def __init__(
        self,
        closure: Callable[[], Any],
        shard: Shard,
        arrivals: Arrivals,
        gradients: Gradients,
        check_first: Callable[[], Exception | None],
        check: Callable[[], None],
    ):
        self._closure = closure
        self._shard, self._arrivals, self._gradients = shard, arrivals, gradients
        self._check_first, self._check = check_first, check
        self._is_first = True

    def __call__(self) -> Any:
        """The mean of the ranks' losses, of the type of this rank's own."""
        is_first, self._is_first = self._is_first, False
        if not is_first:
            self.gather()
            self._arrivals.wait()
        loss, value = self._evaluate(is_first)
        self._gradients.settle(self._check_first() if is_first else None)
        update.give_gradients(self._shard, self._shard.segments, self._gradients.of)
        mean = self._mean(value)
        return torch.full_like(loss.detach(), mean) if isinstance(loss, Tensor) else mean

    def _evaluate(self, is_first: bool) -> tuple[Any, float]:
        """This rank's loss. What fails on one rank fails on all, and no rank waits for it."""
        before = self._gradients.num_rounds
        # Where it fails before others, within a backward, can hear of it; and where they do.
        with (
            self._lost_if_it_fails(),
            all_or_none(self._shard.collectives),
            self._lost_if_it_fails(),
        ):
            loss = self._closure()
            value = float(loss.detach() if isinstance(loss, Tensor) else loss)
            if not is_first:
                self._check()
        self._gradients.num_passes = self._gradients.num_rounds - before
        return loss, value

    @contextmanager
    def _lost_if_it_fails(self) -> Iterator[None]:
        expected = self._gradients.num_rounds + self._gradients.num_passes
        try:
            yield
        except Exception:
            self._gradients.lose(expected)
            raise

    def gather(self) -> None:
        """Start to bring the parameters together on every rank."""
        self._arrivals.expect(update.gather_everything(self._shard))

    def _mean(self, value: float) -> float:
        """Over all ranks, replicas too; the same bits on each."""
        row = torch.tensor([value], dtype=torch.float64, device="cpu")
        values = self._shard.collectives.all_gather_rows(row).flatten().tolist()
        return reduce(add, values) / len(values)
