"""Two minutes of ``tests/soak.py``: training under random faults ends as if undisturbed."""

import os
import time

import pytest

from tests.soak import Soak

SEED = int(os.environ.get("SHARDOPT_TEST_SEED", time.time_ns() % 10**6))


@pytest.mark.slow
def test_training_under_random_faults_ends_as_if_undisturbed(tmp_path):
    print(f"seed {SEED}")
    soak = Soak(tmp_path, SEED, every=6, steps=1000)
    soak.run(minutes=2)
    print(soak.table())
    assert soak.num_runs and sum(map(len, soak.seconds.values()))
