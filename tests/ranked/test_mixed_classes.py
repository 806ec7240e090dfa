"""Groups that name their class: one optimizer, equal to one of each class side by side."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, AdamW, Muon, SparseAdam, lr_scheduler

from shardopt import ShardedOptimizer
from shardopt.errors import AgreementError, ParameterError, UnsupportedError
from tests.each_rank import mean_gradients
from tests.mixtures import (
    MUON,
    assert_same_state,
    groups_of,
    loss_of,
    make_model,
    matrices,
    mixed,
    others,
    side_by_side,
    taken_out,
    train,
)
from tests.pairs import random_gradient, random_parameters
from tests.ranks import on_ranks
from tests.twins import assert_same, assert_same_parameters


class Two:
    """A model under one optimizer of two classes, and an equal one under both classes."""

    def __init__(self, **ours):
        self.ours, self.theirs = make_model(), make_model()
        self.optimizer, self.plain = mixed(self.ours, **ours), side_by_side(self.theirs)
        self.num_steps = 0

    def train(self, steps: int):
        last = self.num_steps + steps
        train(self.ours, self.optimizer, first=self.num_steps, last=last)
        train(self.theirs, *self.plain.values(), first=self.num_steps, last=last)
        self.num_steps = last
        return self.assert_same()

    def assert_same(self):
        assert_same_parameters(self.ours, self.theirs)
        assert_same_state(self.optimizer, self.plain)
        return self


def step_all(ours, theirs, optimizers, steps):
    """Steps of all on equal gradients of both."""
    for step in range(steps):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad = random_gradient(one, 10 * step + index)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("gradients", ["replicated", "local", "sharded"])
def test_equals_the_classes_side_by_side(gradients, world_size, rank):
    two = Two(gradients=gradients)
    if gradients == "replicated":
        two.train(4)
    else:
        train(two.ours, two.optimizer, first=0, last=4, rank=rank)
        for step in range(4):
            means = mean_gradients(two.theirs, step, world_size, loss_of)
            for parameter, mean in zip(two.theirs.parameters(), means, strict=True):
                parameter.grad = mean
            for optimizer in two.plain.values():
                optimizer.step()
        two.assert_same()
    layout = two.optimizer._shard.layout
    held = layout.numel(rank)
    assert 0 < held < sum(p.numel() for p in two.ours.parameters()) or world_size == 1
    assert {bucket.atom.value for bucket in layout.buckets} == {"element", "tensor"}


@on_ranks(2)
def test_a_group_has_the_options_of_its_class_and_no_others():
    groups = mixed(make_model()).param_groups
    plain = side_by_side(make_model())
    for group, theirs in (
        (groups[1], plain[Muon].param_groups[0]),
        (groups[2], plain[AdamW].param_groups[1]),
    ):
        expected = dict(theirs)
        named = {"optimizer_class": "torch.optim.Muon"} if group is groups[1] else {}
        ours = {key: value for key, value in group.items() if key != "optimizer_class"}
        assert group | named == group
        assert list(ours) == list(expected)
        assert_same({**ours, "params": None}, {**expected, "params": None})
    assert groups[1]["weight_decay"] == 0.1 and groups[2]["weight_decay"] == 0.2


@on_ranks(2)
def test_a_group_may_name_the_main_class_and_then_has_its_defaults():
    parameters, twins = random_parameters((70, 33), (5,)), random_parameters((70, 33), (5,))
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "optimizer_class": AdamW}]
    optimizer = ShardedOptimizer(groups, AdamW, lr=0.5, kernel="torch")
    plain = [AdamW(twins[:1], lr=0.5), AdamW(twins[1:])]
    for step in range(2):
        for one, other in zip(parameters, twins, strict=True):
            one.grad = random_gradient(one, step)
            other.grad = one.grad.clone()
        for each in (optimizer, *plain):
            each.step()
    assert_same([p.detach() for p in parameters], [p.detach() for p in twins])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]


@on_ranks(2)
def test_the_groups_that_were_given_serve_again():
    model = make_model()
    groups = groups_of(model)
    ShardedOptimizer(groups, AdamW)
    assert groups[1].keys() == {"params", "optimizer_class", *MUON, "lr"}
    ShardedOptimizer(groups, AdamW)


@on_ranks(2)
def test_every_class_has_the_kernel_that_suits_it():
    model = make_model()
    optimizer = mixed(model, kernel="auto")
    assert [group.get("fused") for group in optimizer.optim.param_groups] == [True, None] * 2
    assert [group.get("fused") for group in optimizer.param_groups] == [None] * 4
    train(model, optimizer, first=0, last=2)


@on_ranks(1, 2, 3, slow=[3])
def test_three_classes_and_state_at_construction():
    """Adagrad has state before any step; Adafactor shares its buckets with Muon."""
    shapes = (70, 33), (33, 40), (2500,), (40,), (60, 40)

    def groups(parameters):
        return [
            {"params": parameters[:1], "optimizer_class": Adafactor},
            {"params": parameters[1:2], "optimizer_class": Muon},
            {"params": parameters[2:4], "optimizer_class": Adagrad, "initial_accumulator_value": 2},
            {"params": parameters[4:]},
        ]

    ours, theirs = random_parameters(*shapes), random_parameters(*shapes)
    optimizer = ShardedOptimizer(groups(ours), SGD, lr=0.1, momentum=0.9, kernel="torch")
    a, m, g, s = groups(theirs)
    plain = [
        Adafactor(a["params"]),
        Muon(m["params"]),
        Adagrad(g["params"], initial_accumulator_value=2),
        SGD(s["params"], lr=0.1, momentum=0.9),
    ]
    before = optimizer.state_dict()["state"]
    assert_same(before, {2 + i: state for i, state in plain[2].state_dict()["state"].items()})
    step_all(ours, theirs, [optimizer, *plain], 3)
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])
    optimizer.consolidate_state_dict(to=None)
    state = {}
    for optim in plain:
        state |= {len(state) + i: entry for i, entry in optim.state_dict()["state"].items()}
    assert_same(optimizer.state_dict()["state"], state)


@on_ranks(1, 2)
@pytest.mark.parametrize("gradients", ["replicated", "sharded"])
def test_a_table_cut_by_rows_beside_matrices(gradients):
    def parts():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return nn.Embedding(90, 40, sparse=True), nn.Linear(40, 70)

    (table, linear), (their_table, their_linear) = parts(), parts()
    groups = [
        {"params": linear.parameters()},
        {"params": table.parameters(), "optimizer_class": SparseAdam, "lr": 0.1},
    ]
    optimizer = ShardedOptimizer(groups, AdamW, gradients=gradients, kernel="torch")
    plain = [AdamW(their_linear.parameters()), SparseAdam(their_table.parameters(), lr=0.1)]
    for step in range(3):
        tokens = torch.randint(90, (8,), generator=torch.Generator().manual_seed(step))
        for one, other, each in ((table, linear, [optimizer]), (their_table, their_linear, plain)):
            for optim in each:
                optim.zero_grad()
            other(one(tokens)).square().sum().backward()
            for optim in each:
                optim.step()
    assert torch.equal(table.weight, their_table.weight)
    assert torch.equal(linear.weight, their_linear.weight)
    assert {bucket.atom.value for bucket in optimizer._shard.layout.buckets} == {"element", "row"}


# -- state -----------------------------------------------------------------------------------------


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("one_rank_brings", [False, True])
def test_state_is_loaded_into_the_same_classes(one_rank_brings, rank):
    two = Two().train(2)
    two.optimizer.consolidate_state_dict(to=None)
    file = io.BytesIO()
    torch.save(two.optimizer.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    model = copy.deepcopy(two.ours)
    two.ours, two.optimizer = model, mixed(model)
    if one_rank_brings:
        two.optimizer.load_state_dict(saved if rank == 0 else None, from_=0)
    else:
        two.optimizer.load_state_dict(saved)
    two.assert_same().train(2)


@on_ranks(2)
def test_each_class_loads_what_is_taken_out():
    two = Two().train(2)
    saved = two.optimizer.state_dict()
    model = copy.deepcopy(two.ours)
    muon = Muon([{"params": matrices(model)[:4]}, {"params": matrices(model)[4:]}])
    adamw = AdamW([{"params": others(model)[:1]}, {"params": others(model)[1:]}])
    muon.load_state_dict(taken_out(saved, "torch.optim.Muon"))
    adamw.load_state_dict(taken_out(saved, None))
    train(model, muon, adamw, first=2, last=4)
    two.train(2)
    assert_same_parameters(two.ours, model)


@on_ranks(1, 2, 3, slow=[3])
def test_state_of_the_classes_is_put_together():
    two = Two().train(2)
    adamw, muon = (two.plain[c].state_dict() for c in (AdamW, Muon))
    shift = len(others(two.theirs))
    for group in muon["param_groups"]:
        group["params"] = [shift + number for number in group["params"]]
        group["optimizer_class"] = "torch.optim.Muon"
    (a, b), (c, d) = adamw["param_groups"], muon["param_groups"]
    state = adamw["state"] | {shift + i: entry for i, entry in muon["state"].items()}
    model = copy.deepcopy(two.theirs)
    optimizer = mixed(model)
    optimizer.load_state_dict({"state": state, "param_groups": [a, c, b, d]})
    train(model, optimizer, first=2, last=4)
    two.train(2)
    assert_same_parameters(model, two.theirs)


@on_ranks(1, 2)
def test_state_of_another_class_is_refused():
    optimizer = mixed(make_model())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["optimizer_class"] = "torch.optim.SGD"
    expected = "optimizer_class of group 1: expected torch.optim.Muon, got torch.optim.SGD"
    with pytest.raises(ValueError, match=expected):
        optimizer.load_state_dict(saved)
    del saved["param_groups"][1]["optimizer_class"]
    with pytest.raises(ValueError, match=r"group 1: expected torch.optim.Muon, got .*AdamW"):
        optimizer.load_state_dict(saved)
    saved["param_groups"][1]["optimizer_class"] = "torch.optim.Muon"
    saved["param_groups"][0]["optimizer_class"] = "torch.optim.AdamW"  # as is left unsaid
    optimizer.load_state_dict(saved)


@on_ranks(1, 2, 3, slow=[3])
def test_distributed_checkpoint_gets_and_sets_the_state():
    two = Two().train(2)
    two.ours.zero_grad()
    saved = get_optimizer_state_dict(two.ours, two.optimizer)
    model, optimizer = copy.deepcopy((two.ours, two.optimizer))
    train(model, optimizer, first=2, last=3)
    optimizer.param_groups[1]["lr"] = 3.0
    set_optimizer_state_dict(model, optimizer, saved)
    model.load_state_dict(two.ours.state_dict())
    two.ours, two.optimizer = model, optimizer
    two.assert_same().train(2)


@on_ranks(1, 2, 3, slow=[3])
def test_a_copy_trains_on_like_the_original():
    two = Two().train(2)
    two.ours, two.optimizer = copy.deepcopy((two.ours, two.optimizer))
    two.assert_same().train(2)


# -- groups that come later ------------------------------------------------------------------------


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("main", [AdamW, Muon])
def test_a_group_of_another_class_is_added_at_any_time(main, steps):
    """To an optimizer of one class too, whose state it keeps."""
    ours, theirs = random_parameters((70, 33), (33, 40)), random_parameters((70, 33), (33, 40))
    optimizer = ShardedOptimizer(ours, main, lr=0.01, kernel="torch")
    plain = [main(theirs, lr=0.01)]
    for added in (None, Muon, Adagrad, None):
        step_all(ours, theirs, [optimizer, *plain], steps)
        assert_same([p.detach() for p in ours], [p.detach() for p in theirs])
        new, twins = random_parameters((50, 41), (9, 8)), random_parameters((50, 41), (9, 8))
        group = {"params": new}
        optimizer.add_param_group({**group, "optimizer_class": added} if added else group)
        plain.append(added(twins) if added else main(twins, lr=0.01))
        ours, theirs = ours + new, theirs + twins
    optimizer.consolidate_state_dict(to=None)
    state, shift = {}, 0
    for optim in plain:
        saved = optim.state_dict()
        state |= {shift + i: entry for i, entry in saved["state"].items()}
        shift += sum(len(group["params"]) for group in saved["param_groups"])
    assert_same(optimizer.state_dict()["state"], state)


@on_ranks(1, 2)
def test_a_refused_group_leaves_no_trace():
    two = Two().train(1)
    vector = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        two.optimizer.add_param_group({"params": [vector], "optimizer_class": Muon})
    assert len(two.optimizer.param_groups) == 4
    two.train(1)


# -- what is refused -------------------------------------------------------------------------------


@on_ranks(2)
@pytest.mark.parametrize("named", ["Muon", None, nn.Linear], ids=str)
def test_what_is_no_optimizer_class_is_refused(named):
    group = {"params": random_parameters((5, 5)), "optimizer_class": named}
    expected = r"expected a subclass of torch.optim.Optimizer, got .*; name the class itself"
    with pytest.raises(TypeError, match=expected):
        ShardedOptimizer([group], AdamW)
    optimizer = ShardedOptimizer(random_parameters((6, 6)), AdamW)
    with pytest.raises(TypeError, match=expected):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@on_ranks(1, 2)
def test_the_errors_of_a_class_come_through():
    rest = {"params": random_parameters((6, 6))}
    for options, message in (
        ({"params": random_parameters((5,))}, "Muon only supports 2D parameters"),
        ({"params": random_parameters((5, 5)), "lr": -1}, "Learning rate should be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ShardedOptimizer([rest, {**options, "optimizer_class": Muon}], AdamW)
    with pytest.raises(ValueError, match="Invalid learning rate"):  # though no group is its
        matrix = {"params": random_parameters((5, 5)), "optimizer_class": Muon}
        ShardedOptimizer([matrix], AdamW, lr=-1.0)


@on_ranks(2, 3, slow=[3])
def test_an_error_on_one_rank_is_raised_on_all(rank):
    shape = (5,) if rank == 1 else (5, 5)
    group = {"params": random_parameters(shape), "optimizer_class": Muon}
    error, message = (
        (ValueError, "Muon only supports 2D parameters")
        if rank == 1
        else (AgreementError, "rank 1 failed where this one did not: .*Muon only supports 2D")
    )
    with pytest.raises(error, match=message):
        ShardedOptimizer([group], AdamW)


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("later", [False, True])
def test_ranks_agree_on_the_class_of_a_group(rank, later):
    shapes = (5, 5), (40, 40)
    first, second = random_parameters(*shapes)
    named = Adagrad if rank == 1 else Adafactor
    group = {"params": [second], "optimizer_class": named}
    expected = "ranks differ in group 1, (optimizer_class|lr)"
    if later:
        optimizer = ShardedOptimizer([first], AdamW)
        with pytest.raises(AgreementError, match=expected):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    else:
        with pytest.raises(AgreementError, match=expected):
            ShardedOptimizer([{"params": [first]}, group], AdamW)


@on_ranks(2)
def test_lbfgs_beside_others_is_refused():
    first, second = random_parameters((5, 5), (6, 6))
    for main, named in ((AdamW, LBFGS), (LBFGS, AdamW)):
        groups = [{"params": [first]}, {"params": [second], "optimizer_class": named}]
        with pytest.raises(UnsupportedError, match="LBFGS"):
            ShardedOptimizer(groups, main)
    optimizer = ShardedOptimizer([first], AdamW)
    with pytest.raises(UnsupportedError, match="LBFGS"):
        optimizer.add_param_group({"params": [second], "optimizer_class": LBFGS})
    assert len(optimizer.param_groups) == 1


@on_ranks(1, 2)
def test_the_class_of_a_group_cannot_be_changed_by_hand():
    model = make_model()
    optimizer = mixed(model)
    optimizer.param_groups[1]["optimizer_class"] = "torch.optim.SGD"
    with pytest.raises((ParameterError, AgreementError), match="got others from group 1 on"):
        train(model, optimizer, first=0, last=1)


# -- schedulers ------------------------------------------------------------------------------------


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 2, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 1)], milestones=[2]
    ),
}


@on_ranks(2)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_every_class(name):
    two = Two()
    ours = [SCHEDULERS[name](two.optimizer)]
    theirs = [SCHEDULERS[name](optimizer) for optimizer in two.plain.values()]
    rates = set()
    for _ in range(4):
        two.train(1)
        rates.add(tuple(group["lr"] for group in two.optimizer.param_groups))
        for scheduler in ours + theirs:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len({row[0] for row in rates}) > 1 and len({row[1] for row in rates}) > 1
