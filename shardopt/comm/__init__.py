"""Communication: the ``Collectives`` interface and what carries it out."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from shardopt.comm.collectives import DEFAULT_TIMEOUT, Collectives
from shardopt.comm.mesh import MeshCollectives
from shardopt.comm.solo import SoloCollectives
from shardopt.errors import warn
from shardopt.launchers import launched

__all__ = ["Collectives", "SoloCollectives", "choose_collectives"]


def choose_collectives(process_group: Any, timeout: float | None = None) -> Collectives:
    """The collectives for whatever a user passes as ``process_group``.

    Args:
        process_group: ``None`` (all ranks, or one process where no process group is initialised),
            a ``ProcessGroup``, a ``DeviceMesh`` (1-D, or 2-D: replicate x shard), an
            ``mpi4py.MPI.Comm``, or a ``Collectives``.
        timeout: how many seconds one communication may take; ``None`` for 10 minutes. A
            ``Collectives`` has its own.

    Raises:
        TypeError: anything else.
        ValueError: a mesh of more than two dimensions, or this rank is not in the group; for a
            communicator of MPI see ``MpiCollectives``.
    """
    if isinstance(process_group, Collectives):
        return process_group
    limit = DEFAULT_TIMEOUT if timeout is None else timedelta(seconds=timeout)
    mpi = sys.modules.get("mpi4py.MPI")  # whoever has a communicator has imported it
    if mpi is not None and isinstance(process_group, mpi.Comm):
        return _over_mpi(process_group, limit)
    if not dist.is_available() or (process_group is None and not dist.is_initialized()):
        _warn_of_others()
        return SoloCollectives()
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(process_group, DeviceMesh):
        if process_group.ndim == 2:
            return _over_mesh(process_group, limit)
        if process_group.ndim != 1:
            raise ValueError(
                "expected a 1-D DeviceMesh, or a 2-D one (replicate x shard), got "
                f"{process_group.ndim} dimensions "
                f"{process_group.mesh_dim_names or tuple(process_group.mesh.shape)}; pass the "
                "dimension that shards, e.g. mesh['shard']"
            )
        process_group = process_group.get_group()
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"expected a process group with this rank in it, got none for global rank "
            f"{dist.get_rank()}; construct the optimizer only on the ranks of its group"
        )
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group: expected None, a ProcessGroup, a DeviceMesh, an mpi4py.MPI.Comm or a "
            f"Collectives, got {type(process_group).__name__}"
        )
    return _over(process_group, limit)


def _warn_of_others() -> None:
    """A launcher has started several processes, and this one is about to train alone."""
    try:
        told = launched(os.environ)
    except ValueError:  # bootstrap raises it, and nobody has called that
        return
    if told.world_size > 1:
        warn(
            f"expected a process group, as this is {told}, got none: each rank works alone; call "
            "shardopt.comm.bootstrap.bootstrap() first, or pass process_group=MPI.COMM_WORLD",
        )


def _over(process_group: Any, limit: timedelta) -> Collectives:
    """The collectives over a process group, or none where there is nobody else."""
    from shardopt.comm.torch_group import TorchCollectives

    if dist.get_world_size(process_group) == 1:
        return SoloCollectives()
    return TorchCollectives(process_group, timeout=limit)


def _over_mesh(mesh: Any, limit: timedelta) -> Collectives:
    """The collectives over a 2-D mesh, or over its row where there is nobody else."""
    column, row = mesh.get_group(0), mesh.get_group(1)
    shard, replicate = _over(row, limit), _over(column, limit)
    if replicate.world_size == 1:
        return shard
    if replicate.wire_device.type != "cpu":
        return MeshCollectives(shard, replicate)
    # Rows start in one order each: of meshes that share a column, each has a channel of its own.
    means = replicate.aside(f"means of {row.group_name}")
    return MeshCollectives(shard, replicate, means)


def _over_mpi(comm: Any, limit: timedelta) -> Collectives:
    """The collectives over a communicator, or none where there is nobody else."""
    from shardopt.comm.mpi import MpiCollectives, refuse_comm

    refuse_comm(comm)
    return SoloCollectives() if comm.size == 1 else MpiCollectives(comm, timeout=limit)
