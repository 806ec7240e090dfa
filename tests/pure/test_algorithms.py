"""What shardopt declares of each class is what the class does; and the bank is complete."""

import inspect

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, Adam, Muon, Optimizer

from shardopt.algos import algorithm_for, register
from shardopt.layout import Atom, ParameterSpec, plan_layout
from tests.bank import (
    BANK,
    DEFAULTS,
    NO_ROWS,
    ON_CPU,
    REFUSED_ARGUMENTS,
    SECOND,
    Case,
)
from tests.bank_runs import STEPS, start

KERNELS = {"foreach", "fused", "capturable"}  # they choose how, not what
ELEMENTWISE = [cls for cls in SECOND if algorithm_for(cls).atom is Atom.ELEMENT]


def state_after_steps(case: Case, shape: tuple[int, ...]) -> dict:
    """What the plain class keeps of one parameter."""
    generator = torch.Generator().manual_seed(4)
    parameter = Parameter(torch.randn(shape, generator=generator))
    optimizer = case.optimizer_class([parameter], **case.options)
    for _ in range(3):
        parameter.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return optimizer.state[parameter]


# -- the bank ----------------------------------------------------------------------------------


def test_no_class_is_forgotten():
    public = {getattr(torch.optim, name) for name in torch.optim.__all__}
    public = {each for each in public if isinstance(each, type) and issubclass(each, Optimizer)}
    torchs = {cls for cls in SECOND if cls.__module__.startswith("torch.")}
    assert torchs == public - {Optimizer} - NO_ROWS
    assert {BANK[name].optimizer_class for name in DEFAULTS} == set(SECOND)


@pytest.mark.parametrize("optimizer_class", SECOND)
def test_no_argument_is_forgotten(optimizer_class):
    wanted = set(inspect.signature(optimizer_class).parameters) - {"params"} - REFUSED_ARGUMENTS
    rows = [row for row in BANK.values() if row.optimizer_class is optimizer_class]
    assert {key for row in rows for key in row.options} == wanted
    assert set(SECOND[optimizer_class]) <= wanted


@pytest.mark.parametrize("name", [name for name in ON_CPU if BANK[name].options])
def test_no_argument_is_given_in_vain(name):
    """Without it the training ends elsewhere, in parameters or state."""
    case = BANK[name]
    for key in set(case.options) - KERNELS:
        less = Case(case.optimizer_class, {k: v for k, v in case.options.items() if k != key})
        if not (key == "momentum" and less.options.get("nesterov")):  # which wants a momentum
            assert outcome(case) != outcome(less), key


def outcome(case: Case) -> list[list[float]]:
    """All numbers that a plain training ends with."""
    training = start(case).run("all always", 0, STEPS)
    values = [*training.parameters]
    for state in training.saved()["state"].values():
        values += state.values()
    return [value.flatten().tolist() for value in values if isinstance(value, torch.Tensor)]


# -- declarations ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", ELEMENTWISE)
def test_state_per_element_is_declared(optimizer_class):
    """Exactly the declared names have the parameter's shape in some row; all else is 0-dim."""
    algorithm, shape, seen = algorithm_for(optimizer_class), (7, 5), set()
    for case in (BANK[name] for name in ON_CPU):
        if case.optimizer_class is optimizer_class:
            tensors = {
                name: value
                for name, value in state_after_steps(case, shape).items()
                if isinstance(value, torch.Tensor)
            }
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            assert shapes == {name: algorithm.state_shape(name, shape) for name in shapes}, case
            seen |= {name for name in shapes if shapes[name] == shape}
    assert seen == algorithm.per_element


@pytest.mark.parametrize(
    "optimizer_class, shape",
    [(Muon, shape) for shape in [(7, 5), (5, 7), (1, 3)]]  # it takes matrices only
    + [(Adafactor, shape) for shape in [(7, 5), (5, 7), (1, 3), (4,), (), (2, 3, 4)]],
)
def test_state_of_whole_parameters_is_declared(optimizer_class, shape):
    """A declared shape is the true one; of what is not declared, no shape is claimed."""
    algorithm = algorithm_for(optimizer_class)
    declared = algorithm.per_element | set(algorithm.shapes or ())
    assert algorithm.atom is Atom.TENSOR
    state = state_after_steps(Case(optimizer_class, {}), shape)
    assert declared & set(state)
    for name, value in state.items():
        expected = tuple(value.shape) if name in declared else None
        assert algorithm.state_shape(name, shape) == expected, name


def test_every_declared_state_of_whole_parameters_exists():
    matrix, vector = (state_after_steps(Case(Adafactor, {}), shape) for shape in [(7, 5), (4,)])
    algorithm = algorithm_for(Adafactor)
    assert set(matrix) | set(vector) - {"step"} >= algorithm.per_element | set(algorithm.shapes)


def test_an_unknown_class_is_kept_whole_and_nothing_is_claimed_of_it():
    class Mine(Optimizer):
        pass

    algorithm = algorithm_for(Mine)
    assert (algorithm.atom, algorithm.refusal) == (Atom.TENSOR, None)
    assert algorithm.state_shape("exp_avg", (7, 5)) is None
    assert not algorithm.fused({}) and not algorithm.fused_devices


@pytest.mark.parametrize("known", ELEMENTWISE)
def test_a_subclass_is_not_its_base(known):
    """It may override ``step`` with anything, so only the class itself is cut by elements."""
    derived = type("Derived", (known,), {})
    assert algorithm_for(known).atom is Atom.ELEMENT
    assert algorithm_for(derived).atom is Atom.TENSOR
    assert algorithm_for(derived).per_element == frozenset()


# -- registering -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", [SGD([Parameter(torch.ones(1))]), "SGD", None, int, torch.nn.Module]
)
def test_only_optimizer_classes_are_registered(what):
    with pytest.raises(TypeError, match=r"expected a subclass of torch\.optim\.Optimizer, got"):
        register(what, per_element=["exp_avg"])


def test_a_class_of_torch_and_a_bare_name_are_not_registered():
    with pytest.raises(ValueError, match="got torch's AdamW, which shardopt knows"):
        register(torch.optim.AdamW, per_element=["exp_avg"])
    with pytest.raises(TypeError, match="expected a list of names, got 'exp_avg'"):
        register(Optimizer, per_element="exp_avg")


def test_a_registered_class_is_cut_by_elements():
    class Mine(Adam):
        pass

    register(Mine, per_element=["exp_avg", "exp_avg_sq"])
    algorithm = algorithm_for(Mine)
    assert algorithm.optimizer_class is Mine and algorithm.atom is Atom.ELEMENT
    assert algorithm.state_shape("exp_avg", (7, 5)) == (7, 5)
    assert algorithm.state_shape("step", (7, 5)) == ()
    assert algorithm_for(type("Derived", (Mine,), {})).atom is Atom.TENSOR


# -- costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [*ELEMENTWISE, Adafactor])
def test_cost_is_the_number_of_elements(optimizer_class):
    cost = algorithm_for(optimizer_class).cost
    assert [cost(shape) for shape in [(7, 5), (4,), (), (0, 3)]] == [35, 4, 1, 0]


def test_cost_of_muon_is_that_of_its_products():
    """Newton-Schulz multiplies (m, n) by (n, m) and (m, m) by (m, n), with m the smaller."""
    cost = algorithm_for(Muon).cost
    assert cost((64, 16)) == cost((16, 64)) == 4 * cost((16, 16))
    assert cost((32, 32)) == 8 * cost((16, 16))


def muon_layout(*shapes, world_size=2, extend=None):
    algorithm = algorithm_for(Muon)
    specs = [
        ParameterSpec(name=str(i), shape=s, dtype=torch.float32, cost=algorithm.cost(s))
        for i, s in enumerate(shapes)
    ]
    options = {"world_size": world_size, "bucket_bytes": 1 << 20, "extend": extend}
    return plan_layout(specs, algorithm.atom, **options)


def held(layout):
    return [
        {segment.parameter for bucket in layout.buckets for segment in bucket.segments(rank)}
        for rank in range(layout.world_size)
    ]


def test_matrices_of_muon_are_balanced_by_cost():
    """A square costs 4 times one of the thin ones, of which it has twice the elements."""
    shapes = [(64, 64), (64, 64), (64, 64), (64, 32), (64, 32), (64, 32), (64, 32)]
    assert held(muon_layout(*shapes)) == [{0, 2}, {1, 3, 4, 5, 6}]  # by elements one of each pair


def test_no_rank_gets_many_more_elements_than_its_share():
    """By cost alone the second rank would have all the thin ones: 8192 elements of 12288."""
    shapes = [(64, 64)] + [(64, 8)] * 16
    layout = muon_layout(*shapes)
    assert [layout.numel(rank) for rank in range(2)] == [4096 + 512, 7680]  # 1.25 of 6144


def test_a_matrix_too_large_for_any_rank_goes_to_the_one_with_the_fewest_elements():
    layout = muon_layout((64, 64), (2, 4000), (1, 10000))
    assert held(layout) == [{0, 2}, {1}]  # by cost the second would have both


def test_what_a_rank_has_already_counts_when_matrices_are_added():
    layout = muon_layout((8, 2000), (64, 64), (64, 64), world_size=3)
    assert held(layout) == [{1}, {2}, {0}]
    later = muon_layout((8, 1000), (8, 1000), world_size=3, extend=layout)
    assert [len(part) for part in held(later)] == [2, 2, 1]  # by cost the third would have both
