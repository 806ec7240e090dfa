"""Collectives over ``torch.distributed``: NCCL, gloo, or one for each device type.

Each backend gets the algorithm that is fast on it. Measured on 64 MB of fp32 over two gloo ranks:
all-gather 126 ms, the same as one broadcast to a shard 27 ms. NCCL gathers even shards in place
by one call; shards of unequal length travel as broadcasts everywhere.

gloo's reduce-scatter is an all-reduce inside (pytorch#149869; 155 ms), so there every rank sends
each shard to its owner, who sums (all-to-all, 70 ms): in rank order, which gloo's own sums are not.
16-bit gradients are reduced that way everywhere, since it sums them in fp32.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.comm.collectives import (
    DEFAULT_TIMEOUT,
    Collectives,
    Handle,
    Reduced,
    Reduction,
    Together,
    Work,
)

# torch 2.13 renamed them and warns of the old names (pytorch#186123).
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchCollectives(Collectives):
    """The ranks of a process group, on a group of shardopt's own with its own time limit.

    Args:
        process_group: whose ranks take part; ``None`` for all. Only its ranks and backend are
            used: the collectives run on a second group over the same ranks, made once for each
            ``process_group`` and time limit, so that they never pair with anyone else's.
        timeout: how long one communication may take before it raises.
        use: what for; for another use there is another channel.

    Raises:
        ValueError: this rank is not in ``process_group``.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        timeout: timedelta = DEFAULT_TIMEOUT,
        use: str = "shardopt",
    ):
        parent = dist.group.WORLD if process_group is None else process_group
        if not isinstance(parent, dist.ProcessGroup):
            raise ValueError(
                f"expected a process group with this rank in it, got {parent!r} on global rank "
                f"{dist.get_rank()}; construct the optimizer only on the ranks of its group"
            )
        self._backends = dict(
            pair.split(":") for pair in dist.get_backend_config(parent).split(",")
        )  # device type -> backend
        backend = dist.get_backend_config(parent)
        self._parent, self._timeout = parent, timeout
        # NCCL ends the process at its time limit; messages come to theirs first, and raise.
        nccl = "nccl" in self._backends.values()
        longer = max(timeout, DEFAULT_TIMEOUT) if nccl else timeout
        self._group = _own_group(parent, longer, str(backend), f"{use} buckets")
        # Small messages pass buckets by, and on a GPU they do not wait for it.
        self._messages, self._message_device = self._group, _wire_device(self._backends)
        if dist.is_gloo_available():
            self._message_device = torch.device("cpu")
            self._messages = _own_group(parent, timeout, "gloo", f"{use} messages")
        self.rank = dist.get_rank(self._group)
        self.world_size = dist.get_world_size(self._group)
        self.wire_device = _wire_device(self._backends)
        _HOLDERS.add(self)

    @property
    def channel(self) -> object:
        """Optimizers over the same ranks share a group."""
        return self._group

    def aside(self, use: str) -> TorchCollectives:
        """See the base class."""
        return TorchCollectives(self._parent, timeout=self._timeout, use=f"shardopt {use}")

    def all_gather(self, bucket: Tensor, borders: Sequence[int]) -> Work:
        """See the base class."""
        even = len({high - low for low, high in pairwise(borders)}) == 1
        if even and self._backends.get(bucket.device.type) == "nccl":
            shard = _as_bytes(bucket[borders[self.rank] : borders[self.rank + 1]])
            whole = _as_bytes(bucket)
            return _all_gather_single(whole, shard, group=self._group, async_op=True)
        return _Works(
            [
                self.broadcast(bucket[low:high], source)
                for source, (low, high) in enumerate(pairwise(borders))
                if low < high
            ]
        )

    def reduce_scatter(self, bucket: Tensor, borders: Sequence[int], out: Tensor) -> Reduction:
        """See the base class."""
        sizes = [high - low for low, high in pairwise(borders)]
        nccl = self._backends.get(bucket.device.type) == "nccl"
        if nccl and len(set(sizes)) == 1 and bucket.dtype in (torch.float32, torch.float64):
            mean = {"op": dist.ReduceOp.AVG, "group": self._group, "async_op": True}
            return Reduced(_reduce_scatter_single(out, bucket, **mean), out)
        return super().reduce_scatter(bucket, borders, out)

    def all_to_all(
        self, send: Tensor, send_sizes: Sequence[int], out: Tensor, out_sizes: Sequence[int]
    ) -> dist.Work:
        """See the base class."""
        return dist.all_to_all_single(
            _as_bytes(out),
            _as_bytes(send),
            [size * out.itemsize for size in out_sizes],
            [size * send.itemsize for size in send_sizes],
            group=self._group,
            async_op=True,
        )

    def all_gather_rows(self, row: Tensor) -> Tensor:
        """See the base class."""
        row = row.detach().to(self._message_device).contiguous()
        rows = row.new_empty(self.world_size, row.numel())
        dist.all_gather(list(rows.unbind()), row, group=self._messages)
        return rows.cpu()

    def sum_rows(self, row: Tensor) -> Tensor:
        """See the base class. One rank adds up an element, and all get it from there."""
        total = row.detach().to(self._message_device, copy=True).contiguous()
        dist.all_reduce(total, group=self._messages)
        return total.cpu()

    def broadcast(self, tensor: Tensor, source: int) -> dist.Work:
        """See the base class."""
        data = _as_bytes(tensor)
        return dist.broadcast(data, group=self._group, group_src=source, async_op=True)

    def send(self, tensor: Tensor, to: int) -> Handle:
        """See the base class."""
        return _started(dist.isend(_as_bytes(tensor), group=self._group, group_dst=to))

    def receive(self, tensor: Tensor, source: int) -> Handle:
        """See the base class."""
        return _started(dist.irecv(_as_bytes(tensor), group=self._group, group_src=source))


class _Works(Together):
    def __init__(self, works: Sequence[dist.Work]):
        super().__init__(works)
        self._works = works

    def is_completed(self) -> bool:
        """Whether all have."""
        return all(work.is_completed() for work in self._works)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: every backend moves bytes, gloo not every dtype."""
    return tensor.detach().view(-1).view(torch.uint8)


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "only ranks of the group communicate in it"
    return work


# Torch's own registry holds a group until ``destroy_process_group``, and here none outlives that.
_OWN_GROUPS: WeakKeyDictionary[
    dist.ProcessGroup, WeakValueDictionary[tuple[timedelta, str], dist.ProcessGroup]
] = WeakKeyDictionary()
_HOLDERS: WeakSet[TorchCollectives] = WeakSet()


@atexit.register
def _let_go() -> None:
    """End destroyed groups while the interpreter still lends its lock to other threads.

    Freed later, a group waits for its threads, one of which may want that lock to let go of a
    tensor: Python then ends the thread, and C++ the process (SIGABRT, "terminate called without an
    active exception").
    """
    for holder in _HOLDERS:
        del holder._parent, holder._group, holder._messages


def _own_group(
    parent: dist.ProcessGroup, timeout: timedelta, backend: str, use: str
) -> dist.ProcessGroup:
    """Another group over ``parent``'s ranks; one for all optimizers over the same ranks.

    Communicators cost memory on a GPU, and a group lives until it is destroyed.
    """
    groups = _OWN_GROUPS.setdefault(parent, WeakValueDictionary())
    group = groups.get((timeout, use))
    if group is None:
        ranks = dist.get_process_group_ranks(parent)
        everyone = len(ranks) == dist.get_world_size()
        if not everyone:
            _know_equally_many_groups(parent)
        groups[timeout, use] = group = dist.new_group(
            ranks,
            timeout=timeout,
            backend=backend,
            use_local_synchronization=not everyone,
            group_desc=use,
        )
    return group


def _know_equally_many_groups(parent: dist.ProcessGroup) -> None:
    """Let every rank of ``parent`` know as many groups as the one that knows most.

    ``new_group(use_local_synchronization=True)`` needs only the ranks of the new group, but names
    it after the number of groups that this rank knows (torch 2.13, ``_hash_ranks_to_str``): ranks
    that differ in it wait for one another under two names, for ever. A group of this rank alone
    makes up for one that others know.
    """
    known = len(dist.distributed_c10d._world.pg_names)
    counts: list[int] = [0] * dist.get_world_size(parent)
    dist.all_gather_object(counts, known, group=parent)
    for _ in range(max(counts) - known):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _wire_device(backends: dict[str, str]) -> torch.device:
    if "cpu" in backends:
        return torch.device("cpu")
    device_type = next(iter(backends))
    return torch.device(device_type, torch.get_device_module(device_type).current_device())
