"""torch's schedulers, unchanged, over ShardedOptimizer: equal to the unsharded run, bit for bit."""

import copy
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, StepLR

from tests.ranks import on_ranks
from tests.scheduler_bank import CYCLING, EPOCHS, HALF, ROWS, Decay, Row
from tests.scheduler_runs import assert_alive, assert_same, set_gradients, start

WITH_LAST_EPOCH = [
    name for name, row in ROWS.items() if "last_epoch" in row.scheduler.__init__.__annotations__
]
KERNELS = {
    # name: (algorithm, options of ours, options under which plain torch gives the same bits)
    "SGD fused": ("SGD", {"fused": True}, {"fused": True}),
    "SGD foreach": ("SGD", {"foreach": True}, {"foreach": True}),
    "SGD auto": ("SGD", {"kernel": "auto"}, {}),  # with momentum it chooses no fused kernel
    "AdamW fused": ("AdamW", {"fused": True}, {"fused": True}),
    "AdamW foreach": ("AdamW", {"foreach": True}, {"foreach": True}),
    "AdamW auto": ("AdamW", {"kernel": "auto"}, {"fused": True}),
}
WORDS_OF_WRONG_ORDER = r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`"


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("algorithm", CYCLING)
@pytest.mark.parametrize("row", ROWS)
def test_matches_unsharded(row, algorithm):
    """lr, momentum, betas, parameters after every epoch, and the scheduler's state at the end."""
    ours = start(row, algorithm, sharded=True).train(range(EPOCHS))
    twin = start(row, algorithm, sharded=False).train(range(EPOCHS))
    assert_same(ours, twin)
    assert ours.saved()["scheduler"] == twin.saved()["scheduler"]


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("algorithm", CYCLING)
def test_every_rank_has_but_a_part(algorithm, world_size):
    """The guard of this file: what is compared above was in truth cut over the ranks."""
    ours = start("StepLR gamma", algorithm, sharded=True).train(range(2))
    held = sum(
        value.numel()
        for state in ours.optimizer.optim.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.ndim
    )
    states_per_element = {"SGD": 1, "AdamW": 2}[algorithm]
    total = states_per_element * sum(parameter.numel() for parameter in ours.parameters)
    assert 0 < held < total if world_size > 1 else held >= total - states_per_element


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("row", ROWS)
def test_resume_from_state_dicts(row):
    """Saved half-way and gone on with in fresh objects, as if never interrupted."""
    whole = start(row, "AdamW", sharded=False).train(range(EPOCHS))
    saved = start(row, "AdamW", sharded=True).train(range(HALF)).saved()
    resumed = start(row, "AdamW", sharded=True, saved=saved)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.scheduler.load_state_dict(saved["scheduler"])
    resumed.train(range(HALF, EPOCHS))
    whole.seen = whole.seen[HALF:]
    for (our_groups, our_values), (groups, values) in zip(resumed.seen, whole.seen, strict=True):
        assert our_groups == groups
        assert all(map(torch.equal, our_values, values))
    assert resumed.saved()["scheduler"] == whole.saved()["scheduler"]


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("row", WITH_LAST_EPOCH)
def test_resume_with_last_epoch(row):
    """``last_epoch=`` goes on from the ``initial_lr`` that the optimizer's state dict carries."""
    ours, twin = start(row, "SGD", sharded=True), start(row, "SGD", sharded=False)
    for run in (ours, twin):
        saved = run.train(range(HALF)).saved()
        sharded = run is ours
        fresh = start(row, "SGD", sharded=sharded, saved=saved)
        fresh.optimizer.load_state_dict(saved["optimizer"])
        run.scheduler = ROWS[row].build(fresh.optimizer, last_epoch=HALF - 1)
        run.optimizer, run.parameters = fresh.optimizer, fresh.parameters
        assert run.scheduler.last_epoch in (HALF, HALF - 1)
        run.train(range(HALF, EPOCHS))
    assert_same(ours, twin)


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("row", ROWS)
def test_lr_held_in_a_tensor(row):
    """A scheduler writes into the lr tensor of each group in place; the shards see it."""
    ours = start(row, "SGD", sharded=True, tensor_lr=True)
    tensors = [group["lr"] for group in ours.optimizer.param_groups]
    twin = start(row, "SGD", sharded=False, tensor_lr=True).train(range(EPOCHS))
    assert_same(ours.train(range(EPOCHS)), twin)
    for group, tensor in zip(ours.optimizer.param_groups, tensors, strict=True):
        assert group["lr"] is tensor


@on_ranks(1, 2, 3, slow=[3], also_on_gpu=True)
@pytest.mark.parametrize("choice", KERNELS)
@pytest.mark.parametrize("row", ["CyclicLR momentum lists", "OneCycleLR lists"])
def test_every_kernel_follows_momentum_and_betas(row, choice, device):
    """Each reads the cycled momentum or betas anew at every step."""
    algorithm, options, twin_options = KERNELS[choice]
    ours = start(row, algorithm, sharded=True, device=device, **options).train(range(EPOCHS))
    twin = start(row, algorithm, sharded=False, device=device, **twin_options).train(range(EPOCHS))
    assert_same(ours, twin)


@on_ranks(1, 2, 3, slow=[3])
def test_lambda_state_keeps_objects_and_drops_lambdas():
    """A callable object's attributes are saved and come back; a lambda leaves None."""
    row = Row("mixed", LambdaLR, {"lr_lambda": [Decay(0.5), lambda epoch: 0.9**epoch]})
    state = start(row, "SGD", sharded=True).train(range(3)).saved()["scheduler"]
    assert state["lr_lambdas"] == [{"rate": 0.5, "calls": 4}, None]

    other_rate = Row("other", LambdaLR, {"lr_lambda": [Decay(0.1), lambda epoch: 0.9**epoch]})
    resumed = start(other_rate, "SGD", sharded=True)
    kept = resumed.scheduler.lr_lambdas[1]
    resumed.scheduler.load_state_dict(copy.deepcopy(state))
    assert vars(resumed.scheduler.lr_lambdas[0]) == {"rate": 0.5, "calls": 4}
    assert resumed.scheduler.lr_lambdas[1] is kept
    assert resumed.scheduler.last_epoch == 3


@on_ranks(1, 2, 3, slow=[3])
def test_wrong_order_warns():
    """``scheduler.step()`` before the first ``optimizer.step()`` skips a value: torch's warning."""
    run = start("StepLR gamma", "SGD", sharded=True)
    with pytest.warns(UserWarning, match=WORDS_OF_WRONG_ORDER):
        run.scheduler.step()


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("closure", [False, True])
def test_right_order_does_not_warn(closure):
    """No warning for the right order, be ``step`` called alone or with a closure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = start("StepLR gamma", "SGD", sharded=True)
        for epoch in range(3):
            set_gradients(run.parameters, epoch)
            run.optimizer.step((lambda: torch.tensor(1.0)) if closure else None)
            run.scheduler.step()
            run.seen.append(([(rate,) for rate in run.scheduler.get_last_lr()], run.values()))
    assert_alive(run)


@on_ranks(1, 2, 3, slow=[3])
@pytest.mark.parametrize("algorithm", CYCLING)
def test_get_lr_of_cyclic_lr_moves_the_momentum(algorithm):
    """``CyclicLR.get_lr`` counts ``last_epoch`` as the batch and cycles momentum on the side."""
    seen = []
    for sharded in (True, False):
        run = start("CyclicLR momentum", algorithm, sharded=sharded).train(range(1))
        before = run.seen[-1][0]
        run.scheduler.last_epoch = 2  # the peak: lr is max_lr, momentum is base_momentum
        with pytest.warns(UserWarning, match="get_last_lr"):
            rates = run.scheduler.get_lr()
        after = [
            group.get("betas", [group.get("momentum")])[0] for group in run.optimizer.param_groups
        ]
        assert rates == pytest.approx([0.1, 0.1])
        assert after == pytest.approx([0.5, 0.5])
        assert [group[0] for group in before] == [
            float(g["lr"]) for g in run.optimizer.param_groups
        ]
        seen.append((rates, after))
    assert seen[0] == seen[1]


@on_ranks(1, 2, 3, slow=[3])
def test_a_class_without_momentum_is_refused_as_torch_does():
    """CyclicLR reads ``defaults``, so they must be those of the inner class."""
    row = Row("off", CyclicLR, {"base_lr": 0.01, "max_lr": 0.1})
    for sharded in (True, False):
        with pytest.raises(ValueError, match="must support momentum or beta1"):
            start(row, "Adagrad", sharded=sharded)


@on_ranks(1, 2, 3, slow=[3])
def test_two_schedulers_over_one_optimizer():
    """Each patches ``step`` at most once, and both drive the same groups."""
    runs = []
    for sharded in (True, False):
        run = start("StepLR gamma", "SGD", sharded=sharded)
        second = StepLR(run.optimizer, step_size=1, gamma=0.9)
        for epoch in range(HALF):
            run.train(range(epoch, epoch + 1))
            second.step()
        runs.append(run)
    assert_same(*runs)
