"""One call that makes ranks out of what a launcher has started.

>>> from shardopt.comm.bootstrap import bootstrap
>>> ranks = bootstrap()  # under torchrun, mpirun, srun, or alone
>>> model.to(ranks.device)

Where ranks meet, the first that applies::

    MASTER_ADDR and MASTER_PORT    as in torch; torchrun sets them, anybody may
    mpirun, with mpi4py            a store that the first rank opens; MPI tells the others where
    srun                           the first host of the step, at a port that its number gives
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shardopt.launchers import MPI, NOBODY, SLURM, Launched, launched, slurm_address

START = timedelta(minutes=10)  # until the last rank has come: it may be importing torch
_QUIET = 30.0  # seconds in which nobody is told that ranks have not come
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """Which rank this is, of how many, and where it computes.

    Attributes:
        rank: of this process.
        world_size: how many there are.
        local_rank: among those on this machine.
        local_world_size: how many are on this machine.
        device: of this rank.
        launcher: who has started it, in words.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    launcher: str


def bootstrap(
    device: str = "auto", *, init: bool = True, timeout: timedelta | None = None
) -> Ranks:
    """The ranks that torchrun, ``mpirun`` or ``srun`` has started, or one process. Collective.

    Sets the CUDA device. Initialises ``torch.distributed``, over NCCL on GPUs and over gloo on the
    CPU, unless it is initialised already, or no launcher has started this process. Over gloo, the
    end of the process destroys it.

    Args:
        device: ``"cpu"``, ``"cuda"`` (one GPU to a rank) or ``"auto"``: GPUs where there are any.
        init: whether to initialise ``torch.distributed``.
        timeout: how long one collective of the default process group may take; ``None`` for
            torch's own limit. Ranks may take 10 minutes to come, whatever it is.

    Raises:
        ValueError: variables that contradict one another; fewer GPUs than ranks on this machine;
            nothing that says where ranks meet, or which of them are on this machine.

    Example:
        >>> bootstrap("cpu").world_size
        1
    """
    told = launched(os.environ)
    initialised = dist.is_available() and dist.is_initialized()
    if initialised:
        told = _as_initialised(told)
    begins = init and not initialised and told.launcher != NOBODY
    by_mpi = told.launcher in MPI and begins and "MASTER_ADDR" not in os.environ
    if by_mpi or (told.launcher in MPI and told.local_rank is None):
        told = _ask_mpi(told)
    place = torch.device("cpu")
    if _chosen(device) == "cuda":
        place = torch.device("cuda", own_gpu(told, torch.cuda.device_count(), os.environ))
        torch.cuda.set_device(place)
    if begins:
        _initialise(told, place, timeout)
    local_rank, local_world_size = _on_this_machine(told)
    return Ranks(told.rank, told.world_size, local_rank, local_world_size, place, told.launcher)


def _chosen(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {device!r}; choose one")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def own_gpu(told: Launched, visible: int, environment: Mapping[str, str]) -> int:
    """The index of this rank's GPU among those that it sees.

    Args:
        told: which rank this is.
        visible: how many GPUs it sees.
        environment: of the process. Slurm may show each task a GPU of its own.

    Raises:
        ValueError: there are too few.
    """
    if visible == 1 and {"SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"} & set(environment):
        return 0
    if told.local_rank is None:
        raise ValueError(
            f"expected the number of this rank on its machine, got {told} without it; set"
            " LOCAL_RANK beside RANK and WORLD_SIZE"
        )
    wanted = told.local_world_size or told.local_rank + 1
    if visible < wanted:
        raise ValueError(
            f"device: expected a GPU for each of {wanted} ranks on this machine, got {visible} on"
            f" rank {told.rank}; start fewer ranks, or choose the CPU"
        )
    return told.local_rank


def _as_initialised(told: Launched) -> Launched:
    """What ``torch.distributed`` says, and what else the launcher knows of the same rank."""
    there = Launched("torch.distributed", dist.get_rank(), dist.get_world_size())
    if told.launcher == NOBODY:
        return there
    if not told.is_same_rank(there):
        raise ValueError(
            f"expected the process group that is initialised to be the launcher's, got {there},"
            f" and {told}; unset the variables of the launcher, or leave the group to bootstrap"
        )
    return told


def _initialise(told: Launched, place: torch.device, timeout: timedelta | None) -> None:
    """Let ``torch.distributed`` begin, as soon as all ranks are there."""
    store = _store(told)
    start = meet(store, told.rank, told.world_size)
    nccl = place.type == "cuda" and dist.is_nccl_available()
    dist.init_process_group(
        "nccl" if nccl else "gloo",
        store=dist.PrefixStore(start, store),
        rank=told.rank,
        world_size=told.world_size,
        timeout=timeout,
        device_id=place if nccl else None,
    )
    if not nccl:
        atexit.register(_end)


def _end() -> None:
    """Destroy the process group if the user has not, while Python lends its lock to threads.

    A thread of gloo that wants it later, to let go of a tensor, ends the process with SIGABRT
    ("terminate called without an active exception"; 3 of 40 processes with torch 2.13).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def meet(store: dist.Store, rank: int, world_size: int, *, within: timedelta = START) -> str:
    """Wait until all ranks are there; returns a name that no earlier start has had.

    torchrun keeps one store for all restarts (torch 2.13), and gloo may find an address in it that
    a rank of an earlier one has left. What is kept under this name is of this start alone. And from
    here on a collective may have less time than the slowest rank takes to come.

    Raises:
        RuntimeError: not all have come; on the first rank it says which.
    """
    name = uuid.uuid4().hex
    store.set_timeout(within)
    if rank > 0:
        store.set(f"rank {rank}", name)
        start = store.get(f"start of {name}").decode()
        store.add(f"{start} has", 1)
        store.get(f"{start} begins")
        return start
    begun, is_told = time.monotonic(), False
    answered: dict[int, bytes] = {}  # the first may be one that an earlier start has left
    while (here := 1 + store.add(f"{name} has", 0)) < world_size:
        for other in range(1, world_size):
            came = store.check([f"rank {other}"])
            if came and (its := store.get(f"rank {other}")) != answered.get(other):
                store.set(f"start of {its.decode()}", name)
                answered[other] = its
        missing = sorted(set(range(world_size)) - {0, *answered})
        if not is_told and time.monotonic() > begun + _QUIET:
            silent = f"no word of ranks {missing}" if missing else "not all are of this start"
            _log.warning("%d of %d ranks are here, %s; waiting", here, world_size, silent)
            is_told = True
        if time.monotonic() > begun + within.total_seconds():
            raise RuntimeError(
                f"expected {world_size} ranks within {within}, got {here}, and no word of ranks"
                f" {missing}; see what they have printed"
            )
        time.sleep(0.01)
    store.set(f"{name} begins", "")
    return name


def _store(told: Launched) -> dist.Store:
    """Where ranks meet."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(dist.rendezvous("env://", told.rank, told.world_size, timeout=START))
        return store
    if "MASTER_ADDR" in os.environ:
        if "MASTER_PORT" not in os.environ:
            raise ValueError(
                f"expected MASTER_PORT beside MASTER_ADDR={os.environ['MASTER_ADDR']}, got none; "
                "set both, or neither under mpirun or srun"
            )
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    elif told.launcher in MPI:
        return _store_told_by_mpi(told)
    elif told.launcher == SLURM:
        host, port = slurm_address(os.environ)
    else:
        raise ValueError(
            f"expected MASTER_ADDR and MASTER_PORT, where ranks meet, got none for {told}; set"
            " them, to a host and a free port of the first rank"
        )
    # Does not wait for the others, whom meet() names; and one may be there from a group before.
    return dist.TCPStore(
        host, port, None, told.rank == 0, START, wait_for_workers=False, multi_tenant=True
    )


def _store_told_by_mpi(told: Launched) -> dist.Store:
    """A store of the first rank, at a port that the system has chosen."""
    store = None
    if told.rank == 0:
        store = dist.TCPStore("localhost", 0, None, True, START, wait_for_workers=False)
    is_one_machine = told.local_world_size == told.world_size
    host = "localhost" if is_one_machine else socket.gethostname()
    host, port = _mpi().COMM_WORLD.bcast((host, store.port) if store is not None else None)
    return store or dist.TCPStore(host, port, None, False, START)


def _ask_mpi(told: Launched) -> Launched:
    """``told``, and which ranks are on this machine."""
    mpi = _mpi()
    world = mpi.COMM_WORLD
    if (world.rank, world.size) != (told.rank, told.world_size):
        raise ValueError(
            f"expected {told}, got rank {world.rank} of {world.size} from mpi4py; start with the"
            " mpirun of the MPI library that mpi4py has loaded"
        )
    here = world.Split_type(mpi.COMM_TYPE_SHARED)
    told = replace(told, local_rank=here.rank, local_world_size=here.size)
    here.Free()
    return told


def _mpi() -> Any:
    try:
        from mpi4py import MPI as mpi
    except ImportError:
        raise ValueError(
            "expected the package mpi4py, by which the ranks of mpirun find one another, got a"
            " Python without it; install shardopt[mpi], or set MASTER_ADDR, MASTER_PORT and"
            " LOCAL_RANK"
        ) from None
    return mpi


def _on_this_machine(told: Launched) -> tuple[int, int]:
    """Number of this rank among those of its machine, and of those; by their names at need."""
    if told.local_rank is not None and told.local_world_size is not None:
        return told.local_rank, told.local_world_size
    if told.world_size == 1:
        return 0, 1
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"expected the number of this rank on its machine, got {told} without it; set"
            " LOCAL_RANK and LOCAL_WORLD_SIZE beside RANK and WORLD_SIZE"
        )
    hosts: list[Any] = [None] * told.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    here = [rank for rank, host in enumerate(hosts) if host == socket.gethostname()]
    return here.index(told.rank), len(here)
