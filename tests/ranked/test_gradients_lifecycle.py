"""What ``.grad`` and the means are from backward to step: kept, added to, forgotten, copied."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from shardopt import ShardedOptimizer
from shardopt.errors import AgreementError, GradientError
from tests.ranked.test_gradients import UNUSED, Twins, every_kind, gradients_of, mean_of, random
from tests.ranks import on_ranks
from tests.twins import assert_same, assert_same_parameters, make_model


def grads(model: nn.Module) -> list:
    return [parameter.grad for parameter in model.parameters()]


def own_gradients(twins: Twins, *passes: int) -> list:
    return gradients_of(twins.theirs, twins.loss, passes, twins.rank)


@on_ranks(1, 2, 3)
@every_kind
def test_what_grad_holds(kind, rank, world_size):
    """This rank's own, or nothing; nothing after a step."""
    twins = Twins(kind, rank, world_size).build()
    for passes in [(0,), (1, 2)]:
        for number in range(len(passes)):
            twins.backward(passes[number])
            if kind == "local":
                assert_same(grads(twins.ours), own_gradients(twins, *passes[: number + 1]))
            else:
                assert grads(twins.ours) == [None] * 6
        twins.optimizer.step()
        twins.follow(*passes)
        assert grads(twins.ours) == [None] * 6


@on_ranks(1, 2, 3)
@every_kind
@pytest.mark.parametrize("pauses", ["none", "all but the last", "all", "the last"])
def test_accumulation(kind, pauses, rank, world_size):
    """Sums of what each rank has, or of means; the same whether told in advance or not."""
    twins = Twins(kind, rank, world_size).build()
    for step in range(2):
        passes = [10 * step + number for number in range(3)]
        paused = {"none": [], "all but the last": passes[:2], "all": passes, "the last": passes[2:]}
        for seed in passes:
            if seed in paused[pauses]:
                before = twins.optimizer._gradients._rounds.num_rounds
                with twins.optimizer.no_sync():
                    twins.backward(seed)
                rounds = twins.optimizer._gradients._rounds.num_rounds - before
                assert rounds == (0 if kind == "local" else 1)
            else:
                twins.backward(seed)
        twins.optimizer.step()
        twins.follow(*passes)
    twins.assert_same_state()


@on_ranks(2)
@every_kind
def test_no_sync_ends_with_an_exception_and_nests(kind, rank, world_size):
    twins = Twins(kind, rank, world_size).build()
    with pytest.raises(ZeroDivisionError), twins.optimizer.no_sync():
        with twins.optimizer.no_sync():
            twins.backward(0)
        twins.backward(1)
        raise ZeroDivisionError
    before = twins.optimizer._gradients._rounds.num_rounds
    twins.backward(2)
    assert twins.optimizer._gradients._rounds.num_rounds == before + 1
    twins.optimizer.step()
    twins.follow(0, 1, 2)


ZEROS = {
    "optimizer, None": lambda twins: twins.optimizer.zero_grad(),
    "optimizer, zeros": lambda twins: twins.optimizer.zero_grad(set_to_none=False),
    "model, None": lambda twins: twins.ours.zero_grad(),
    "model, zeros": lambda twins: twins.ours.zero_grad(set_to_none=False),
}


@on_ranks(1, 2, 3)
@every_kind
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("when", ["before backward", "after backward"])
def test_zero_grad(kind, zero, when, rank, world_size):
    """Whatever has been reduced is forgotten, whoever forgets it."""
    twins = Twins(kind, rank, world_size).build()
    for seed in range(0, 8, 4):
        if when == "after backward":
            twins.backward(seed)
        ZEROS[zero](twins)
        twins.backward(seed + 1, seed + 2)
        twins.optimizer.step()
        twins.follow(seed + 1, seed + 2)
    if when == "after backward" and zero.endswith("None"):
        twins.backward(8)
        ZEROS[zero](twins)
        twins.optimizer.step()  # nothing to do, as in torch
        assert_same_parameters(twins.ours, twins.theirs)
        twins.assert_same_state()


@on_ranks(1, 2, 3)
def test_grad_that_is_gone_is_forgotten(rank, world_size):
    """Local: all of it, or that of some parameters; set to ``None`` by hand."""
    twins = Twins("local", rank, world_size).build(optimizer_class=SGD, ours={"guards": UNUSED})
    for gone in ([0, 1, 2, 3, 4, 5], [0, 5]):
        twins.backward(1)
        for index in gone:
            list(twins.ours.parameters())[index].grad = None
        twins.optimizer.step()
        for index, (parameter, mean) in enumerate(
            zip(twins.theirs.parameters(), twins.means(1), strict=True)
        ):
            parameter.grad = None if index in gone else mean
        twins.plain.step()
        assert_same_parameters(twins.ours, twins.theirs)


@on_ranks(1, 2, 3)
def test_a_gradient_that_is_used_again_is_new(rank, world_size):
    """Local: the tensor that a step has clipped and let go of, put back by hand."""
    twins = Twins("local", rank, world_size).build(optimizer_class=SGD)
    twins.backward(0)
    before, means = grads(twins.ours), twins.means(0)
    twins.optimizer.clip_grad_norm_(1e9)
    for _ in range(2):
        for parameter, gradient in zip(twins.ours.parameters(), before, strict=True):
            parameter.grad = gradient
        twins.optimizer.step()
        for parameter, mean in zip(twins.theirs.parameters(), means, strict=True):
            parameter.grad = mean
        twins.plain.step()
    assert_same_parameters(twins.ours, twins.theirs)


@on_ranks(1, 2, 3)
def test_what_was_paused_and_forgotten_is_not_sent(rank, world_size):
    twins = Twins("local", rank, world_size).build()
    twins.backward(0)
    with twins.optimizer.no_sync():
        twins.backward(1)
    twins.optimizer.zero_grad()
    rounds = twins.optimizer._gradients._rounds.num_rounds
    twins.optimizer.step()
    assert twins.optimizer._gradients._rounds.num_rounds == rounds


@on_ranks(1, 2, 3)
@every_kind
def test_a_part_of_the_model_forgets(kind, rank, world_size):
    """Where gradients are freed it is refused: what was reduced lies together."""
    twins = Twins(kind, rank, world_size).build(optimizer_class=SGD, ours={"guards": UNUSED})
    nn.Linear(2, 2).zero_grad()
    twins.ours[2].zero_grad()  # there is nothing to forget
    twins.backward(0)
    nn.Linear(2, 2).zero_grad()  # nor of those of others
    if kind == "sharded":
        words = r"'2.weight' has been reduced and freed.* Linear .* use optimizer.zero_grad\(\)"
        with pytest.raises(GradientError, match=words):
            twins.ours[2].zero_grad()
        twins.optimizer.step()
        twins.follow(0)
        return
    twins.ours[2].zero_grad()
    twins.optimizer.step()
    for parameter, mean in zip(twins.theirs.parameters(), twins.means(0), strict=True):
        parameter.grad = mean
    twins.theirs[2].zero_grad()
    twins.plain.step()
    assert_same_parameters(twins.ours, twins.theirs)


@on_ranks(1, 2, 3)
@every_kind
def test_parameters_that_nobody_else_holds_are_trained(kind):
    optimizer = ShardedOptimizer([Parameter(torch.ones(5))], SGD, gradients=kind, lr=0.5)
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    assert_same(optimizer.param_groups[0]["params"][0].detach(), torch.full((5,), 0.5))


@on_ranks(2, 3)
@every_kind
@pytest.mark.parametrize("zero", ZEROS)
def test_forgotten_on_one_rank_only(kind, zero, rank, world_size):
    twins = Twins(kind, rank, world_size).build(ours={"guards": UNUSED})
    twins.step(0)
    twins.backward(1)
    if rank == 1:
        ZEROS[zero](twins)
    words = r"number of backward passes before zero_grad\(\): rank 1 has 2, rank 0 has 1"
    with pytest.raises(AgreementError, match=words):
        twins.optimizer.step()
    assert_same_parameters(twins.ours, twins.theirs)
    twins.optimizer.zero_grad()
    twins.step(2)
    twins.assert_same_state()


@on_ranks(1, 2, 3)
@every_kind
@pytest.mark.parametrize("zero", [zero for zero in ZEROS if zero.endswith("zeros")])
@pytest.mark.parametrize("cap", [25.0, 1e-4])
def test_zeros_are_gradients_as_in_torch(zero, cap, kind, rank, world_size):
    """Whether what was reduced has arrived, or is on its way."""
    twins = Twins(kind, rank, world_size).build(ours={"bucket_cap_mb": cap}, weight_decay=0.1)
    twins.step(0)
    twins.backward(1)
    ZEROS[zero](twins)
    twins.optimizer.step()
    for parameter in twins.theirs.parameters():
        parameter.grad = torch.zeros_like(parameter)
    twins.plain.step()
    assert_same_parameters(twins.ours, twins.theirs)


@on_ranks(1, 2, 3)
@every_kind
def test_a_closure_is_called_once(kind, rank, world_size):
    twins = Twins(kind, rank, world_size).build()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        twins.optimizer.zero_grad()
        loss = twins.loss(twins.ours, len(calls), rank)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = twins.optimizer.step(closure)
    assert calls == [True]
    assert_same(loss.detach(), twins.loss(twins.theirs, 1, rank).detach())
    twins.follow(1)
    twins.optimizer.step(closure)
    twins.follow(2)


@on_ranks(1, 2, 3)
@every_kind
@pytest.mark.parametrize("how", ["instead", "besides", "replaced", "on one rank"])
def test_gradients_assigned_by_hand_are_this_ranks_own(kind, how, rank, world_size):
    twins = Twins(kind, rank, world_size).build(optimizer_class=SGD)
    twins.backward(0)
    first, last = twins.ours[0].weight, twins.ours[4].bias
    rows = [gradients_of(twins.theirs, twins.loss, [0], r) for r in range(world_size)]
    for r, row in enumerate(rows):
        mine = [(0, first), (5, last)] if how != "on one rank" or r == world_size - 1 else []
        for index, parameter in mine:
            given = random(*parameter.shape, seed=7, rank=r)
            if how != "instead" and kind == "local":
                given = row[index] * 2 if how == "replaced" else row[index] + given
                row[index] = given
            elif how == "instead" and kind == "local":
                row[index] = given
            else:  # there is nothing to take the place of: it is added to the mean
                row[index] = row[index] + given
            if r == rank:
                assert (parameter.grad is None) is (kind == "sharded")
                parameter.grad = given.clone()
    twins.optimizer.step()
    for parameter, mean in zip(
        twins.theirs.parameters(), map(mean_of, zip(*rows, strict=True)), strict=True
    ):
        parameter.grad = mean
    twins.plain.step()
    for ours, theirs in zip(twins.ours.parameters(), twins.theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@on_ranks(1, 2, 3)
@every_kind
@pytest.mark.parametrize("cap", [25.0, 1e-4])
def test_trainability_changes_between_steps(kind, cap, rank, world_size):
    """Frozen at first, trained later, frozen again; alone in its bucket, and not."""
    model = lambda: make_model().requires_grad_(False)  # noqa: E731
    twins = Twins(kind, rank, world_size).build(model, ours={"bucket_cap_mb": cap})
    trained = [(0, 3), (2, 3, 4), (0, 1), (0, 1, 2, 3, 4, 5), (4, 5)]
    rounds = twins.optimizer._gradients._rounds
    for number, indices in enumerate(trained):
        for network in (twins.ours, twins.theirs):
            for index, parameter in enumerate(network.parameters()):
                parameter.requires_grad_(index in indices)
        twins.step(2 * number)
        before = rounds.num_rounds
        twins.backward(2 * number + 1)
        assert rounds.num_rounds == before + 1
        twins.optimizer.step()
        assert rounds.num_rounds == before + 1  # nothing was left over
        twins.follow(2 * number + 1)
    twins.assert_same_state()


@on_ranks(1, 2, 3)
@every_kind
def test_a_group_is_added_while_training(kind, rank, world_size):
    def both(model: nn.Module, seed: int, rank: int):
        return sum(part(random(8, 61, seed=seed, rank=rank)).square().mean() for part in model)

    model = lambda: nn.ModuleList([make_model(1)])  # noqa: E731
    twins = Twins(kind, rank, world_size, both).build(model)
    twins.step(0)
    twins.backward(1)  # and then the group comes, with no gradient in this step
    for network, optimizer in [(twins.ours, twins.optimizer), (twins.theirs, twins.plain)]:
        network.append(make_model(2))
        group = {"params": list(network[1].named_parameters()), "lr": 0.1}
        optimizer.add_param_group(group)
    twins.optimizer.zero_grad()
    for seed in (2, 3):
        twins.step(seed)
    twins.assert_same_state()


@on_ranks(1, 2, 3)
@every_kind
def test_copies_train_apart(kind, rank, world_size):
    """A copy hears of its own parameters only."""
    twins = Twins(kind, rank, world_size).build()
    twins.step(0)
    copied = Twins(kind, rank, world_size)
    copied.ours, copied.optimizer = copy.deepcopy((twins.ours, twins.optimizer))
    copied.theirs, copied.plain = copy.deepcopy((twins.theirs, twins.plain))
    copied.step(1)
    twins.step(2)
    copied.step(3)
    with pytest.raises(AssertionError):
        assert_same_parameters(copied.ours, twins.ours)
    for each in (twins, copied):
        each.assert_same_state()


@on_ranks(1, 2)
@every_kind
def test_constructed_anew_the_newest_optimizer_has_the_gradients(kind, rank, world_size):
    """Even while the one before is alive, as it is on some ranks until their garbage is swept."""
    twins = Twins(kind, rank, world_size).build()
    twins.step(0)
    before = twins.optimizer
    before.consolidate_state_dict(to=None)
    twins.optimizer = ShardedOptimizer(
        twins.ours.named_parameters(), AdamW, gradients=kind, kernel="torch", lr=0.01
    )
    twins.optimizer.load_state_dict(before.state_dict())
    rounds = before._gradients._rounds.num_rounds
    twins.step(1)
    twins.step(2)
    twins.assert_same_state()
    assert before._gradients._rounds.num_rounds == rounds


@on_ranks(1, 2, 3)
@every_kind
def test_absent_everywhere_is_no_step(kind, rank, world_size):
    """As in torch: no state, no step counted, and a parameter that never had one keeps none."""
    twins = Twins(kind, rank, world_size).build(ours={"guards": UNUSED})
    twins.optimizer.step()
    twins.assert_same_state()
    assert twins.plain.state_dict()["state"] == {}
    twins.step(0)
    twins.optimizer.step()
    assert_same_parameters(twins.ours, twins.theirs)
    twins.assert_same_state()


@on_ranks(2)
@every_kind
def test_backward_into_some_parameters_only(kind, rank, world_size):
    """``backward(inputs=)`` twice makes up one step's gradients."""
    twins = Twins(kind, rank, world_size).build()
    parameters = list(twins.ours.parameters())
    for inputs in (parameters[:3], parameters[3:]):
        twins.loss(twins.ours, 0, rank).backward(inputs=inputs)
    twins.optimizer.step()
    twins.follow(0)


@on_ranks(2)
@every_kind
def test_gradients_leave_when_the_optimizer_does(kind, rank, world_size):
    """Hooks do not keep it alive, and a model without it trains as before."""
    twins = Twins(kind, rank, world_size).build()
    twins.step(0)
    rounds = twins.optimizer._gradients._rounds
    alive = [Parameter(p.detach().clone()) for p in twins.ours.parameters()]
    del rounds, twins.optimizer
    gc.collect()
    twins.backward(1)
    assert all(gradient is not None for gradient in grads(twins.ours))
    assert_same([p.detach() for p in alive], [p.detach() for p in twins.ours.parameters()])
