"""The options of ``train.py``, and what it says about bad ones.

Torch is not imported here: ``--help`` and a refusal come at once.
"""

import argparse
import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from choices import COMPANION, GRADIENTS, OPTIMIZERS, SCHEDULERS, SIZES, Size


class Refused(Exception):
    """The run cannot start; the message is one line that says expected, got, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options, filled in. What is ``None`` is the choice of the optimizer class."""

    optimizer: str = "AdamW"
    scheduler: str = "cosine"
    lr: float
    weight_decay: float | None = None
    size: str = "small"
    steps: int
    batch: int
    context: int
    seed: int = 0
    eval_every: int
    save_every: int = 0
    keep: int = 0
    out: str = "runs"
    save: str
    plot: str
    resume: str | None = None  # a directory, or AUTO
    kernel: str = "auto"
    gradients: str = "sharded"
    clip: float
    device: str = "auto"
    timeout: float = 600.0
    check: bool = False


# What makes a run this run and no other. A resumed run takes it from what was saved.
LEARNING = ("optimizer", "scheduler", "lr", "weight_decay", "clip")
IDENTITY = (*LEARNING, "size", "batch", "context", "seed")
HABITS = ("steps", "eval_every", "save_every", "keep", "kernel", "gradients")  # unless given
AUTO = "auto"  # in the place of a directory to resume: the newest step, if there is one
PLANNED = ("cosine", "linear", "step", "onecycle")  # schedules laid out over --steps


def parse(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The options that were given, by name; nothing stands for those that were not."""
    parser = _Parser(
        prog="train.py",
        description="Train a GPT over bytes on the source of Python's standard library,\n"
        "with the optimizer state sharded over the ranks.",
        epilog="one process:\n  python launch/train.py\n"
        "two ranks, on two GPUs or on CPU:\n"
        "  python -m torch.distributed.run --standalone --nproc-per-node 2 launch/train.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_what_to_train(parser)
    _add_where_and_when(parser)
    return vars(parser.parse_args(arguments))


def _add_what_to_train(parser: argparse.ArgumentParser) -> None:
    schedules = "; ".join(f"{name}: {what}" for name, what in SCHEDULERS.items())
    sizes = "; ".join(
        f"{name}: {size.num_layers} layers of width {size.width}, context {size.context}, "
        f"batch {size.batch}, {size.steps} steps"
        for name, size in SIZES.items()
    )
    add = parser.add_argument_group("what is trained").add_argument
    add("--optimizer", type=_one_of(OPTIMIZERS), metavar="CLASS",
        help=f"a class of torch.optim: {', '.join(OPTIMIZERS)}; where it takes matrices or"
        f" embeddings only, {COMPANION} has the rest (default AdamW)")  # fmt: skip
    add("--scheduler", type=_one_of(SCHEDULERS), metavar="NAME",
        help=f"{schedules} (default cosine)")  # fmt: skip
    add("--lr", type=_number(above=0), help="learning rate (default: one that suits the optimizer)")
    add("--weight-decay", type=_number(least=0), metavar="X", help="default: that of the optimizer")
    add("--size", type=_one_of(SIZES), metavar="NAME", help=f"{sizes} (default small)")
    add("--steps", type=_whole(1), metavar="N", help="steps in all, those before a resume included")
    add("--batch", type=_whole(1), metavar="N", help="windows of one step, over all ranks")
    add("--context", type=_whole(2), metavar="N", help="bytes in a window")
    add("--clip", type=_number(least=0), metavar="X",
        help="the largest norm of the gradients; 0: any (default 1; LBFGS: 0)")  # fmt: skip
    add("--seed", type=_whole(0), metavar="N", help="of weights and order of data (default 0)")


def _add_where_and_when(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where, and when").add_argument
    kernels = "auto: torch's fused kernel where there is one; torch: torch's own default"
    add("--eval-every", type=_whole(1), metavar="N",
        help="steps between two evaluations (default: a tenth of the steps)")  # fmt: skip
    add("--out", metavar="DIR",
        help="directory of all that is written (default runs, or runs-2, ...)")  # fmt: skip
    add("--save", metavar="DIR", help="directory of the saved steps, step-N (default: --out)")
    add("--save-every", type=_whole(0), metavar="N",
        help="steps between two saves; 0: at the end only (default 0)")  # fmt: skip
    add("--keep", type=_whole(0), metavar="N",
        help="how many of the newest saved steps stay; 0: all (default 0)")  # fmt: skip
    add("--resume", metavar="DIR",
        help="a saved run, of which the newest step that verifies is taken, or one of its steps;"
        " any number of ranks; auto: the run in --save if there is one, or a new one")  # fmt: skip
    add("--plot", metavar="PATH", help="the curves, a PNG (default: curves.png in --out)")
    add("--kernel", type=_one_of(("auto", "torch")), metavar="NAME",
        help=f"{kernels} (default auto)")  # fmt: skip
    kinds = "; ".join(f"{name}: {what}" for name, what in GRADIENTS.items())
    add("--gradients", type=_one_of(GRADIENTS), metavar="NAME", help=f"{kinds} (default sharded)")
    add("--check", action="store_true", help="check the options and train nothing")
    add("--device", type=_one_of(("auto", "cpu", "cuda")), metavar="NAME",
        help="auto takes GPUs where there are any (default auto)")  # fmt: skip
    add("--timeout", type=_number(above=0), metavar="SECONDS",
        help="how long a rank waits for the others before it fails (default 600)")  # fmt: skip


def fill_in(
    given: Mapping[str, Any], saved: Mapping[str, Any] | None = None, *, world_size: int = 1
) -> Options:
    """``given`` completed by what a resumed run was ``saved`` with, and by defaults; checked."""
    if saved is not None:
        _check_same_run(given, saved)
        given = {**{name: saved[name] for name in IDENTITY + HABITS}, **given}
    size = SIZES[given.get("size", Options.size)]
    optimizer = given.get("optimizer", Options.optimizer)
    steps = given.get("steps", size.steps)
    out = given.get("out", Options.out)
    defaults = {
        "lr": default_lr(optimizer, size),
        "clip": 0.0 if OPTIMIZERS[optimizer].evaluates else 1.0,
        "steps": steps,
        "batch": size.batch,
        "context": size.context,
        "eval_every": max(1, steps // 10),
        "save": out,
        "plot": f"{out}/curves.png",
    }
    options = Options(**{**defaults, **given})
    _check(options, world_size)
    return options


def default_lr(optimizer: str, size: Size) -> float:
    """The recipe's, tried on the small model; wider ones take smaller steps, in proportion."""
    return OPTIMIZERS[optimizer].lr * min(1.0, SIZES["small"].width / size.width)


def _check(options: Options, world_size: int) -> None:
    if options.batch < world_size:
        raise Refused(
            f"--batch: expected at least {world_size} windows, one for each rank,"
            f" got {options.batch}; ask for a larger batch or fewer ranks"
        )
    if options.weight_decay is not None and not OPTIMIZERS[options.optimizer].has_weight_decay:
        raise Refused(
            f"--weight-decay: expected none with {options.optimizer}, which has no such option,"
            f" got {options.weight_decay}; leave it out"
        )
    if options.clip > 0 and OPTIMIZERS[options.optimizer].evaluates:
        raise Refused(
            f"--clip: expected 0 with {options.optimizer}, which searches along the gradient as it"
            f" is, got {options.clip:g}; leave it out"
        )
    if options.gradients == "replicated" and OPTIMIZERS[options.optimizer].takes == "embeddings":
        raise Refused(
            f"--gradients: expected local or sharded with {options.optimizer}, since DDP averages"
            f" sparse gradients on a CPU only, got {options.gradients}; leave it out"
        )
    if not options.plot.endswith(".png"):
        raise Refused(f"--plot: expected a name that ends in .png, got {options.plot!r}; rename it")


def _check_same_run(given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse options that would make of the resumed run another one."""
    for name in IDENTITY:
        if name in given and given[name] != saved[name]:
            option = "--" + name.replace("_", "-")
            raise Refused(
                f"{option}: expected {saved[name]}, with which the resumed run was saved, got"
                f" {given[name]}; leave {option} out, or start a new run without --resume"
            )
    steps = given.get("steps", saved["steps"])
    if steps != saved["steps"] and saved["scheduler"] in PLANNED:
        raise Refused(
            f"--steps: expected {saved['steps']}, over which the {saved['scheduler']} schedule of"
            f" the resumed run is laid out, got {steps}; leave --steps out"
        )


def is_first_here() -> bool:
    """Whether this is the first rank of its machine, as far as can be known: it alone speaks."""
    try:
        from shardopt.launchers import launched

        return not launched(os.environ).local_rank
    except (ImportError, ValueError):  # which is what there is to say
        return True


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        """Once, however many ranks are asked for it."""
        if is_first_here():
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """One line and no usage: the option at fault would scroll away."""
        unknown = "" if "expected" in message else "; python launch/train.py --help lists all"
        raise Refused(message.removeprefix("argument ") + unknown)


def _one_of(names: Sequence[str] | Mapping[str, Any]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text in names:
            return text
        folded = {name.lower(): name for name in names}
        close = difflib.get_close_matches(text.lower(), folded, n=1)
        remedy = f"did you mean {folded[close[0]]}?" if close else "choose one of these"
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(names)}, got {text!r}; {remedy}"
        )

    return read


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}; correct it"
            )
        return value

    return read


def _number(*, least: float = -math.inf, above: float = -math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value >= least and value > above and value < math.inf):
            bound = f"above {above:g}" if above > least else f"of at least {least:g}"
            raise argparse.ArgumentTypeError(f"expected a number {bound}, got {text!r}; correct it")
        return value

    return read
