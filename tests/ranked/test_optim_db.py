"""torch's own table of wrong inputs: what they raise in the class, they raise through shardopt."""

import re
import warnings
from typing import NamedTuple

import pytest
import torch
from torch.optim import SGD, Adam

from shardopt import ShardedOptimizer
from shardopt.algos import algorithm_for
from shardopt.errors import AgreementError, UnsupportedError
from tests.bank import FUSED_BY_AUTO
from tests.ranks import on_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it misses packages that its errors do not need
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

ENTRIES = {info.optim_cls.__name__: info for info in optim_db}
ELSEWHERE = "failed where this one did not"
REFUSED = {
    # name: (class, options, words of the error)
    "compiled": (SGD, {"kernel": "compiled"}, "kernel='compiled' is not supported yet; use"),
    **{
        f"{name} differentiable": (
            info.optim_cls,
            {"differentiable": True},
            "differentiable=True is not supported",
        )
        for name, info in ENTRIES.items()
        if "differentiable" in info.supported_impls
    },
}


class Attempt(NamedTuple):
    """What came of a wrong input."""

    stage: str
    error: Exception | None
    warnings: list[str]


def error_inputs(name):
    """The wrong inputs of an entry, newly made: equal on every rank."""
    torch.manual_seed(0)
    return ENTRIES[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)


def attempt(build, error_input) -> Attempt:
    """Do what torch's own ``test_errors`` does with a wrong input."""
    given = error_input.optimizer_error_input
    stage, error = "construction", None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            optimizer = build(given.params, **given.kwargs)
            if error_input.error_on is OptimizerErrorEnum.STEP_ERROR:
                stage = "step"
                optimizer.step()
        except Exception as problem:
            error = problem
    return Attempt(stage, error, [str(warning.message) for warning in warned])


@on_ranks(1, 2)
@pytest.mark.parametrize("name", ENTRIES)
def test_raises_what_the_class_raises(name, world_size):
    """The same type, in torch's words, at the same stage, on every rank.

    One thing differs: what the class refuses in ``step`` only, it refuses on the rank that holds
    the parameter, and the others name that rank and its error.
    """
    optimizer_class = ENTRIES[name].optim_cls

    def sharded(params, **options):
        return ShardedOptimizer(params, optimizer_class, **options)

    pairs = list(zip(error_inputs(name), error_inputs(name), strict=True))
    assert len(pairs) >= 6
    for ours, torchs in pairs:
        what = f"{name}, {ours.optimizer_error_input.desc}"
        found, expected = attempt(sharded, ours), attempt(optimizer_class, torchs)
        assert found.warnings == expected.warnings, what
        if issubclass(ours.error_type, Warning):
            assert [w for w in found.warnings if re.match(ours.error_regex, w)], what
            assert found.error is None, (what, found)
            continue
        assert type(expected.error) is ours.error_type, (what, expected)
        assert found.stage == expected.stage, (what, found)
        assert re.search(ours.error_regex, str(found.error)), (what, found)
        if found.stage == "step" and type(found.error) is AgreementError:
            assert world_size > 1 and f"rank 0 {ELSEWHERE}" in str(found.error), (what, found)
        else:
            assert type(found.error) is ours.error_type, (what, found)


@on_ranks(2, 3)
@pytest.mark.parametrize("options", [{"lr": -1.0}, {"weight_decay": -1}, {"betas": (1.0, 0.0)}])
def test_an_error_on_one_rank_raises_on_all(options, rank):
    """Torch's own error where it belongs, and one that names it elsewhere; then all go on."""
    parameter = torch.nn.Parameter(torch.ones(3))
    expected = ValueError if rank == 1 else AgreementError
    elsewhere = "" if rank == 1 else f"rank 1 {ELSEWHERE}: ValueError: "
    with pytest.raises(expected, match=f"^{elsewhere}Invalid") as caught:
        ShardedOptimizer([parameter], Adam, **(options if rank == 1 else {}))
    assert type(caught.value) is expected
    optimizer = ShardedOptimizer([parameter], Adam, lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert (parameter < 1).all()


@on_ranks(2, 3)
def test_an_argument_that_one_rank_alone_lacks(rank):
    parameter = torch.nn.Parameter(torch.ones(3))
    expected = TypeError if rank == 1 else AgreementError
    with pytest.raises(expected, match="unexpected keyword argument 'momentun'"):
        ShardedOptimizer([parameter], SGD, **({"momentun": 0.9} if rank == 1 else {}))


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name):
    optimizer_class, options, words = REFUSED[name]
    parameter = torch.nn.Parameter(torch.ones(3))
    before = parameter.data_ptr()
    with pytest.raises(UnsupportedError, match=words) as caught:
        ShardedOptimizer([parameter], optimizer_class, **options)
    assert "\n" not in str(caught.value)
    assert parameter.data_ptr() == before  # and nothing has moved


@on_ranks(1, 2)
def test_differentiable_in_one_group_is_refused_too():
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "differentiable": True}]
    with pytest.raises(UnsupportedError, match="differentiable=True is not supported"):
        ShardedOptimizer(groups, Adam)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize(
    "options",
    [{"gradients": "summed"}, {"kernel": "fast"}, {"kernel": None}, {"bucket_cap_mb": 0}],
    ids=str,
)
def test_what_is_no_choice_at_all_is_a_value_error(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .* got") as caught:
        ShardedOptimizer([torch.nn.Parameter(torch.ones(3))], SGD, **options)
    assert not isinstance(caught.value, UnsupportedError)


@pytest.mark.parametrize("name", ENTRIES)
def test_auto_fuses_only_where_torch_can(name):
    optimizer_class = ENTRIES[name].optim_cls
    devices = algorithm_for(optimizer_class).fused_devices & {"cpu", "cuda"}
    assert devices == set(FUSED_BY_AUTO.get(optimizer_class, "").split())
    assert devices <= set(ENTRIES[name].supports_fused_on)
