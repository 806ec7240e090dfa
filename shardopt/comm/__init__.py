"""Communication: the ``Collectives`` interface and what carries it out."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from shardopt.comm.collectives import Collectives
from shardopt.comm.mesh import MeshCollectives
from shardopt.comm.solo import SoloCollectives

__all__ = ["Collectives", "SoloCollectives", "choose_collectives"]


def choose_collectives(process_group: Any) -> Collectives:
    """The collectives for whatever a user passes as ``process_group``.

    Args:
        process_group: ``None`` (all ranks, or one process where no process group is initialised),
            a ``ProcessGroup``, a ``DeviceMesh`` (1-D, or 2-D: replicate x shard), or a
            ``Collectives``.

    Raises:
        TypeError: anything else.
        ValueError: a mesh of more than two dimensions, or this rank is not in the group.
    """
    if isinstance(process_group, Collectives):
        return process_group
    if not dist.is_available() or (process_group is None and not dist.is_initialized()):
        return SoloCollectives()
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(process_group, DeviceMesh):
        if process_group.ndim == 2:
            shard, replicate = (_over(process_group.get_group(axis)) for axis in (1, 0))
            return shard if replicate.world_size == 1 else MeshCollectives(shard, replicate)
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
            "process_group: expected None, a ProcessGroup, a DeviceMesh or a Collectives, got "
            f"{type(process_group).__name__}"
        )
    return _over(process_group)


def _over(process_group: Any) -> Collectives:
    """The collectives over a process group, or none where there is nobody else."""
    from shardopt.comm.torch_group import TorchCollectives

    if dist.get_world_size(process_group) == 1:
        return SoloCollectives()
    return TorchCollectives(process_group)
