"""How one ``torch.optim`` class is sharded: where it may be cut, and what its state means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardopt.layout import Atom

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What shardopt knows of an optimizer class.

    Args:
        optimizer_class: the class itself, never a subclass: that may compute anything.
        atom: what a shard border may not cut.
        per_element: names of the state with one value for each element of the parameter, declared
            because a shape alone does not tell (a parameter may have one element). With
            ``Atom.ELEMENT`` all other state belongs to the parameter as a whole, like ``step``.
        cost: estimated cost of updating a parameter of some shape; balances whole parameters.
        separable: whether a step on some parameters and then on the others is one step on all: the
            class changes nothing in its groups.
        gradient_layouts: of the gradients that it takes where parameters are cut; a class that
            has whole parameters says so itself.
        coalesces: whether the class sums the entries of a sparse gradient that are of one element,
            before all else.
        fused: whether a group of options may use torch's fused kernel when the user leaves the
            choice to us.
        fused_devices: device types on which it may.
        fuses_16_bits_on_cpu: whether it may there, for bf16 and fp16.
        faster: a subclass with the same options and state, for ``kernel="auto"``; equal within
            what it says.
        flat: names of the state that is one vector over all parameters, in order of registration,
            or a list of such; kept under the first parameter, with all other state there is. Such a
            class has one group, reevaluates a closure within a step, and reduces vectors to
            numbers, which ``SumsOverRanks`` takes over all ranks.
        mixes: whether its groups may stand beside those of other classes.
        refusal: why the class cannot be used, and what to use; or ``None``.
    """

    optimizer_class: type[Optimizer]
    atom: Atom
    per_element: frozenset[str] = frozenset()
    shapes: Mapping[str, Callable[[Shape], Shape]] | None = None
    cost: Callable[[Shape], int] = math.prod
    separable: bool = False
    gradient_layouts: frozenset[torch.layout] = frozenset({torch.strided})
    coalesces: bool = False
    fused: Callable[[Mapping[str, Any]], bool] = lambda group: False
    fused_devices: frozenset[str] = frozenset()
    fuses_16_bits_on_cpu: bool = True
    faster: type[Optimizer] | None = None
    flat: frozenset[str] = frozenset()
    mixes: bool = True
    refusal: str | None = None

    def class_for(self, kernel: str) -> type[Optimizer]:
        """The class that computes a step."""
        return self.faster if kernel == "auto" and self.faster else self.optimizer_class

    def may_fuse(self, parameters: Sequence[Tensor]) -> bool:
        """Whether torch's fused kernel is right for all of ``parameters``. The same on any rank."""
        return all(
            p.is_floating_point()
            and p.device.type in self.fused_devices
            and (p.itemsize >= 4 or p.device.type != "cpu" or self.fuses_16_bits_on_cpu)
            for p in parameters
        )

    def state_shape(self, name: str, shape: Shape) -> Shape | None:
        """Shape of state ``name`` of a parameter of ``shape``; ``None`` where it is not known."""
        if name in self.per_element:
            return shape
        if self.shapes and name in self.shapes:
            return self.shapes[name](shape)
        return () if self.atom is Atom.ELEMENT else None
