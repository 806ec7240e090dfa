"""``torch.distributed.checkpoint.state_dict`` takes the optimizer for any other."""

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Adagrad, AdamW

from shardopt import ShardedOptimizer
from shardopt.errors import StaleStateError
from tests.ranks import on_ranks
from tests.searches import Network, search
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model, train


def pair(optimizer_class, steps):
    ours, theirs = make_model(), make_model()
    optimizer = ShardedOptimizer(
        ours.parameters(), optimizer_class, kernel="torch", bucket_cap_mb=SMALL_BUCKETS
    )
    twin = optimizer_class(theirs.parameters())
    train(ours, optimizer, 0, steps)
    train(theirs, twin, 0, steps)
    return ours, optimizer, theirs, twin


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("optimizer_class", [AdamW, Adagrad])
def test_round_trip(optimizer_class, full):
    ours, optimizer, theirs, twin = pair(optimizer_class, 3)
    ours.zero_grad()  # where torch would run a phantom step() to make state
    optimizer.consolidate_state_dict(to=None)
    options = StateDictOptions(full_state_dict=full)
    saved = get_optimizer_state_dict(ours, optimizer, options=options)
    assert_same(saved, get_optimizer_state_dict(theirs, twin))
    assert {float(state["step"]) for state in saved["state"].values()} == {3.0}
    set_optimizer_state_dict(ours, optimizer, saved)
    train(ours, optimizer, 3, 5)
    train(theirs, twin, 3, 5)
    assert_same_parameters(ours, theirs)
    optimizer.consolidate_state_dict(to=None)
    assert_same(optimizer.state_dict(), twin.state_dict())


@on_ranks(2, 3)
def test_the_state_of_one_rank_reaches_all(rank):
    ours, optimizer, theirs, twin = pair(AdamW, 3)
    saved = get_optimizer_state_dict(theirs, twin)
    train(theirs, twin, 3, 4)
    train(ours, optimizer, 3, 4)
    later = get_optimizer_state_dict(theirs, twin)
    set_optimizer_state_dict(ours, optimizer, saved)
    optimizer.consolidate_state_dict(to=None)  # torch reads the shapes from every rank's state
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(ours, optimizer, later if rank == 0 else {}, options=options)
    train(ours, optimizer, 4, 6)
    train(theirs, twin, 4, 6)
    assert_same_parameters(ours, theirs)


@on_ranks(1, 2)
def test_before_any_step_there_is_no_phantom_step(world_size):
    ours, optimizer, theirs, _ = pair(AdamW, 0)
    assert get_optimizer_state_dict(ours, optimizer)["state"] == {}
    assert_same_parameters(ours, theirs)
    assert optimizer._num_steps == 0
    train(ours, optimizer, 0, 1)
    if world_size > 1:
        with pytest.raises(StaleStateError, match="consolidate_state_dict"):
            get_optimizer_state_dict(ours, optimizer)


@on_ranks(1, 2, 3)
def test_lbfgs_as_far_as_torchs_own(world_size):
    """All its state is the first parameter's; torch misses the others' unless told not to."""
    running = search(Network(), max_iter=4)
    running.step()
    ours, theirs = torch.nn.ParameterList(running.ours), torch.nn.ParameterList(running.theirs)
    running.optimizer.consolidate_state_dict(to=None)
    saved = get_optimizer_state_dict(ours, running.optimizer)
    expected = get_optimizer_state_dict(theirs, running.plain)
    torch.testing.assert_close(saved["state"], expected["state"], rtol=1e-7, atol=1e-9)
    assert saved["param_groups"] == expected["param_groups"]
    for model, optimizer in ((ours, running.optimizer), (theirs, running.plain)):
        with pytest.raises(RuntimeError, match="Missing optimizer state for parameter '1'"):
            set_optimizer_state_dict(model, optimizer, saved)
    options = StateDictOptions(strict=False)
    fresh = search(Network(), max_iter=4)
    set_optimizer_state_dict(
        torch.nn.ParameterList(fresh.ours), fresh.optimizer, saved, options=options
    )
    assert_same(fresh.saved()["state"][0], saved["state"]["0"])
