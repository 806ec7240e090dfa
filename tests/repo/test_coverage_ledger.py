"""docs/torch-optim-coverage.md cannot lie: complete, and every test that it names exists.

So do those that docs/reliability.md names.
"""

import ast
import inspect
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

from shardopt import ShardedOptimizer
from tests.repo.source import ROOT

LEDGER = (ROOT / "docs" / "torch-optim-coverage.md").read_text()
FAULTS = (ROOT / "docs" / "reliability.md").read_text()

# The constructors as that edition prints them. What has no default is required.
EDITION = {
    "Adadelta": "params, lr=1.0, rho=0.9, eps=1e-06, weight_decay=0",
    "Adagrad": "params, lr=0.01, lr_decay=0, weight_decay=0, initial_accumulator_value=0",
    "Adam": "params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, amsgrad=False",
    "AdamW": "params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False",
    "SparseAdam": "params, lr=0.001, betas=(0.9, 0.999), eps=1e-08",
    "Adamax": "params, lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0",
    "ASGD": "params, lr=0.01, lambd=0.0001, alpha=0.75, t0=1000000.0, weight_decay=0",
    "LBFGS": "params, lr=1, max_iter=20, max_eval=None, tolerance_grad=1e-05, "
    "tolerance_change=1e-09, history_size=100, line_search_fn=None",
    "RMSprop": "params, lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0, centered=False",
    "Rprop": "params, lr=0.01, etas=(0.5, 1.2), step_sizes=(1e-06, 50)",
    "SGD": "params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False",
    "LambdaLR": "optimizer, lr_lambda, last_epoch=-1",
    "StepLR": "optimizer, step_size, gamma=0.1, last_epoch=-1",
    "MultiStepLR": "optimizer, milestones, gamma=0.1, last_epoch=-1",
    "ExponentialLR": "optimizer, gamma, last_epoch=-1",
    "CosineAnnealingLR": "optimizer, T_max, eta_min=0, last_epoch=-1",
    "ReduceLROnPlateau": "optimizer, mode='min', factor=0.1, patience=10, verbose=False, "
    "threshold=0.0001, threshold_mode='rel', cooldown=0, min_lr=0, eps=1e-08",
    "CyclicLR": "optimizer, base_lr, max_lr, step_size_up=2000, step_size_down=None, "
    "mode='triangular', gamma=1.0, scale_fn=None, scale_mode='cycle', cycle_momentum=True, "
    "base_momentum=0.8, max_momentum=0.9, last_epoch=-1",
}
METHODS = {
    "Optimizer": [
        "add_param_group(param_group)",
        "load_state_dict(state_dict)",
        "state_dict()",
        "step(closure)",
        "zero_grad()",
    ],
    "LambdaLR": ["load_state_dict(state_dict)", "state_dict()"],
    "CyclicLR": ["get_lr()"],
}
OPTIMIZERS = [name for name in EDITION if hasattr(torch.optim, name)]
NUM_WARNINGS, NUM_NOTES, NUM_EXAMPLES = 4, 4, 11  # in the whole edition
NOTHING = "-"

DIFFERENCES = "Where that edition and today's torch differ"
CAME_SINCE = "Arguments that came since"
SINCE = {"foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}
AS_PINNED = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the ledger lists those of torch 2.13"
)


def edition_arguments(name: str) -> dict[str, str]:
    """Argument -> the text of its default, of a class in that edition."""
    arguments = ast.parse(f"def constructor({EDITION[name]}): ...").body[0].args
    defaults = [ast.unparse(value) for value in arguments.defaults]
    required = ["required"] * (len(arguments.args) - len(defaults))
    return {a.arg: d for a, d in zip(arguments.args, required + defaults, strict=True)}


def todays_arguments(name: str) -> dict[str, str]:
    """The same of the torch at hand."""
    today = getattr(torch.optim, name, None) or getattr(lr_scheduler, name)
    return {
        argument: "required" if p.default is p.empty else repr(p.default)
        for argument, p in inspect.signature(today).parameters.items()
    }


def sections() -> dict[str, list[list[str]]]:
    """Heading -> the rows of the table below it, cell by cell."""
    found = {}
    for section in re.split(r"^#{2,3} ", LEDGER, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
        found[heading] = [[cell.strip() for cell in row] for row in rows[1:]]
    return found


def named_tests(text: str) -> list[str]:
    return re.findall(r"`([^`]+\.py::[^`]+)`", text)


@pytest.mark.parametrize("name", ["Optimizer", *EDITION])
def test_every_class_argument_and_method_has_a_row(name):
    arguments = ["params", "defaults"] if name == "Optimizer" else list(edition_arguments(name))
    methods = METHODS.get(name, ["step(closure)"] if name in OPTIMIZERS else [])
    items = [row[0] for row in sections()[name]]
    for item in [*arguments, *methods]:
        assert items.count(f"`{item}`") == 1, f"{name}: {item}"
    assert name == "Optimizer" or f"`{name}`" in items


def test_every_note_warning_and_example_has_a_row():
    items = [row[0] for rows in sections().values() for row in rows]
    assert sum(item.startswith("warning") for item in items) == NUM_WARNINGS
    assert sum(item.startswith("note") for item in items) == NUM_NOTES
    assert sum(item.startswith("example") for item in items) == NUM_EXAMPLES


def test_every_row_names_a_test():
    rows = [row for head, rows in sections().items() if head != DIFFERENCES for row in rows]
    assert len(rows) > 150
    assert [row for row in rows if not named_tests(row[-1])] == []
    assert "`<" not in LEDGER  # a test that is still to be named


def test_every_test_named_exists():
    named = set(named_tests(LEDGER + FAULTS))
    assert len(named) > 150
    files = sorted({f"tests/{name.partition('::')[0]}" for name in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listing = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert listing.returncode == 0, listing.stdout + listing.stderr
    collected = listing.stdout.splitlines()
    assert sorted(name for name in named if not exists(name, collected)) == []


def exists(name: str, collected: list[str]) -> bool:
    """Whether ``file::test[parameters]`` is collected; further parameters may follow."""
    test, _, parameters = f"tests/{name}".rstrip("]").partition("[")
    pattern = re.escape(test)
    if parameters:
        pattern += r"\[" + re.escape(parameters).replace(r"\*", ".*") + r"(-.*)?\]"
    lines = (line for line in collected if line.startswith(test))
    return any(re.fullmatch(pattern + r"(\[.*\])?", line) for line in lines)


def test_what_does_not_exist_is_found():
    collected = ["tests/ranked/test_a.py::test_b[StepLR gamma-SGD-ranks1]", "tests/pure/c.py::d"]
    for name in (
        "ranked/test_a.py::test_b",
        "ranked/test_a.py::test_b[StepLR gamma]",
        "pure/c.py::d",
    ):
        assert exists(name, collected)
    for name in ("ranked/test_a.py::test_", "ranked/test_a.py::test_b[StepLR]", "pure/c.py::d[x]"):
        assert not exists(name, collected)


def differences() -> dict[tuple[str, str], tuple[str, str]]:
    """Class and argument -> its default in that edition, and today's."""
    found = {}
    for name in EDITION:
        then, now = edition_arguments(name), todays_arguments(name)
        for argument in dict.fromkeys([*then, *now]):
            pair = then.get(argument, NOTHING), now.get(argument, NOTHING)
            if value_of(pair[0]) != value_of(pair[1]):
                found[name, argument] = pair
    return found


@AS_PINNED
def test_differences_are_these():
    rows = sections()[DIFFERENCES]
    listed = {row[0].strip("`"): (row[1].strip("`"), row[2].strip("`")) for row in rows}
    assert listed == {
        f"{name}({argument}=)": pair
        for (name, argument), pair in differences().items()
        if argument not in SINCE
    }


@AS_PINNED
def test_arguments_that_came_since_are_these():
    listed = {row[0].strip("`"): set(row[1].split(", ")) for row in sections()[CAME_SINCE]}
    computed: dict[str, set[str]] = {}
    for name, argument in differences():
        if argument in SINCE:
            computed.setdefault(name, set()).add(argument)
    assert listed == computed


def value_of(text: str) -> object:
    """``0`` and ``0.0`` are one default."""
    return text if text in (NOTHING, "required") else ast.literal_eval(text)


@pytest.mark.parametrize("name", EDITION)
def test_arguments_of_that_edition_keep_their_order(name):
    """So that what was passed by position then means the same now, dropped arguments apart."""
    now = list(todays_arguments(name))
    kept = [argument for argument in edition_arguments(name) if argument in now]
    assert [argument for argument in now if argument in kept] == kept


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_of_today_win(name):
    """Without options a group holds what it holds in the torch at hand."""
    optimizer_class = getattr(torch.optim, name)
    parameter = Parameter(torch.ones(3))
    (plain,) = optimizer_class([Parameter(torch.ones(3))]).param_groups
    (sharded,) = ShardedOptimizer([parameter], optimizer_class).param_groups
    assert {k: v for k, v in sharded.items() if k != "params"} == {
        k: v for k, v in plain.items() if k != "params"
    }
