"""Exceptions in the middle of a backward, and gradients changed after they were sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from shardopt import Guards, ShardedOptimizer
from shardopt.errors import AgreementError, GradientError, UnsupportedError
from tests.ranked.test_gradients import Twins, every_kind, random
from tests.ranked.test_gradients_lifecycle import ZEROS
from tests.ranked.test_gradients_refused import refuses
from tests.ranks import on_ranks
from tests.twins import assert_same, assert_same_parameters, make_model


class Boom(RuntimeError):
    pass


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(context, x, blows):
        context.blows = blows
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        if context.blows:
            raise Boom
        return gradient, None


def fused_loss(model: nn.Module, seed: int, rank: int, blows: bool = True, reentrant=False):
    """Backward ends in the middle: of six parameters, two or four have their gradients."""
    x = random(8, 61, seed=seed, rank=rank).requires_grad_()
    for number, layer in enumerate(model):
        recomputed = reentrant and number < 4
        x = checkpoint(layer, x, use_reentrant=True) if recomputed else layer(x)
        if number == 1 + seed % 2:
            x = _Fuse.apply(x, blows)
    return x.square().mean()


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("cap", [25.0, 1e-4])
@pytest.mark.parametrize(
    ("kind", "zero"), [("local", "zero_grad"), ("sharded", "zero_grad"), ("sharded", "nothing")]
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_an_exception_in_backward_and_another_try(kind, cap, zero, reentrant, rank, world_size):
    """Local without ``zero_grad`` is the user's to put right: see the next test."""
    twins = Twins(kind, rank, world_size).build(ours={"bucket_cap_mb": cap})
    twins.step(0)
    for seed in (1, 2, 3):
        with pytest.raises(Boom):
            fused_loss(twins.ours, seed, rank, reentrant=reentrant).backward()
        if zero == "zero_grad":
            twins.optimizer.zero_grad()
        twins.step(seed)
    with pytest.raises(Boom):
        fused_loss(twins.ours, 4, rank, reentrant=reentrant).backward()
    twins.optimizer.zero_grad()
    twins.optimizer.step()  # nothing to do
    twins.step(5)
    twins.assert_same_state()


@on_ranks(1, 2)
def test_after_an_exception_grad_is_what_torch_leaves(rank, world_size):
    """Local: what was accumulated stays, and the next backward adds to it."""
    twins = Twins("local", rank, world_size).build()
    for network in (twins.ours, twins.theirs):
        with pytest.raises(Boom):
            fused_loss(network, 1, rank).backward()
        twins.loss(network, 2, rank).backward()
    for ours, theirs in zip(twins.ours.parameters(), twins.theirs.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad)


@on_ranks(1, 2)
def test_an_exception_spoils_what_was_accumulated(rank, world_size):
    """Sharded: a part of it may be in the mean."""
    twins = Twins("sharded", rank, world_size).build()
    twins.backward(0)
    with pytest.raises(Boom):
        fused_loss(twins.ours, 1, rank).backward()
    twins.backward(2)
    for _ in range(2):
        with refuses(GradientError, "an exception ended a backward()", "zero_grad()"):
            twins.optimizer.step()
    twins.optimizer.zero_grad()
    twins.step(3)
    twins.assert_same_state()


@on_ranks(2, 3)
@every_kind
@pytest.mark.parametrize("cap", [25.0, 1e-4])
@pytest.mark.parametrize("call", ["step", "clip_grad_norm_"])
@pytest.mark.parametrize("then", ["go on", "again", "zero_grad, again"])
def test_an_exception_on_one_rank_while_others_go_on(kind, then, call, cap, rank, world_size):
    """It is told on all, and nobody waits for ever, however many buckets there are."""
    odd = rank == world_size - 1
    ours = {"bucket_cap_mb": cap, "guards": Guards(deadline=30)}
    twins = Twins(kind, rank, world_size).build(ours=ours)
    twins.step(0)
    if odd:
        with pytest.raises(Boom):
            fused_loss(twins.ours, 1, rank).backward()
        if then.startswith("zero_grad"):
            twins.optimizer.zero_grad()
        if then != "go on":
            twins.backward(1)
    else:
        twins.backward(1)
    arguments = [1.0] if call == "clip_grad_norm_" else []
    for _ in range(2):
        with refuses(GradientError, "an exception ended a backward()", "zero_grad()"):
            getattr(twins.optimizer, call)(*arguments)
    assert_same_parameters(twins.ours, twins.theirs)
    twins.optimizer.zero_grad()
    twins.step(2)
    twins.step(3, 4)
    twins.assert_same_state()


def tell(when: str, now: str) -> None:
    """The ranks tell one another whether it went well, on the user's group, if there is one."""
    if when == now and dist.is_initialized():
        dist.all_reduce(torch.ones(()))


@on_ranks(2, 3)
@every_kind
@pytest.mark.parametrize("cap", [25.0, 1e-4])
@pytest.mark.parametrize("zero", ["optimizer, None", "model, None"])
@pytest.mark.parametrize("told", ["never", "before zero_grad", "after zero_grad"])
@pytest.mark.parametrize("call", ["nothing", "a norm"])
def test_an_exception_on_one_rank_and_another_try_on_all(
    kind, cap, zero, told, call, rank, world_size
):
    """The first other try counts, whatever ranks do to tell one another."""
    ours = {"bucket_cap_mb": cap, "guards": Guards(deadline=30)}
    twins = Twins(kind, rank, world_size).build(ours=ours)
    for seed in range(3):
        if rank == seed % world_size:
            with pytest.raises(Boom):
                fused_loss(twins.ours, seed, rank).backward()
        else:
            twins.backward(seed)
        tell(told, "before zero_grad")
        ZEROS[zero](twins)
        tell(told, "after zero_grad")
        twins.backward(seed)
        if call == "a norm":
            twins.optimizer.clip_grad_norm_(1e9)
        twins.optimizer.step()
        twins.follow(seed)
        means = twins.optimizer._gradients._rounds.means
        assert means.has_limit  # on what is under way
        assert sum(map(len, means._free.values())) <= 2
    twins.assert_same_state()


@on_ranks(2, 3)
@every_kind
def test_failing_in_turn_and_not_forgetting(kind, rank, world_size):
    """As many exceptions on each rank, and still not the same passes."""
    twins = Twins(kind, rank, world_size).build()
    for fails in (1, 0):
        if rank == fails:
            with pytest.raises(Boom):
                fused_loss(twins.ours, fails, rank).backward()
        else:
            twins.backward(fails)
        if fails == 1:
            twins.optimizer.zero_grad()
    twins.backward(2)
    with refuses(GradientError, "exception ended a backward() on rank 0 and not on rank", "zero_"):
        twins.optimizer.step()
    twins.optimizer.zero_grad()
    twins.step(3)


@on_ranks(2, 3)
@every_kind
def test_an_exception_that_all_have_got_over_is_not_told_again(kind, rank, world_size):
    """What is wrong later has another cause."""
    twins = Twins(kind, rank, world_size).build()
    if rank == 1:
        with pytest.raises(Boom):
            fused_loss(twins.ours, 0, rank).backward()
    else:
        twins.backward(0)
    twins.optimizer.zero_grad()
    twins.step(1)
    twins.backward(*[2, 3][: 1 + rank])
    with refuses(AgreementError, "number of backward passes: rank"):
        twins.optimizer.step()


@on_ranks(2, 3)
@pytest.mark.parametrize("zeros", [True, False])
def test_one_rank_adds_to_what_an_exception_has_left(zeros, rank, world_size):
    """Local: as many backward passes as the others have been through, and not the same."""
    twins = Twins("local", rank, world_size).build()
    if rank == 1:
        with pytest.raises(Boom):
            fused_loss(twins.ours, 0, rank).backward()
        if zeros:
            twins.optimizer.zero_grad()
    else:
        twins.backward(0)
    twins.backward(1)
    with refuses(GradientError, "an exception ended a backward() on rank 1 and not on rank 0"):
        twins.optimizer.step()
    twins.optimizer.zero_grad()
    twins.step(2)


# -- changed ---------------------------------------------------------------------------------------


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("who", ["all", "last"])
def test_a_gradient_changed_after_it_was_sent(who, rank, world_size):
    twins = Twins("local", rank, world_size).build()
    twins.backward(0)
    if who == "all":
        torch.nn.utils.clip_grad_norm_(twins.ours.parameters(), 1e-3)
    elif rank == world_size - 1:
        twins.ours[2].weight.grad.mul_(0.5)
    words = ("' was changed on rank 0",)
    if who == "last":
        words = ("'2.weight' was changed", f"rank {world_size - 1}")
    for _ in range(2):
        with refuses(GradientError, *words, "optimizer.clip_grad_norm_"):
            twins.optimizer.step()
    assert_same_parameters(twins.ours, twins.theirs)
    twins.optimizer.zero_grad()
    with twins.optimizer.no_sync():
        twins.backward(1)
        twins.ours[0].weight.grad.mul_(1.0)  # before it is sent, it may change
    twins.optimizer.step()
    twins.follow(1)


@on_ranks(1, 2)
@pytest.mark.parametrize("who", ["all", "last"])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_is_refused_where_gradients_are_freed(who, rank, world_size):
    """On one rank alone, too: what it owes the others it sends, bucket by bucket."""
    twins = Twins("sharded", rank, world_size).build()
    if who == "all" or rank == world_size - 1:
        with refuses(UnsupportedError, "create_graph=True", "torch.autograd.grad", "'local'"):
            twins.loss(twins.ours, 0, rank).backward(create_graph=True)
    else:
        twins.backward(0)
    if who == "last" and world_size > 1:
        with refuses(GradientError, "an exception ended a backward()"):
            twins.optimizer.step()
    twins.optimizer.zero_grad()
    twins.step(1)


@on_ranks(1, 2, 3)
@every_kind
def test_a_step_after_an_exception_that_was_not_repeated(kind, rank, world_size):
    """It would do nothing, or step on half of the gradients."""
    twins = Twins(kind, rank, world_size).build()
    with pytest.raises(Boom):
        fused_loss(twins.ours, 1, rank).backward()
    with pytest.raises(GradientError, match="was not repeated"):
        twins.optimizer.step()
    twins.optimizer.zero_grad()
    twins.step(2)


@on_ranks(1, 2, 3)
def test_a_gradient_that_comes_after_clipping_is_not_lost(rank, world_size):
    parameter = nn.Parameter(torch.zeros(3000))
    optimizer = ShardedOptimizer([parameter], SGD, lr=1.0, gradients="sharded")
    parameter.sum().backward()
    optimizer.clip_grad_value_(0.5)
    parameter.grad = torch.full((3000,), float(rank))
    optimizer.step()
    assert_same(parameter.detach(), torch.full((3000,), -0.5 - (world_size - 1) / 2))


@on_ranks(1, 2, 3)
def test_a_gradient_changed_after_clipping_is_refused(rank):
    parameter = nn.Parameter(torch.zeros(3000))
    optimizer = ShardedOptimizer([parameter], SGD, gradients="local")
    parameter.sum().backward()
    optimizer.clip_grad_norm_(1.0)
    parameter.grad.mul_(2)
    with pytest.raises(GradientError, match="was changed on rank 0 after"):
        optimizer.step()


@on_ranks(1, 2)
@every_kind
def test_a_group_added_to_a_round_that_is_open(kind, rank, world_size):
    """All of the model lies within reentrant checkpoints, so no round ends before the step."""
    model = make_model()
    optimizer = ShardedOptimizer(model.parameters(), SGD, lr=0.1, gradients=kind)
    inputs = random(8, 61, seed=0, rank=rank).requires_grad_()
    checkpoint(model, inputs, use_reentrant=True).square().mean().backward()
    added = nn.Parameter(torch.ones(7))
    optimizer.add_param_group({"params": [added]})
    loss = checkpoint(model, inputs, use_reentrant=True).square().mean() + added.sum()
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(added.detach(), torch.full((7,), 0.9))
    assert all(
        not torch.equal(p, q)
        for p, q in zip(model[0].parameters(), make_model()[0].parameters(), strict=True)
    )
