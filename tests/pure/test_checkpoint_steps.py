"""A step is complete or absent, whoever commits and gives up at the same moment."""

import os
import random
import shutil
import time

import pytest

from shardopt.checkpoint.steps import NewStep, steps_in, write_synced
from shardopt.errors import CheckpointError
from tests.forks import FORKS

FILES = [f"file-{number}" for number in range(8)]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def write(new):
    for name in FILES:
        write_synced(new.temporary / name, name.encode() * 100)


def begun(directory, step=5, run="one"):
    new = NewStep(directory, step, run)
    new.begin()
    new.enter()
    write(new)
    return new


def test_a_step_appears_whole_and_is_not_overwritten(tmp_path):
    new = begun(tmp_path)
    assert steps_in(tmp_path) == []
    new.commit()
    assert names(tmp_path) == ["step-5"] and names(tmp_path / "step-5") == FILES
    with pytest.raises(CheckpointError, match="never overwritten"):
        NewStep(tmp_path, 5, "two").begin()
    new.give_up()
    NewStep(tmp_path, 5, "two").give_up()
    assert names(tmp_path) == ["step-5"] and names(tmp_path / "step-5") == FILES


def test_what_is_given_up_leaves_nothing_and_cannot_be_committed(tmp_path):
    new = begun(tmp_path)
    new.give_up()
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        new.commit()
    assert names(tmp_path) == []


def test_the_next_attempt_removes_what_a_killed_one_has_left(tmp_path):
    begun(tmp_path, 5)
    begun(tmp_path / "other", 7).temporary.rename(tmp_path / "step-3.gone-12ab")
    (tmp_path / "other").rmdir()
    (tmp_path / "step-notes").mkdir()  # somebody else's
    (tmp_path / "step-4").mkdir()
    NewStep(tmp_path, 6, "two").begin()
    assert names(tmp_path) == ["step-4", "step-notes"]


def test_a_rank_of_an_earlier_job_takes_nothing_from_a_later_one(tmp_path):
    """It has slept while its job was restarted, and wakes up within the same step."""
    old = begun(tmp_path, run="old")
    new = begun(tmp_path, run="new")
    with pytest.raises(FileNotFoundError):
        old.commit()
    old.give_up()
    with pytest.raises(FileNotFoundError):
        write_synced(old.temporary / "late", b"")
    new.commit()
    old.give_up()
    assert names(tmp_path) == ["step-5"] and names(tmp_path / "step-5") == FILES


def test_a_file_written_while_others_give_up_goes_with_the_last_of_them(tmp_path):
    """Whoever still writes holds the directory by a descriptor, so to speak; then gives up too."""
    new = begun(tmp_path)
    opened = (new.temporary / "still open").open("xb")
    here = os.open(new.temporary, os.O_RDONLY)
    gone = tmp_path / "step-5.gone-0001"
    new.temporary.rename(gone)
    os.close(os.open("created late", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    opened.write(b"more")
    opened.close()
    new.give_up()
    assert names(tmp_path) == []


def test_giving_up_hides_no_error(tmp_path):
    """Where nothing can be removed, since the directory is a file."""
    (tmp_path / "run").write_bytes(b"")
    new = NewStep(tmp_path / "run", 5, "one")
    with pytest.raises(FileExistsError):
        new.begin()
    new.give_up()
    assert (tmp_path / "run").read_bytes() == b""


def test_the_step_just_saved_is_kept_though_it_is_behind(tmp_path):
    for step in (10, 20, 30):
        begun(tmp_path, step).commit()
    new = begun(tmp_path, 15)
    new.commit()
    new.keep_last(2)
    assert names(tmp_path) == ["step-15", "step-20", "step-30"]


ROUNDS = 150


def take_part(role, directory, barrier):
    draw = random.Random(role + str(os.getpid()))
    for number in range(ROUNDS):
        new = NewStep(directory, number, "one")
        if role == "first":
            new.begin()
            new.enter()
            write(new)
        barrier.wait(60)
        time.sleep(draw.uniform(0, 0.004))
        try:
            if role == "first":
                new.commit()
                write_synced(directory / f"committed-{number}", b"")
            elif role == "writer":
                write_synced(new.temporary / "rank-2", b"x" * 1000)
                raise RuntimeError("and hears that another has failed")
            else:
                raise RuntimeError("its peer is gone")
        except (RuntimeError, OSError):
            new.give_up()
        barrier.wait(60)


def test_processes_that_commit_write_and_give_up_at_once(tmp_path):
    roles = ["first", "gives up", "gives up", "writer"]
    barrier = FORKS.Barrier(len(roles))
    processes = [FORKS.Process(target=take_part, args=(role, tmp_path, barrier)) for role in roles]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    committed = {path.name for path in tmp_path.glob("committed-*")}
    for name in committed:
        (tmp_path / name).unlink()
    steps = steps_in(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in steps)  # no debris
    assert {f"committed-{path.name.split('-')[1]}" for path in steps} == committed
    for path in steps:
        assert set(FILES) <= {file.name for file in path.iterdir()}, path
        shutil.rmtree(path)
    assert 0 < len(committed) < ROUNDS  # else nobody was ever first
