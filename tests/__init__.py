"""The tests are a package, so that pytest and the ranks import a test by one name."""

from pathlib import Path

# Modules with asserts that tests share; pytest rewrites those of test modules by itself.
HELPERS = tuple(
    f"tests.{path.stem}"
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "conftest", "ranks", "rank_process")
)
