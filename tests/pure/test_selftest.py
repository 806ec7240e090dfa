"""The table of checks that users run, and what it says of those that fail."""

import torch

from shardopt.comm import SoloCollectives
from shardopt.selftest.__main__ import main, run
from shardopt.selftest.checks import CLASSES, all_checks
from shardopt.selftest.lab import Lab, Skipped, expect, expect_equal
from tests.bank import BANK, DEFAULTS

ALONE = Lab(SoloCollectives(), torch.device("cpu"), "nothing", None)


def fails(lab):
    expect_equal({"a": [torch.ones(3)]}, {"a": [torch.tensor([1.0, 2.0, 1.0])]}, "state")


def is_skipped(lab):
    raise Skipped("no reason")


def test_a_row_says_what_became_of_a_check(capsys):
    assert run(ALONE, {"good": lambda lab: None})
    assert not run(ALONE, {"bad": fails, "other": is_skipped, "good": lambda lab: None})
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row.split()[:2] for row in rows[:3]] == [
        ["bad", "failed"],
        ["other", "skipped"],
        ["good", "passed"],
    ]
    message = "rank 0: AssertionError: state['a'][0]: 1 of 3 elements differ"
    assert rows[0].endswith(message) and rows[1].endswith("no reason")
    assert rows[4].startswith("1 passed, 1 failed, 1 skipped, in ")


def test_every_class_of_torch_is_checked():
    ours = {BANK[name].optimizer_class for name in DEFAULTS}
    torchs = {kind.__name__ for kind in ours if kind.__module__.startswith("torch.optim")}
    assert torchs == set(CLASSES)


def test_the_quick_checks_pass_alone():
    checks = all_checks()
    quick = [name for name in checks if name.startswith(("small", "collectives", "GradScaler"))]
    assert len(quick) == 6
    assert run(ALONE, {name: checks[name] for name in quick})


def test_a_bad_device_is_refused_in_one_line(capsys):
    assert main(["--device", "tpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("selftest: device: expected") and said.count("\n") == 1


def test_expectations_can_fail():
    pairs = [(1, 2), ([1], [1, 2]), ({"a": 1}, {"b": 1}), (torch.ones(2), torch.ones(3))]
    for ours, theirs in pairs:
        try:
            expect_equal(ours, theirs, "it")
        except AssertionError as problem:
            assert str(problem).startswith("it: ")
        else:
            expect(False, f"{ours} and {theirs} passed for equal")
