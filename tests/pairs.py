"""Parameters without a model: some under ``ShardedOptimizer``, equal ones under the plain class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from shardopt import ShardedOptimizer
from tests.twins import SMALL_BUCKETS, assert_same

Make = Callable[[], list[Tensor]]  # equal parameters at every call, on every rank


class WholeAdamW(AdamW):
    """A class that shardopt does not know, so its parameters are placed whole."""


class WholeSGD(torch.optim.SGD):
    """The same, for SGD."""


def random_parameters(*shapes: Iterable[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, dtype=dtype, generator=generator)) for s in shapes]


def four(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What most tests train: cut on two ranks and on three."""
    return random_parameters((70, 33), (5,), (40, 40), (2500,), dtype=dtype)


def random_gradient(parameter: Tensor, seed: int) -> Tensor:
    """The same for the same seed; with the strides of its parameter, as autograd has it."""
    generator = torch.Generator().manual_seed(1000 + seed)
    gradient = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
    return torch.empty_like(parameter.detach()).copy_(gradient)


@dataclass
class Pair:
    """Equal parameters under our optimizer and under the plain one.

    ``ours`` and ``theirs`` hold each parameter once, in order; a step gives both the same
    gradients, but for the parameters named as ``missing``.
    """

    ours: list[Tensor]
    theirs: list[Tensor]
    optimizer: ShardedOptimizer
    plain: Optimizer
    num_steps: int = 0

    def both(self) -> list[tuple[list[Tensor], Optimizer]]:
        """Ours, then theirs."""
        return [(self.ours, self.optimizer), (self.theirs, self.plain)]

    def give_gradients(self, missing: Iterable[int] = (), contiguous: bool = False) -> None:
        """Those of the next step, to all that want one."""
        for parameters, _ in self.both():
            for index, parameter in enumerate(parameters):
                parameter.grad = None
                if parameter.requires_grad and index not in missing:
                    gradient = random_gradient(parameter, 100 * self.num_steps + index)
                    parameter.grad = gradient.contiguous() if contiguous else gradient

    def step(self, missing: Iterable[int] = (), contiguous: bool = False) -> None:
        """One step of both, on the same gradients."""
        self.give_gradients(missing, contiguous)
        for _, optimizer in self.both():
            optimizer.step()
        self.num_steps += 1

    def train(self, steps: int, **how: Any) -> Pair:
        """Several steps, then the comparison."""
        for _ in range(steps):
            self.step(**how)
        self.assert_same()
        return self

    def assert_same(self) -> None:
        """Parameters, their strides, and the full state, bit for bit. A collective."""
        assert_same([p.detach() for p in self.ours], [p.detach() for p in self.theirs])
        assert [p.stride() for p in self.ours] == [p.stride() for p in self.theirs]
        self.optimizer.consolidate_state_dict(to=None)
        assert_same(comparable(self.optimizer.state_dict()), comparable(self.plain.state_dict()))

    def assert_is_shared_out(self) -> None:
        """Guards against a vacuous comparison: no rank updates everything."""
        layout = self.optimizer._shard.layout
        total = sum(parameter.numel() for parameter in self.ours)
        held = [layout.numel(rank) for rank in range(layout.world_size)]
        assert sum(held) == total
        assert max(held) < total or layout.world_size == 1


def comparable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """State by number of the parameter, which torch has in order of first gradients; and groups
    without ``fused``, which ours chooses and does not show."""
    groups = [{k: v for k, v in g.items() if k != "fused"} for g in state_dict["param_groups"]]
    return {"state": dict(sorted(state_dict["state"].items())), "param_groups": groups}


OURS_ALONE = ("process_group", "guards")


def pair(
    make: Make,
    optimizer_class: type[Optimizer] = AdamW,
    arrange: Callable[[list[Tensor]], Any] = list,  # parameters -> the constructor's params
    kernel: str = "torch",
    **options: Any,
) -> Pair:
    """Two equal trainings at their beginning. A collective."""
    ours, theirs = make(), make()
    options = {"lr": 0.01, **options}
    plain_options = {key: value for key, value in options.items() if key not in OURS_ALONE}
    optimizer = ShardedOptimizer(
        arrange(ours), optimizer_class, kernel=kernel, bucket_cap_mb=SMALL_BUCKETS, **options
    )
    if kernel == "auto" and optimizer.optim.param_groups[0].get("fused"):
        plain_options["fused"] = True
    plain = optimizer_class(arrange(theirs), **plain_options)
    return Pair(ours, theirs, optimizer, plain)
