"""Construction, and the first step: ranks agree, or all hear why not."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW

from shardopt import Guards, ShardedOptimizer
from shardopt.errors import AgreementError
from tests.pairs import Pair, four, pair, random_parameters
from tests.ranks import on_ranks


def same_on_every_rank(error: BaseException) -> str:
    """The message, which must not depend on the rank."""
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, f"{type(error).__name__}: {error}")
    assert len(set(messages)) == 1, messages
    return messages[0]


def assert_the_group_still_works() -> None:
    pair(four).train(2)


# -- what ranks must bring alike -------------------------------------------------------------------


def construct(parameters, optimizer_class=AdamW, **options) -> None:
    ShardedOptimizer(parameters, optimizer_class, **{"lr": 0.1, **options})


def alike():
    construct(four())


def permuted():
    construct(four()[::-1])


def of_other_shape():
    construct([*four()[:3], *random_parameters((50, 50))])


def of_other_dtype():
    construct(four(torch.float64))


def of_other_strides():
    parameters = four()
    construct([*parameters[:2], Parameter(parameters[2].detach().t()), parameters[3]])


def fewer():
    construct(four()[:3])


def in_two_groups():
    construct([{"params": four()[:2]}, {"params": four()[2:]}])


def frozen():
    parameters = four()
    parameters[1].requires_grad_(False)
    construct(parameters)


def with_names():
    construct(zip("abcd", four(), strict=True))


def with_other_names():
    construct(zip("abed", four(), strict=True))


def of_other_class():
    construct(four(), Adam)


def with_other_lr():
    construct(four(), lr=0.2)


def with_tensor_lr():
    construct(four(), lr=torch.tensor(0.1))


def with_other_lr_in_a_group():
    construct([{"params": four(), "lr": 0.2}])


def with_other_kernel():
    construct(four(), kernel="torch")


def without_guards():
    construct(four(), guards=Guards(replicas=False))


def in_other_buckets():
    construct(four(), bucket_cap_mb=0.01)


def with_other_values():
    parameters = four()
    with torch.no_grad():
        parameters[2][7, 7] += 1e-6
    construct(parameters)


DIFFERENCES = {
    permuted: (alike, "parameter 0", r"of shape \(2500,\)", r"\(70, 33\) torch.float32 on cpu"),
    of_other_shape: (alike, "parameter 3", r"\(50, 50\)", r"\(2500,\) torch"),
    of_other_dtype: (alike, "parameter 0", "torch.float64", "torch.float32"),
    of_other_strides: (alike, "parameter 2", r"strides \(1, 40\)", r"strides \(40, 1\)"),
    fewer: (alike, "the number of parameters of group 0", "3", "4"),
    in_two_groups: (alike, "the number of parameters of group 0", "2", "4"),
    frozen: (alike, "parameter 1", "requires_grad=False", "requires_grad=True"),
    with_other_names: (with_names, "parameter 2", "e: ", "c: "),
    with_names: (alike, "parameter 0", "a: ", "0 of shape"),
    of_other_class: (alike, "the optimizer class", "'torch.*.Adam'", "'torch.*.AdamW'"),
    with_other_lr: (alike, "group 0, lr", "0.2", "0.1"),
    with_tensor_lr: (alike, "group 0, lr", r"tensor\(0.1.*, torch.float32\)", "0.1"),
    with_other_lr_in_a_group: (alike, "group 0, lr", "0.2", "0.1"),
    with_other_kernel: (alike, "kernel", "'torch'", "'auto'"),
    without_guards: (alike, "guards", "Guards.replicas=False.", "Guards.replicas=True."),
    in_other_buckets: (alike, "the layout", ".*bucket 1", ".*bucket 0"),
    with_other_values: (alike, r"the value of parameter 2 of shape \(40, 40\)", "hash", "hash"),
}


@on_ranks(2, 3)
@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda way: way.__name__)
def test_a_difference_is_named_on_every_rank(difference, rank):
    usual, fact, got, expected = DIFFERENCES[difference]
    match = f"ranks differ in {fact}: rank 1 has .*{got}.*, rank 0 has .*{expected}.*; "
    with pytest.raises(AgreementError, match=match) as error:
        difference() if rank == 1 else usual()
    same_on_every_rank(error.value)
    assert_the_group_still_works()


@on_ranks(3)
def test_rank_0_may_be_the_odd_one(rank):
    with pytest.raises(AgreementError, match=r"lr: rank 0 has 0.2, rank 1 has 0.1; ") as error:
        construct(four(), lr=0.2 if rank == 0 else 0.1)
    same_on_every_rank(error.value)


@on_ranks(2, 3)
def test_parameters_of_one_shape_in_another_order_differ_by_value(rank):
    def square():
        return [*random_parameters((9, 9), (9, 9))]

    with pytest.raises(
        AgreementError, match=r"the value of parameter 0 of shape \(9, 9\): rank 1 has"
    ):
        construct(square()[::-1] if rank == 1 else square())
    assert_the_group_still_works()


@on_ranks(2, 3)
def test_refused_parameters_stay_where_they_were(rank):
    parameters = four()
    before = [parameter.data_ptr() for parameter in parameters]
    with pytest.raises(AgreementError):
        construct(parameters, lr=0.2 if rank == 1 else 0.1)
    assert [parameter.data_ptr() for parameter in parameters] == before


@on_ranks(2, 3)
def test_a_value_that_differs_comes_with_a_remedy(rank):
    with pytest.raises(AgreementError, match=r"; seed every rank alike, .* from rank 0$"):
        with_other_values() if rank == 1 else alike()


@on_ranks(2, 3)
def test_different_values_pass_where_the_guard_is_off(rank):
    """And the owner's part reaches every rank with the first step."""
    parameters = [Parameter(torch.full((4000,), float(rank)))]
    optimizer = ShardedOptimizer(parameters, SGD, guards=Guards(replicas=False), lr=1.0)
    parameters[0].grad = torch.zeros(4000)
    optimizer.step()
    owners = torch.arange(4000) // optimizer._shard.layout.buckets[0].borders[1]
    assert torch.equal(parameters[0], owners.float())


@on_ranks(2, 3)
def test_what_one_rank_refuses_is_refused_by_all(rank):
    """There with the class's own error, elsewhere with one that names it."""
    lr, error, match = (
        0.1,
        AgreementError,
        "rank 1 failed .*: ValueError: Invalid learning rate: -1",
    )
    if rank == 1:
        lr, error, match = -1.0, ValueError, "Invalid learning rate: -1"
    with pytest.raises(error, match=match):
        construct(four(), lr=lr)
    assert_the_group_still_works()


# -- gradients at the first step -------------------------------------------------------------------

REMEDY = r"; with gradients='replicated' every rank needs the averaged gradient: wrap the model .*"


def prepared(rank: int, change, guards: Guards | None = None) -> Pair:
    """A pair before its first step, with one gradient of rank 1 changed."""
    trained = pair(four, guards=guards)
    trained.give_gradients()
    if rank == 1:
        trained.ours[2].grad = change(trained.ours[2].grad)
    return trained


def slightly_other(gradient):
    return gradient + torch.eye(40) * 1e-6


def missing(gradient):
    return None


@on_ranks(2, 3)
@pytest.mark.parametrize("change", [slightly_other, missing], ids=lambda change: change.__name__)
def test_a_gradient_that_differs_is_named_on_every_rank(change, rank):
    trained = prepared(rank, change)
    got = {"slightly_other": "hash [0-9a-f]{16}", "missing": "none"}[change.__name__]
    match = (
        rf"the gradient of parameter 2 of shape \(40, 40\): rank 1 has {got}, rank 0 has hash .*"
    )
    with pytest.raises(AgreementError, match=match + REMEDY) as error:
        trained.optimizer.step()
    same_on_every_rank(error.value)
    trained.train(3)  # nothing has been stepped


@on_ranks(2, 3)
def test_different_gradients_pass_where_the_guard_is_off(rank):
    prepared(rank, slightly_other, Guards(replicas=False)).optimizer.step()


@on_ranks(2, 3)
def test_equal_nan_gradients_are_no_difference():
    trained = pair(four)
    for parameters, _ in trained.both():
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter.detach(), torch.nan)
    trained.optimizer.step()
    assert all(parameter.isnan().all() for parameter in trained.ours)
