"""Parameters are views of buckets: what takes them out is undone or named, never ignored."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, AdamW

from shardopt import ShardedOptimizer
from shardopt.errors import ParameterError
from tests.pairs import WholeAdamW, pair, random_parameters
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same_parameters, make_model, train


def twins(optimizer_class=AdamW, prepare=lambda model: model):
    """A model with our optimizer, and an equal one with the plain class."""
    ours, theirs = prepare(make_model()), prepare(make_model())
    optimizer = ShardedOptimizer(
        ours.named_parameters(),
        optimizer_class,
        kernel="torch",
        bucket_cap_mb=SMALL_BUCKETS,
        lr=0.01,
    )
    return ours, optimizer, theirs, optimizer_class(theirs.parameters(), lr=0.01)


def assert_home(optimizer: ShardedOptimizer) -> None:
    """Every parameter lies in its bucket, with a storage of its own."""
    buffers, layout = optimizer._shard.buffers, optimizer._shard.layout
    for index, parameter in enumerate(buffers.parameters):
        number, slot = layout.place(index)
        bucket = buffers.buckets[number]
        assert parameter.data_ptr() == bucket.data_ptr() + slot.start * bucket.element_size()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


# -- taken back ------------------------------------------------------------------------------------


def set_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone().mul_(2)


def there_and_back_again(model):
    model.double().float()


def by_a_vector(model):
    vector_to_parameters(parameters_to_vector(model.parameters()) * 2, model.parameters())


def load(model):
    model.load_state_dict(make_model(seed=1).state_dict())


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


def swap(model):
    """What ``torch.__future__.set_swap_module_params_on_conversion`` makes of conversions."""
    gc.collect()  # a tensor that a graph still holds cannot be swapped
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, Parameter(parameter.detach().clone() * 2))


CHANGES = [set_data, there_and_back_again, by_a_vector, load, in_place, swap]


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_new_values_are_trained_on(change, steps):
    ours, optimizer, theirs, plain = twins()
    train(ours, optimizer, 0, steps)
    train(theirs, plain, 0, steps)
    for model in (ours, theirs):
        change(model)
    train(ours, optimizer, steps, steps + 3)
    train(theirs, plain, steps, steps + 3)
    assert_same_parameters(ours, theirs)
    assert_home(optimizer)


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("optimizer_class", [AdamW, WholeAdamW], ids=lambda c: c.__name__)
def test_one_parameter_that_left_is_taken_back(optimizer_class):
    ours, optimizer, theirs, plain = twins(optimizer_class)
    for step in range(4):
        for model in (ours, theirs):
            model[step % 2 * 2].weight.data = model[step % 2 * 2].weight.data.clone() + 1
        train(ours, optimizer, step, step + 1)
        train(theirs, plain, step, step + 1)
        assert_home(optimizer)
    assert_same_parameters(ours, theirs)


@on_ranks(1, 2, 3, slow=[3])
def test_a_view_of_other_shape_at_the_same_place_is_not_overlooked():
    """Its pointer is the same."""
    trained = pair(lambda: random_parameters((60, 60), (5,))).train(1)
    for parameters in (trained.ours, trained.theirs):
        parameters[0].data = parameters[0].data.t()
    with pytest.warns(
        UserWarning, match=r"parameter 0 of shape \(60, 60\) has strides \(1, 60\) now"
    ):
        trained.step()
    assert torch.equal(trained.ours[0], trained.theirs[0])
    trained.ours[0].data = trained.ours[0].data.view(3600)
    trained.ours[0].grad = None
    with pytest.raises(ParameterError, match=r"expected \(60, 60\) torch.float32 .* got \(3600,\)"):
        trained.optimizer.step()


@on_ranks(1, 2, 3, slow=[3])
def test_another_memory_format_is_undone_with_a_warning():
    def image():
        torch.manual_seed(0)
        return nn.Conv2d(16, 32, 3)

    ours, theirs = image(), image()
    optimizer = ShardedOptimizer(ours.named_parameters(), SGD, kernel="torch", lr=0.1, momentum=0.9)
    plain = SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for model, each in ((ours, optimizer), (theirs, plain)):
        model.to(memory_format=torch.channels_last)
        model(torch.ones(1, 16, 5, 5)).square().sum().backward()
        if each is plain:
            each.step()
        else:
            with pytest.warns(UserWarning, match="'weight' has strides .* change the memory form"):
                each.step()
    assert_same_parameters(ours, theirs)
    assert ours.weight.is_contiguous()
    assert_home(optimizer)


# -- named -----------------------------------------------------------------------------------------


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("steps", [0, 2])
def test_another_dtype_is_named_and_can_be_undone(steps):
    ours, optimizer, theirs, plain = twins()
    train(ours, optimizer, 0, steps)
    train(theirs, plain, 0, steps)
    ours[2].double()
    expected = r"'2.weight': expected \(37, 53\) torch.float32 on cpu .*, got .* torch.float64"
    with pytest.raises(ParameterError, match=expected):
        optimizer.step()
    ours[2].float()
    train(ours, optimizer, steps, steps + 2)
    train(theirs, plain, steps, steps + 2)
    assert_same_parameters(ours, theirs)
    assert_home(optimizer)


@on_ranks(2, 3, slow=[3])
def test_another_dtype_on_one_rank_is_named_on_every_rank_at_the_first_step(rank):
    ours, optimizer, _, _ = twins()
    if rank == 1:
        ours[2].double()
    with pytest.raises(RuntimeError, match=r"'2.weight': expected \(37, 53\) torch.float32"):
        optimizer.step()
    ours[2].float()
    train(ours, optimizer, 0, 2)


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("first", [0, 2])
def test_a_layer_with_other_parameters_is_warned_of(first):
    """After ``load_state_dict(assign=True)``, of all layers or of some."""
    ours, optimizer, _, _ = twins()
    train(ours, optimizer, 0, 1)
    ours[0].bias.requires_grad_(False)
    optimizer.zero_grad()
    layers = ours[first:]
    layers.load_state_dict(copy.deepcopy(layers.state_dict()), assign=True)
    ours(torch.ones(1, 61)).sum().backward()
    words = rf"'{first}.weight' .* load_state_dict\(assign=True\)"
    with pytest.warns(UserWarning, match=words) as caught:
        optimizer.step()
    assert [each.filename for each in caught] == [__file__]  # at the user's line


@on_ranks(1, 2)
def test_steps_without_gradients_are_not_warned_of_while_the_model_has_its_parameters():
    ours, optimizer, _, _ = twins()
    optimizer.step()
    train(ours, optimizer, 0, 1)
    optimizer.zero_grad()
    optimizer.step()


# -- graphs and modules ----------------------------------------------------------------------------


@on_ranks(1, 2, 3, slow=[3])
def test_a_graph_from_before_the_step_is_refused_by_autograd():
    """On every rank, whoever has updated the parameter; as in plain torch."""
    for model, optimizer in (twins()[:2], twins()[2:]):
        batch = torch.ones(4, 61)
        model(batch).sum().backward()
        old = model(batch).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            old.backward()
        optimizer.zero_grad()
        model(batch).sum().backward()


@on_ranks(1, 2, 3, slow=[3])
def test_a_graph_over_parameters_that_did_not_change_stays_good():
    for parameters in (random_parameters((40, 60), (5,)), random_parameters((40, 60), (5,))):
        optimizer = ShardedOptimizer(parameters, AdamW)
        old = parameters[0].square().sum()
        parameters[1].sum().backward()
        optimizer.step()
        old.backward()
        assert torch.equal(parameters[0].grad, 2 * parameters[0])


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize("as_views", [True, False])
def test_gradients_averaged_by_ddp(rank, world_size, wrapped_first, as_views):
    """Each rank has a part of the batch; the plain twin is under DDP as well."""
    ours, theirs = make_model(), make_model()
    options = {"gradient_as_bucket_view": as_views}
    wrapped = DistributedDataParallel(ours, **options) if wrapped_first else None
    optimizer = ShardedOptimizer(
        ours.parameters(), AdamW, kernel="torch", bucket_cap_mb=SMALL_BUCKETS
    )
    wrapped = wrapped or DistributedDataParallel(ours, **options)
    twin = DistributedDataParallel(theirs, **options)
    plain = AdamW(theirs.parameters())
    for step in range(4):
        generator = torch.Generator().manual_seed(world_size * step + rank)
        batch = torch.randn(4, 61, generator=generator)
        for model, each in ((wrapped, optimizer), (twin, plain)):
            each.zero_grad()
            model(batch).square().mean().backward()
            each.step()
    assert_same_parameters(ours, theirs)
    assert_home(optimizer)


@on_ranks(1, 2, 3, slow=[3])
def test_two_optimizers_share_a_model():
    ours, theirs = make_model(), make_model()
    both = []
    for layers in (slice(0, 2), slice(2, 5)):
        options = {"kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, "lr": 0.01}
        both.append(
            (
                ShardedOptimizer(ours[layers].parameters(), AdamW, **options),
                AdamW(theirs[layers].parameters(), lr=0.01),
            )
        )
    for step in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.full((2, 61), 0.1 * step)).square().mean().backward()
        for pair_of_optimizers in both:
            for optimizer in pair_of_optimizers:
                optimizer.step()
    assert_same_parameters(ours, theirs)
