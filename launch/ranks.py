"""The processes of a run: alone, or as many as a launcher has started."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from options import Refused
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardopt.comm.bootstrap import bootstrap
from shardopt.comm.torch_group import TorchCollectives

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which rank this is, of how many, where it computes, and how long it waits for others."""

    rank: int
    world_size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        backend = f" over {dist.get_backend()}" if dist.is_initialized() else ""
        ranks = "1 process" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{ranks}{backend} on {self.device.type}"

    @property
    def process_group(self) -> TorchCollectives | None:
        """The ranks as shardopt takes them, with the time limit. Collective."""
        return None if self.world_size == 1 else TorchCollectives(timeout=self.timeout)

    def replicate(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients averaged over the ranks, and the first rank's weights.

        One rank has nothing to average.
        """
        if self.world_size == 1:
            return model
        return DistributedDataParallel(model)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, summed in their order, then divided: as shardopt does over gloo."""
        if self.world_size == 1:
            return tensor
        if tensor.is_sparse:
            return self._mean_of_rows(tensor.coalesce())
        rows = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(rows, tensor)
        total = rows[0]
        for row in rows[1:]:
            total += row
        return total / self.world_size

    def _mean_of_rows(self, tensor: Tensor) -> Tensor:
        """Of sparse tensors: the rows that any rank has."""
        has = torch.zeros(len(tensor), device=tensor.device)
        has[tensor.indices()[0]] = 1.0
        rows = self.sum(has).nonzero().T
        values = self.mean(tensor.to_dense())[rows[0]]
        return torch.sparse_coo_tensor(
            rows, values, tensor.shape, is_coalesced=True, check_invariants=False
        )

    @property
    def sums_in_rank_order(self) -> bool:
        """Whether shardopt's own means are those of :meth:`mean`, bit for bit.

        NCCL has an order of its own, which matters from three ranks on.
        """
        return self.world_size <= 2 or dist.get_backend() == "gloo"

    def from_first(self, value: T) -> T:
        """The first rank's ``value``, a small object, on every rank."""
        values: list[Any] = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def from_all(self, value: T) -> list[T]:
        """Every rank's ``value``, a small object, on every rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait_for_device(self) -> None:
        """Return when this rank's device has done what it was given; clocks need it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def start_ranks(device: str, timeout: float) -> Ranks:
    """Join the other processes, if a launcher has started any.

    Args:
        device: ``"cpu"``, ``"cuda"`` (one GPU to a rank) or ``"auto"``.
        timeout: of one communication, in seconds.
    """
    limit = timedelta(seconds=timeout)
    try:
        found = bootstrap(device, timeout=limit)
    except ValueError as problem:
        raise Refused(str(problem)) from None
    return Ranks(found.rank, found.world_size, found.device, limit)


def stop_ranks() -> None:
    """Leave the other processes; NCCL complains of those that only go."""
    if dist.is_initialized():
        dist.destroy_process_group()
