"""The parts of ``launch/train.py``, in one process: every optimizer and schedule, the proof."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import ROOT

# As in launch/choices.py; each schedule meets two optimizers.
SCHEDULERS = ("none", "cosine", "linear", "step", "onecycle", "plateau")
FAST = ("AdamW", "Adafactor", "SGD", "Rprop", "Adagrad", "NAdam")
SLOW = ("Adam", "Adamax", "RAdam", "Adadelta", "RMSprop", "ASGD")
SPECIAL = {"Muon": "onecycle", "SparseAdam": "cosine", "LBFGS": "plateau"}
PAIRS = [
    *zip(FAST, SCHEDULERS, strict=True),
    *SPECIAL.items(),
    *(
        pytest.param(optimizer, scheduler, marks=pytest.mark.slow)
        for optimizer, scheduler in zip(SLOW, reversed(SCHEDULERS), strict=True)
    ),
]


@pytest.fixture
def launch(monkeypatch) -> SimpleNamespace:
    """The modules beside train.py, which finds them because it is run from their folder."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    names = ("corpus", "gpt", "job", "options", "proof", "ranks")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def alone(launch):
    return launch.ranks.Ranks(0, 1, torch.device("cpu"))


def job(launch, out: Path, *arguments: object):
    """A run of one process, about to start."""
    given = launch.options.parse(["--out", str(out), *map(str, arguments)])
    return launch.job.Job(given, alone(launch))


def test_tables_are_tried(launch):
    assert set(SCHEDULERS) == set(launch.options.SCHEDULERS)
    assert {*FAST, *SLOW, *SPECIAL} == set(launch.options.OPTIMIZERS)


@pytest.mark.parametrize("optimizer, scheduler", PAIRS)
def test_resumed_run_is_the_undisturbed_one(launch, tmp_path, optimizer, scheduler):
    names = ("--optimizer", optimizer, "--scheduler", scheduler)
    run = job(launch, tmp_path, *names, "--size", "tiny", "--steps", 4, "--save-every", 2)
    assert run.run() is None
    whole = torch.load(tmp_path / "step-000004.pt", weights_only=True)
    resumed = job(launch, tmp_path / "resumed", "--resume", tmp_path / "step-000002.pt")
    assert resumed.step == 2
    assert resumed.run() is None
    again = torch.load(tmp_path / "resumed" / "step-000004.pt", weights_only=True)
    assert again["history"] == whole["history"]
    assert again["scheduler"] == whole["scheduler"]
    assert again["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    torch.testing.assert_close(again["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(
        again["optimizer"]["state"], whole["optimizer"]["state"], rtol=0, atol=0
    )


@pytest.mark.parametrize("gradients", ["replicated", "local", "sharded"])
def test_run_goes_on_with_gradients_of_another_kind(launch, tmp_path, gradients):
    """Of one process, unclipped, all kinds have the same bits."""
    run = job(launch, tmp_path, "--size", "tiny", "--steps", 4, "--save-every", 2, "--clip", 0)
    assert run.run() is None
    whole = torch.load(tmp_path / "step-000004.pt", weights_only=True)
    resume = ("--resume", tmp_path / "step-000002.pt", "--gradients", gradients)
    resumed = job(launch, tmp_path / "resumed", *resume)
    assert resumed.options.gradients == gradients
    assert resumed.run() is None
    again = torch.load(tmp_path / "resumed" / "step-000004.pt", weights_only=True)
    torch.testing.assert_close(again["model"], whole["model"], rtol=0, atol=0)


def test_file_without_the_kind_of_gradients_goes_on_as_it_was(launch, tmp_path):
    run = job(launch, tmp_path, "--size", "tiny", "--steps", 2, "--save-every", 1)
    assert run.run() is None
    earlier = torch.load(tmp_path / "step-000001.pt", weights_only=True)
    del earlier["options"]["gradients"], earlier["options"]["clip"]
    torch.save(earlier, tmp_path / "earlier.pt")
    options = job(launch, tmp_path, "--resume", tmp_path / "earlier.pt").options
    assert (options.gradients, options.clip) == ("replicated", 0)


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
