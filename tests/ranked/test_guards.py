"""Every step agrees, with every kind of gradient; and copies of the parameters are compared."""

import gc
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import LBFGS, Adafactor, Adam, AdamW, SparseAdam

from shardopt import Guards, ShardedOptimizer
from shardopt.comm import board
from shardopt.errors import AgreementError, DeadlineError, ParameterError
from tests.each_rank import KINDS, loss_of
from tests.pairs import WholeAdamW
from tests.ranked.test_construction import same_on_every_rank
from tests.ranked.test_waits import DeferredCollectives
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same_parameters, make_model

ALL_KINDS = ["replicated", *KINDS]
every_kind = pytest.mark.parametrize("kind", ALL_KINDS)


class Training:
    """A model, in two groups, and its optimizer."""

    def __init__(self, kind="replicated", optimizer_class=AdamW, guards=None, **options):
        self.kind, self.model = kind, make_model()
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[2:].parameters()}]
        options = {"lr": 0.1, "bucket_cap_mb": SMALL_BUCKETS, **options}
        self.optimizer = ShardedOptimizer(
            groups, optimizer_class, gradients=kind, guards=guards, **options
        )

    def backward(self, step):
        rank = 0 if self.kind == "replicated" else dist.get_rank()
        self.optimizer.zero_grad()
        loss_of(self.model, step, rank).backward()

    def steps(self, first, last):
        for step in range(first, last):
            self.backward(step)
            self.optimizer.step()
        return self

    def assert_refused(self, match, error=AgreementError):
        """The step raises on every rank alike, and updates nothing."""
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        with pytest.raises(error, match=match) as caught:
            self.optimizer.step()
        same_on_every_rank(caught.value)
        for old, parameter in zip(before, self.model.parameters(), strict=True):
            assert torch.equal(old, parameter)


# -- the agreement of a step -----------------------------------------------------------------------


def another_lr(groups):
    groups[0]["lr"] = 7.0


def other_betas(groups):
    groups[1]["betas"] = (0.9, 0.5)


def a_group_less(groups):
    groups.pop()


def a_group_more(groups):
    groups.append({**groups[0], "params": []})


DIFFERENCES = {
    another_lr: r"group 0, lr: rank 1 has 7\.0, rank 0 has 0\.1; ",
    other_betas: r"group 1, betas: rank 1 has \(0\.9, 0\.5\), rank 0 has \(0\.9, 0\.999\); ",
    a_group_less: r"the number of groups: rank 1 has 1, rank 0 has 2; ",
    a_group_more: r"the number of groups: rank 1 has 3, rank 0 has 2; ",
}


@on_ranks(2, 3, slow=[3])
@every_kind
@pytest.mark.parametrize("change", DIFFERENCES, ids=lambda change: change.__name__)
def test_options_that_differ_are_named_at_any_step(change, kind, rank):
    trained, twin = Training(kind).steps(0, 2), Training(kind).steps(0, 3)
    trained.backward(2)
    groups = [dict(group) for group in trained.optimizer.param_groups]
    if rank == 1:
        change(trained.optimizer.param_groups)
    trained.assert_refused(DIFFERENCES[change])
    trained.optimizer.param_groups[:] = groups
    trained.backward(2)
    trained.optimizer.step()
    assert_same_parameters(trained.model, twin.model)


@on_ranks(2, 3, slow=[3])
@every_kind
def test_what_one_rank_refuses_at_a_later_step_is_told_on_all(kind, rank):
    trained = Training(kind).steps(0, 2)
    trained.backward(2)
    weight = trained.model[0].weight
    if rank == 1:
        weight.data = weight.data.double()
    expected = r"parameter 0 .*: expected .* torch.float32 on cpu as when .* got .* torch.float64"
    error = ParameterError if rank == 1 else AgreementError
    where = "" if rank == 1 else "rank 1 failed where this one did not: ParameterError: "
    with pytest.raises(error, match=f"^{where}{expected}"):
        trained.optimizer.step()


@on_ranks(2, 3, slow=[3])
def test_a_gradient_that_is_missing_at_a_later_step_is_named(rank):
    """Where each rank brings its own, ``test_gradients_refused.py`` has it."""
    trained = Training().steps(0, 2)
    trained.backward(2)
    if rank == 1:
        trained.model[2].bias.grad = None
    trained.assert_refused(r"the gradient of parameter 3 .*: rank 1 has 'none', rank 0 has 'one")


FROM_ITS_GRADIENTS = "the gradient of parameter 0 .*: rank 1 has 'one that .*', rank 0 has 'one tha"


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("odd", ["skips a step", "takes an extra step"])
def test_a_rank_that_is_a_step_apart_is_named(odd, rank):
    """By gradients of another batch; from its backward passes where each rank brings its own."""
    trained = Training().steps(0, 2)
    if rank != 1 or odd == "skips a step":
        trained.backward(2)
    if rank == 1 and odd == "skips a step":
        trained.backward(3)
    trained.assert_refused(FROM_ITS_GRADIENTS)


@on_ranks(2)
def test_gradients_may_differ_at_a_later_step_where_the_guard_is_off(rank):
    trained = Training(guards=Guards(replicas=False)).steps(0, 2)
    trained.backward(2 + rank)
    trained.optimizer.step()


# -- copies of the parameters ----------------------------------------------------------------------

NAMED = r"ranks differ in the value of parameter {}.*: rank 1 has hash \w+, rank 0 has hash \w+; {}"


def flip_a_bit(tensor, place):
    with torch.no_grad():
        tensor.view(-1).view(torch.uint8)[place] ^= 4


@on_ranks(2, 3, slow=[2])
@pytest.mark.parametrize("index", [0, 3, 5])
def test_a_flipped_bit_in_one_copy_is_found(index, rank, world_size):
    trained = Training().steps(0, 2)
    trained.optimizer.check_replicas()
    parameter = [*trained.model.parameters()][index]
    if rank == 1:
        flip_a_bit(parameter, -3)
    doubt = "of two ranks, either may be the odd one; " if world_size == 2 else "memory has changed"
    with pytest.raises(AgreementError, match=NAMED.format(index, doubt)) as caught:
        trained.optimizer.check_replicas()
    same_on_every_rank(caught.value)


@on_ranks(2, 3, slow=[3])
@every_kind
def test_a_step_looks_every_so_often(kind, rank):
    trained = Training(kind, guards=Guards(check_replicas_every=3)).steps(0, 2)
    if rank == 1:
        flip_a_bit(trained.model[4].bias, 0)
    trained.steps(2, 3)  # brings the owner's copy back, or spreads it
    trained.optimizer.check_replicas()
    trained.backward(3)
    if rank == 1:
        flip_a_bit(trained.model[4].bias, 0)
    trained.assert_refused(NAMED.format(5, ""))


@on_ranks(2)
def test_a_search_looks_too(rank):
    model = make_model()
    guards = Guards(check_replicas_every=1)
    optimizer = ShardedOptimizer(model.parameters(), LBFGS, guards=guards)
    if rank == 1:
        flip_a_bit(model[0].weight, 5)
    with pytest.raises(AgreementError, match=NAMED.format(0, "")):
        optimizer.step(lambda: loss_of(model, 0, 0))


@on_ranks(2)
def test_what_lies_between_parameters_is_nobody_s(rank):
    trained = Training().steps(0, 1)
    layout, buffers = trained.optimizer._shard.layout, trained.optimizer._shard.buffers
    for bucket, buffer in zip(layout.buckets, buffers.buckets, strict=True):
        start, _ = next(bucket.gaps)
        buffer[start] = rank
    trained.optimizer.check_replicas()
    trained.steps(1, 3)


@on_ranks(1, 2, 3, slow=[1, 2])
@pytest.mark.parametrize("optimizer_class", [AdamW, WholeAdamW, Adafactor])
@every_kind
def test_copies_are_equal_while_nothing_is_wrong(kind, optimizer_class):
    options = {"lr": 0.01, "guards": Guards(check_replicas_every=1)}
    Training(kind, optimizer_class, **options).steps(0, 3).optimizer.check_replicas()


@on_ranks(2)
def test_copies_of_all_dtypes_and_of_tables_are_compared(rank):
    dtypes = [torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool]
    parameters = [
        nn.Parameter(torch.ones(71).to(dtype), requires_grad=dtype.is_floating_point)
        for dtype in dtypes
    ]
    tables = [nn.Parameter(torch.ones(9, 7)) for _ in range(2)]
    ours = ShardedOptimizer(parameters, Adam)
    theirs = ShardedOptimizer(tables, SparseAdam)
    for optimizer, held in ((ours, parameters), (theirs, tables)):
        optimizer.check_replicas()
        for index, parameter in enumerate(held):
            if rank == 1:
                flip_a_bit(parameter.detach(), 3)
            with pytest.raises(AgreementError, match=NAMED.format(index, "")):
                optimizer.check_replicas()
            if rank == 1:
                flip_a_bit(parameter.detach(), 3)


@on_ranks(2)
def test_copies_under_way_are_waited_for():
    model = make_model()
    optimizer = ShardedOptimizer(model.parameters(), AdamW, DeferredCollectives())
    optimizer.overlap_forward(model)
    loss_of(model, 0, 0).backward()
    optimizer.step()
    optimizer.check_replicas()


@on_ranks(2)
def test_a_parameter_that_was_taken_out_is_compared(rank):
    trained = Training().steps(0, 1)
    trained.model[0].bias.data = trained.model[0].bias.data + rank
    with pytest.raises(AgreementError, match=NAMED.format(1, "")):
        trained.optimizer.check_replicas()


@on_ranks(2)
def test_a_parameter_that_cannot_be_taken_back_is_told_on_all(rank):
    trained = Training().steps(0, 1)
    if rank == 1:
        trained.model[0].bias.data = trained.model[0].bias.data.double()
    error = ParameterError if rank == 1 else AgreementError
    with pytest.raises(error, match=r"parameter 1 of .*: expected .* got .*float64"):
        trained.optimizer.check_replicas()


@on_ranks(4, slow=[4])
@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)])
def test_copies_of_all_replicas_are_compared(shape, rank):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    trained = Training("local", process_group=mesh).steps(0, 2)
    trained.optimizer.check_replicas()
    if rank == 3:
        flip_a_bit(trained.model[0].weight, 0)
    with pytest.raises(AgreementError, match=r"value of parameter 0.*: rank 3 has .*, rank 0 has "):
        trained.optimizer.check_replicas()


# -- the deadline ----------------------------------------------------------------------------------


def watching():
    return [thread for thread in threading.enumerate() if thread.name == "shardopt.watch"]


@on_ranks(2)
@pytest.mark.parametrize("has_store", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_rank_that_comes_late_is_named(has_store, rank, monkeypatch):
    """And hears itself why nobody waits for it any more."""
    with monkeypatch.context() as without_torch:
        if not has_store:
            without_torch.setattr(board.dist, "is_initialized", lambda: False)
        deadline = 0.5 + 0.01 * has_store  # another for another group
        group = dist.group.WORLD
        trained = Training(guards=Guards(deadline=deadline), process_group=group).steps(0, 2)
    for waits in (0, 1):
        if rank == waits:
            told = (
                "rank 0 has left .*, with DeadlineError: rank 0 in" if rank else "rank 1 has left"
            )
            begun = time.monotonic()
            trained.backward(2)
            with pytest.raises(
                DeadlineError, match=rf"^rank {rank} in step\(\), number 3: .*{told}"
            ):
                trained.optimizer.step()
            assert time.monotonic() - begun < deadline + 2.5
        dist.barrier()


@on_ranks(1, 2)
def test_nobody_watches_where_nobody_is_waited_for(world_size):
    gc.collect()
    before = len(watching())
    kept = [Training(), Training(guards=Guards(deadline=60.0)).steps(0, 1)]
    assert len(watching()) == before + (world_size > 1)
    del kept
    gc.collect()
    assert len(watching()) == before
