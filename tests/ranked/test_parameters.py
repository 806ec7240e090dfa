"""Odd parameters: each trains bit for bit as under the plain class, on 1, 2 and 3 ranks."""

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, AdamW

from tests.pairs import WholeAdamW, four, pair, random_parameters
from tests.ranks import on_ranks

RULES = {
    "AdamW": {"optimizer_class": AdamW},
    "SGD": {"optimizer_class": SGD, "momentum": 0.9},
    "Adagrad": {"optimizer_class": Adagrad, "initial_accumulator_value": 0.1},
    "whole AdamW": {"optimizer_class": WholeAdamW},
    "fused AdamW": {"optimizer_class": AdamW, "kernel": "auto"},
}
every_rule = pytest.mark.parametrize("rule", RULES)


# -- kinds of parameters ---------------------------------------------------------------------------


def complex_ones():
    many = random_parameters((60, 40), (7,), (), dtype=torch.complex64)
    return many + random_parameters((70, 30), dtype=torch.complex128) + random_parameters((9,))


def of_four_dtypes():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    return [p for _ in range(2) for d in dtypes for p in random_parameters((70, 33), (5,), dtype=d)]


def channels_last():
    image, volume, bias = random_parameters((32, 16, 3, 3), (12, 6, 3, 3, 3), (32,))
    return [
        Parameter(image.detach().to(memory_format=torch.channels_last)),
        Parameter(volume.detach().to(memory_format=torch.channels_last_3d)),
        bias,
    ]


def transposed():
    return [Parameter(p.detach().mT) for p in random_parameters((70, 33), (3, 20, 30))]


def scalars_and_nothings():
    return random_parameters((), (0,), (2500,), (3, 0), (), (1, 1))


SHARED_OUT = [complex_ones, of_four_dtypes, channels_last, transposed, scalars_and_nothings]


@on_ranks(1, 2, 3, slow=[3])
@every_rule
@pytest.mark.parametrize("make", SHARED_OUT, ids=lambda make: make.__name__)
def test_kinds_of_parameters(rule, make):
    trained = pair(make, **RULES[rule])
    trained.assert_is_shared_out()
    before = [parameter.detach().clone() for parameter in trained.ours]
    trained.train(3)
    for parameter, old in zip(trained.ours, before, strict=True):
        assert not torch.equal(parameter, old) or parameter.numel() == 0


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "fused AdamW"])
def test_contiguous_gradients_of_channels_last_parameters(rule):
    pair(channels_last, **RULES[rule]).train(3, contiguous=True)


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("optimizer_class", [AdamW, SGD, Adagrad], ids=lambda c: c.__name__)
def test_the_fused_kernel_is_never_given_gradients_of_other_strides(optimizer_class):
    """On CPU it takes them in memory order without a look, and computes something else."""
    trained = pair(channels_last, optimizer_class, kernel="auto")
    assert trained.optimizer.optim.param_groups[0]["fused"]
    for step in range(3):
        trained.give_gradients()
        for parameter in trained.ours:
            parameter.grad = parameter.grad.contiguous()
        trained.optimizer.step()
        trained.plain.step()
        trained.num_steps = step + 1
    trained.assert_same()


@on_ranks(1, 2, 3, slow=[3])
def test_state_has_the_strides_of_its_parameter():
    trained = pair(channels_last, SGD, momentum=0.9).train(2)
    ours, theirs = trained.optimizer.state_dict(), trained.plain.state_dict()
    for index, parameter in enumerate(trained.theirs):
        strides = [s["state"][index]["momentum_buffer"].stride() for s in (ours, theirs)]
        assert strides == [parameter.stride()] * 2


@on_ranks(1, 2, 3, slow=[3])
def test_parameters_with_gaps_train_as_their_dense_copies():
    def make(dense=True):
        base = random_parameters((60, 80))[0].detach()
        return [Parameter(base[:, :50].clone() if dense else base[:, :50])]

    trained, gapped = pair(make), pair(lambda: make(dense=False))
    trained.train(2)
    for _ in range(2):
        gapped.step()
    assert not gapped.theirs[0].is_contiguous() and gapped.ours[0].is_contiguous()
    assert torch.equal(gapped.ours[0], trained.theirs[0])


@on_ranks(1, 2, 3, slow=[3])
@every_rule
@pytest.mark.parametrize("shapes", [[()], [(2,)], [(0,)], [(1,), (), (0, 2)]], ids=str)
def test_more_ranks_than_elements(rule, shapes):
    pair(lambda: random_parameters(*shapes), **RULES[rule]).train(3)


# -- presence --------------------------------------------------------------------------------------


@on_ranks(1, 2, 3, slow=[3])
@every_rule
def test_frozen_parameters_stay_as_they_are(rule):
    def make():
        parameters = four()
        for index in (0, 2):
            parameters[index].requires_grad_(False)
        return [*parameters, Parameter(torch.arange(5), requires_grad=False)]

    trained = pair(make, **RULES[rule])
    frozen = [p.detach().clone() for p in trained.ours]
    trained.train(3)
    same = [torch.equal(p, old) for p, old in zip(trained.ours, frozen, strict=True)]
    assert same == [True, False, True, False, True]


@on_ranks(1, 2, 3, slow=[3])
@every_rule
def test_unused_parameters_have_no_state(rule):
    trained = pair(four, **RULES[rule]).train(3, missing=[0, 1])
    has_state = rule == "Adagrad"  # which makes it when it is constructed
    assert [i in trained.optimizer.state_dict()["state"] for i in range(4)] == [
        has_state,
        has_state,
        True,
        True,
    ]


@on_ranks(1, 2, 3, slow=[3])
@every_rule
def test_no_gradients_at_all_change_nothing(rule):
    pair(four, **RULES[rule]).train(1).train(2, missing=range(4)).train(1)


@on_ranks(1, 2, 3, slow=[3])
@every_rule
def test_trainability_may_change_between_steps(rule):
    trained = pair(four, **RULES[rule])
    for trainable in ([0, 1], [1, 2], [], [3], [0, 1, 2, 3], [2]):
        for parameters in (trained.ours, trained.theirs):
            for index, parameter in enumerate(parameters):
                parameter.requires_grad_(index in trainable)
        trained.train(1)
    assert [p.requires_grad for p in trained.ours] == [False, False, True, False]


# -- ties ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and an output layer that are one Parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 40)
        self.hidden = nn.Linear(40, 40)
        self.output = nn.Linear(40, 50, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(self.hidden(self.embedding(tokens)).tanh())


@on_ranks(1, 2, 3, slow=[3])
@every_rule
def test_one_parameter_in_two_modules(rule):
    models = []

    def make():
        models.append(Tied())
        return list(models[-1].parameters())

    trained = pair(make, **RULES[rule])
    assert len(trained.ours) == 3
    for step in range(3):
        tokens = torch.arange(step, step + 20) % 50
        for model in models:
            model.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens).backward()
        trained.optimizer.step()
        trained.plain.step()
    trained.assert_same()
    assert models[0].output.weight is models[0].embedding.weight is trained.ours[0]


def duplicated(parameters):
    return [*parameters, parameters[0]]


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("rule", ["AdamW", "SGD", "Adagrad", "whole AdamW"])
def test_duplicates_in_a_group_are_warned_of_and_stepped_twice_as_by_torch(rule):
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters") as seen:
        trained = pair(four, arrange=duplicated, **RULES[rule])
    assert len(seen) == 2  # ours once, and the plain one
    trained.train(3)
