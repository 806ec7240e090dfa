"""Train a GPT with the optimizer state sharded over the ranks: the main job of this repository.

    python launch/train.py                                                  # one process
    python -m torch.distributed.run --standalone --nproc-per-node 2 launch/train.py

The second line runs two ranks, over gloo on CPU or over NCCL on two GPUs. README.md beside this
file has the rest.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from options import AUTO, Options, Refused, fill_in, is_first_here, parse
from saved_run import check_place, newest_step, prepare_run

NEEDED = {
    "torch": "torch",
    "shardopt": "-e .",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if the proof fails, 2 for what the user can put right, and 128
    plus the number of a signal that has ended the run, once it is saved.

    Only the first rank of a machine speaks, and only it returns 2: a launcher ends all ranks as
    soon as one has failed, and that might be before the first one has spoken.
    """
    try:
        return train(arguments)
    except Refused as refusal:
        if not is_first_here():
            return 0
        print(f"train.py: error: {refusal}", file=sys.stderr)
        return 2


def train(arguments: Sequence[str] | None) -> int:
    given = parse(arguments)
    require_packages()
    world_size = _world_size()
    if given.get("resume", AUTO) == AUTO:
        fill_in(given, world_size=world_size)
    else:  # the options are completed by what was saved
        check_place(Path(given["resume"]))

    if "check" in given:
        prepare_run(given, newest_step(given), world_size)
        return 0

    # Not imported before now: torch takes seconds, a refusal takes none.
    from job import Job
    from notice import Interrupted
    from ranks import start_ranks, stop_ranks

    ranks = start_ranks(given.get("device", "auto"), given.get("timeout", Options.timeout))
    try:
        return 0 if Job(given, ranks).run() is None else 1
    except Interrupted as end:
        if ranks.is_first:
            print(f"train.py: {end}", file=sys.stderr)
        return end.exit_code
    finally:
        stop_ranks()


def _world_size() -> int:
    from shardopt.launchers import launched

    try:
        return launched(os.environ).world_size
    except ValueError as problem:
        raise Refused(str(problem)) from None


def require_packages() -> None:
    for package, installs in NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise Refused(
                f"expected the package {package}, got a Python without it ({sys.executable});"
                f" run: {sys.executable} -m pip install {installs}"
            )


if __name__ == "__main__":
    sys.exit(main())
