"""What only a GPU can show: no hidden synchronisation, several devices, where state lies.

The bodies that also run on a CPU carry ``also_on_gpu`` where they stand.
"""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from shardopt import ShardedOptimizer
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, make_model


def gpu_pair(optimizer_class, device, **options):
    """A sharded and a plain optimizer over equal parameters on ``device``."""
    ours, theirs = (list(make_model().to(device).parameters()) for _ in range(2))
    optimizer = ShardedOptimizer(
        ours, optimizer_class, kernel="torch", bucket_cap_mb=SMALL_BUCKETS, **options
    )
    return ours, optimizer, theirs, optimizer_class(theirs, **options)


def give_gradients(*lists, seed):
    """Equal gradients for each list of parameters."""
    for parameters in lists:
        for number, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = grad.to(parameter.device)


@on_ranks(1, backend="nccl")
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_a_step_adds_no_host_synchronisation(options, device):
    ours, optimizer, theirs, _ = gpu_pair(AdamW, device, **options)
    give_gradients(ours, theirs, seed=0)
    optimizer.step()  # checks gradients, makes state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_ranks(2, device="cuda")
@pytest.mark.parametrize("optimizer_class", [AdamW, SGD])
def test_parameters_on_the_cpu_and_on_a_gpu(optimizer_class, device):
    ours, theirs = (
        [nn.Parameter(torch.ones(70, 60, device=place)) for place in ("cpu", device, "cpu", device)]
        for _ in range(2)
    )
    optimizer = ShardedOptimizer(ours, optimizer_class, kernel="torch", bucket_cap_mb=SMALL_BUCKETS)
    twin = optimizer_class(theirs)
    for seed in range(3):
        give_gradients(ours, theirs, seed=seed)
        optimizer.step()
        twin.step()
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])
    optimizer.consolidate_state_dict(to=None)
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, twin.state_dict()["state"][index][name].cpu())


@on_ranks(2, device="cuda")
@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {}])
def test_step_is_kept_where_the_kernel_wants_it(options, rank, device):
    """A 0-dim ``step`` forced onto the CPU breaks fused and capturable AdamW (pytorch#124133)."""
    ours, optimizer, theirs, twin = gpu_pair(AdamW, device, **options)
    give_gradients(ours, theirs, seed=0)
    optimizer.step()
    twin.step()
    optimizer.consolidate_state_dict(to=0)
    optimizer.load_state_dict(optimizer.state_dict() if rank == 0 else None, from_=0)
    where = device.type if options else "cpu"
    assert {state["step"].device.type for state in optimizer.optim.state.values()} == {where}
    give_gradients(ours, theirs, seed=1)
    optimizer.step()
    twin.step()
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])
