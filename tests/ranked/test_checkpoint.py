"""What one world size saves, another loads, bit for bit."""

import pytest
import torch.distributed as dist

from shardopt.checkpoint import load, save
from tests.checkpoint_runs import (
    KINDS,
    SAVED_AT,
    STEPS,
    assert_same_run,
    group_of,
    start,
    undisturbed,
)
from tests.rank_process import World
from tests.ranks import TIMEOUT, on_ranks, run_on_ranks
from tests.twins import assert_same


def save_at(size, kind, rank, directory, **options):
    """What a run of so many ranks saves; the first one's copy of it all."""
    group = group_of(size)
    if rank >= size:
        return None
    run = start(kind, group, **options).train(0, SAVED_AT)
    everything = run.everything()
    save(directory, step=SAVED_AT, model=run.model, optimizer=run.optimizer)
    return everything


def goes_on(before, after, kind, rank, world_size, directory):
    """Save at one number of ranks, load and go on at another."""
    for size in range(1, world_size + 1):
        group_of(size)
    saved = save_at(before, kind, rank, directory)
    dist.barrier()
    if rank >= after:
        return
    run = start(kind, group_of(after), seed=7)
    loaded = load(directory, model=run.model, optimizer=run.optimizer)
    assert (loaded.path, loaded.step) == (directory / f"step-{SAVED_AT}", SAVED_AT)
    everything = run.everything()
    if rank == 0:
        assert_same(everything, saved)
    if KINDS[kind].exact:
        run.train(SAVED_AT, STEPS)
        assert_same_run(run, undisturbed(kind))


@on_ranks(3)
@pytest.mark.parametrize("before, after", [(2, 3), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_world_size_goes_on_from_any_other(kind, before, after, rank, world_size, tmp_path):
    goes_on(before, after, kind, rank, world_size, tmp_path)


@pytest.mark.slow
@on_ranks(4)
@pytest.mark.parametrize("before, after", [(1, 4), (4, 3), (4, 1), (2, 4), (1, 2), (2, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_also_among_four(kind, before, after, rank, world_size, tmp_path):
    goes_on(before, after, kind, rank, world_size, tmp_path)


@on_ranks(1, 2, 3, 4)
def saves(rank, world_size, tmp_path):
    run = start("AdamW, four dtypes").train(0, SAVED_AT)
    directory = tmp_path / str(world_size)
    save(directory, step=SAVED_AT, model=run.model, optimizer=run.optimizer)


@on_ranks(1, 2, 3, 4)
def loads(before, rank, tmp_path):
    run = start("AdamW, four dtypes", seed=7)
    load(tmp_path / str(before), model=run.model, optimizer=run.optimizer)
    assert_same_run(run.train(SAVED_AT, STEPS), undisturbed("AdamW, four dtypes"))


@pytest.mark.parametrize(
    "before, after",
    [(1, 2), (2, 1), (2, 3), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_other_processes_go_on(before, after, tmp_path):
    """The ranks that load have seen nothing of what was saved but the files."""
    run_on_ranks(World(before), saves, {"tmp_path": tmp_path}, timeout=TIMEOUT)
    given = {"tmp_path": tmp_path, "before": before}
    run_on_ranks(World(after), loads, given, timeout=TIMEOUT)
