"""The proof at the end of a run: its saved state is plain torch's, and so is its next step."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from choices import OPTIMIZERS
from options import Options
from ranks import Ranks
from recipe import class_options, classes, groups_of, stepping_class
from report import state_bytes
from torch import Tensor, nn
from torch.optim import Optimizer

from shardopt import ShardedOptimizer, checkpoint

NORM_TOLERANCE = 1e-5  # relative: plain torch adds fp32 norms up, shardopt fp64 ones, rank by rank


@contextmanager
def own_gradients(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """This rank's gradients of a backward in here, by name: ``.grad`` may be gone after it."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, gradient: Tensor) -> None:
        seen[name] = gradient.clone()

    hooks = [p.register_hook(partial(keep, name)) for name, p in model.named_parameters()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Rounding(NamedTuple):
    """By what plain torch's step may differ: a share of a parameter's largest move, and why."""

    share: float = 0.0
    of: str = ""


def rounding_of(options: Options, ranks: Ranks) -> Rounding:
    """None where every sum is taken in the order in which plain torch takes it."""
    if any(stepping_class(chosen, options) is not chosen for chosen in classes(options)):
        # Which matrices are multiplied as one depends on the rank; on a GPU in bf16.
        return Rounding(0.05 if ranks.device.type == "cuda" else 1e-3, "products in batches")
    sums_over_ranks = OPTIMIZERS[options.optimizer].evaluates and ranks.world_size > 1
    if sums_over_ranks or not ranks.sums_in_rank_order:
        return Rounding(1e-3, "sums over ranks")
    return Rounding()


def consolidated(saved: Path) -> dict[str, Any]:
    """What a saved step is to plain torch: read from the disk, as one file."""
    with tempfile.TemporaryDirectory(prefix="proof-", dir=saved.parent) as folder:
        file = Path(folder) / "run.pt"
        checkpoint.consolidate(saved, file)
        run: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return run


class Twin:
    """A model with plain ``torch.optim`` optimizers, all as a saved run has them.

    Args:
        run: what :func:`consolidated` has read.
        model: any of the right shapes; its weights are replaced.
        options: those of the run.
        kernels: flags of the implementation of each group, see :func:`chosen_kernels`.
    """

    def __init__(
        self,
        run: Mapping[str, Any],
        model: nn.Module,
        options: Options,
        kernels: list[dict[str, bool]],
    ):
        self.model = model
        self.model.load_state_dict(run["model"])
        self.before = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimizers = []
        state, saved_groups = run["optimizer"]["state"], run["optimizer"]["param_groups"]
        parts = zip(groups_of(model, options), classes(options), kernels, saved_groups, strict=True)
        for group, chosen, kernel, saved_group in parts:  # one to a class
            given = {**class_options(chosen, options), **kernel}
            optimizer = stepping_class(chosen, options)([group], **given)
            saved_group.update(kernel)  # which it does not name: loading would choose another
            saved_group.pop("optimizer_class", None)
            own = {key: state[key] for key in saved_group["params"] if key in state}
            optimizer.load_state_dict({"state": own, "param_groups": [saved_group]})
            self.optimizers.append(optimizer)

    def step(self, gradients: Mapping[str, Tensor | None], norm: float) -> str | None:
        """Step on these gradients; returns what is wrong with ``norm``, which should be theirs."""
        for name, parameter in self.model.named_parameters():
            gradient = gradients[name]
            parameter.grad = None if gradient is None else gradient.clone()
        held = [p.grad for p in self.model.parameters() if p.grad is not None]
        dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in held]
        expected = float(nn.utils.get_total_norm(dense))
        for optimizer in self.optimizers:
            one_evaluation(optimizer)
            optimizer.step(lambda: 0.0)
        if not math.isclose(norm, expected, rel_tol=NORM_TOLERANCE):
            return f"clip_grad_norm_ found a norm of {norm}, and plain torch one of {expected}"
        return None

    def difference(self, model: nn.Module, sharded_bytes: int, rounding: Rounding) -> str | None:
        """What is not as it should be after a step of both, or ``None``.

        Args:
            model: the one that the sharded optimizer has stepped.
            sharded_bytes: per-element state of all ranks together.
            rounding: by what parameters may differ.
        """
        moved = 0
        pairs = zip(model.named_parameters(), self.model.parameters(), self.before, strict=True)
        for (name, ours), plain, before in pairs:
            allowed = rounding.share * float((plain - before).detach().abs().max())
            if differing := _num_different(ours, plain, allowed):
                return f"{differing} of {ours.numel()} elements of {name} differ"
            moved += _num_different(ours, before)
        if moved == 0:  # which would prove nothing
            return "the step moved no parameter"
        if (plain_bytes := state_bytes(*self.optimizers)) != sharded_bytes:
            return f"the ranks hold {sharded_bytes} bytes of state, plain torch {plain_bytes}"
        return None


def verdict(options: Options, wrong: str | None, rounding: Rounding) -> str:
    """The line that ends a run."""
    plain = "it loads into plain " + " and ".join(
        f"torch.optim.{chosen.__name__}" for chosen in classes(options)
    )
    equal = f"but for the rounding of {rounding.of}" if rounding.of else "bit for bit"
    if wrong is not None:
        return f"proof   FAILED: {plain}, but {wrong}"
    return f"proof   {plain}, whose next step is equal, {equal}"


def chosen_kernels(optimizer: ShardedOptimizer) -> list[dict[str, bool]]:
    """The flags of torch's implementation that each group runs: fused rounds otherwise."""
    return [
        {flag: group[flag] for flag in ("fused", "foreach") if group.get(flag) is not None}
        for group in optimizer.optim.param_groups
    ]


def one_evaluation(optimizer: Optimizer) -> None:
    """Of a class that evaluates a closure as often as it likes: let the next step do so once."""
    for group in optimizer.param_groups:
        if "line_search_fn" in group:
            group.update(max_iter=1, line_search_fn=None)


def _num_different(one: Tensor, other: Tensor, allowed: float = 0.0) -> int:
    """How many elements differ by more than is allowed; with 0, in any bit.

    Then 0.0 is not -0.0, and NaN equals itself.
    """
    if allowed > 0:
        return int((~((one - other).abs() <= allowed)).sum())
    bits = [tensor.detach().view(torch.int32) for tensor in (one, other)]
    return int((bits[0] != bits[1]).sum())
