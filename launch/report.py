"""What a run shows: lines, a progress bar, a table of memory, a picture of its curves."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

NAT = 1 / math.log(2)  # bits


def bits(nats: float) -> float:
    return nats * NAT


@dataclass
class History:
    """The curves. Saved with the run, so that those of a resumed run are whole."""

    training: list[float] = field(default_factory=list)  # nats per byte, of each step
    lr: list[float] = field(default_factory=list)  # of each step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, nats per byte)


class Report:
    """Speaks on the first rank and is silent on the others."""

    def __init__(self, is_first: bool, *, first_step: int, steps: int):
        self.is_first = is_first
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", disable=not is_first, mininterval=0.5
        )

    def say(self, text: str) -> None:
        """Print to stdout, above the bar."""
        if self.is_first:
            tqdm.write(text)

    def stepped(self, training: Tensor) -> None:
        self.bar.update()
        if self.is_first and self.bar.n % 10 == 0:  # reading the loss makes a GPU wait
            self.bar.set_postfix_str(f"loss {training.item():.3f}", refresh=False)

    def evaluated(self, history: History) -> None:
        step, held_out = history.held_out[-1]
        training = f"training loss {history.training[-1]:.3f}   " if history.training else ""
        self.say(
            f"step {step:5}   {training}held-out loss {held_out:.3f} nats"
            f" = {bits(held_out):.3f} bits a byte"
        )

    def close(self) -> None:
        self.bar.close()


def state_bytes(*optimizers: Optimizer) -> int:
    """Bytes of per-element state in ``optimizers``, read off its tensors.

    Step counts, one number to a tensor, are left out: they are on every rank alike.
    """
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    values = tree_leaves(states)
    return sum(value.nbytes for value in values if isinstance(value, Tensor) and value.dim() > 0)


def memory_table(by_rank: list[int], name: str) -> str:
    """Optimizer state of each rank beside that of a replica, which is their sum."""
    replica = sum(by_rank)
    rows = [(f"rank {rank}, sharded", held) for rank, held in enumerate(by_rank)]
    rows.append(("every rank, if replicated", replica))
    title = f"optimizer state of {name}"
    width = max(28, len(title))
    lines = [f"{title:<{width}} {'bytes':>13}    {'share':>6}"]
    lines += [
        f"  {label:<{width - 2}} {held:>13,}    {held / max(1, replica):6.1%}"
        for label, held in rows
    ]
    return "\n".join(lines)


def draw(path: Path, history: History, title: str) -> None:
    """The curves as a PNG: losses above, the lr below."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = range(1, len(history.training) + 1)
    losses.plot(steps, history.training, color="tab:blue", alpha=0.4, label="training")
    losses.plot(*zip(*history.held_out, strict=True), "o-", color="tab:red", label="held out")
    losses.set(title=title, ylabel="loss (nats a byte)")
    losses.legend()
    scale: Any = losses.secondary_yaxis("right", functions=(bits, lambda b: b / NAT))
    scale.set_ylabel("bits a byte")
    rates.plot(steps, history.lr, color="tab:green")
    rates.set(xlabel="step", ylabel="learning rate")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
