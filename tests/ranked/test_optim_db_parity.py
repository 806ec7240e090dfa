"""torch's own table of inputs, each on 1, 2 and 3 ranks, against the class itself, bit for bit.

``ranked/test_bank.py`` says what is compared: parameters, consolidated state, reload into torch and
back, and the steps after it.
"""

import warnings
from collections import Counter

import pytest

from shardopt.errors import UnsupportedError
from tests.bank import REFUSED_CLASSES, Case
from tests.bank_runs import presences, start
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
CASES = OF_TORCH | FOREACH


def test_no_case_is_lost():
    """What torch 2.13 has; a later one may have more."""
    assert len(OF_TORCH) >= 117
    assert len(FOREACH) >= 75
    assert len(CASES) == len(OF_TORCH) + len(FOREACH)
    classes = Counter(case.optimizer_class.__name__ for case in OF_TORCH.values())
    assert len(classes) == len(optim_db) >= 15
    assert min(classes.values()) >= 4
    assert sum(bool(case.options.get("fused")) for case in OF_TORCH.values()) >= 26


def compare(case: Case, presence: str, rank: int) -> None:
    if case.optimizer_class in REFUSED_CLASSES:
        with pytest.raises(UnsupportedError, match="is not supported yet"):
            start(case, "torch")
    else:
        check(case, presence, rank)


@pytest.mark.slow  # the bank is fast
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", OF_TORCH)
def test_equals_the_class(name, rank):
    """With gradients that come and go, where the class itself can take that."""
    case = OF_TORCH[name]
    compare(case, presences(case)[-1], rank)


@pytest.mark.slow
@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_class_with_all_gradients(name, rank):
    """Here ``foreach=True``, too, which torch's own tests give to accelerators only."""
    compare(CASES[name], "all always", rank)
