"""``launch/train.py`` within this process, which has torch already."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT
from tests.launch.jobs import JOB, trained


@pytest.fixture
def main(monkeypatch) -> Callable[[list[str]], int]:
    """The script's ``main``."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    return importlib.import_module("train").main


@pytest.fixture
def trained_here(main, capsys) -> Callable[..., str]:
    """As ``jobs.trained``, in one process."""

    def run(out: Path, *arguments: object) -> str:
        code = main(["--device", "cpu", "--out", str(out), *map(str, arguments)])
        printed = capsys.readouterr().out
        assert code == 0
        assert "next step is equal, bit for bit" in printed
        return printed

    return run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Path:
    """``JOB`` on two ranks that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed")
    trained(out, *JOB, ranks=2)
    return out
