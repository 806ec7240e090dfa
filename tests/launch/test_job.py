"""The parts of ``launch/train.py``, in one process: every optimizer and schedule, the proof."""

import importlib
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shardopt.errors import CorruptError
from tests import ROOT
from tests.launch.saved import flip_a_bit, saved, steps_in

# As in launch/choices.py; each schedule meets two optimizers.
SCHEDULERS = ("none", "cosine", "linear", "step", "onecycle", "plateau")
SOME = ("AdamW", "Adafactor", "SGD", "Rprop", "Adagrad", "NAdam")
OTHERS = ("Adam", "Adamax", "RAdam", "Adadelta", "RMSprop", "ASGD")
SPECIAL = {"Muon": "onecycle", "SparseAdam": "cosine", "LBFGS": "plateau"}
SCHEDULES = {
    **dict(zip(SOME, SCHEDULERS, strict=True)),
    **dict(zip(OTHERS, reversed(SCHEDULERS), strict=True)),
    **SPECIAL,
}
FAST = ("AdamW", "Adafactor", "Muon")
PAIRS = [
    pytest.param(*pair, marks=[] if pair[0] in FAST else [pytest.mark.slow])
    for pair in SCHEDULES.items()
]


@pytest.fixture
def launch(monkeypatch) -> SimpleNamespace:
    """The modules beside train.py, which finds them because it is run from their folder."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    names = ("corpus", "gpt", "job", "notice", "options", "proof", "ranks", "saved_run")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def alone(launch):
    return launch.ranks.Ranks(0, 1, torch.device("cpu"))


def job(launch, out: Path, *arguments: object):
    """A run of one process, about to start."""
    given = launch.options.parse(["--out", str(out), *map(str, arguments)])
    return launch.job.Job(given, alone(launch))


def test_tables_are_tried(launch):
    assert set(SCHEDULERS) == set(launch.options.SCHEDULERS)
    assert {*SCHEDULES} == set(launch.options.OPTIMIZERS)


@pytest.mark.parametrize("optimizer, scheduler", PAIRS)
def test_resumed_run_is_the_undisturbed_one(launch, tmp_path, optimizer, scheduler):
    names = ("--optimizer", optimizer, "--scheduler", scheduler)
    run = job(launch, tmp_path, *names, "--size", "tiny", "--steps", 4, "--save-every", 2)
    assert run.run() is None
    resumed = job(launch, tmp_path / "resumed", "--resume", tmp_path / "step-2")
    assert resumed.step == 2
    assert resumed.run() is None
    assert_same_end(tmp_path, tmp_path / "resumed")


def assert_same_end(one: Path, other: Path) -> None:
    """Both ended after step 4, with no bit of difference."""
    whole, again = saved(one, 4), saved(other, 4)
    assert again["step"] == 4
    assert again["extra"]["history"] == whole["extra"]["history"]
    assert again["scheduler"] == whole["scheduler"]
    assert again["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    torch.testing.assert_close(again["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(
        again["optimizer"]["state"], whole["optimizer"]["state"], rtol=0, atol=0
    )


def test_damaged_newest_step_is_passed_over_and_named(launch, tmp_path, caplog, capsys):
    run = job(launch, tmp_path, "--size", "tiny", "--steps", 4, "--save-every", 1)
    assert run.run() is None
    flip_a_bit(tmp_path / "step-4" / "__0_0.distcp")
    (tmp_path / "step-3" / "__0_0.distcp").unlink()
    resumed = job(launch, tmp_path / "resumed", "--resume", tmp_path)
    assert resumed.step == 2
    passed_over = [record.getMessage() for record in caplog.records]
    for step, message in zip((4, 3), passed_over, strict=True):
        assert message.startswith(f"passed over: {tmp_path}/step-{step}/__0_0.distcp")
    capsys.readouterr()
    assert resumed.run() is None
    assert "resumed after step 2" in capsys.readouterr().out
    whole = job(launch, tmp_path / "whole", "--size", "tiny", "--steps", 4)
    assert whole.run() is None
    assert_same_end(tmp_path / "whole", tmp_path / "resumed")


def test_no_step_that_verifies_is_refused(launch, tmp_path, caplog):
    run = job(launch, tmp_path, "--size", "tiny", "--steps", 2, "--save-every", 1)
    assert run.run() is None
    for step in (1, 2):
        flip_a_bit(tmp_path / f"step-{step}" / "manifest.json")
    with pytest.raises(launch.options.Refused, match="got 2 of which none does"):
        job(launch, tmp_path, "--resume", tmp_path)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_the_next_step_and_saves_it_once(
    launch, tmp_path, number, capsys
):
    names = ("--size", "tiny", "--steps", 4, "--save-every", 3, "--eval-every", 2)
    run, before = job(launch, tmp_path, *names), signal.getsignal(number)
    step = run._step

    def step_and_be_told():
        if run.step == 0:
            os.kill(os.getpid(), number)
        return step()

    run._step = step_and_be_told
    with pytest.raises(
        launch.notice.Interrupted, match=f"ended by {number.name}; .*/step-2 is"
    ) as end:
        run.run()
    assert end.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert steps_in(tmp_path) == ["step-2"]
    assert "step     2   training loss" in capsys.readouterr().out
    assert job(launch, tmp_path, *names, "--resume", "auto").run() is None
    assert steps_in(tmp_path) == ["step-2", "step-3", "step-4"]
    assert job(launch, tmp_path / "whole", *names).run() is None
    assert_same_end(tmp_path / "whole", tmp_path)


def test_automatic_resumption_begins_and_goes_on_and_is_done(launch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    again = ["--size", "tiny", "--steps", "4", "--save-every", "2", "--resume", "auto"]
    for step, begins in (
        (0, "a new run"),
        (2, "resumed after step 2"),
        (4, "resumed after step 4"),  # which is all: what is there is proven once more
    ):
        for path in Path("runs").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        run = launch.job.Job(launch.options.parse(again), alone(launch))
        assert run.step == step
        assert run.run() is None
        assert begins in capsys.readouterr().out
    assert steps_in(Path("runs")) == ["step-2", "step-4"]


def test_automatic_resumption_sets_damaged_steps_aside_unless_all_are(launch, tmp_path, capsys):
    again = ("--size", "tiny", "--steps", 4, "--save-every", 1, "--resume", "auto")
    assert job(launch, tmp_path, *again).run() is None
    for step in (3, 4):
        flip_a_bit(tmp_path / f"step-{step}" / "__0_0.distcp")
    run = job(launch, tmp_path, *again)
    assert run.step == 2
    told = capsys.readouterr().err
    *kept, three, four = steps_in(tmp_path)
    assert kept == ["step-1", "step-2"]
    for step, name in ((3, three), (4, four)):
        assert name.startswith(f"step-{step}.damaged-")
        assert f"{tmp_path}/step-{step} does not verify; it is now {name}" in told
    for step in (1, 2):
        flip_a_bit(tmp_path / f"step-{step}" / "__0_0.distcp")
    with pytest.raises(launch.options.Refused, match="got 2 of which none does"):
        job(launch, tmp_path, *again)
    assert steps_in(tmp_path) == [*kept, three, four]


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3]), (1, [3]), (2, [2, 3])])
def test_older_steps_go(launch, tmp_path, keep, left):
    names = ("--size", "tiny", "--steps", 3, "--save-every", 1, "--keep", keep)
    assert job(launch, tmp_path, *names).run() is None
    assert steps_in(tmp_path) == [f"step-{step}" for step in left]


def test_another_run_goes_to_another_directory(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("runs", "runs-2", "runs-3"):
        options = launch.saved_run.prepare_run({}, None, world_size=1).options
        assert (options.save, options.plot) == (place, f"{place}/curves.png")
        (tmp_path / place / "step-1").mkdir(parents=True)


def test_later_steps_are_not_overwritten(launch, tmp_path):
    names = ("--size", "tiny", "--steps", 2, "--save-every", 1)
    assert job(launch, tmp_path, *names).run() is None
    for options in (names, ("--resume", tmp_path / "step-1")):
        with pytest.raises(launch.options.Refused, match=r"later than [01], got .* step-2;"):
            job(launch, tmp_path, *options)
    resumed = job(launch, tmp_path, "--resume", tmp_path / "step-1", "--save", tmp_path / "other")
    assert resumed.run() is None
    assert steps_in(tmp_path / "other") == ["step-2"]


@pytest.mark.parametrize("gradients", ["replicated", "local", "sharded"])
def test_run_goes_on_with_gradients_of_another_kind(launch, tmp_path, gradients):
    """Of one process, unclipped, all kinds have the same bits."""
    run = job(launch, tmp_path, "--size", "tiny", "--steps", 4, "--save-every", 2, "--clip", 0)
    assert run.run() is None
    resume = ("--resume", tmp_path / "step-2", "--gradients", gradients)
    resumed = job(launch, tmp_path / "resumed", *resume)
    assert resumed.options.gradients == gradients
    assert resumed.run() is None
    whole, again = saved(tmp_path, 4), saved(tmp_path / "resumed", 4)
    torch.testing.assert_close(again["model"], whole["model"], rtol=0, atol=0)


@pytest.mark.parametrize("gradients", ["replicated", "local", "sharded"])
def test_clipping_bounds_a_step(launch, tmp_path, gradients):
    """SGD moves by at most the learning rate times the norm."""
    moved = {}
    for clip in (0, 0.01):
        names = ("--optimizer", "SGD", "--scheduler", "none", "--lr", 0.5, "--clip", clip)
        size = ("--size", "tiny", "--steps", 1, "--gradients", gradients)
        run = job(launch, tmp_path, *size, *names)
        before = torch.nn.utils.parameters_to_vector(run.model.parameters()).detach().clone()
        run._train_until(1)
        after = torch.nn.utils.parameters_to_vector(run.model.parameters()).detach()
        moved[clip] = float((after - before).norm())
    assert moved[0] > 0.1
    assert moved[0.01] == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_proof_sees_a_wrong_norm(launch, tmp_path, monkeypatch):
    run = job(launch, tmp_path, "--size", "tiny", "--steps", 1)
    clip = run.optimizer.clip_grad_norm_
    monkeypatch.setattr(run.optimizer, "clip_grad_norm_", lambda most: 1.001 * clip(most))
    assert "clip_grad_norm_ found a norm of" in run.run()


def test_proof_sees_a_wrong_mean(launch, tmp_path, monkeypatch):
    run = job(launch, tmp_path, "--size", "tiny", "--steps", 1)
    monkeypatch.setattr(run.ranks.__class__, "mean", lambda ranks, tensor: tensor * 1.000001)
    assert "elements of" in run.run()


def test_rounding_is_allowed_only_where_it_is_said(launch):
    moved, rounded = torch.full((3,), 2.0), torch.full((3,), 2.0005)
    assert launch.proof._num_different(moved, rounded, 1e-3) == 0
    assert launch.proof._num_different(moved, rounded, 1e-4) == 3
    assert launch.proof._num_different(moved, rounded) == 3
    assert launch.proof._num_different(moved, torch.full((3,), torch.nan), 1e-3) == 3


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_proof_sees_state_that_was_not_saved(launch, tmp_path, capsys, kernel):
    run = job(launch, tmp_path, "--size", "tiny", "--steps", 1, "--kernel", kernel)
    save = run._save

    def save_and_disturb():
        saved = save()
        state = next(iter(run.optimizer.optim.state.values()))
        state["exp_avg"].view(-1)[0] += 1e-3
        return saved

    run._save = save_and_disturb
    assert "1 of" in run.run()
    assert "FAILED: it loads into plain torch.optim.AdamW, but 1 of" in capsys.readouterr().out


def test_proof_reads_what_lies_on_the_disk(launch, tmp_path):
    run = job(launch, tmp_path, "--size", "tiny", "--steps", 1)
    save = run._save

    def save_and_damage():
        path = save()
        flip_a_bit(path / "__0_0.distcp")
        return path

    run._save = save_and_damage
    with pytest.raises(CorruptError, match="expected CRC32"):
        run.run()
    assert steps_in(tmp_path) == ["step-1"]
    assert list(tmp_path.glob("proof-*")) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_the_same_batch(launch, world_size):
    text = torch.arange(5000).to(torch.uint8)
    corpus = launch.corpus.Corpus(text, text, num_files=1, sha256="")
    device = torch.device("cpu")
    everybody = [launch.ranks.Ranks(rank, world_size, device) for rank in range(world_size)]

    def batch(ranks, step=3, seed=0):
        return corpus.batch(step, seed=seed, size=8, context=5, ranks=ranks)

    bytes_in, bytes_out = batch(alone(launch))
    assert bytes_in.shape == bytes_out.shape == (8, 5)
    assert torch.equal(bytes_in[:, 1:], bytes_out[:, :-1])
    for rank, ranks in enumerate(everybody):
        assert torch.equal(batch(ranks)[0], bytes_in[rank::world_size])
        assert torch.equal(batch(ranks)[1], bytes_out[rank::world_size])
    for other in (batch(alone(launch), step=4), batch(alone(launch), seed=1)):
        assert not torch.equal(other[0], bytes_in)


def test_held_out_files_are_not_read_in_training(launch):
    corpus = launch.corpus.read_corpus()
    assert 0.02 < corpus.held_out.numel() / corpus.training.numel() < 0.1
    assert corpus.sha256 == launch.corpus.read_corpus().sha256
    window = bytes(corpus.held_out[1000:1200].tolist())
    assert window not in bytes(corpus.training.tolist())
