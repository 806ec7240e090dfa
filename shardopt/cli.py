"""``shardopt inspect | verify | consolidate | diff CHECKPOINT``: no ranks, no GPU, no pickle.

torch is imported by those commands alone that need it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shardopt.errors import CorruptError, IncompleteError, ShardoptError

DIFFERENT, USAGE, CORRUPT, INCOMPLETE = 1, 2, 3, 4

_EPILOG = """\
CHECKPOINT is the directory of one step, or one of steps (step-N), of which the newest complete one
is taken; inspect, consolidate and diff also read a directory of torch.distributed.checkpoint, and a
file of torch.save.

exit codes: 0 fine, 1 (of diff) they differ, 2 cannot do what is asked, 3 corrupt, 4 incomplete
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        arguments: without the program's name; ``None``: the process's own.

    Returns:
        The exit code, see ``--help``.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read has seen enough; the interpreter must not try again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return getattr(options, "found", 0)
    except (ShardoptError, OSError) as problem:
        print(f"shardopt: {problem}", file=sys.stderr)
        if isinstance(problem, CorruptError):
            return CORRUPT
        return INCOMPLETE if isinstance(problem, IncompleteError) else USAGE
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "shardopt",
        description="Looks at, checks and converts checkpoints.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    inspect = _command(
        commands, _inspect, "say what is in a checkpoint", "inspect runs/step-100 --json"
    )
    inspect.add_argument("source", metavar="CHECKPOINT", type=Path)
    inspect.add_argument("--json", action="store_true", help="one JSON object, not a table")

    verify = _command(commands, _verify, "check every checksum", "verify runs/step-100")
    verify.add_argument("source", metavar="CHECKPOINT", type=Path)
    verify.add_argument(
        "--quiet", action="store_true", help="say nothing unless something is wrong"
    )

    text = "write a checkpoint as one file that needs no shardopt"
    example = "consolidate runs/step-100 model.safetensors --format safetensors --model-only"
    _add_consolidate(_command(commands, _consolidate, text, example))

    text = "say how two checkpoints differ"
    diff = _command(commands, _diff, text, "diff runs/step-100 runs/step-200")
    diff.add_argument("source", metavar="A", type=Path)
    diff.add_argument("other", metavar="B", type=Path)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        example.split()[0],
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  shardopt {example}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_consolidate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CHECKPOINT", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="a file that is not there yet")
    parser.add_argument(
        "--format",
        choices=("torch", "safetensors"),
        default="torch",
        help="for torch.load(weights_only=True), or the safetensors library (default: torch)",
    )
    parser.add_argument(
        "--keys",
        choices=("index", "name"),
        default="index",
        help="optimizer state by number, as torch.optim has it, or by name (default: index)",
    )
    part = parser.add_mutually_exclusive_group()
    for name in ("model", "optimizer"):
        text = f"the {name}'s state_dict, and nothing around it"
        part.add_argument(
            f"--{name}-only", dest="only", action="store_const", const=name, help=text
        )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_num_bytes,
        help="of one safetensors file, such as 500MB or 2GB; further ones, and an index, follow",
    )


def _num_bytes(text: str) -> int:
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text)
    unit = units.get(match[2].upper()) if match else None
    if match is None or unit is None or (count := int(float(match[1]) * unit)) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, got {text!r}")
    return count


def _inspect(options: argparse.Namespace) -> int:
    from shardopt.checkpoint.inspection import describe, table
    from shardopt.checkpoint.opening import open_source

    with open_source(_one_step(options.source)) as source:
        about = describe(source)
    if options.json:
        print(json.dumps(about, indent=2, ensure_ascii=False))
    else:
        for line in table(about):
            print(line)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from shardopt.checkpoint.verify import problems

    source = _one_step(options.source)
    with _Bar("verify", options.quiet) as bar:
        found = problems(source, bar.told)
    for problem in found:
        print(f"shardopt: {problem}", file=sys.stderr)
    if found:
        return CORRUPT if any(isinstance(p, CorruptError) for p in found) else INCOMPLETE
    if not options.quiet:
        print(f"{source}: every checksum is right")
    return 0


def _consolidate(options: argparse.Namespace) -> int:
    from shardopt.checkpoint.offline import consolidate

    with _Bar("consolidate") as bar:
        notes = consolidate(
            _one_step(options.source),
            options.out,
            format=options.format,
            keys=options.keys,
            only=options.only,
            max_shard_size=options.max_shard_size,
            progress=bar.told,
        )
    for note in notes:
        print(f"shardopt: {note}", file=sys.stderr)
    return 0


def _diff(options: argparse.Namespace) -> int:
    from shardopt.checkpoint.diff import diff

    with _Bar("diff") as bar:
        found = diff(_one_step(options.source), _one_step(options.other), bar.told)
    options.found = DIFFERENT if found else 0  # also for those who do not read to the end
    for line in found.lines((str(options.source), str(options.other))):
        print(line)
    return int(options.found)


def _one_step(path: Path) -> Path:
    """The directory itself, or the newest complete step in it, which is said."""
    from shardopt.checkpoint.manifest import NAME
    from shardopt.checkpoint.steps import steps_in

    if not path.is_dir() or (path / NAME).exists() or (path / ".metadata").exists():
        return path
    complete = [step for step in steps_in(path) if (step / NAME).exists()]
    if not complete:
        return path
    print(f"shardopt: {complete[0]}, the newest of {len(complete)}", file=sys.stderr)
    return complete[0]


class _Bar:
    """How far it is, on standard error where that is a terminal."""

    def __init__(self, title: str, quiet: bool = False):
        self._title, self._shown = title, sys.stderr.isatty() and not quiet
        self._start, self._last = time.monotonic(), 0.0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *problem: object) -> None:
        if self._shown and self._last:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def told(self, done: int, total: int) -> None:
        """Draw again, ten times a second at most."""
        now = time.monotonic()
        if self._shown and now - self._last > 0.1 and total:
            self._last = now
            filled = 30 * done // total
            rest = (now - self._start) * (total - done) / max(done, 1)
            bar = "#" * filled + "." * (30 - filled)
            text = f"\r{self._title} [{bar}] {100 * done // total}%, {rest:.0f} s left\033[K"
            print(text, end="", file=sys.stderr, flush=True)
