"""Torch's own tools read our checkpoints; ours read no more than they need."""

from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from shardopt import ShardedOptimizer
from shardopt.checkpoint import load, save
from shardopt.checkpoint.reader import Reader
from tests.checkpoint_runs import SAVED_AT, group_of, start
from tests.ranks import on_ranks
from tests.twins import assert_same

quiet = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)


def expected_state(run):
    """Key -> tensor, as our keys name the optimizer's state. Collective."""
    names = [name for group in run.optimizer.param_groups for name in group["param_names"]]
    state = run.state()["state"]
    return {
        f"optimizer.state.{names[number]}.{name}": value
        for number, entries in state.items()
        for name, value in entries.items()
    }


@quiet
@on_ranks(2, 3)
@pytest.mark.parametrize("kind", ["AdamW", "AdamW, four dtypes", "Adafactor"])
def test_plain_tensors_are_loaded_by_torch(kind, rank, tmp_path):
    run = start(kind).train(0, SAVED_AT)
    path = save(tmp_path, step=SAVED_AT, model=run.model, optimizer=run.optimizer)
    expected = {f"model.{name}": value for name, value in run.model.state_dict().items()}
    expected |= expected_state(run)
    assert any("exp_avg" in key or "row_var" in key for key in expected)
    target = {key: torch.full_like(value, 7) for key, value in expected.items()}
    del target["model.tied.weight"], expected["model.tied.weight"]  # is model.wide.weight
    dcp.load(target, checkpoint_id=path)
    assert_same(target, expected)


@quiet
@on_ranks(2)
def test_fsdp2_loads_model_and_state(rank, tmp_path):
    """Each rank gets its rows of n-d tensors that were cut elsewhere."""
    run = start("AdamW").train(0, SAVED_AT)
    path = save(tmp_path, step=SAVED_AT, model=run.model, optimizer=run.optimizer)
    model = nn.Sequential(OrderedDict(wide=nn.Linear(61, 53), frozen=nn.Linear(30, 40)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    parameters = {f"model.{name}": p for name, p in model.state_dict().items()}
    moments = {
        f"optimizer.state.wide.{name}.exp_avg": torch.zeros_like(p)
        for name, p in model.wide.state_dict().items()
    }
    dcp.load({**parameters, **moments}, checkpoint_id=path)
    own = run.model.state_dict()
    for key, tensor in parameters.items():
        assert tensor.to_local().numel() < tensor.numel()
        assert_same(tensor.full_tensor(), own[key.removeprefix("model.")])
    expected = expected_state(run)
    for key, tensor in moments.items():
        assert_same(tensor.full_tensor(), expected[key])


@quiet
@on_ranks(2)
def test_torch_consolidates_a_checkpoint(rank, tmp_path):
    run = start("AdamW").train(0, SAVED_AT)
    path = save(tmp_path, step=SAVED_AT, model=run.model, optimizer=run.optimizer, extra={"a": 1})
    state = run.state()["state"]
    if rank == 0:
        dcp_to_torch_save(path, tmp_path / "whole.pt")
        whole = torch.load(tmp_path / "whole.pt", weights_only=True)
        own = run.model.state_dict()
        assert_same(whole["model"], {name: own[name] for name in whole["model"]})
        assert set(own) - set(whole["model"]) <= {"tied.weight"}
        assert whole["step"] == SAVED_AT and whole["extra"] == {"a": 1}
        names = [n for group in run.optimizer.param_groups for n in group["param_names"]]
        by_name = {names[number]: dict(sorted(s.items())) for number, s in state.items()}
        theirs = {n: dict(sorted(s.items())) for n, s in whole["optimizer"]["state"].items()}
        assert_same(theirs, {n: by_name[n] for n in theirs})
        assert set(by_name) == set(theirs)
        assert [g["lr"] for g in whole["optimizer"]["param_groups"]] == [0.01, 0.05]


@contextmanager
def counted_reads():
    """The bytes that readers of this process have taken from files, once they are closed."""
    counts, close = [], Reader.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "close", lambda self: counts.append(self.bytes_read) or close(self))
        yield counts


def large(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1000, 1003), nn.Linear(1003, 999))


@on_ranks(3)
@pytest.mark.parametrize("before, after", [(2, 3), (3, 2), (1, 3)])
def test_a_rank_reads_what_it_holds_and_little_more(before, after, rank, tmp_path):
    groups = {size: group_of(size) for size in (1, 2, 3)}

    def begin(size):
        model = large()
        return ShardedOptimizer(model.parameters(), AdamW, groups[size], bucket_cap_mb=4.0), model

    if rank < before:
        optimizer, model = begin(before)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        save(tmp_path, step=1, optimizer=optimizer)
    dist.barrier()
    if rank < after:
        optimizer, model = begin(after)
        with counted_reads() as counts:
            load(tmp_path / "step-1", optimizer=optimizer)
        held = sum(
            tensor.numel() * tensor.itemsize
            for state in optimizer.optim.state.values()
            for tensor in state.values()
        )
        assert held > 4e6
        assert len(counts) == 1 and held <= counts[0] <= 1.1 * held


@on_ranks(1, 2)
def test_each_byte_is_written_once(rank, tmp_path):
    model = large()
    optimizer = ShardedOptimizer(model.parameters(), AdamW, bucket_cap_mb=4.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = save(tmp_path, step=1, model=model, optimizer=optimizer)
    needed = 3 * sum(parameter.numel() * 4 for parameter in model.parameters())
    held = sum(file.stat().st_size for file in path.iterdir())
    assert needed < held < 1.01 * needed
