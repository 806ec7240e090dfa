"""What holds for every test: one thread, skipped GPU tests, the end of the ranks."""

import importlib
import os
import sys

import pytest

from tests import HELPERS

pytest.register_assert_rewrite(*HELPERS)


def pytest_configure(config: pytest.Config) -> None:
    if mutant := os.environ.get("SHARDOPT_MUTANT"):
        importlib.import_module("tests.mutants").apply(mutant)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def pytest_unconfigure(config: pytest.Config) -> None:
    if "tests.ranks" in sys.modules:  # else no test needed a rank, nor to import torch
        sys.modules["tests.ranks"].close_pools()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Ranks and workers share the cores; and results must not depend on their number."""
    import torch

    torch.set_num_threads(1)
