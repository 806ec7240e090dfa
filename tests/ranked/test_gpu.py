"""What a GPU shows: no hidden synchronisation, several devices, where state lies.

The bodies that also run on a CPU carry ``also_on_gpu`` where they stand.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from shardopt import ShardedOptimizer
from shardopt.checkpoint import async_save, load, save
from shardopt.gradients import norms
from tests.each_rank import KINDS, batch, loss_of, mean_gradients
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


@on_ranks(1, backend="nccl")
@pytest.mark.parametrize("kind", KINDS)
def test_reducing_clipping_and_stepping_add_no_host_synchronisation(kind, device):
    model = make_model().to(device)
    optimizer = ShardedOptimizer(
        model.parameters(), AdamW, gradients=kind, bucket_cap_mb=SMALL_BUCKETS, fused=True
    )
    inputs = batch(0, 0).to(device)
    for mode in ("default", "error"):  # the first step checks more, and makes state
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(inputs).square().mean().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


class ReadsNothing(TorchDispatchMode):
    """Refuses the operators whose result depends on values, for which the host would wait."""

    READS = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.READS, func
        return func(*args, **(kwargs or {}))


@on_ranks(2, 3)
@pytest.mark.parametrize("kind", KINDS)
def test_reducing_clipping_and_stepping_read_no_value(kind, rank, monkeypatch):
    """The same without a GPU, for which this takes the CPU."""
    monkeypatch.setattr(norms, "is_host", lambda device: False)
    model = make_model()
    optimizer = ShardedOptimizer(
        model.parameters(), AdamW, gradients=kind, bucket_cap_mb=SMALL_BUCKETS, fused=True
    )
    for step, mode in enumerate((contextlib.nullcontext(), ReadsNothing())):
        with mode:
            loss_of(model, step, rank).backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()


@on_ranks(2, device="cuda")
@pytest.mark.parametrize("kind", KINDS)
def test_each_ranks_own_gradients(kind, device, rank, world_size):
    ours, theirs = make_model().to(device), make_model().to(device)
    optimizer = ShardedOptimizer(
        ours.parameters(), AdamW, gradients=kind, kernel="torch", bucket_cap_mb=SMALL_BUCKETS
    )
    twin = AdamW(theirs.parameters())

    def loss(model, step, rank):
        return model(batch(step, rank).to(device)).square().mean()

    for step in range(3):
        loss(ours, step, rank).backward()
        optimizer.step()
        for parameter, mean in zip(
            theirs.parameters(), mean_gradients(theirs, step, world_size, loss), strict=True
        ):
            parameter.grad = mean
        twin.step()
        assert_same([*ours.parameters()], [*theirs.parameters()])


@on_ranks(1, backend="nccl")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_a_bucket", [1, 2, 4])
def test_gradients_produced_on_several_streams(in_a_bucket, kind, device):
    """Each producer is waited for before a bucket is copied (DeepSpeed#8061)."""
    ours, theirs = ([nn.Parameter(torch.ones(2048, device=device)) for _ in range(4)] for _ in "12")
    options = {"bucket_cap_mb": in_a_bucket * 8192 / 2**20}
    optimizer = ShardedOptimizer(ours, SGD, gradients=kind, kernel="torch", lr=0.1, **options)
    streams = [torch.cuda.Stream() for _ in ours]
    for _ in range(3):
        losses = []
        for stream, parameter in zip(streams, ours, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
                losses.append(parameter.square().sum())
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        torch.stack(losses).sum().backward()
        optimizer.step()
    twin = SGD(theirs, lr=0.1)
    for _ in range(3):
        twin.zero_grad()
        torch.stack([parameter.square().sum() for parameter in theirs]).sum().backward()
        twin.step()
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])


@on_ranks(2, device="cuda")
def test_every_stream_waits_for_parameters_that_are_on_their_way(device):
    """Of two layers in one bucket, each runs on a stream of its own."""
    model = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(2)).to(device)
    plain = copy.deepcopy(model)
    optimizer = ShardedOptimizer(model.parameters(), SGD, gradients="local", kernel="torch", lr=0.1)
    optimizer.overlap_forward(model)
    twin = SGD(plain.parameters(), lr=0.1)
    inputs = torch.ones(4, 2048, device=device)
    streams = [torch.cuda.Stream() for _ in model]
    for _ in range(3):
        for optimizer_of, layers in ((optimizer, model), (twin, plain)):
            optimizer_of.zero_grad()
            sum(layer(inputs).square().mean() for layer in layers).backward()
            optimizer_of.step()
        outputs = []
        for stream, layer in zip(streams, model, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch.no_grad():
                outputs.append(layer(inputs))
        torch.cuda.synchronize()
        assert_same(outputs, [layer(inputs) for layer in plain])


@on_ranks(1, 2, device="cuda")
@pytest.mark.parametrize("how", [save, async_save])
def test_a_checkpoint_holds_what_was_on_the_gpu(how, device, tmp_path):
    models = [make_model(seed).to(device) for seed in (0, 0, 1)]
    saved, kept, loaded = ([*model.named_parameters()] for model in models)
    optimizers = [
        ShardedOptimizer(named, AdamW, kernel="torch", bucket_cap_mb=SMALL_BUCKETS)
        for named in (saved, kept, loaded)
    ]
    for optimizer, named in zip(optimizers[:2], (saved, kept), strict=True):
        give_gradients([parameter for _, parameter in named], seed=0)
        optimizer.step()
    written = how(tmp_path, step=1, model=models[0], optimizer=optimizers[0])
    give_gradients([parameter for _, parameter in saved], seed=1)
    optimizers[0].step()  # after the call: not what was saved
    if how is async_save:
        written.result()
    load(tmp_path, model=models[2], optimizer=optimizers[2])
    assert_same([p.detach() for _, p in loaded], [p.detach() for _, p in kept])
    for optimizer in optimizers[1:]:
        optimizer.consolidate_state_dict(to=None)
    assert_same(optimizers[2].state_dict()["state"], optimizers[1].state_dict()["state"])
