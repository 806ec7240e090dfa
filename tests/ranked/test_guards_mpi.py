"""Over MPI a rank at fault is named on every other one, within a stated time, as over gloo.

An exception on one rank ends the job: see ``test_mpi.py``.
"""

import json
import re
import time
from collections import defaultdict

import pytest

from tests.mpi_run import needs_mpi, run_job

pytestmark = [needs_mpi, pytest.mark.slow]

KINDS = ["replicated", "local", "sharded"]
DEADLINE = 2.0  # seconds, of ``mpi_faults.py``, which imports mpi4py
TO_NAME = 1.0  # seconds that the error takes once a communication has failed
SLACK = 4.0  # seconds that a busy machine may add
TO_END = 5.0  # seconds in which mpirun ends a job


def run_faults(*arguments):
    """What the job prints; and what each rank says: (fault, kind) -> rank -> [seconds, ...]."""
    output = run_job(3, "-m", "tests.mpi_faults", *arguments, timeout=120).stdout
    told = defaultdict(dict)
    for line in output.splitlines():
        if line.startswith('["'):
            fault, kind, rank, *rest = json.loads(line)
            told[fault, kind][rank] = rest
    return output, told


# -- ranks that disagree ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disagreements():
    _, told = run_faults("disagree")
    return told


AGREEMENT = "AgreementError: ranks differ in "
BYTES = "rank 1 has 'one that begins with the bytes .*', rank 0 has 'one that begins"
NAMED = {  # where replicated gradients are not those of another rank, another check comes first
    "permuted_parameters": AGREEMENT
    + r"parameter 0: rank 1 has .*\(1,\).*, rank 0 has .*\(53, 61\)",
    "other_shapes": AGREEMENT + r"parameter 2: rank 1 has .*\(50, 50\).*, rank 0 has .*\(37, 53\)",
    "another_lr": AGREEMENT + r"group 0, lr: rank 1 has 7\.0, rank 0 has 0\.001; ",
    "a_skipped_step": {
        "replicated": AGREEMENT + "the gradient of parameter 0 .*: " + BYTES,
        "local": AGREEMENT + "the number of backward passes: rank 1 has 5, rank 0 has 4; ",
    },
    "a_gradient_that_is_not_finite": {
        "replicated": AGREEMENT + "the gradient of parameter 2 .*: " + BYTES,
        "local": r"GradientError: the gradient of parameter 2 .* from rank 1 is not finite; ",
    },
    "a_flipped_bit": AGREEMENT + r"the value of parameter 5 .*: rank 1 has hash \w+, rank 0 has ",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", NAMED)
def test_ranks_that_disagree(fault, kind, disagreements):
    """At the step, or at construction, on all ranks, and none of them is ended."""
    named = NAMED[fault]
    pattern = named if isinstance(named, str) else named.get(kind, named["local"])
    told = disagreements[fault, kind]
    assert sorted(told) == [0, 1, 2]
    for seconds, error, text in told.values():
        assert re.match(pattern, f"{error}: {text}"), text
        assert seconds < TO_NAME + SLACK, text


# -- a rank that is lost ---------------------------------------------------------------------------

SILENT = r"rank 1 is gone or stopped: .* it last said it has been in step\(\), number 4, for"
LOST = {
    ("stay_away", "replicated", 1): r"rank 1 has left step\(\), number 3, .* and does not come",
    ("stay_away", "sharded", 1): r"rank 1 has left step\(\), number 3, .* and does not come",
    ("skip_a_step", "sharded", 1): r"rank 1 has (been in|left) backward\(\) after step 3, ",
    ("stop", "replicated", 1): SILENT,
    ("stop", "sharded", 0): r"who holds it \(rank 0 by default\) is gone or stopped",
}


@pytest.mark.parametrize(("fault", "kind", "culprit"), LOST)
def test_a_rank_that_is_lost(fault, kind, culprit):
    """At the deadline; then ``mpirun`` ends the job, and a rank that is stopped with it.

    Where rank 0 is stopped, so is the store in it, and nobody can say more than that.
    """
    output, told = run_faults(fault, kind, culprit)
    others = {0, 1, 2} - {culprit}
    assert others <= told[fault, kind].keys(), output
    for rank in others:
        seconds, error, text = told[fault, kind][rank]
        expected = rf"rank {rank} in [^;]*, but .*{LOST[fault, kind, culprit]}"
        assert error == "DeadlineError" and re.match(expected, text), text
        assert DEADLINE - 0.1 < seconds < DEADLINE + TO_NAME + SLACK, (seconds, text)


def test_mpirun_ends_the_job_of_a_rank_that_is_killed():
    """At once, by a signal: the others cannot tell, and what it prints does not name the rank."""
    output, told = run_faults("die", "sharded", 1)
    ended = time.time()
    assert "EXIT CODE: 9" in output and not told, output
    assert ended - float(re.search(r"killed at ([\d.]+)", output)[1]) < TO_END
