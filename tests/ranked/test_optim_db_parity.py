"""torch's own table of inputs, each on 1, 2 and 3 ranks, against the class itself, bit for bit.

``ranked/test_bank.py`` says what is compared: parameters, consolidated state, reload into torch and
back, and the steps after it.
"""

import copy
import warnings
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, AdamW

from shardopt import ShardedOptimizer
from tests.bank import Case
from tests.bank_runs import Training, presences, start
from tests.ranked.test_bank import check
from tests.ranks import on_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it misses packages that its errors do not need
    from torch.testing._internal.common_optimizers import (
        _get_optim_inputs_including_global_cliquey_kwargs as inputs_with_flags,
    )
    from torch.testing._internal.common_optimizers import optim_db


def cases_of_torch() -> dict[str, Case]:
    """All inputs with all flags that torch tries on a CPU, but for ``differentiable``."""
    return {
        f"{info.optim_cls.__name__} {given.desc}": Case(info.optim_cls, given.kwargs)
        for info in optim_db
        for given in inputs_with_flags("cpu", None, info, skip=("differentiable",))
    }


def foreach_cases() -> dict[str, Case]:
    """A CPU takes it, too."""
    return {
        f"{info.optim_cls.__name__} {given.desc} & foreach": Case(
            info.optim_cls, {**given.kwargs, "foreach": True}
        )
        for info in optim_db
        for given in info.optim_inputs_func(device="cpu")
        if "foreach" in info.supported_impls
    }


OF_TORCH, FOREACH = cases_of_torch(), foreach_cases()


def test_no_case_is_lost():
    """What torch 2.13 has; a later one may have more."""
    assert len(OF_TORCH) >= 117
    assert len(FOREACH) >= 75
    assert not OF_TORCH.keys() & FOREACH.keys()
    classes = Counter(case.optimizer_class.__name__ for case in OF_TORCH.values())
    assert len(classes) == len(optim_db) >= 15
    assert min(classes.values()) >= 4
    assert sum(bool(case.options.get("fused")) for case in OF_TORCH.values()) >= 26


def compare(case: Case, presence: str, rank: int, world_size: int) -> None:
    if case.optimizer_class is LBFGS:
        check_search(case, rank, world_size)
    else:
        check(case, presence, rank)


def check_search(case: Case, rank: int, world_size: int) -> None:
    """LBFGS: one group, a closure, and sums over ranks, which round in another order."""
    exact = {"rtol": 0, "atol": 0} if world_size == 1 else {"rtol": 1e-6, "atol": 1e-9}

    def build(sharded: bool, values: list[Tensor]) -> Training:
        parameters = [Parameter(value.detach().clone()) for value in values]
        options = copy.deepcopy(dict(case.options))
        if not sharded:
            return Training(case, parameters, LBFGS(parameters, **options))
        return Training(case, parameters, ShardedOptimizer(parameters, LBFGS, **options))

    begun = start(Case(AdamW, {}), dtype=torch.float64).parameters
    ours, theirs = build(True, begun), build(False, begun)
    search(ours, theirs, steps=1)
    states = ours.saved(), theirs.saved()
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], **exact)
    resumed = build(True, theirs.parameters), build(False, theirs.parameters)
    resumed[0].optimizer.load_state_dict(states[1] if rank == 0 else None, from_=0)
    resumed[1].optimizer.load_state_dict(states[0])
    search(ours, theirs, *resumed, steps=1)
    for training in (ours, *resumed):
        torch.testing.assert_close(training.parameters, theirs.parameters, **exact)
        torch.testing.assert_close(training.saved()["state"], theirs.saved()["state"], **exact)
    moved = [not torch.equal(*pair) for pair in zip(begun, ours.parameters, strict=True)]
    assert all(moved), moved


def search(*trainings: Training, steps: int) -> None:
    """Steps on a bowl with ripples; every rank evaluates all of it."""
    for training in trainings:
        optimizer, parameters = training.optimizer, training.parameters

        def closure(optimizer=optimizer, parameters=parameters) -> Tensor:
            optimizer.zero_grad()
            bowl = [(p.square() * (1 + n) + p.cos()).sum() for n, p in enumerate(parameters)]
            loss = torch.stack(bowl).sum()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)


@pytest.mark.slow  # the bank is fast
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", OF_TORCH)
def test_equals_the_class(name, rank, world_size):
    """With gradients that come and go, where the class itself can take that."""
    case = OF_TORCH[name]
    compare(case, presences(case)[-1], rank, world_size)


@pytest.mark.slow
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", FOREACH)
def test_foreach_equals_the_class_with_all_gradients(name, rank, world_size):
    """``foreach=True``, which torch's own tests give to accelerators only."""
    compare(FOREACH[name], "all always", rank, world_size)
