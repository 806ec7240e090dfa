"""The command line: what it prints, its exit codes, and that it needs no torch to answer."""

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardopt.cli import main
from tests.checkpoints import flip, training_tree, write_checkpoint

ROOT = Path(__file__).parents[2]
TORCH_FREE = """
import sys
from shardopt.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
assert code in (0, None), code
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "numpy"}, loaded
"""


def shardopt(*arguments) -> subprocess.CompletedProcess:
    """Run the tool in this process, where torch is imported already."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(words, code or 0, out.getvalue(), err.getvalue())


def assert_fails(ran: subprocess.CompletedProcess, code: int, *texts: str) -> None:
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    for text in texts:
        assert text in ran.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory of steps: 3, 20, and one that was not finished."""
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run / "step-3", training_tree(), step=3, world_size=2)
    write_checkpoint(run / "step-20", training_tree(), step=20, world_size=3)
    (run / "step-100.tmp").mkdir()
    return run


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["verify", "--help"], ["consolidate", "--help"], ["verify"], ["inspect"],
     ["inspect", "--json"]],
)  # fmt: skip
def test_torch_is_not_imported_without_need(run, arguments):
    if arguments[0] in ("verify", "inspect") and "--help" not in arguments:
        arguments = [*arguments, str(run)]
    command = [sys.executable, "-c", TORCH_FREE, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "consolidate", "diff"])
def test_help_shows_an_example_and_the_exit_codes(command):
    ran = shardopt(command, "--help")
    assert ran.returncode == 0
    assert f"example:\n  shardopt {command} " in ran.stdout
    assert "3 corrupt, 4 incomplete" in ran.stdout


def test_inspect_prints_a_table(run):
    ran = shardopt("inspect", run / "step-20")
    assert ran.returncode == 0
    assert ran.stderr == ""
    lines = [" ".join(line.split()) for line in ran.stdout.splitlines()]
    for line in (
        "step 20", "world size 3", "run 5eed5eed", "optimizer class torch.optim.AdamW",
        "parameter dtype shape state", "other tensor dtype shape", "extra.rng uint8 5056",
        "1.weight float32 40×1000 step float32, exp_avg float32, exp_avg_sq float32, "
        "max_exp_avg_sq float32",
    ):  # fmt: skip
        assert line in lines
    size = (run / "step-20" / "rank-2.bin").stat().st_size
    assert f"rank 2 {size / 1000:.3g} kB" in lines
    (group,) = (line for line in lines if line.startswith("group 1: "))
    assert "torch.optim.AdamW, 2 parameters: lr=0.01, betas=[0.9, 0.999]" in group


def test_inspect_prints_json(run):
    ran = shardopt("inspect", run / "step-20", "--json")
    about = json.loads(ran.stdout, parse_constant=lambda name: pytest.fail(name))
    assert (about["step"], about["world_size"], about["run"]) == (20, 3, "5eed5eed")
    assert about["bytes_per_rank"] == {
        **{str(r): (run / "step-20" / f"rank-{r}.bin").stat().st_size for r in range(3)},
        "shared": 16,
    }
    tree = training_tree()
    assert about["parameters"] == [
        {
            "name": name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        for name, tensor in tree["model"].items()
    ]
    assert about["state"]["0.bias"]["exp_avg"] == {"dtype": "float32", "shape": [8]}
    assert [group["num_parameters"] for group in about["groups"]] == [3, 2]
    assert about["groups"][0]["options"]["weight_decay"] == 0.1
    assert {entry["name"] for entry in about["others"]} == {"extra.rng", "extra.empty"}


def test_the_newest_complete_step_of_several_is_taken_and_said(run):
    ran = shardopt("verify", run)
    assert ran.returncode == 0
    assert ran.stderr == f"shardopt: {run / 'step-20'}, the newest of 2\n"
    assert ran.stdout == f"{run / 'step-20'}: every checksum is right\n"
    assert shardopt("verify", run / "step-3", "--quiet").stdout == ""


def test_verify_names_what_is_corrupt_and_what_is_missing(run, tmp_path):
    step = tmp_path / "step-20"
    shutil.copytree(run / "step-20", step)
    (step / "rank-1.bin").unlink()
    ran = shardopt("verify", step)
    assert_fails(ran, 4, f"shardopt: {step}/rank-1.bin: expected a file of rank 1, got none; ")
    flip(step / "rank-0.bin", (step / "rank-0.bin").stat().st_size // 2)
    ran = shardopt("verify", step, "--quiet")
    assert_fails(ran, 3, "rank-0.bin: tensor '", "expected CRC32", "rank-1.bin: expected a file")
    for command in (("inspect",), ("consolidate", tmp_path / "out")):
        (step / "manifest.json").write_bytes(b"{}")
        ran = shardopt(command[0], step, *command[1:])
        assert_fails(ran, 3, f"{step}/manifest.json: expected a manifest of shardopt")


@pytest.mark.parametrize("command", ["inspect", "verify", "consolidate", "diff"])
def test_a_path_with_no_checkpoint_is_incomplete(tmp_path, command):
    more = [tmp_path / "out"] if command in ("consolidate", "diff") else []
    for path in (tmp_path, tmp_path / "nothing"):
        assert_fails(shardopt(command, path, *more), 4, f"shardopt: {path}: expected ")


def test_usage_errors_are_told_in_a_line(run, tmp_path):
    (tmp_path / "taken").touch()
    out = tmp_path / "out"
    assert_fails(shardopt(), 2, "usage: shardopt")
    assert_fails(shardopt("consolidate", run, out, "--format", "npz"), 2, "invalid choice: 'npz'")
    for text in ("much", "0", "1XB", "-5MB"):
        ran = shardopt(
            "consolidate", run, out, "--format", "safetensors", f"--max-shard-size={text}"
        )
        assert_fails(ran, 2, f"expected a size such as 500MB or 2GB, got '{text}'")
    ran = shardopt("consolidate", run, out, "--model-only", "--optimizer-only")
    assert_fails(ran, 2, "not allowed with argument")
    ran = shardopt("consolidate", run, out, "--max-shard-size", "1GB")
    assert_fails(ran, 2, "max_shard_size: expected a size above 0 and the format safetensors")
    assert_fails(shardopt("consolidate", run, tmp_path / "taken"), 2, "taken: expected a name")
    assert_fails(shardopt("consolidate", run, tmp_path / "no" / "out"), 2, "No such file")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_verify_of_what_has_no_checksums_says_so(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    assert_fails(shardopt("verify", tmp_path / "model.pt"), 2, "has no checksums")


def test_consolidate_writes_what_plain_torch_loads(run, tmp_path):
    ran = shardopt("consolidate", run, tmp_path / "all.pt")
    assert ran.returncode == 0
    assert "extra['window']: deque written as list" in ran.stderr
    assert torch.load(tmp_path / "all.pt", weights_only=True)["step"] == 20
    ran = shardopt("consolidate", run, tmp_path / "o.pt", "--optimizer-only", "--keys", "name")
    assert ran.returncode == 0
    assert "0.bias" in torch.load(tmp_path / "o.pt", weights_only=True)["state"]
    command = ["consolidate", run, tmp_path / "m.safetensors", "--format", "safetensors"]
    assert shardopt(*command, "--model-only", "--max-shard-size", "10kB").returncode == 0
    assert (tmp_path / "m.safetensors.index.json").exists()
    assert shardopt("verify", run).returncode == 0


def test_diff_says_by_its_exit_code_whether_they_differ(run, tmp_path):
    tree = training_tree()
    write_checkpoint(tmp_path / "same", tree, step=20, world_size=1)
    ran = shardopt("diff", run, tmp_path / "same")
    assert (ran.returncode, ran.stdout) == (0, "27 tensors are equal bit by bit, 0 differ\n")
    tree["model"]["0.bias"][3] += 0.5
    write_checkpoint(tmp_path / "other", tree, step=20)
    ran = shardopt("diff", run / "step-20", tmp_path / "other")
    assert ran.returncode == 1
    assert ran.stdout.startswith("model['0.bias']: 1 of 8 elements differ, by at most 0.5\n")


def test_the_module_is_run_by_its_name_and_errors_show_no_traceback(tmp_path):
    command = [sys.executable, "-m", "shardopt", "verify", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert_fails(ran, 4, f"shardopt: {tmp_path}: expected a checkpoint with manifest.json")


def test_a_reader_that_has_seen_enough_is_no_error(run):
    command = (
        f"{sys.executable} -m shardopt inspect --json {run} | head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.splitlines()[-1] == "0"
    assert "Traceback" not in ran.stderr and "BrokenPipe" not in ran.stderr


def test_a_closed_pipe_is_no_error(run):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "shardopt", "inspect", "--json", str(run)]
    with os.fdopen(write) as closed:
        ran = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert ran.returncode == 0
    assert ran.stderr == f"shardopt: {run / 'step-20'}, the newest of 2\n"


def test_those_who_read_no_further_hear_that_they_differ(run):
    read, write = os.pipe()
    os.close(read)
    steps = [str(run / name) for name in ("step-3", "step-20")]
    with os.fdopen(write) as closed:
        ran = subprocess.run(
            [sys.executable, "-m", "shardopt", "diff", *steps], stdout=closed, cwd=ROOT
        )
    assert ran.returncode == 1


def test_a_terminal_sees_how_far_it_is(run):
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "shardopt", "verify", str(run / "step-20")]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=ROOT)
    os.close(theirs)
    shown = os.read(mine, 1 << 16).decode()
    os.close(mine)
    assert "verify [" in shown and "%, " in shown
    assert "\x1b[K" in shown
    assert ran.stdout == f"{run / 'step-20'}: every checksum is right\n"
