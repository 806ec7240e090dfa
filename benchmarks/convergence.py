"""Every class of torch.optim on a real task: sharded over ranks beside torch's own curve.

    python benchmarks/convergence.py                  # docs/convergence.png, 2 ranks

The task is scikit-learn's handwritten digits: a network of 74 thousand parameters reads 64 pixels
of 17 shades each, as words from a table. Each rank has a part of each batch, and shardopt averages
their gradients; torch's own class has the whole batch, in one process. Muon takes the matrices and
SparseAdam the table, whose gradients are sparse then; AdamW has what they leave. LBFGS gets all the
training images at once.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from common import on_ranks
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from shardopt import ShardedOptimizer

CLASSES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 3e-3},
    "AdamW": {"lr": 3e-3},
    "Adamax": {"lr": 5e-3},
    "NAdam": {"lr": 3e-3},
    "RAdam": {"lr": 5e-3},
    "Adagrad": {"lr": 0.03},
    "Adadelta": {"lr": 1.0},
    "RMSprop": {"lr": 1e-3},
    "Rprop": {"lr": 1e-3},
    "ASGD": {"lr": 0.3},
    "Adafactor": {"lr": 0.03},
    "Muon": {"lr": 0.01},
    "SparseAdam": {"lr": 3e-3},
    "LBFGS": {"lr": 1.0, "max_iter": 4, "line_search_fn": "strong_wolfe"},
}
REST = torch.optim.AdamW, {"lr": 3e-3}
SHADES, PIXELS, WIDTH = 17, 64, 64
TRAINED, BATCH, STEPS, FULL_STEPS = 1500, 150, 200, 40  # images, images, steps, steps of LBFGS


class Run(NamedTuple):
    """What came of a training."""

    losses: list[float]  # of each step's batch, before the step
    accuracy: float  # on images that were not trained on


class Network(nn.Module):
    """The same at every call."""

    def __init__(self, *, sparse: bool):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(PIXELS * SHADES, WIDTH, mode="sum", sparse=sparse)
        nn.init.normal_(self.table.weight, std=PIXELS**-0.5)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, 10)

    def forward(self, shades: Tensor) -> Tensor:  # (batch, PIXELS) of int64 -> (batch, 10)
        x = self.table(shades + SHADES * torch.arange(PIXELS))
        return self.output(functional.gelu(self.hidden(functional.gelu(x))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs"))
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="CLASS")
    arguments = parser.parse_args()
    on_ranks(arguments.ranks, compare, arguments.classes, arguments.out)


def compare(rank: int, names: list[str], out: pathlib.Path) -> None:
    """Train each class both ways; rank 0 trains torch's own, prints and draws."""
    digits = load_digits()
    data = torch.tensor(digits.data).long(), torch.tensor(digits.target)
    pairs: dict[str, tuple[Run, Run]] = {}
    for name in names:
        ours = train(name, data, sharded, rank, dist.get_world_size())
        if rank > 0:
            continue
        theirs = train(name, data, plain, 0, 1)
        pairs[name] = ours, theirs
        print(line(name, ours, theirs), flush=True)
    if rank == 0:
        draw(out / "convergence.png", pairs, dist.get_world_size())


Build = Callable[[str, nn.Module], list[Optimizer]]


def train(name: str, data: tuple[Tensor, Tensor], build: Build, part: int, parts: int) -> Run:
    """On every ``parts``-th image of each batch; the losses are means over the ranks."""
    model = Network(sparse=name == "SparseAdam")
    optimizers = build(name, model)
    shades, labels = data
    losses = []
    for step in range(FULL_STEPS if name == "LBFGS" else STEPS):
        order = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(step))
        batch = order if name == "LBFGS" else order[:BATCH]
        losses.append(one_step(model, optimizers, shades, labels, batch[part::parts]))
    with torch.no_grad():
        right = model(shades[TRAINED:]).argmax(1) == labels[TRAINED:]
    curve = torch.tensor(losses)
    if parts > 1:
        dist.all_reduce(curve)
    return Run((curve / parts).tolist(), float(right.float().mean()))


def one_step(
    model: nn.Module, optimizers: list[Optimizer], shades: Tensor, labels: Tensor, batch: Tensor
) -> float:
    """Returns the loss of the batch before the step."""
    losses = []

    def closure() -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = functional.cross_entropy(model(shades[batch]), labels[batch])
        loss.backward()
        losses.append(loss.item())
        return loss

    if "line_search_fn" in optimizers[0].defaults:
        optimizers[0].step(closure)
    else:
        closure()
        for optimizer in optimizers:
            optimizer.step()
    return losses[0]


def groups_of(name: str, model: nn.Module) -> list[list[nn.Parameter]]:
    """What the class takes, then what it leaves."""
    takes: dict[str, Callable[[str, Tensor], bool]] = {
        "Muon": lambda path, parameter: parameter.dim() == 2 and not path.startswith("table"),
        "SparseAdam": lambda path, parameter: path.startswith("table"),
    }
    fits = takes.get(name, lambda path, parameter: True)
    named = list(model.named_parameters())
    taken = [parameter for path, parameter in named if fits(path, parameter)]
    return [taken, [parameter for path, parameter in named if not fits(path, parameter)]]


def sharded(name: str, model: nn.Module) -> list[Optimizer]:
    """One optimizer for all, which averages gradients itself."""
    optimizer_class, options = getattr(torch.optim, name), CLASSES[name]
    taken, rest = groups_of(name, model)
    settings = {"gradients": "sharded", "kernel": "torch", "bucket_cap_mb": 0.1}
    if not rest:
        return [ShardedOptimizer(taken, optimizer_class, **settings, **options)]
    groups = [{"params": taken, "optimizer_class": optimizer_class, **options}, {"params": rest}]
    return [ShardedOptimizer(groups, REST[0], **settings, **REST[1])]


def plain(name: str, model: nn.Module) -> list[Optimizer]:
    """One optimizer for each class."""
    taken, rest = groups_of(name, model)
    first = getattr(torch.optim, name)(taken, **CLASSES[name])
    return [first, REST[0](rest, **REST[1])] if rest else [first]


def difference(ours: Run, theirs: Run) -> float:
    """The largest of any step."""
    return max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))


def line(name: str, ours: Run, theirs: Run) -> str:
    return (
        f"{name:<11}loss {ours.losses[0]:.2f} -> {ours.losses[-1]:.1e}, torch's "
        f"{theirs.losses[-1]:.1e}, largest difference {difference(ours, theirs):.1e}; "
        f"unseen digits {ours.accuracy:.1%} and {theirs.accuracy:.1%}"
    )


def draw(path: pathlib.Path, pairs: dict[str, tuple[Run, Run]], num_ranks: int) -> None:
    """A small panel to a class, with both curves."""
    columns = min(5, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.1 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, (name, (ours, theirs)) in zip(panels, pairs.items(), strict=False):
        axes.semilogy(theirs.losses, color="tab:orange", alpha=0.5, linewidth=4)
        axes.semilogy(ours.losses, color="tab:blue", linewidth=1)
        axes.set_title(f"{name}\nlargest difference {difference(ours, theirs):.0e}", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[len(pairs) :]:
        axes.axis("off")
    figure.supxlabel("step")
    figure.supylabel("training loss (nats)")
    handles = panels[0].get_lines()
    labels = ["torch.optim, one process", f"ShardedOptimizer, {num_ranks} ranks"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
