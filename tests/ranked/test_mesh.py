"""A 2-D mesh: shards along one axis, replicas of them along the other."""

import copy
import time

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import SGD, AdamW

from shardopt import Guards, ShardedOptimizer
from shardopt.comm import choose_collectives
from shardopt.comm.mesh import MeshCollectives
from shardopt.errors import AgreementError, GradientError
from tests.each_rank import KINDS, loss_of, mean_gradients
from tests.pure.test_mesh_turns import RecordedCollectives
from tests.ranked.test_gradients_exceptions import Boom, fused_loss
from tests.ranked.test_traffic import Waits
from tests.ranked.test_waits import DeferredCollectives
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, make_model

SHAPES = {2: [(2, 1)], 3: [(3, 1)], 4: [(2, 2), (4, 1), (1, 4)]}


def on_mesh(model, shape, optimizer_class=AdamW, late=False, **options):
    """``late``: every communication happens at the last moment allowed."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    if late:
        shard, replicate = (DeferredCollectives(mesh.get_group(axis)) for axis in (1, 0))
        mesh = MeshCollectives(shard, replicate)
    options = {"lr": 0.01, "kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, **options}
    return ShardedOptimizer(model.parameters(), optimizer_class, mesh, **options)


def train(model, optimizer, first, last, rank):
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()


def train_twin(model, twin, first, last, world_size, clip=None):
    for step in range(first, last):
        means = mean_gradients(model, step, world_size)
        for parameter, mean in zip(model.parameters(), means, strict=True):
            parameter.grad = mean
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        twin.step()
    return norm if clip else None


def assert_close(ours, theirs):
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def assert_replicas_are_one(model):
    rows = [torch.empty(0)] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(rows, [p.detach() for p in model.parameters()])
    for row in rows:
        assert_same(row, rows[0])


@on_ranks(2, 3, 4, slow=[4])
@pytest.mark.parametrize("kind", KINDS)
def test_as_on_one_axis_within_rounding(kind, rank, world_size):
    for shape in SHAPES[world_size]:
        ours, theirs = make_model(), make_model()
        late = 1 not in shape
        optimizer = on_mesh(ours, shape, SGD, late, gradients=kind, momentum=0.9)
        twin = SGD(theirs.parameters(), lr=0.01, momentum=0.9)
        train(ours, optimizer, 0, 3, rank)
        train_twin(theirs, twin, 0, 3, world_size)
        assert_replicas_are_one(ours)
        assert_close(ours, theirs)
        assert optimizer.collectives.world_size == shape[1]
        held = sum(len(state) for state in optimizer.optim.state.values())
        assert held < sum(len(s) for s in twin.state.values()) or shape[1] == 1


@on_ranks(4, slow=[4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "all_of_them",
    ["are told", "forget and are told", "zero and are told", "try again", "go on and are told"],
)
def test_an_exception_on_one_rank_keeps_nobody_waiting(kind, all_of_them, rank, world_size):
    """Though a reduction goes on only while somebody waits for it, and there are more than two."""
    ours, theirs = make_model(), make_model()
    guards = Guards(deadline=20)
    optimizer = on_mesh(ours, (2, 2), SGD, gradients=kind, bucket_cap_mb=1e-4, guards=guards)
    twin = SGD(theirs.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        if rank == step:
            with pytest.raises(Boom):
                fused_loss(ours, step, rank).backward()
        else:
            loss_of(ours, step, rank).backward()
        if all_of_them.startswith(("forget", "zero")):
            optimizer.zero_grad(set_to_none=all_of_them.startswith("forget"))
        if all_of_them.startswith("go on"):
            with pytest.raises(GradientError, match=f"what rank {step} has is of no use"):
                optimizer.step()
        if all_of_them.endswith("are told"):
            torch.distributed.all_reduce(torch.ones(()))
        train(ours, optimizer, step, step + 1, rank)
        train_twin(theirs, twin, step, step + 1, world_size)
    assert_replicas_are_one(ours)
    assert_close(ours, theirs)


@on_ranks(4, slow=[4])
def test_replicated_gradients_are_exact():
    """Every rank brings the same: there is nothing to round."""
    ours, theirs = make_model(), make_model()
    optimizer, twin = on_mesh(ours, (2, 2)), AdamW(theirs.parameters(), lr=0.01)
    train(ours, optimizer, 0, 3, rank=7)
    train(theirs, twin, 0, 3, rank=7)
    assert_same([*ours.parameters()], [*theirs.parameters()])


@on_ranks(4, slow=[4])
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_put_together_in_every_replica_and_loaded_there(kind, rank, world_size):
    ours, theirs = make_model(), make_model()
    optimizer = on_mesh(ours, (2, 2), gradients=kind)
    train(ours, optimizer, 0, 2, rank)
    optimizer.consolidate_state_dict(to=1)
    saved = optimizer.state_dict()
    assert (len(saved["state"]) > 0) == (rank in (1, 3))
    train(ours, optimizer, 2, 4, rank)
    theirs.load_state_dict(make_model().state_dict())
    other = on_mesh(theirs, (2, 2), gradients=kind)
    train(theirs, other, 0, 2, rank)
    other.load_state_dict(AdamW(make_model().parameters(), lr=0.3).state_dict())
    other.load_state_dict(copy.deepcopy(saved) if rank in (1, 3) else None, from_=1)
    train(theirs, other, 2, 4, rank)
    assert_same([*ours.parameters()], [*theirs.parameters()])


@on_ranks(4, slow=[4])
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_counts_each_shard_once(kind, rank, world_size):
    ours, theirs = make_model(), make_model()
    optimizer = on_mesh(ours, (2, 2), SGD, gradients=kind)
    loss_of(ours, 0, rank).backward()
    norm = optimizer.clip_grad_norm_(1e-3)
    optimizer.step()
    twin = SGD(theirs.parameters(), lr=0.01)
    expected = train_twin(theirs, twin, 0, 1, world_size, clip=1e-3)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    assert_close(ours, theirs)


@on_ranks(4, slow=[4])
def test_what_one_rank_does_is_named_in_every_replica(rank):
    model = make_model()
    optimizer = on_mesh(model, (2, 2), gradients="sharded", guards=Guards(nonfinite="raise"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = loss_of(model, 0, rank)
    (loss * float("nan") if rank == 2 else loss).backward()
    with pytest.raises(GradientError, match="from rank 2 is not finite"):
        optimizer.step()
    assert_same([p.detach() for p in model.parameters()], before)
    optimizer.zero_grad()
    loss_of(model, 0, rank).backward()
    if rank == 3:
        optimizer.param_groups[0]["lr"] = 7.0
    with pytest.raises(AgreementError, match=r"group 0, lr: rank 3 has 7\.0, rank 0 has 0\.01"):
        optimizer.step()


@on_ranks(4, slow=[4])
@pytest.mark.parametrize("kind", KINDS)
def test_many_ranks_agree_by_sums_over_both_axes(kind, rank, monkeypatch):
    """Each shard counts once; what differs is named as on few ranks."""
    model, few = make_model(), make_model()
    optimizer = on_mesh(model, (2, 2), gradients=kind, guards=Guards(nonfinite="raise"))
    optimizer.collectives.gathers_up_to = 1
    other = on_mesh(few, (2, 2), gradients=kind)
    for step in range(3):
        loss_of(model, step, rank).backward()
        loss_of(few, step, rank).backward()
        with monkeypatch.context() as patch:
            if step > 0:
                patch.setattr(MeshCollectives, "all_gather_rows", None)
            norm = optimizer.clip_grad_norm_(1e9)
            optimizer.step()
        torch.testing.assert_close(norm, other.clip_grad_norm_(1e9), rtol=1e-6, atol=0)
        other.step()
        assert_same([*model.parameters()], [*few.parameters()])
    loss_of(model, 0, rank).backward()
    if rank == 3:
        optimizer.param_groups[0]["lr"] = 7.0
    with pytest.raises(AgreementError, match=r"group 0, lr: rank 3 has 7\.0, rank 0 has 0\.01"):
        optimizer.step()


@on_ranks(4, slow=[4])
def test_parameters_start_as_those_of_the_first_rank(rank):
    model, first = make_model(rank), make_model(0)
    on_mesh(model, (2, 2), late=True, gradients="local")
    assert_same([*model.parameters()], [*first.parameters()])


def on_slow_rows(is_quick):
    """A mesh of two by two: whether a rank sees its row's half end before it waits for it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    column = Waits(mesh.get_group(0), quick=True)
    row = Waits(mesh.get_group(1), quick=is_quick)
    return MeshCollectives(row, column, column.aside("means")), row, column


@on_ranks(4)
@pytest.mark.parametrize("quick", [True, False])
def test_a_local_backward_waits_for_nothing(quick, rank):
    """Although where there is room for another bucket takes two halves."""
    collectives, row, _ = on_slow_rows(quick)
    model = make_model()
    options = {"gradients": "local", "bucket_cap_mb": 1e-6}
    optimizer = ShardedOptimizer(model.parameters(), AdamW, collectives, **options)
    assert len(optimizer._shard.layout.buckets) == 6
    waits = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: waits.append(row.num_waits))
    loss_of(model, 0, rank).backward()
    assert waits == [0] * 6
    assert (row.num_started, row.num_waits) == (6, 0 if quick else 4)
    optimizer.step()


@on_ranks(4)
def test_a_mean_ends_by_itself(rank):
    mesh, out = init_device_mesh("cpu", (2, 2)), torch.zeros(2)
    mean = choose_collectives(mesh).reduce_scatter(torch.full((4,), float(rank)), [0, 2, 4], out)
    for _ in range(1000):
        if mean.is_done():
            break
        time.sleep(0.01)
    assert_same(out, torch.full((2,), 1.5))
    mean.wait()
    assert_same(out, torch.full((2,), 1.5))


@on_ranks(4)
def test_meshes_with_rows_of_their_own_have_means_of_their_own():
    """Only what starts in one line takes turns: also where another row has the same ranks."""
    mesh = init_device_mesh("cpu", (2, 2))
    column, row = mesh.get_group(0), mesh.get_group(1)
    rows = [torch.distributed.new_group(ranks) for ranks in mesh.mesh.tolist()]
    twin = rows[torch.distributed.get_rank() // 2]
    names = {"mesh_dim_names": ("replicate", "shard")}
    other = DeviceMesh.from_group([column, twin], "cpu", mesh.mesh, **names)
    ones, same, others = (choose_collectives(each) for each in (mesh, mesh, other))
    assert other.get_group(1) is not row and other.get_group(0) is column
    assert ones._means.channel is same._means.channel is not others._means.channel


@on_ranks(4, slow=[4])
def test_halves_take_turns_whoever_sees_them_end(rank, world_size):
    """Optimizers over the same mesh, where one rank of each column sees no half end by itself."""
    collectives, _, _ = on_slow_rows(rank < 2)
    ours, theirs = make_model(), make_model()
    options = {"gradients": "local", "bucket_cap_mb": 1e-6, "momentum": 0.9, "lr": 0.01}
    halves = [[*ours.parameters()][half::2] for half in range(2)]
    optimizers = [ShardedOptimizer(half, SGD, collectives, **options) for half in halves]
    twin = SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    for step in range(3):
        loss_of(ours, step, rank).backward()
        if step == 1:  # while halves are under way
            extra = torch.nn.Parameter(torch.full([7], float(rank)))
            ShardedOptimizer([extra], SGD, collectives, gradients="local")
            assert extra.eq(0).all()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    train_twin(theirs, twin, 0, 3, world_size)
    assert_replicas_are_one(ours)
    assert_close(ours, theirs)


@on_ranks(2)
def test_each_waits_on_its_own_stream_whoever_has_gone_on_with_it():
    streams = ["first"]
    row, column = RecordedCollectives(streams), RecordedCollectives(streams)
    mesh = MeshCollectives(row, column)
    first, second = (mesh.reduce_scatter(torch.zeros(4), [0, 4], torch.zeros(4)) for _ in range(2))
    assert not column.started
    second.wait()
    assert len(column.started) == 4
    streams.append("second")
    first.wait()
    assert column.started[1].waits == {"first", "second"}
