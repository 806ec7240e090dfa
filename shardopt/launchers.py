"""Who has started this process, and as which of how many: read off the environment. No torch.

Launchers say it in variables of their own::

    launcher          rank                  of                    on this machine
    torchrun          RANK                  WORLD_SIZE            LOCAL_RANK, LOCAL_WORLD_SIZE
    Open MPI          OMPI_COMM_WORLD_RANK  OMPI_COMM_WORLD_SIZE  OMPI_COMM_WORLD_LOCAL_RANK, _SIZE
    MPICH, Intel MPI  PMI_RANK              PMI_SIZE              MPI_LOCALRANKID, MPI_LOCALNRANKS
    Slurm (srun)      SLURM_PROCID          SLURM_NTASKS          SLURM_LOCALID, and a list of nodes

One may start another, and then the inner one counts: ``srun`` may start ``mpirun``, and either may
start torchrun. Within ``sbatch`` there are variables of Slurm before ``srun`` has started anything;
only a step (SLURM_STEP_ID) makes a process one of several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

NOBODY = "no launcher"
BY_HAND = "the environment"  # RANK and WORLD_SIZE, and not from torchrun
TORCHRUN = "torchrun"
SLURM = "Slurm"
MPI = ("Open MPI", "MPICH or Intel MPI")

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPEN_MPI = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_TASKS_HERE = "SLURM_TASKS_PER_NODE here"  # which is a list, of all nodes
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", _TASKS_HERE)


@dataclass(frozen=True)
class Launched:
    """What the environment says of this process.

    Attributes:
        launcher: its name, or ``NOBODY``.
        rank: of this process.
        world_size: how many there are.
        local_rank: among those on this machine; ``None`` where the launcher does not say.
        local_world_size: how many are on this machine; ``None`` where it does not say.
    """

    launcher: str = NOBODY
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} from {self.launcher}"

    def is_same_rank(self, other: Launched) -> bool:
        """Whether both speak of one rank of one world."""
        return (self.rank, self.world_size) == (other.rank, other.world_size)


def launched(environment: Mapping[str, str]) -> Launched:
    """Which rank of how many ``environment`` makes of this process.

    Args:
        environment: of the process, as ``os.environ``.

    Raises:
        ValueError: variables that contradict one another, or are no numbers.

    Example:
        >>> launched({"RANK": "1", "WORLD_SIZE": "2"})
        Launched(launcher='the environment', rank=1, world_size=2, local_rank=None, ...)
    """
    found = _found(environment)
    if not found:
        return Launched(local_rank=0, local_world_size=1)
    counts, *others = found
    agreeing = [counts]
    for other in others:
        if other.is_same_rank(counts):
            agreeing.append(other)
        elif not any(_is_within(one, other) for one in agreeing):
            raise ValueError(
                f"expected launchers that agree, got {counts}, and {other}; unset the variables of"
                " the one that has not started this process"
            )
    of_this_machine = {
        name: value
        for one in reversed(agreeing)  # the inner one has the last word
        for name in ("local_rank", "local_world_size")
        if (value := getattr(one, name)) is not None
    }
    return replace(counts, **of_this_machine)


def _is_within(inner: Launched, outer: Launched) -> bool:
    """Whether one of these launchers is started by the other, as a rule."""
    return inner.launcher == TORCHRUN or (inner.launcher in MPI and outer.launcher == SLURM)


def _found(environment: Mapping[str, str]) -> list[Launched]:
    """What each launcher says that has left its variables, the inner ones first."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    said = [
        _read(environment, TORCHRUN if by_torchrun else BY_HAND, *_TORCH),
        _read(environment, MPI[0], *_OPEN_MPI),
        _read(environment, MPI[1], *_MPICH),
    ]
    if "SLURM_STEP_ID" in environment:
        here = _tasks_on_this_node(environment)
        step = environment if here is None else {**environment, _TASKS_HERE: here}
        said.append(_read(step, SLURM, *_SLURM))
    return [one for one in said if one is not None]


def _read(
    environment: Mapping[str, str], launcher: str, rank: str, size: str, local: str, local_size: str
) -> Launched | None:
    """What the variables of these names say, or ``None`` where they are not set."""
    if rank not in environment and size not in environment:
        return None
    numbers = {
        name: _whole_number(name, environment[name])
        for name in (rank, size, local, local_size)
        if name in environment
    }
    for name, other in ((rank, size), (size, rank)):
        if name not in numbers:
            raise ValueError(
                f"expected {name} beside {other}={environment[other]}, got none; set both, or"
                " neither for a single process"
            )
    for one, of in ((rank, size), (local, local_size), (local, size)):
        if one in numbers and of in numbers and numbers[one] >= numbers[of]:
            raise ValueError(
                f"expected {one} below {of}={numbers[of]}, got {numbers[one]}; ranks are counted"
                " from 0: correct one of them"
            )
    if numbers.get(local_size, 0) > numbers[size]:
        raise ValueError(
            f"expected {local_size} of at most {size}={numbers[size]}, got {numbers[local_size]};"
            " correct one of them"
        )
    return Launched(
        launcher, numbers[rank], numbers[size], numbers.get(local), numbers.get(local_size)
    )


def _whole_number(name: str, text: str) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise ValueError(
            f"{name}: expected a whole number, got {text!r}; correct the variable or unset it"
        )
    return int(text)


def _tasks_on_this_node(environment: Mapping[str, str]) -> str | None:
    """Slurm's ``2(x3),1`` says 2 tasks on each of three nodes, then 1."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE"))
    node = environment.get("SLURM_NODEID")
    if text is None or node is None:
        return None
    counts: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [match[1]] * int(match[2] or 1)
    index = _whole_number("SLURM_NODEID", node)
    return counts[index] if index < len(counts) else None


def first_host(nodes: str) -> str:
    """The first of a list of hosts as Slurm writes it.

    Raises:
        ValueError: brackets that do not close, or no host.

    Example:
        >>> first_host("rack[2-3]node[04-07,9],login1")
        'rack2node04'
    """
    first = re.match(r"(?:[^\[\],]|\[[^\[\]]*\])+", nodes)
    if first is None or nodes[first.end() :][:1] not in ("", ","):
        raise ValueError(
            f"expected a list of hosts such as node[01-04,7], got {nodes!r}; set MASTER_ADDR and"
            " MASTER_PORT"
        )
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def slurm_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the ranks of a step of Slurm meet: its first host, at a port that its number gives.

    Below those that systems give away themselves (from 32768 on Linux); two steps share one only if
    they run on one host and their numbers lie 15,000 apart.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job = _whole_number("SLURM_JOB_ID", environment.get("SLURM_JOB_ID", ""))
    step = _whole_number("SLURM_STEP_ID", environment.get("SLURM_STEP_ID", "0"))
    return first_host(nodes), 15_000 + (job + 101 * step) % 15_000
