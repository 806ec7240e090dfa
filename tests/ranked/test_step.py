"""What ``step`` does beside the update: closures, hooks, options, errors, communication."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from shardopt import ShardedOptimizer
from tests.pairs import WholeAdamW, comparable, four, pair, random_gradient
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model


def sharded(parameters, optimizer_class=AdamW, **options) -> ShardedOptimizer:
    options = {"kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, "lr": 0.01, **options}
    return ShardedOptimizer(parameters, optimizer_class, **options)


# -- what it is ------------------------------------------------------------------------------------


@on_ranks(1, 2)
def test_it_is_an_optimizer_of_torch():
    trained = pair(four)
    assert isinstance(trained.optimizer, Optimizer)
    assert trained.optimizer.defaults == trained.plain.defaults
    assert trained.optimizer.step.__self__ is trained.optimizer
    assert repr(trained.optimizer) == repr(trained.plain).replace("AdamW", "ShardedOptimizer")
    assert type(trained.optimizer.optim) is AdamW


@on_ranks(1, 2, 3)
def test_state_is_true_before_there_is_any():
    """Where it is not, torch's distributed checkpoint runs a phantom step."""
    optimizer = pair(four).optimizer
    assert optimizer.state and not len(optimizer.state)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]] == {}


# -- closures --------------------------------------------------------------------------------------


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("optimizer_class", [AdamW, WholeAdamW], ids=lambda c: c.__name__)
def test_a_closure_runs_once_with_gradients_on(optimizer_class, grad_enabled):
    losses, calls = {}, []
    models = {"ours": make_model(), "theirs": make_model()}
    optimizers = {
        "ours": sharded(models["ours"].parameters(), optimizer_class),
        "theirs": optimizer_class(models["theirs"].parameters(), lr=0.01),
    }

    def closure_of(name):
        def closure():
            calls.append(name)
            assert torch.is_grad_enabled()
            optimizers[name].zero_grad()
            loss = models[name](torch.ones(3, 61)).square().mean()
            loss.backward()
            return loss

        return closure

    with torch.set_grad_enabled(grad_enabled):
        for name in models:
            losses[name] = [optimizers[name].step(closure_of(name)).item() for _ in range(3)]
    assert losses["ours"] == losses["theirs"] and len(set(losses["ours"])) == 3
    assert calls == ["ours"] * 3 + ["theirs"] * 3
    assert_same_parameters(models["ours"], models["theirs"])


@on_ranks(1, 2)
def test_a_step_without_a_closure_returns_nothing():
    trained = pair(four)
    trained.give_gradients()
    assert trained.optimizer.step() is None


@on_ranks(1, 2, 3)
def test_it_steps_under_no_grad_and_leaves_the_mode_alone():
    trained = pair(four)
    with torch.no_grad():
        trained.step()
        assert not torch.is_grad_enabled()
    trained.step()
    assert torch.is_grad_enabled()
    trained.assert_same()


# -- gradients -------------------------------------------------------------------------------------


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    trained = pair(four)
    for _ in range(2):
        trained.step()
        for parameters, optimizer in trained.both():
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all((p.grad is None) == set_to_none for p in parameters)
            assert set_to_none or not any(p.grad.any() for p in parameters)
            optimizer.step()
    trained.assert_same()


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_gradients_are_left_as_they_are(kernel):
    trained = pair(four, kernel=kernel, maximize=True, weight_decay=0.1)
    trained.give_gradients()
    grads = [parameter.grad for parameter in trained.ours]
    before = [grad.clone() for grad in grads]
    trained.optimizer.step()
    assert all(p.grad is grad for p, grad in zip(trained.ours, grads, strict=True))
    assert_same(grads, before)


@on_ranks(1, 2, 3)
def test_a_gradient_with_a_graph_is_taken():
    """As ``backward(create_graph=True)`` leaves it."""
    trained = pair(four)
    for _ in range(2):
        trained.give_gradients()
        for parameters, optimizer in trained.both():
            for parameter in parameters:
                parameter.grad = parameter.grad * parameter.detach().clone().requires_grad_()
            optimizer.step()
    trained.assert_same()


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_a_gradient_scaler_skips_steps_with_infinite_gradients(kernel):
    ours, theirs = make_model(), make_model()
    fused = {"fused": True} if kernel == "auto" else {}
    both = [
        (ours, sharded(ours.parameters(), kernel=kernel)),
        (theirs, AdamW(theirs.parameters(), lr=0.01, **fused)),
    ]
    for model, optimizer in both:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        scales = []
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((2, 61), 0.1)).square().mean()).backward()
            if step == 2:
                model[2].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [4, 8, 4, 4, 8]
    assert_same_parameters(ours, theirs)


# -- options ---------------------------------------------------------------------------------------


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_options_changed_between_steps_take_effect(kernel):
    trained = pair(four, kernel=kernel).train(1)
    changes = [
        {"lr": 0.3},
        {"betas": (0.5, 0.6)},
        {"weight_decay": 0.5},
        {"eps": 0.1, "maximize": True},
        {"lr": torch.tensor(0.02)},
    ]
    for change in changes:
        before = trained.ours[0].detach().clone()
        for _, optimizer in trained.both():
            optimizer.param_groups[0].update(change)
        trained.train(1)
        assert not torch.equal(trained.ours[0], before)


@on_ranks(1, 2, 3)
def test_a_kernel_that_the_user_chooses_later_is_taken():
    optimizer = sharded(four(), kernel="auto")
    for choice in ({"foreach": True}, {"foreach": None, "fused": False}, {"fused": None}):
        optimizer.param_groups[0].update(choice)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = random_gradient(parameter, 0)
        optimizer.step()
        chosen = {key: optimizer.optim.param_groups[0][key] for key in ("foreach", "fused")}
        auto = {"foreach": None, "fused": True}
        assert chosen == (auto if choice == {"fused": None} else {"fused": None, **choice})
        assert {key: optimizer.param_groups[0][key] for key in choice} == choice


class Counting(SGD):
    """A third-party class that writes into its groups, as schedule-free ones do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["num_calls"] = group.get("num_calls", 0) + 1
            group["lr"] *= 0.5
        return super().step(closure)


@on_ranks(1, 2, 3)
def test_what_the_class_writes_into_its_groups_comes_out():
    trained = pair(four, Counting, lambda p: [{"params": p[:1]}, {"params": p[1:], "lr": 0.1}])
    trained.train(3)
    assert [group["num_calls"] for group in trained.optimizer.param_groups] == [3, 3]
    assert [group["lr"] for group in trained.optimizer.param_groups] == [0.01 / 8, 0.1 / 8]


# -- errors ----------------------------------------------------------------------------------------


class Failing(AdamW):
    """Fails in the middle of its second step."""

    num_calls = 0

    def step(self, closure=None):
        self.num_calls += 1
        if self.num_calls == 2:
            raise ArithmeticError("no convergence")
        return super().step(closure)


@on_ranks(1, 2, 3)
def test_an_error_of_the_class_leaves_gradients_and_a_usable_optimizer():
    trained = pair(four, Failing).train(1)
    trained.give_gradients()
    before = [parameter.grad.clone() for parameter in trained.ours]
    for _, optimizer in trained.both():
        with pytest.raises(ArithmeticError, match="no convergence"):
            optimizer.step()
    assert_same([parameter.grad for parameter in trained.ours], before)
    assert all(p.grad is None for g in trained.optimizer.optim.param_groups for p in g["params"])
    trained.train(2)


@on_ranks(1, 2)
def test_an_error_of_the_closure_changes_nothing():
    trained = pair(four).train(1)
    before = copy.deepcopy(comparable(trained.optimizer.state_dict()))

    def closure():
        raise ArithmeticError("no loss")

    with pytest.raises(ArithmeticError, match="no loss"):
        trained.optimizer.step(closure)
    assert_same(comparable(trained.optimizer.state_dict()), before)
    trained.train(1)


@on_ranks(1, 2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer_class", [SGD, AdamW, Adagrad], ids=lambda c: c.__name__)
def test_auto_moves_parameters_of_16_bits_as_the_loop_does(optimizer_class, dtype):
    """torch's fused SGD leaves them where they are, on a CPU."""
    ours, theirs = (nn.Parameter(torch.ones(3000, dtype=dtype)) for _ in range(2))
    optimizer = ShardedOptimizer([ours], optimizer_class, lr=0.1)
    twin = optimizer_class([theirs], lr=0.1, foreach=False)
    for _ in range(3):
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
        optimizer.step()
        twin.step()
    assert (ours < 0.95).all()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
