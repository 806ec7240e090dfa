"""What is kept: names, kinds of gradient, buckets, meshes, wrapped models, schedules, extra."""

import math
import re
from collections import Counter, OrderedDict, deque

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW, lr_scheduler

from shardopt import Guards, ShardedOptimizer
from shardopt.checkpoint import load, save
from shardopt.checkpoint.opening import open_source
from shardopt.errors import UnsupportedError
from tests.checkpoint_runs import SAVED_AT, STEPS, Zoo, assert_same_run, make, start, undisturbed
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, make_model, train


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_goes_on_as_if_undisturbed(steps, rank, tmp_path):
    """Also one that has not begun."""
    run = start("AdamW").train(0, steps)
    save(tmp_path, step=steps, model=run.model, optimizer=run.optimizer)
    again = start("AdamW", seed=3)
    load(tmp_path, model=again.model, optimizer=again.optimizer)
    assert_same_run(again, run)
    assert_same_run(again.train(steps, STEPS), undisturbed("AdamW"))


KINDS_OF_GRADIENT = ["replicated", "local", "sharded"]


@on_ranks(2)
@pytest.mark.parametrize("before", KINDS_OF_GRADIENT)
@pytest.mark.parametrize("after", KINDS_OF_GRADIENT)
def test_kinds_of_gradient_and_sizes_of_buckets_load_one_another(before, after, rank, tmp_path):
    seed = 0 if before == "replicated" else rank
    guards = Guards(find_unused_parameters=True)
    run = start("AdamW", gradients=before, guards=guards).train(0, SAVED_AT, seed)
    save(tmp_path, step=SAVED_AT, model=run.model, optimizer=run.optimizer)
    again = start("AdamW", seed=3, gradients=after, guards=guards, bucket_cap_mb=25.0)
    load(tmp_path, model=again.model, optimizer=again.optimizer)
    assert_same_run(again, run)
    same_kind = start("AdamW", seed=3, gradients=before, guards=guards)
    load(tmp_path, model=same_kind.model, optimizer=same_kind.optimizer)
    assert_same_run(same_kind.train(SAVED_AT, STEPS, seed), run.train(SAVED_AT, STEPS, seed))


@on_ranks(4)
def test_a_mesh_and_one_axis_load_one_another(rank, tmp_path):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    on_mesh = start("AdamW", mesh).train(0, SAVED_AT)
    save(tmp_path / "mesh", step=SAVED_AT, model=on_mesh.model, optimizer=on_mesh.optimizer)
    on_four = start("AdamW", seed=3)
    load(tmp_path / "mesh", model=on_four.model, optimizer=on_four.optimizer)
    assert_same_run(on_four, on_mesh)
    ranks = sorted(path.name for path in (tmp_path / "mesh/step-2").glob("__*"))
    assert ranks == ["__0_0.distcp", "__1_0.distcp"]  # each byte by one replica
    save(tmp_path / "axis", step=SAVED_AT, model=on_four.model, optimizer=on_four.optimizer)
    back = start("AdamW", mesh, seed=5)
    load(tmp_path / "axis", model=back.model, optimizer=back.optimizer)
    assert_same_run(back.train(SAVED_AT, STEPS), undisturbed("AdamW"))


def named(model, how):
    return model.named_parameters() if how == "named_parameters" else model.parameters()


@on_ranks(2)
@pytest.mark.parametrize("how", ["parameters", "named_parameters"])
@pytest.mark.parametrize("with_model", [True, False])
def test_keys_are_names_where_there_are_some(how, with_model, rank, tmp_path):
    def begin():
        model = make_model()
        options = {"lr": 0.01, "bucket_cap_mb": SMALL_BUCKETS}
        return model, ShardedOptimizer(named(model, how), AdamW, **options)

    model, optimizer = begin()
    train(model, optimizer, 0, 2)
    save(tmp_path, step=2, optimizer=optimizer, model=model if with_model else None)
    names = with_model or how == "named_parameters"
    with open_source(tmp_path / "step-2") as source:
        keys = [*source.tree["optimizer"]["state"]]
        numbers = [str(number) for number in range(6)]
        assert keys == ([name for name, _ in model.named_parameters()] if names else numbers)
        assert source.tensors[f"optimizer.state.{keys[0]}.exp_avg"].shape == (53, 61)
    other, again = begin()
    load(tmp_path, optimizer=again, model=other if with_model else None)
    for one in (optimizer, again):
        one.consolidate_state_dict(to=None)
    assert_same(again.state_dict()["state"], optimizer.state_dict()["state"])


@on_ranks(2)
def test_any_name_of_a_parameter_will_do(rank, tmp_path):
    """Also those that have a meaning in the manifest."""
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.ones(2100)) for name in ("!", "of", "entry")}
    )
    optimizer = ShardedOptimizer(model.named_parameters(), AdamW, bucket_cap_mb=SMALL_BUCKETS)
    for parameter in model.values():
        parameter.grad = torch.ones(2100)
    optimizer.step()
    save(tmp_path, step=1, model=model, optimizer=optimizer)
    trained = {name: parameter.detach().clone() for name, parameter in model.items()}
    for parameter in model.values():
        nn.init.zeros_(parameter)
    load(tmp_path, model=model, optimizer=optimizer)
    assert_same({name: parameter.detach() for name, parameter in model.items()}, trained)


@on_ranks(2)
def test_the_model_within_ddp_is_saved_and_loaded_under_its_own_names(rank, tmp_path):
    model = make(Zoo)
    wrapped = nn.parallel.DistributedDataParallel(model)
    save(tmp_path, step=1, model=wrapped)
    plain = make(Zoo, seed=2)
    load(tmp_path, model=plain)
    assert_same(plain.state_dict(), model.state_dict())
    other = nn.parallel.DistributedDataParallel(make(Zoo, seed=3))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load(tmp_path, model=other)
    assert_same(other.module.state_dict(), model.state_dict())


@on_ranks(2)
def test_an_empty_group_and_a_group_added_later_are_kept(rank, tmp_path):
    def begin():
        model = make_model()
        optimizer = ShardedOptimizer(model[0].parameters(), AdamW, lr=0.01)
        optimizer.add_param_group({"params": [], "lr": 0.5})
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.25})
        return model, optimizer

    model, optimizer = begin()
    train(model, optimizer, 0, 2)
    save(tmp_path, step=2, model=model, optimizer=optimizer)
    other, again = begin()
    for group in again.param_groups:
        group["lr"] = 1.0
    load(tmp_path, model=other, optimizer=again)
    assert [group["lr"] for group in again.param_groups] == [0.01, 0.5, 0.25]
    train(model, optimizer, 2, 4)
    train(other, again, 2, 4)
    assert_same(other.state_dict(), model.state_dict())


class Warmup:
    """A callable with state, which ``LambdaLR`` saves."""

    def __init__(self, steps=3):
        self.steps = steps

    def __call__(self, step):
        return min(1.0, (step + 1) / self.steps)


SCHEDULERS = {
    "LambdaLR": lambda o, n=3: lr_scheduler.LambdaLR(o, Warmup(n)),
    "MultiStepLR": lambda o, n=3: lr_scheduler.MultiStepLR(o, [n, n, n + 1]),
    "OneCycleLR": lambda o, n=3: lr_scheduler.OneCycleLR(o, 0.1 * n, total_steps=9),
    "SequentialLR": lambda o, n=3: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.CosineAnnealingLR(o, 9)], [n]
    ),
    "ReduceLROnPlateau": lambda o, n=3: lr_scheduler.ReduceLROnPlateau(o, patience=n - 3),
}


def advance(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        optimizer.step()
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*[1.0] * plateau)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@on_ranks(2)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")
def test_schedules_go_on(name, rank, tmp_path):
    def begin(n):
        optimizer = ShardedOptimizer([held[n - 3]], AdamW, lr=0.01)
        return optimizer, SCHEDULERS[name](optimizer, n)

    held = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer, scheduler = begin(3)
    advance(optimizer, scheduler, 2)
    save(tmp_path, step=2, optimizer=optimizer, scheduler=scheduler)
    again, schedule = begin(4)
    load(tmp_path, optimizer=again, scheduler=schedule)
    assert_same(schedule.state_dict(), scheduler.state_dict())
    assert advance(again, schedule, 5) == advance(optimizer, scheduler, 5)


EXTRA = {
    3: "an int for a key",
    "tuple": (1, (2.5, None), [True]),
    ("a", 1): {"nested": {1: {2: 3}}},
    "counter": Counter("aab"),
    "ordered": OrderedDict(b=1, a=2),
    "set": {1, 2},
    "frozen": frozenset({"x"}),
    "deque": deque([1, 2], maxlen=4),
    "floats": [math.inf, -math.inf, -0.0, 1e-320, 0.1],
    "big": 1 << 80,
    "complex": 1 + 2j,
    "bytes": b"\x00\xff",
    "text": "äß\U0001f600\ud800",
    "!": "the mark itself",
    "tensors": [torch.arange(3), torch.tensor(2.5, dtype=torch.bfloat16), torch.ones(0, 3)],
    "in a tuple": (torch.ones(2, dtype=torch.bool), 1),
}


def typed(value):
    """A value with the types of all its parts."""
    if isinstance(value, dict):
        return type(value), [(typed(k), typed(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return type(value), getattr(value, "maxlen", None), [typed(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.tolist()
    return type(value), repr(value)


@on_ranks(1, 2)
def test_extra_keeps_types_and_is_of_the_first_rank(rank, tmp_path):
    save(tmp_path, step=1, extra={**EXTRA, "rank": rank})
    loaded = load(tmp_path)
    assert typed(loaded.extra) == typed({**EXTRA, "rank": 0})
    save(tmp_path, step=2, extra=[math.nan])
    assert math.isnan(load(tmp_path).extra[0])
    save(tmp_path, step=3)
    assert load(tmp_path).extra is None
    dist.is_initialized()  # a world of one has none and needs none


@on_ranks(2)
@pytest.mark.parametrize(
    "extra, place",
    [
        ({"a": [1, object()]}, "extra['a'][1]: expected plain Python values"),
        ({"f": len}, "extra['f']"),
        ({1: {"x": Warmup()}}, "extra[1]['x']"),
        ({"t": torch.eye(3).to_sparse()}, "extra.t: expected a dense tensor"),
        ({"b": True, "n": [type]}, "extra['n'][0]"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_place(extra, place, rank, tmp_path):
    with pytest.raises((UnsupportedError, RuntimeError), match=re.escape(place)):
        save(tmp_path, step=1, extra=extra)
    assert [*tmp_path.glob("step*")] == []
