"""The tests are a package, so that pytest and the ranks import a test by one name."""

from pathlib import Path

ROOT = Path(__file__).parents[1]

# Modules with asserts that tests share; pytest rewrites those of test modules by itself.
HELPERS = tuple(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(Path(__file__).parent.rglob("*.py"))
    if not path.stem.startswith("test_")
    and path.stem not in ("__init__", "conftest", "forks", "ranks", "rank_process")
)
