"""``launch/train.py`` as a user runs it: alone, under torchrun, saved, resumed, and refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer

from shardopt import checkpoint
from tests.launch.jobs import (
    ENVIRONMENT,
    SCRIPT,
    TOLERANCE,
    Run,
    assert_same_run,
    command,
    newest_step,
    train,
    trained,
)
from tests.launch.saved import flip_a_bit, steps_in

TINY = ("--size", "tiny", "--steps", "6", "--save-every", "3", "--eval-every", "2")


def state_bytes(printed: str) -> list[int]:
    """The column of bytes in the table of memory; the last is what a replica takes."""
    rows = re.findall(r"(?:sharded|replicated) +([\d,]+)", printed)
    return [int(row.replace(",", "")) for row in rows]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, str]:
    """A run on two ranks that nobody disturbs: its directory, and what it printed."""
    out = tmp_path_factory.mktemp("two-ranks")
    return out, trained(out, *TINY, ranks=2)


def test_two_ranks_share_the_state(two_ranks):
    out, printed = two_ranks
    parameters = int(re.search(r"([\d,]+) parameters", printed).group(1).replace(",", ""))
    *by_rank, replica = state_bytes(printed)
    assert len(by_rank) == 2
    assert replica == sum(by_rank) == 8 * parameters  # two moments of four bytes
    assert max(by_rank) < 0.55 * replica
    assert re.search(r"[\d.]+ MB in \d+ files of Python's standard library", printed)
    assert re.search(r"sha256 [0-9a-f]{64}\n", printed)
    assert re.findall(r"^step +(\d)", printed, re.MULTILINE) == ["0", "2", "4", "6"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert steps_in(out) == ["step-3", "step-6"]


def test_one_process_goes_on_from_two_ranks(two_ranks, tmp_path, trained_here):
    out, _ = two_ranks
    printed = trained_here(tmp_path, "--resume", out / "step-3")
    assert "resumed after step 3, 6 steps in all, on 1 process" in printed
    assert_same_run(out, tmp_path, tolerance=TOLERANCE)


@pytest.mark.slow
def test_two_ranks_go_on_from_two_ranks(two_ranks, tmp_path):
    out, _ = two_ranks
    trained(tmp_path, "--resume", out / "step-3", ranks=2)
    assert_same_run(out, tmp_path, tolerance=0)


ENDLESS = ("--size", "tiny", "--scheduler", "none", "--save-every", "3", "--eval-every", "1")


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run on two ranks, of which one was killed some time after step 3: its directory."""
    out = tmp_path_factory.mktemp("killed")
    line = command("--out", out, *ENDLESS, "--steps", 100_000, ranks=2)
    with Run(line, out, ENVIRONMENT) as run:
        run.wait_for_a_step([3], seed=0)
        os.kill(run.ranks()[1], signal.SIGKILL)
        assert run.ended(60) != 0
    return out


@pytest.mark.slow
def test_killed_run_goes_on_in_one_process(killed, tmp_path, trained_here):
    """From the step that it completed, as if undisturbed; what it did not complete is removed."""
    out = shutil.copytree(killed, tmp_path / "out")
    (out / "step-999.tmp-0a1b").mkdir()  # as if it had been in the midst of a save
    last = newest_step(out)
    end = ("--steps", last + 3)
    printed = trained_here(out, "--resume", out, *end)
    assert f"resumed after step {last}, {last + 3} steps in all, on 1 process" in printed
    assert set(steps_in(out)) == {f"step-{step}" for step in range(3, last + 4, 3)}
    trained_here(tmp_path / "whole", *ENDLESS, *end)
    assert_same_run(tmp_path / "whole", out, tolerance=TOLERANCE, step=last + 3)


@pytest.mark.slow
def test_killed_run_goes_on_on_three_ranks(killed, tmp_path, trained_here):
    last = newest_step(killed)
    end = ("--steps", last + 3)
    trained(tmp_path / "3", "--resume", killed, *end, ranks=3)
    trained_here(tmp_path / "whole", *ENDLESS, *end)
    assert_same_run(tmp_path / "whole", tmp_path / "3", tolerance=TOLERANCE, step=last + 3)


@pytest.mark.slow
def test_averaged_gradients_are_those_of_ddp(two_ranks, tmp_path):
    """Two terms have one sum; what differs is the rounding of the norm that clips them."""
    out, printed = two_ranks
    assert "gradients  sharded, clipped to a norm of 1" in printed
    run = out / "step-3"
    printed = trained(tmp_path, "--resume", run, "--gradients", "replicated", ranks=2)
    assert "gradients  replicated" in printed
    assert_same_run(out, tmp_path, tolerance=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["replicated", "local", "sharded"])
def test_three_ranks(gradients, two_ranks, tmp_path):
    """They go on from two ranks, and from three without a bit of difference."""
    out, _ = two_ranks
    kind = ("--gradients", gradients)
    trained(tmp_path / "2-3", "--resume", out / "step-3", *kind, ranks=3)
    assert_same_run(out, tmp_path / "2-3", tolerance=TOLERANCE)
    trained(tmp_path / "3", *TINY, *kind, ranks=3)
    assert_same_run(out, tmp_path / "3", tolerance=TOLERANCE)
    trained(tmp_path / "3-3", "--resume", tmp_path / "3" / "step-3", ranks=3)
    assert_same_run(tmp_path / "3", tmp_path / "3-3", tolerance=0)


@pytest.mark.slow
def test_default_model_learns(tmp_path):
    """A good deal better than the frequencies of bytes, which take 4.5 bits a byte."""
    printed = trained(tmp_path, "--steps", 150, ranks=2)
    bits = [float(found) for found in re.findall(r"= ([\d.]+) bits a byte", printed)]
    assert bits[0] > 7
    assert bits[-1] < 4


EVERY_CLASS = [
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", EVERY_CLASS)
def test_every_class_of_torch_is_there(optimizer, tmp_path):
    checked = train("--check", "--optimizer", optimizer, "--out", tmp_path)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", EVERY_CLASS)
def test_every_class_of_torch_trains_on_two_ranks(optimizer, tmp_path):
    """A few steps, and the proof against the plain class."""
    rounded = optimizer in ("Muon", "LBFGS")
    how = "but for the rounding of" if rounded else "bit for bit"
    printed = trained(tmp_path, "--optimizer", optimizer, *TINY, ranks=2, how=how)
    assert re.search(rf"^optimizer  {optimizer}( and AdamW)?, lr", printed, re.MULTILINE)
    first, last = re.search(r"held-out loss ([\d.]+) -> ([\d.]+) nats", printed).groups()
    assert float(last) < float(first)


BAD_OPTIONS = {
    "--optimizer AdamQ": "got 'AdamQ'; did you mean Adam?",
    "--optimizer SparseAdam --gradients replicated": "--gradients: expected local or sharded",
    "--optimizer LBFGS --clip 1": "--clip: expected 0 with LBFGS",
    "--scheduler cosin": "did you mean cosine?",
    "--steps -3": "--steps: expected a whole number of at least 1, got '-3'",
    "--steps many": "got 'many'",
    "--batch 0": "--batch: expected a whole number of at least 1",
    "--lr nan": "--lr: expected a number above 0, got 'nan'",
    "--weight-decay -0.1": "--weight-decay: expected a number of at least 0",
    "--gradients shard": "expected one of replicated, local, sharded, got 'shard'; did you mean",
    "--clip -1": "--clip: expected a number of at least 0, got '-1'",
    "--optimizer Rprop --weight-decay 0.1": "Rprop, which has no such option",
    "--size": "--size: expected one argument",
    "--bathc 3": "unrecognized arguments: --bathc 3; python launch/train.py --help",
    "--plot curves.jpg": "ends in .png, got 'curves.jpg'",
    "--check --out {file}": "--out: expected a directory that can be written",
    "--check --resume {none}": "which does not exist; correct the path",
    "--check --resume {empty}": "got none in",
    "--resume {file}": "which is a file; name the directory",
    "--keep few": "--keep: expected a whole number of at least 0",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_get_one_line(options, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("file", "empty", "none")}
    refused = train("--out", tmp_path / "out", *options.format(**places).split())
    assert_one_line(refused, BAD_OPTIONS[options])


def assert_one_line(refused: subprocess.CompletedProcess, says: str) -> None:
    assert refused.returncode == 2, refused.stderr
    assert refused.stdout == ""
    assert re.fullmatch(r"train\.py: error: .+\n", refused.stderr), refused.stderr
    assert says in refused.stderr


def refuses(main, capsys, says: str, *arguments: object) -> None:
    """One line, on stderr."""
    code, shown = main(list(map(str, arguments))), capsys.readouterr()
    refused = subprocess.CompletedProcess(arguments, code, shown.out, shown.err)
    assert_one_line(refused, says)


def test_resuming_another_run_gets_one_line(two_ranks, tmp_path, main, capsys):
    out, _ = two_ranks
    run = out / "step-3"
    torch.save({}, tmp_path / "step-000003.pt")
    other = checkpoint.save(tmp_path / "other", step=3, extra={"options": {"size": "tiny"}})
    for says, *options in (
        ("--size: expected tiny", "--resume", run, "--size", "small"),
        ("--clip: expected 1.0, with which", "--resume", run, "--clip", 2),
        ("step-3, which is none; name another", "--resume", other),
        ("step-000003.pt, which is a file", "--resume", tmp_path / "step-000003.pt"),
        ("over which the cosine schedule", "--resume", run, "--steps", 60),
        ("there is nothing left to train", "--resume", out),
    ):
        refuses(main, capsys, says, "--check", "--out", tmp_path / "out", *options)
    later = "expected a directory without saved steps later than 3"
    refuses(main, capsys, later, "--check", "--out", out, "--resume", run)


def damaged(step: Path, name: str, how: str) -> None:
    """Damage one file of a step."""
    path = step / name
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        flip_a_bit(path)


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("manifest.json", "flipped", "manifest.json: expected CRC32"),
        ("__1_0.distcp", "flipped", "expected CRC32"),
        ("__1_0.distcp", "cut", "bytes, got 100000"),
        ("__1_0.distcp", "gone", "expected a file of the checkpoint, got none"),
    ],
)
def test_damaged_step_gets_one_line(two_ranks, tmp_path, main, capsys, name, how, says):
    out, _ = two_ranks
    step = shutil.copytree(out / "step-3", tmp_path / "step-3")
    damaged(step, name, how)
    where = ("--device", "cpu", "--out", tmp_path / "out")
    refuses(main, capsys, says, *where, "--resume", step)
    assert steps_in(tmp_path / "out") == []


@pytest.mark.slow
def test_two_ranks_refuse_a_damaged_step_with_one_voice(two_ranks, tmp_path):
    out, _ = two_ranks
    step = shutil.copytree(out / "step-3", tmp_path / "step-3")
    flip_a_bit(step / "__1_0.distcp")
    refused = train("--resume", step, "--out", tmp_path / "out", ranks=2)
    assert refused.returncode != 0
    assert refused.stderr.count("train.py: error: --resume: ") == 1
    assert "expected CRC32" in refused.stderr


def test_only_one_rank_refuses():
    refused = train("--batch", 1, ranks=2)
    assert refused.returncode != 0
    assert refused.stderr.count("train.py: error: --batch: expected at least 2 windows") == 1


def test_missing_packages_get_one_line():
    """``-S`` hides what is installed, torch too."""
    refused = subprocess.run(
        [sys.executable, "-E", "-S", str(SCRIPT)], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("train.py: error: expected the package torch")
    assert refused.stderr.count("\n") == 1


def test_help_needs_no_torch():
    shown = subprocess.run(
        [sys.executable, "-E", "-S", str(SCRIPT), "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    for option in ("--optimizer", "--scheduler", "--resume", "--gradients", "--clip", "--keep"):
        assert option in shown.stdout
