"""What a rank reports before a step, how it travels, and what all ranks make of it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from shardopt import Guards
from shardopt.comm import SoloCollectives
from shardopt.errors import GradientError
from shardopt.gradients.report import Report, exchange, from_bits, judge, refuse_lost, to_bits

NAMES = ["a", "b", "c"]
GOOD = Report(rounds=3, lost=0, facts=-5, present=frozenset({0, 1, 2}))
POWERS = torch.zeros(2, dtype=torch.float64)
UNUSED = Guards(find_unused_parameters=True)


class Recorded(SoloCollectives):
    """Two ranks that bring the same; what they bring is kept."""

    def all_gather_rows(self, row):
        self.row = row
        return torch.stack([row, row])


@pytest.mark.parametrize("num_parameters", [0, 1, 61, 62, 63, 124, 1000])
def test_a_report_travels_as_a_few_words(num_parameters):
    present = frozenset(i for i in range(num_parameters) if i % 3 == 0 or i > num_parameters - 3)
    report = Report(
        rounds=7,
        void=6,
        lost=2,
        facts=-(2**63),
        failed=1,
        early=1,
        more=1,
        rows=1,
        missing=5,
        num_missing=4,
        changed=-1,
        nonfinite=6,
        source=2,
        power=to_bits(-1e300),
        present=present,
    )
    collectives = Recorded()
    assert exchange(collectives, report, num_parameters) == [report, report]
    assert collectives.row.dtype is torch.int64
    assert collectives.row.numel() == 14 + num_parameters // 62 + 1


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-310, 3.5, float("inf"), float("nan")])
def test_bits_of_a_float(value):
    assert str(from_bits(to_bits(value))) == str(value)
    assert -(2**63) <= to_bits(value) < 2**63


def judged(*reports, guards=Guards()):  # noqa: B008
    return judge(reports, POWERS, NAMES, guards)


def test_present_means_present_on_any_rank():
    here, there = replace(GOOD, present=frozenset({0})), replace(GOOD, present=frozenset({2}))
    verdict = judged(here, there, guards=UNUSED)
    assert verdict.present == {0, 2} and not verdict.skips
    assert verdict.powers is POWERS


def test_a_missing_gradient_is_refused_unless_none_is_there():
    missing = replace(GOOD, present=frozenset({0, 2}), missing=2, num_missing=1)
    more = replace(GOOD, present=frozenset({0}), missing=2, num_missing=2)
    with pytest.raises(GradientError, match="none on rank 1 for parameter 'b'; let every"):
        judged(GOOD, missing)
    with pytest.raises(
        GradientError, match="none on rank 0 for parameter 'b' and 1 more; let every"
    ):
        judged(more, missing)
    nowhere = replace(GOOD, present=frozenset(), missing=1, num_missing=3)
    assert judged(nowhere, nowhere).present == frozenset()
    with pytest.raises(GradientError, match="rank 1 for parameter 'a' and 2 more"):
        judged(GOOD, nowhere)


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        (
            [GOOD, replace(GOOD, changed=2)],
            "the gradient of parameter 'b' was changed on rank 1 after",
        ),
        ([GOOD, replace(GOOD, changed=-1)], "what rank 1 has is of no use"),
        ([GOOD, replace(GOOD, changed=-2)], "on rank 1 a backward.* added to gradients that had"),
        ([replace(GOOD, rounds=4, lost=1), GOOD], r"backward\(\) on rank 0 and not on rank 1"),
        ([GOOD, GOOD, replace(GOOD, void=1, lost=1)], r"on rank 2 and not on rank 0"),
    ],
)
def test_what_is_lost_is_refused(reports, words):
    with pytest.raises(GradientError, match=words):
        refuse_lost(reports, NAMES)


def test_what_all_have_lost_is_not():
    refuse_lost([GOOD, GOOD], NAMES)
    refuse_lost([replace(GOOD, lost=2)] * 2, NAMES)


def test_what_is_not_finite(caplog):
    seen = replace(GOOD, nonfinite=2, source=2)
    unseen = replace(GOOD, nonfinite=3)
    with pytest.raises(GradientError, match="gradient of parameter 'b' from rank 1 is not finite"):
        judged(GOOD, seen, guards=Guards(nonfinite="raise"))
    with pytest.raises(GradientError, match="gradient of parameter 'b' from rank 1 is not finite"):
        judged(unseen, seen, guards=Guards(nonfinite="raise"))  # who brought it is worth more
    with pytest.raises(GradientError, match="gradient of parameter 'c' from a rank is not finite"):
        judged(unseen, GOOD, guards=Guards(nonfinite="raise"))
    with caplog.at_level(logging.WARNING, logger="shardopt"):
        assert judged(seen, GOOD, guards=Guards(nonfinite="skip")).skips
    assert "'b' from rank 1 is not finite: the step is skipped on every rank" in caplog.text
    assert not judged(GOOD, GOOD, guards=Guards(nonfinite="skip")).skips
    assert not judged(seen, GOOD).skips
