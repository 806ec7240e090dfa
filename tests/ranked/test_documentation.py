"""The documentation of torch.optim holds for ShardedOptimizer: each block, and each promise."""

import ast
import difflib
import functools
import math
import pathlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler

from shardopt import ShardedOptimizer
from shardopt.errors import ParameterError, UnsupportedError
from tests.documentation import BLOCKS, Stage, source_of, with_sharded_optimizer
from tests.ranks import on_ranks
from tests.twins import assert_same_parameters, make_model

KERNELS = {
    # kernel: the flags under which plain torch computes the same numbers bit for bit. "auto" fuses
    # Adam, but not SGD with momentum.
    "torch": {},
    "auto": {torch.optim.Adam: {"fused": True}},
}

DENSE = ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "RMSprop", "Rprop", "SGD"]
SUPPORTED = [*DENSE, "SparseAdam"]


def options_of(optimizer: torch.optim.Optimizer) -> list[dict]:
    hidden = ("params", "fused")  # "auto" never shows the flag it chooses
    return [{k: v for k, v in g.items() if k not in hidden} for g in optimizer.param_groups]


def plain(params, optimizer_class: type, **options) -> torch.optim.Optimizer:
    """The unsharded optimizer, constructed as ``ShardedOptimizer`` is."""
    return optimizer_class(params, **options)


@pytest.mark.parametrize("name", BLOCKS)
def test_only_the_constructor_line_changes(name):
    before = ast.unparse(ast.parse(source_of(name))).splitlines()
    after = with_sharded_optimizer(source_of(name)).splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    removed = [line[2:] for line in changed if line[0] == "-"]
    added = [line[2:] for line in changed if line[0] == "+"]
    assert len(removed) == len(added) >= 1
    for old, new in zip(removed, added, strict=True):
        assert "optim.SGD(" in old or "optim.Adam(" in old
        assert "ShardedOptimizer(" in new
        assert sorted(new.replace("ShardedOptimizer", "").replace(" ", "")) == sorted(
            old.replace(" ", "") + ","
        )


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, kernel):
    """The block, and then some steps of what it constructed, equal plain torch bit for bit."""
    ours = Stage(sharded=True, flags={ShardedOptimizer: {"kernel": kernel}})
    twin = Stage(sharded=False, flags=KERNELS[kernel])
    for stage in (ours, twin):
        untouched = stage.values()
        stage.run(name)
        trained_by_block = not all(map(torch.equal, untouched, stage.values()))
        assert trained_by_block == (name not in ("construct", "per-parameter options"))
        for _ in range(3):
            stage.train()
    assert list(map(options_of, ours.built)) == list(map(options_of, twin.built))
    for (our_rates, our_values), (rates, values) in zip(ours.seen, twin.seen, strict=True):
        assert our_rates == rates
        assert all(map(torch.equal, our_values, values))
    assert not torch.equal(twin.seen[0][1][-1 if name == "construct" else 0], twin.values()[0])


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize(
    "name, rates",
    [
        ("StepLR", {0: 0.05, 29: 0.05, 30: 0.005, 59: 0.005, 60: 0.0005, 89: 0.0005, 90: 0.00005}),
        ("MultiStepLR", {0: 0.05, 29: 0.05, 30: 0.005, 79: 0.005, 80: 0.0005, 99: 0.0005}),
        ("scheduler", {0: 0.05, 29: 0.05, 30: 0.005}),
    ],
)
def test_rates_are_those_of_the_comments(name, rates):
    """``# lr = 0.05 if epoch < 30`` and so on, for all groups."""
    seen = Stage(sharded=True).run(name).seen
    assert {epoch: seen[epoch][0] for epoch in rates} == {
        epoch: pytest.approx([rate, rate]) for epoch, rate in rates.items()
    }


@on_ranks(1, 2, 3, slow=[3])
def test_lambda_rates_are_the_initial_rate_times_the_function():
    """The first group's lr is 0 for 30 epochs: its parameters stand still, the second's move."""
    seen = Stage(sharded=True).run("LambdaLR").seen
    for epoch in (0, 29, 30, 60, 99):
        expected = [0.05 * (epoch // 30), 0.05 * 0.95**epoch]
        assert seen[epoch][0] == pytest.approx(expected)
    base, classifier = 0, 2
    assert torch.equal(seen[0][1][base], seen[29][1][base])
    assert not torch.equal(seen[29][1][base], seen[31][1][base])
    assert not torch.equal(seen[0][1][classifier], seen[29][1][classifier])


@on_ranks(1, 2, 3, slow=[3])
def test_group_options_override_the_keyword_arguments():
    """model.base: the default lr of 1e-2; model.classifier: 1e-3; momentum 0.9 for all."""
    optimizer = Stage(sharded=True).run("per-parameter options").built[0]
    assert [(g["lr"], g["momentum"]) for g in optimizer.param_groups] == [(1e-2, 0.9), (1e-3, 0.9)]


@on_ranks(1, 2, 3, slow=[3])
def test_a_model_that_moves_after_construction_is_named():
    """The note: ``.cuda()`` comes before. Here as ``.double()``, for want of another device."""
    stage = Stage(sharded=True).run("SGD")
    stage.model.double()
    stage.dataset = [(inputs.double(), target.double()) for inputs, target in stage.dataset]
    stage.variables = []
    with pytest.raises(ParameterError, match=r"float32 .*move the model before constructing"):
        stage.train()


@on_ranks(1, 2, 3, slow=[3])
def test_parameters_that_left_their_place_are_taken_back():
    """Consistent locations: values put into other memory are trained, not those left behind."""
    seen = []
    for sharded in (True, False):
        stage = Stage(sharded=sharded, flags={ShardedOptimizer: {"kernel": "torch"}}).run("SGD")
        for parameter in stage.model.parameters():
            parameter.data = parameter.data.clone() + 1
        stage.train()
        stage.train()
        seen.append(stage.values())
    assert all(map(torch.equal, *seen))


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("name", SUPPORTED)
def test_closure_is_called_once_and_its_loss_returned(name):
    """``step(closure)`` of each class: gradients on, one call, and the numbers of plain torch."""
    seen = []
    for construct in (ShardedOptimizer, plain):
        stage, calls = Stage(sharded=False), []
        inputs, target = stage.dataset[0]
        flags = {"kernel": "torch"} if construct is ShardedOptimizer else {}
        optimizer = construct(stage.model.parameters(), getattr(torch.optim, name), lr=0.1, **flags)

        def closure(stage=stage, optimizer=optimizer, calls=calls, inputs=inputs, target=target):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(stage.model(inputs), target)
            loss.backward()
            if name == "SparseAdam":
                for parameter in stage.model.parameters():
                    parameter.grad = parameter.grad.to_sparse(1)
            return loss

        untouched = stage.values()[0]
        losses = [optimizer.step(closure).item() for _ in range(2)]
        assert calls == [True, True]
        assert not torch.equal(stage.values()[0], untouched)
        seen.append((losses, stage.values()))
        assert optimizer.step() is None
    assert seen[0][0] == seen[1][0]
    assert all(map(torch.equal, seen[0][1], seen[1][1]))


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("name", DENSE)
def test_differentiable_is_refused(name):
    """The one option of today's torch that shards cannot have: they are detached."""
    parameter = nn.Parameter(torch.ones(3000))
    with pytest.raises(UnsupportedError, match="differentiable=True is not supported"):
        ShardedOptimizer([parameter], getattr(torch.optim, name), differentiable=True)


@on_ranks(1, 2, 3, slow=[3])
def test_state_dict_has_two_entries():
    """``state`` and ``param_groups``, which hold no tensor of the model but its index."""
    stage = Stage(sharded=True).run("SGD")
    stage.built[0].consolidate_state_dict(to=None)
    state = stage.built[0].state_dict()
    assert set(state) == {"state", "param_groups"}
    assert [group["params"] for group in state["param_groups"]] == [[0, 1, 2, 3]]
    assert {key: set(value) for key, value in state["state"].items()} == {
        index: {"momentum_buffer"} for index in range(4)
    }
    for index, parameter in enumerate(stage.model.parameters()):
        assert state["state"][index]["momentum_buffer"].shape == parameter.shape


@on_ranks(1, 2, 3, slow=[3])
def test_zero_grad_clears_all_gradients():
    stage = Stage(sharded=True).run("SGD")
    stage.built[0].zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in stage.model.parameters())
    stage.built[0].zero_grad()
    assert all(p.grad is None for p in stage.model.parameters())


@on_ranks(1, 2, 3, slow=[3])
def test_frozen_layers_join_as_training_goes_on():
    """``add_param_group`` "can be useful when fine tuning a pre-trained network"."""
    seen = []
    for construct in (ShardedOptimizer, plain):
        stage = Stage(sharded=construct is ShardedOptimizer)
        stage.model.base.requires_grad_(False)
        trainable = stage.model.classifier.parameters()
        optimizer = construct(trainable, torch.optim.SGD, lr=0.1, momentum=0.9)
        stage.built.append(optimizer)
        stage.train()
        stage.model.base.requires_grad_(True)
        optimizer.add_param_group({"params": stage.model.base.parameters(), "lr": 0.01})
        frozen = stage.values()[0]
        stage.train()
        stage.train()
        assert not torch.equal(frozen, stage.values()[0])
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
        seen.append(stage.values())
    assert all(map(torch.equal, *seen))


@on_ranks(1, 2, 3, slow=[3])
def test_parameters_without_an_order_are_refused():
    """The warning: "a deterministic ordering that is consistent between runs", so no sets.

    torch refuses a set within a group; ShardedOptimizer one in place of a list too.
    """
    for construct in (ShardedOptimizer, plain):
        with pytest.raises(TypeError, match="need to be organized in ordered collections"):
            construct([{"params": set(nn.Linear(2, 2).parameters())}], torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="need to be organized in ordered collections"):
        ShardedOptimizer(set(nn.Linear(2, 2).parameters()), torch.optim.SGD, lr=0.1)


@on_ranks(1, 2, 3, slow=[3])
def test_momentum_of_sgd_is_the_form_of_the_note():
    """v = ρ·v + g, p = p − lr·v, which parts from v = ρ·v + lr·g, p = p − v once lr changes."""
    parameter = nn.Parameter(torch.ones(3000, dtype=torch.float64))
    optimizer = ShardedOptimizer([parameter], torch.optim.SGD, lr=0.1, momentum=0.9)
    noted = sutskever = 1.0
    v = w = 0.0
    for step, lr in enumerate([0.1, 0.1, 0.01, 0.5]):
        gradient = 1.0 + step
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        v, w = 0.9 * v + gradient, 0.9 * w + lr * gradient
        noted, sutskever = noted - lr * v, sutskever - w
    assert parameter.detach().tolist() == pytest.approx([noted] * 3000, rel=1e-12)
    assert abs(noted - sutskever) > 0.1


@on_ranks(1, 2, 3, slow=[3])
def test_cosine_annealing_follows_its_formula():
    """η_t = η_min + ½ (η_max − η_min) (1 + cos(T_cur / T_max · π))."""
    parameter = nn.Parameter(torch.ones(3000))
    optimizer = ShardedOptimizer([parameter], torch.optim.SGD, lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.02)
    for epoch in range(9):
        expected = 0.02 + 0.5 * (0.1 - 0.02) * (1 + math.cos(epoch / 8 * math.pi))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()


# -- README.md -------------------------------------------------------------------------------------


def blocks_of(heading: str) -> list[str]:
    """The blocks of Python below a heading of README.md."""
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [block.split("```")[0] for block in section.split("```python\n")[1:]]


# What a way of saving takes of them, in their order.
WAYS = {"save": [0], "async_save": [0, 1], "torch.save": [0, 2]}


def test_every_block_of_the_recipe_is_tried():
    numbers = {number for way in WAYS.values() for number in way}
    assert numbers == set(range(len(blocks_of("Saving and resuming"))))


def go_on(model, optimizer, scheduler, epochs):
    for epoch in epochs:
        optimizer.zero_grad()
        model(inputs_of(epoch)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def inputs_of(epoch: int) -> torch.Tensor:
    return torch.randn(8, 61, generator=torch.Generator().manual_seed(epoch))


@on_ranks(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (1, 3), (3, 1)])
def test_saving_and_resuming(way, before, after, rank, tmp_path):
    """Interrupted after three epochs, resumed on other ranks; equal to one training in torch."""

    def recipe(num_ranks: int) -> dict:
        group = dist.new_group(range(num_ranks))
        construct = functools.partial(ShardedOptimizer, process_group=group, kernel="torch")
        names = {"make_model": make_model, "rank": rank}
        for number in WAYS[way]:
            block = blocks_of("Saving and resuming")[number]
            exec(compile(block, "README.md", "exec"), names)
        return names | {"shardopt": SimpleNamespace(ShardedOptimizer=construct), "group": group}

    path = f"{tmp_path}/saved"
    for num_ranks, epochs in ((before, range(3)), (after, range(3, 6))):
        names = recipe(num_ranks)
        if rank < num_ranks:
            names["construct"].__globals__.update(names)
            if epochs[0] == 0:
                trained = names["construct"]()
                go_on(*trained, epochs)
                saving = names["save"](path, epochs[-1], *trained)
                if way == "async_save":
                    saving.result()
            else:
                *trained, first = names["resume"](path)
                assert first == epochs[0]
                go_on(*trained, epochs)
        dist.barrier()
    if rank < after:
        model = make_model()
        plain = torch.optim.AdamW(model.parameters(), lr=3e-4)
        go_on(model, plain, lr_scheduler.CosineAnnealingLR(plain, T_max=1000), range(6))
        assert_same_parameters(trained[0], model)
        assert trained[1].param_groups[0]["lr"] == plain.param_groups[0]["lr"] < 3e-4
