"""The proof at the end of a run: its saved state is plain torch's, and so is its next step."""

from collections.abc import Iterable
from pathlib import Path

import torch
from options import Options
from recipe import class_options, optimizer_class
from report import state_bytes
from saved_run import read_run
from torch import Tensor, nn

from shardopt import ShardedOptimizer


class Twin:
    """A model with a plain ``torch.optim`` optimizer, both as a saved run has them.

    Args:
        saved: the file.
        model: any of the right shapes; its weights are replaced.
        options: those of the run.
        kernel: flags of the implementation, see :func:`chosen_kernel`.
    """

    def __init__(self, saved: Path, model: nn.Module, options: Options, kernel: dict[str, bool]):
        run = read_run(saved)
        self.model = model
        self.model.load_state_dict(run["model"])
        self.before = [parameter.detach().clone() for parameter in self.model.parameters()]
        given = {**class_options(options), **kernel}
        self.optimizer = optimizer_class(options)(self.model.parameters(), **given)
        for group in run["optimizer"]["param_groups"]:
            group.update(kernel)  # which it does not name: loading would choose another
        self.optimizer.load_state_dict(run["optimizer"])

    def step(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        self.optimizer.step()

    def difference(self, model: nn.Module, sharded_bytes: int) -> str | None:
        """What is not as it should be after a step of both, or ``None``.

        Args:
            model: the one that the sharded optimizer has stepped.
            sharded_bytes: per-element state of all ranks together.
        """
        moved = 0
        pairs = zip(model.named_parameters(), self.model.parameters(), self.before, strict=True)
        for (name, ours), plain, before in pairs:
            if differing := _num_different(ours, plain):
                return f"{differing} of {ours.numel()} elements of {name} differ"
            moved += _num_different(ours, before)
        if moved == 0:  # which would prove nothing
            return "the step moved no parameter"
        if (plain_bytes := state_bytes(self.optimizer)) != sharded_bytes:
            return f"the ranks hold {sharded_bytes} bytes of state, plain torch {plain_bytes}"
        return None


def chosen_kernel(optimizer: ShardedOptimizer) -> dict[str, bool]:
    """The flags of torch's implementation that ``optimizer`` runs: fused rounds otherwise."""
    group = optimizer.optim.param_groups[0]
    return {flag: group[flag] for flag in ("fused", "foreach") if group.get(flag) is not None}


def _num_different(one: Tensor, other: Tensor) -> int:
    """How many elements differ in any bit: 0.0 is not -0.0 here, and NaN equals itself."""
    bits = [tensor.detach().view(torch.int32) for tensor in (one, other)]
    return int((bits[0] != bits[1]).sum())
