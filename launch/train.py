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

from options import Refused, fill_in, parse
from saved_run import check_place, prepare_run

NEEDED = {
    "torch": "torch",
    "shardopt": "-e .",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if the proof fails, 2 for what the user can put right.

    Only the first rank of a machine speaks, and only it returns 2: a launcher ends all ranks as
    soon as one has failed, and that might be before the first one has spoken.
    """
    try:
        return train(arguments)
    except Refused as refusal:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            return 0
        print(f"train.py: error: {refusal}", file=sys.stderr)
        return 2


def train(arguments: Sequence[str] | None) -> int:
    given = parse(arguments)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if "resume" in given:  # the options are completed by what was saved
        check_place(Path(given["resume"]))
    else:
        fill_in(given, world_size=world_size)
    require_packages()

    if "check" in given:
        prepare_run(given, world_size)
        return 0

    # Not imported before now: torch takes seconds, a refusal takes none.
    from job import Job
    from ranks import start_ranks, stop_ranks

    ranks = start_ranks(given.get("device", "auto"))
    try:
        return 0 if Job(given, ranks).run() is None else 1
    finally:
        stop_ranks()


def require_packages() -> None:
    for package, installs in NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise Refused(
                f"expected the package {package}, got a Python without it ({sys.executable});"
                f" run: {sys.executable} -m pip install {installs}"
            )


if __name__ == "__main__":
    sys.exit(main())
