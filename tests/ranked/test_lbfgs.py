"""LBFGS on shards is torch's: whole optimisations, as many evaluations, the same errors."""

import copy
import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Parameter
from torch.optim import LBFGS
from torch.optim.lr_scheduler import StepLR
from torch.utils._pytree import tree_leaves

from shardopt import Guards, ShardedOptimizer, evaluation
from shardopt.algos import algorithm_for
from shardopt.errors import AgreementError, GradientError, UnsupportedError
from shardopt.guard import fingerprint
from tests.each_rank import loss_of
from tests.pairs import random_parameters
from tests.ranked.test_waits import DeferredCollectives
from tests.ranks import on_ranks
from tests.searches import Digits, Mixed, Network, Rosenbrock, search
from tests.twins import SMALL_BUCKETS, assert_same, make_model

pytestmark = pytest.mark.slow  # an iteration has many small messages

ALL_KINDS = ["replicated", "local", "sharded"]
FP64 = {"rtol": 1e-7, "atol": 1e-9}
FP32 = {"rtol": 1e-3, "atol": 1e-4}

OPTIONS = {
    "defaults": {},
    "lr": {"lr": 0.5},
    "lr=tensor": {"lr": torch.tensor(0.5)},
    "max_iter": {"max_iter": 7},
    "max_eval": {"max_eval": 5, "line_search_fn": "strong_wolfe"},
    "tolerance_grad": {"tolerance_grad": 0.3},
    "tolerance_change": {"tolerance_change": 1e-2},
    "history_size": {"history_size": 2},
    "line_search_fn": {"line_search_fn": "strong_wolfe"},
}


# -- numbers ---------------------------------------------------------------------------------------


@on_ranks(1)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_torchs_bit_for_bit_on_one_rank(name):
    options = {"lr": 0.1, **OPTIONS[name]}
    for problem in (Network(torch.float32), Mixed()):
        running = search(problem, **options).run(2)
        assert_same(running.calls, running.plain_calls)
        assert_same(running.saved(), running.plain.state_dict())


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "defaults"])
def test_no_option_is_given_in_vain(name):
    """Without it the plain class makes other evaluations."""
    (key,) = {"lr"} if name == "lr=tensor" else {name}
    with_it = {"lr": 0.1, **OPTIONS[name]}
    ends = []
    for options in (with_it, {k: v for k, v in {**with_it}.items() if k != key} | _without(key)):
        running = search(Network(torch.float32), **options)
        running.plain.step(running.plain_closure)
        running.plain.step(running.plain_closure)
        ends.append(running.plain_calls)
    assert ends[0] != ends[1]


def _without(key):
    return {"lr": 0.1} if key == "lr" else {}


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_network_on_unequal_parts_of_the_data(kind, line_search_fn, rank, world_size):
    lr = 0.2 if line_search_fn is None else 1
    options = {"lr": lr, "line_search_fn": line_search_fn, "history_size": 10}
    rounding = FP64 if world_size > 1 else {}
    running = search(Network(), kind, rank, world_size, **options).run(2, **rounding)
    assert running.calls[-1] < 0.1 * running.calls[0]
    layout = running.optimizer._shard.layout
    held = [layout.numel(each) for each in range(world_size)]
    assert sum(held) == 5322 and (max(held) < 5322 or world_size == 1)  # not vacuous


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_rosenbrock_to_its_end(line_search_fn, rank, world_size):
    options = {"lr": 1, "max_iter": 50} if line_search_fn else {"lr": 0.02, "max_iter": 20}
    options["line_search_fn"] = line_search_fn
    running = search(Rosenbrock(), "sharded", rank, world_size, **options)
    running.run(2, rtol=1e-5, atol=1e-6)
    if line_search_fn:
        for parameter in running.ours:
            torch.testing.assert_close(
                parameter.detach(), torch.ones_like(parameter), rtol=1e-5, atol=1e-5
            )


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kind", ["local", "sharded"])
def test_logistic_regression_on_digits(kind, rank, world_size):
    """All its parameters are on the first rank; the others have data and no element."""
    problem = Digits()
    running = search(problem, kind, rank, world_size, line_search_fn="strong_wolfe")
    running.run(2, **FP64)
    assert running.optimizer._shard.layout.numel(rank) == (650 if rank == 0 else 0)
    weight, bias = running.ours
    right = (problem.images @ weight.T + bias).argmax(dim=1) == problem.labels
    assert right.double().mean() > 0.95


@on_ranks(2, 3)
def test_mixed_complex_empty_and_zero_dimensional_parameters():
    running = search(Mixed(), lr=0.1).run(3, **FP32)
    assert running.optimizer.state[running.ours[0]]["d"].dtype == torch.float64


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_are_rounded_as_torchs(dtype):
    """The mean of equal losses, and a sum over ranks, have the dtype of the class's own."""
    running = search(Network(dtype), max_iter=6)
    loss, plain_loss = running.step()
    assert_same(loss, plain_loss)
    assert not loss.requires_grad
    (state,) = running.optimizer.optim.state.values()
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    assert len(tensors) > 5 and {tensor.dtype for tensor in tensors} == {dtype}


def one_element(loss: torch.Tensor) -> torch.Tensor:
    return loss.reshape(1)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kind", ["float", "one element"])
def test_the_loss_is_averaged_and_keeps_its_type(kind, rank, world_size):
    as_number = float if kind == "float" else one_element
    parameter = Parameter(torch.ones(3000))
    optimizer = ShardedOptimizer([parameter], LBFGS, gradients="local", max_iter=1)

    def closure():
        optimizer.zero_grad()
        loss = (parameter * (rank + 1)).mean()
        loss.backward()
        return as_number(loss.detach())

    mean = (world_size + 1) / 2
    loss = optimizer.step(closure)
    assert loss == mean and type(loss) is type(as_number(torch.tensor(mean)))


@on_ranks(2, 3)
@pytest.mark.parametrize("kind", ["local", "sharded"])
def test_everything_waits_for_what_it_uses(kind, rank, world_size):
    collectives = DeferredCollectives()
    running = search(
        Network(), kind, rank, world_size, collectives, line_search_fn="strong_wolfe", max_iter=6
    )
    running.run(2, **FP64)
    saved, theirs = running.saved(), running.plain.state_dict()
    torch.testing.assert_close(saved["state"], theirs["state"], **FP64)
    running.optimizer.load_state_dict(theirs if rank == 1 else None, from_=1)
    assert_same(running.saved(), theirs)
    running.run(1, **FP64)


@on_ranks(2, 3)
def test_a_step_waits_for_the_one_before_and_each_evaluation_for_its_place():
    """With parameters that wait in a model, where the closure takes none of them out of it."""
    problem = Network()
    running = search(problem, process_group=DeferredCollectives(), max_iter=4)
    model = torch.nn.ParameterList(running.ours)
    running.ours = [*model.parameters()]
    running.optimizer.overlap_forward(model)
    for _ in range(2):
        running.step()
        assert len(running.calls) == len(running.plain_calls)
    torch.testing.assert_close(running.calls, running.plain_calls, **FP64)
    running.optimizer.wait()
    running.assert_same(**FP64)


@on_ranks(4)
@pytest.mark.parametrize("kind", ["local", "sharded"])
def test_on_a_mesh(kind, rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    running = search(Network(), kind, rank, world_size, mesh, lr=0.2).run(2, **FP64)
    state = running.saved()["state"]
    torch.testing.assert_close(state, running.plain.state_dict()["state"], **FP64)


@on_ranks(1, 2, 3)
def test_sparse_gradients_are_made_dense_as_torch_does():
    def make():
        return [Parameter(torch.ones(500, 10)), *random_parameters((30, 40))]

    ours, theirs = make(), make()
    indices = torch.tensor([1, 3, 499])
    for parameters, optimizer in (
        (ours, ShardedOptimizer(ours, LBFGS, bucket_cap_mb=SMALL_BUCKETS, lr=0.1)),
        (theirs, LBFGS(theirs, lr=0.1)),
    ):

        def closure(parameters=parameters, optimizer=optimizer):
            optimizer.zero_grad()
            table, matrix = parameters
            rows = torch.nn.functional.embedding(indices, table, sparse=True)
            loss = rows.square().mean() + matrix.cos().mean()
            loss.backward()
            assert table.grad.is_sparse
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(ours, theirs, **FP32)


@on_ranks(1, 2)
def test_schedulers_and_overlap_go_on():
    model, twin = make_model(), make_model()
    optimizer = ShardedOptimizer(model.parameters(), LBFGS, lr=0.4, max_iter=3)
    plain = LBFGS(twin.parameters(), lr=0.4, max_iter=3)
    optimizer.overlap_forward(model)
    inputs = torch.ones(2, 61)
    for each, other in ((model, optimizer), (twin, plain)):
        scheduler = StepLR(other, 1, 0.5)

        def closure(each=each, other=other):
            other.zero_grad()
            loss = each(inputs).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            other.step(closure)
            scheduler.step()
        assert other.param_groups[0]["lr"] == 0.05
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), **FP32)


# -- errors ----------------------------------------------------------------------------------------


@on_ranks(1, 2, 3)
def test_a_step_without_a_closure_raises_torchs_error():
    running = search(Network())
    with pytest.raises(TypeError) as torchs:
        running.plain.step()
    with pytest.raises(TypeError, match=f"^{re.escape(str(torchs.value))}$"):
        running.optimizer.step()
    running.run(1, **FP64)


@on_ranks(2, 3)
def test_a_closure_that_one_rank_lacks_is_missed_on_all(rank):
    running = search(Network())
    with pytest.raises(TypeError if rank == 1 else AgreementError, match="'closure'"):
        running.optimizer.step(None if rank == 1 else running.closure)
    running.run(1, **FP64)


@on_ranks(2, 3)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_closure_that_fails_on_one_rank_fails_on_all(kind, rank, world_size):
    """At its first call nothing has changed; later, parameters are where the search is, on all."""
    running = search(Network(), kind, rank, world_size, max_iter=3).run(1, **FP64)
    for calls in (0, 2):
        before = len(running.calls)

        def closure(last=before + calls):
            if rank == 1 and len(running.calls) == last:
                raise OverflowError("too hot")
            return running.closure()

        with pytest.raises(OverflowError if rank == 1 else AgreementError, match="too hot"):
            running.optimizer.step(closure)
        assert len(running.calls) == before + calls + (rank != 1)
        prints = {"parameters": [fingerprint(parameter) for parameter in running.ours]}
        running.optimizer.agree(prints, "they are one model")
        running.optimizer.zero_grad()
        if calls == 0:
            running.calls[:] = running.plain_calls
            running.run(1, **FP64)


@on_ranks(2)
@pytest.mark.parametrize("kind", ["local", "sharded"])
def test_a_closure_of_several_passes_that_fails_on_one_rank_fails_on_all(kind, rank):
    """How many passes the others are in for is known from the step before."""
    model, fails = make_model(), False
    options = {"gradients": kind, "bucket_cap_mb": SMALL_BUCKETS, "max_iter": 2}
    optimizer = ShardedOptimizer(model.parameters(), LBFGS, **options)

    def closure():
        if fails and rank == 1:
            raise OverflowError("too hot")
        optimizer.zero_grad()
        losses = [loss_of(model, step, rank) for step in range(3)]
        for loss in losses:
            loss.backward()
        return sum(loss.detach() for loss in losses)

    optimizer.step(closure)
    fails = True
    with pytest.raises(OverflowError if rank == 1 else AgreementError, match="too hot"):
        optimizer.step(closure)
    fails = False
    optimizer.step(closure)
    optimizer.check_replicas()


@on_ranks(2, 3)
def test_another_option_on_one_rank_is_named_before_any_evaluation(rank):
    running = search(Network())
    if rank == 1:
        running.optimizer.param_groups[0]["max_iter"] = 3
    with pytest.raises(AgreementError, match="group 0, max_iter: rank 1 has 3, rank 0 has 20"):
        running.optimizer.step(running.closure)
    assert running.calls == []


@on_ranks(2, 3)
def test_gradients_that_nobody_averages_are_named(rank):
    running = search(Network())
    running.part, running.parts = rank, 2
    with pytest.raises(
        AgreementError, match=r"ranks differ in the gradient of .*all-reduce \.grad"
    ):
        running.optimizer.step(running.closure)


@on_ranks(1, 2, 3)
def test_what_is_not_finite_raises_on_every_rank(rank, world_size):
    options = {"guards": Guards(nonfinite="raise"), "gradients": "local"}
    parameter = Parameter(torch.ones(3000))
    optimizer = ShardedOptimizer([parameter], LBFGS, **options)

    def closure():
        optimizer.zero_grad()
        loss = parameter.sum() * (float("nan") if rank == world_size - 1 else 1)
        loss.backward()
        return loss

    with pytest.raises(GradientError, match="not finite"):
        optimizer.step(closure)
    assert (parameter == 1).all()
    with pytest.raises(UnsupportedError, match=r"'skip'.*LBFGS.*; use 'raise' or 'ignore'"):
        ShardedOptimizer([parameter], LBFGS, guards=Guards(nonfinite="skip"))


@on_ranks(1, 2, 3)
def test_a_second_group_is_refused_in_torchs_words():
    first, second = random_parameters((3000,), (50,))
    groups = [{"params": [first]}, {"params": [second]}]
    with pytest.raises(ValueError) as torchs:
        LBFGS(groups)
    words = f"^{re.escape(str(torchs.value))}$"
    with pytest.raises(ValueError, match=words):
        ShardedOptimizer(groups, LBFGS)
    running = search(Network())
    with pytest.raises(ValueError, match=words):
        running.optimizer.add_param_group({"params": [second]})
    assert len(running.optimizer.param_groups) == 1
    running.run(1, **FP64)


@on_ranks(1, 2)
def test_its_group_names_no_class():
    groups = [{"params": random_parameters((3000,)), "optimizer_class": LBFGS}]
    with pytest.raises(
        UnsupportedError, match=r"LBFGS has one group.*; leave out 'optimizer_class"
    ):
        ShardedOptimizer(groups, LBFGS)


@on_ranks(1, 2)
def test_a_parameter_that_is_not_contiguous_is_named():
    weight = Parameter(torch.ones(3, 4, 5, 5).to(memory_format=torch.channels_last))
    before = weight.data_ptr()
    with pytest.raises(UnsupportedError, match=r"'conv.weight': expected contiguous memory.*; use"):
        ShardedOptimizer([("conv.weight", weight)], LBFGS)
    assert weight.data_ptr() == before


def test_devices_are_named():
    parameters = [Parameter(torch.ones(3)), Parameter(torch.ones(3, device="meta"))]
    with pytest.raises(UnsupportedError, match="on one device, got cpu and meta; move"):
        evaluation.refuse([algorithm_for(LBFGS)], [{"params": parameters}], Guards())


@on_ranks(1, 2)
def test_a_class_derived_from_it_is_refused():
    class Mine(LBFGS):
        pass

    with pytest.raises(UnsupportedError, match=r"derived from LBFGS.*; use torch\.optim\.LBFGS"):
        ShardedOptimizer(random_parameters((3000,)), Mine)


# -- state -----------------------------------------------------------------------------------------


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("from_", [None, 0])
def test_state_goes_to_torch_and_back(from_, line_search_fn, rank, world_size):
    options = {"lr": 0.1, "history_size": 5, "line_search_fn": line_search_fn, "max_iter": 6}
    running = search(Network(), "local", rank, world_size, **options).run(2, **FP64)
    saved = running.saved()
    assert_same_form(saved, running.plain.state_dict())
    running.plain.load_state_dict(copy.deepcopy(saved))  # torch's keeps what it loads
    give_values(running.ours, running.theirs)
    running.run(1, **FP64)  # torch goes on from our state
    torchs = copy.deepcopy(running.plain.state_dict())
    kept = copy.deepcopy(torchs)
    fresh = search(Network(), "local", rank, world_size, **options)
    fresh.optimizer.load_state_dict(torchs if from_ is None or rank == from_ else None, from_=from_)
    assert_same(fresh.saved(), torchs)
    give_values(running.theirs, fresh.ours)
    fresh.optimizer.step(fresh.closure)  # and we from torch's
    running.plain.step(running.plain_closure)
    torch.testing.assert_close(fresh.ours, running.theirs, **FP64)
    assert_same(torchs, kept)


def give_values(given, parameters) -> None:
    for value, parameter in zip(given, parameters, strict=True):
        parameter.data.copy_(value.detach())


def assert_same_form(ours, theirs) -> None:
    """Keys in order, types, dtypes and shapes; numbers within rounding."""
    (ours_state,), (theirs_state,) = ours["state"].values(), theirs["state"].values()
    assert list(ours_state) == list(theirs_state)
    for name, value in theirs_state.items():
        other = ours_state[name]
        assert type(other) is type(value), name
        if isinstance(value, list):
            assert [type(item) for item in other] == [type(item) for item in value], name
        torch.testing.assert_close(other, value, **FP64)
    assert ours["param_groups"] == theirs["param_groups"]


@on_ranks(3)
def test_state_of_three_ranks_goes_on_on_two(rank):
    options = {"lr": 0.1, "max_iter": 6}
    running = search(Network(), **options).run(2, **FP64)
    saved = running.saved()
    group = torch.distributed.new_group([0, 1])
    if rank < 2:
        fewer = search(Network(), process_group=group, **options)
        fewer.optimizer.load_state_dict(saved if rank == 0 else None, from_=0)
        give_values(running.ours, fewer.ours)
        assert_same(fewer.saved(), saved)
        fewer.optimizer.step(fewer.closure)
    running.step()
    if rank < 2:
        torch.testing.assert_close(fewer.ours, running.ours, **FP64)


@on_ranks(1, 2, 3)
def test_mixed_state_goes_to_torch_and_back(rank):
    running = search(Mixed(), lr=0.1).run(1, **FP32)
    saved = running.saved()
    lengths = [len(saved["state"][0][name]) for name in ("d", "prev_flat_grad")]
    assert lengths == [1200 + 2 * 1300 + 1 + 1500] * 2
    running.optimizer.load_state_dict(saved if rank == 0 else None, from_=0)
    assert_same(running.saved(), saved)


@on_ranks(1, 2, 3)
def test_a_state_that_does_not_fit_is_refused_on_every_rank():
    running = search(Network(), max_iter=3).run(1, **FP64)
    good = running.saved()
    short = copy.deepcopy(good)
    short["state"][0]["old_dirs"][0] = torch.ones(7)
    with pytest.raises(ValueError, match=r"'old_dirs': expected shape \(5322,\), got \(7,\)"):
        running.optimizer.load_state_dict(short)
    other = copy.deepcopy(good)
    other["state"][2] = {"exp_avg": torch.ones(3)}
    with pytest.raises(
        ValueError, match=r"parameter 2 of .*: expected all state under the first parameter"
    ):
        running.optimizer.load_state_dict(other)
    assert_same(running.saved(), good)
    running.run(1, **FP64)


@on_ranks(2, 3)
def test_state_that_differs_between_ranks_is_never_saved(rank):
    running = search(Network(), max_iter=3).run(1, **FP64)
    if rank == 1:
        running.optimizer.state[running.ours[0]]["n_iter"] = 99
    with pytest.raises(
        AgreementError, match="state 'n_iter' of the optimizer: rank 1 has 99, rank"
    ):
        running.saved()


@on_ranks(1, 2, 3)
def test_a_copy_goes_on_by_itself():
    running = search(Network(), max_iter=3).run(1, **FP64)
    ours, optimizer = copy.deepcopy((running.ours, running.optimizer))
    twin = copy.copy(running)
    twin.ours, twin.optimizer, twin.calls = ours, optimizer, []
    before = running.saved()
    twin.optimizer.step(twin.closure)
    assert_same(running.saved(), before)
    running.step()
    assert_same([p.detach() for p in twin.ours], [p.detach() for p in running.ours])
    assert_same(twin.saved(), running.saved())


@on_ranks(1, 2, 3)
def test_the_first_parameter_shows_this_ranks_part(rank, world_size):
    running = search(Network(), max_iter=3).run(1, **FP64)
    (parameter,) = running.optimizer.state
    assert parameter is running.ours[0]
    held = running.optimizer._shard.layout.numel(rank)
    assert running.optimizer.state[parameter]["d"].shape == (held,)
    assert running.optimizer.state[running.ours[1]] == {}
    before = running.saved()["state"][0]["n_iter"]
    assert before == running.plain.state_dict()["state"][0]["n_iter"] > 0
