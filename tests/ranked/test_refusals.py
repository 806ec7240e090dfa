"""What cannot be sharded is refused at construction, in one line, on every rank."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn import Parameter
from torch.optim import Adam, AdamW, RMSprop

from shardopt import ShardedOptimizer
from shardopt.errors import ParameterError, UnsupportedError
from tests.pairs import WholeSGD, pair, random_parameters
from tests.ranks import on_ranks


def linear(**options) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 4, **options)


# -- arguments -------------------------------------------------------------------------------------

ARGUMENTS = {
    "compiled kernel": ({"kernel": "compiled"}, "use kernel='auto' or 'torch'"),
    "differentiable": ({"differentiable": True}, "use the optimizer class itself"),
}
WRONG_ARGUMENTS = {
    "gradients": ("mine", ValueError, "expected 'replicated' or 'local' or 'sharded', got"),
    "kernel": (7, ValueError, "expected 'auto' or 'torch', got 7"),
    "guards": (True, TypeError, "expected shardopt.Guards, got bool"),
    "bucket_cap_mb": (0, ValueError, "expected a positive number of MiB, got 0"),
    "optimizer_class": (nn.Linear, TypeError, "expected a subclass of torch.optim.Optimizer, got "),
    "momentum": (0.9, TypeError, "unexpected keyword argument 'momentum'"),
    "lr": (-1.0, ValueError, "Invalid learning rate: -1.0"),
}


@on_ranks(1, 2)
@pytest.mark.parametrize("what", ARGUMENTS)
def test_what_is_not_supported_yet_comes_with_what_to_use(what):
    options, remedy = ARGUMENTS[what]
    with pytest.raises(UnsupportedError, match=f"not supported.*; {remedy}") as error:
        ShardedOptimizer(linear().parameters(), **{"optimizer_class": AdamW, **options})
    assert "\n" not in str(error.value)


@on_ranks(1, 2)
@pytest.mark.parametrize("argument", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_refused_on_every_rank_alike(argument):
    value, error, message = WRONG_ARGUMENTS[argument]
    with pytest.raises(error, match=message):
        ShardedOptimizer(linear().parameters(), **{"optimizer_class": AdamW, argument: value})


# -- parameters ------------------------------------------------------------------------------------


def lazy():
    return nn.LazyLinear(3).named_parameters()


def lazy_without_a_name():
    return nn.LazyLinear(3).parameters()


def without_memory():
    return linear(device="meta").named_parameters()


def distributed():
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return [("weight", Parameter(distribute_tensor(torch.ones(6, 4), mesh)))]


def sparse():
    return [("weight", Parameter(torch.eye(3).to_sparse()))]


def tied_through_data():
    model = nn.ModuleDict({"first": linear(), "second": linear()})
    model["second"].weight.data = model["first"].weight.data
    return model.named_parameters()


def overlapping():
    memory = torch.ones(100)
    return [("low", Parameter(memory[:60])), ("high", Parameter(memory[50:]))]


PARAMETERS = {
    lazy: "parameter 'weight' is not initialized; run a first forward pass before",
    lazy_without_a_name: "parameter 0 of unknown shape is not initialized; run a first forward",
    without_memory: "'weight': expected an ordinary dense tensor with memory, got .* on meta",
    distributed: "'weight': expected an ordinary dense tensor with memory, got DTensor",
    sparse: "'weight': expected an ordinary dense tensor with memory, got .* torch.sparse_coo",
    tied_through_data: "'first.weight' and 'second.weight' share memory .*; use one Parameter in",
    overlapping: "'low' and 'high' share memory but are two Parameter objects",
}


@on_ranks(1, 2)
@pytest.mark.parametrize("optimizer_class", [AdamW, WholeSGD], ids=lambda c: c.__name__)
@pytest.mark.parametrize("make", PARAMETERS, ids=lambda make: make.__name__)
def test_parameters_that_cannot_become_views_are_named(make, optimizer_class):
    with pytest.raises(UnsupportedError, match=PARAMETERS[make]) as error:
        ShardedOptimizer(make(), optimizer_class, lr=0.1)
    assert "\n" not in str(error.value)


@on_ranks(1, 2)
def test_a_result_of_an_operation_is_refused_in_torchs_words():
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        ShardedOptimizer([linear().weight * 2], AdamW)


@on_ranks(1, 2)
def test_views_of_one_tensor_that_do_not_overlap_are_taken():
    def make():
        memory = random_parameters((3000,))[0].detach()
        return [Parameter(memory[:1000]), Parameter(memory[1000:])]

    pair(make).train(2)


@on_ranks(1, 2, 3)
def test_a_lazy_model_is_taken_after_its_first_forward_pass():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(60), nn.LazyLinear(50))
        model(torch.ones(1, 40))
        return list(model.parameters())

    pair(make).train(2)


# -- sparse gradients ------------------------------------------------------------------------------


# Torch's, once a process, about sparse tensors in general.
sparse_gradients = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


def a_sparse_gradient() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[1, 3, 3]]), torch.ones(3, 40), (50, 40))


@sparse_gradients
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("optimizer_class", [RMSprop, Adam], ids=lambda c: c.__name__)
def test_a_sparse_gradient_of_a_cut_parameter_is_named(optimizer_class, steps):
    trained = pair(lambda: random_parameters((7,), (50, 40)), optimizer_class).train(steps)
    trained.give_gradients()
    trained.ours[1].grad = a_sparse_gradient()
    with pytest.raises(
        ParameterError, match=r"parameter 1 of .*: expected a dense gradient for .*, got torch.sp"
    ):
        trained.optimizer.step()
    trained.train(2)


@sparse_gradients
@on_ranks(2, 3)
def test_a_sparse_gradient_on_one_rank_is_named_on_every_rank_at_the_first_step(rank):
    trained = pair(lambda: random_parameters((7,), (50, 40)), Adam)
    trained.give_gradients()
    if rank == 1:
        trained.ours[1].grad = a_sparse_gradient()
    with pytest.raises(
        RuntimeError, match=r"expected a dense gradient for Adam, got torch.sparse_coo"
    ):
        trained.optimizer.step()
    trained.train(2)


@sparse_gradients
@on_ranks(1, 2, 3)
def test_a_class_on_whole_parameters_takes_sparse_gradients_if_it_can():
    trained = pair(lambda: random_parameters((50, 40), (50, 40), (7,)), WholeSGD)
    before = trained.ours[1].detach().clone()
    for _ in range(3):
        trained.give_gradients()
        for parameters, optimizer in trained.both():
            parameters[1].grad = a_sparse_gradient()
            optimizer.step()
    trained.assert_same()
    assert (trained.ours[1] != before).any(dim=1).nonzero().flatten().tolist() == [1, 3]


# -- copies ----------------------------------------------------------------------------------------


@on_ranks(1, 2)
def test_pickling_is_refused_with_what_to_save_instead():
    optimizer = pair(lambda: random_parameters((50, 40))).optimizer
    with pytest.raises(
        TypeError, match=r"cannot be pickled.*; save optimizer.state_dict\(\) after"
    ):
        pickle.dumps(optimizer)
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.copy(optimizer)
