"""The offline tool on what ``save`` writes: plain torch goes on from the consolidated file."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, AdamW

from shardopt import ShardedOptimizer, checkpoint
from shardopt.checkpoint.diff import diff
from shardopt.checkpoint.offline import consolidate
from shardopt.checkpoint.verify import problems
from tests.pure.test_checkpoint_cli import shardopt
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model, train


def sharded(model: nn.Module, optimizer_class, **options) -> ShardedOptimizer:
    options = {"kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, **options}
    return ShardedOptimizer(model.parameters(), optimizer_class, **options)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (AdamW, {"lr": 0.01, "amsgrad": True}),
        (SGD, {"lr": 0.01, "momentum": 0.9}),
        (SGD, {"lr": 0.01}),
        (Adagrad, {"lr": 0.01}),
        (Adafactor, {"lr": 0.01}),
    ],
)
def test_plain_torch_goes_on_from_a_consolidated_file(optimizer_class, options, rank, tmp_path):
    ours, theirs = make_model(), make_model()
    optimizer, twin = sharded(ours, optimizer_class, **options), optimizer_class(
        theirs.parameters(), **options
    )  # fmt: skip
    train(ours, optimizer, 0, 3)
    train(theirs, twin, 0, 3)
    step = checkpoint.save(tmp_path, step=3, model=ours, optimizer=optimizer, extra={"a": (1,)})
    if rank != 0:
        return
    assert problems(step) == []
    assert consolidate(step, tmp_path / "out.pt") == []
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same(loaded["model"], theirs.state_dict())
    assert_same(loaded["optimizer"], twin.state_dict())
    assert (loaded["step"], loaded["extra"]) == (3, {"a": (1,)})
    again = make_model(seed=1)
    again.load_state_dict(loaded["model"])
    new = optimizer_class(again.parameters(), **options)
    new.load_state_dict(loaded["optimizer"])
    train(again, new, 3, 5)
    train(theirs, twin, 3, 5)
    assert_same_parameters(again, theirs)


@on_ranks(2)
def test_vectors_over_all_parameters_are_consolidated(rank, tmp_path):
    model, plain = make_model().double(), make_model().double()
    optimizer = sharded(model, LBFGS, max_iter=3, history_size=2)
    twin = LBFGS(plain.parameters(), max_iter=3, history_size=2)
    batch = torch.randn(8, 61, generator=torch.Generator().manual_seed(0)).double()
    for net, steps in ((model, optimizer), (plain, twin)):

        def closure(net=net, steps=steps):
            steps.zero_grad()
            loss = net(batch).square().mean()
            loss.backward()
            return loss

        for _ in range(2):
            steps.step(closure)
    step = checkpoint.save(tmp_path, step=2, optimizer=optimizer)
    optimizer.consolidate_state_dict(to=None)
    if rank == 0:
        consolidate(step, tmp_path / "out.pt", only="optimizer")
        loaded = torch.load(tmp_path / "out.pt", weights_only=True)
        assert_same(loaded, optimizer.state_dict())
        twin.load_state_dict(loaded)


@on_ranks(2)
def test_the_commands_work_on_a_saved_run(rank, tmp_path):
    model = make_model()
    optimizer = sharded(model, AdamW, lr=0.01)
    for step in range(3):
        train(model, optimizer, step, step + 1)
        checkpoint.save(tmp_path / "run", step=step + 1, model=model, optimizer=optimizer)
    if rank != 0:
        return
    run, out = str(tmp_path / "run"), tmp_path / "out.safetensors"
    assert shardopt("verify", run).stdout == f"{run}/step-3: every checksum is right\n"
    about = json.loads(shardopt("inspect", run, "--json").stdout)
    assert (about["step"], about["world_size"]) == (3, 2)
    assert [group["class"] for group in about["groups"]] == ["torch.optim.AdamW"]
    assert [entry["name"] for entry in about["parameters"]] == list(model.state_dict())
    assert set(about["bytes_per_rank"]) == {"0", "1", "shared"}
    ran = shardopt("consolidate", run, out, "--format", "safetensors", "--model-only")
    assert ran.returncode == 0, ran.stderr
    assert_same(
        dict(sorted(safetensors.torch.load_file(out).items())),
        dict(sorted((name, value.detach()) for name, value in model.state_dict().items())),
    )
    ran = shardopt("diff", f"{run}/step-2", f"{run}/step-3")
    assert ran.returncode == 1
    assert "model['0.weight']: 3233 of 3233 elements differ" in ran.stdout
    assert not diff(tmp_path / "run" / "step-3", tmp_path / "run" / "step-3")
