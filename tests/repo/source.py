"""The repository's files and syntax trees, for the tests of its rules."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "shardopt"

# Built or downloaded, not written. A leading dot is skipped as well, but for .ci.
NOT_SOURCE = ("build", "dist", "runs", "__pycache__")


def modules(folder: Path = PACKAGE) -> list[Path]:
    """All Python files below ``folder``."""
    return sorted(folder.rglob("*.py"))


def texts(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Every text file of the project, with what it says."""
    for path in sorted(root.iterdir()):
        if path.is_dir():
            hidden = path.name.startswith(".") and path.name != ".ci"
            if not (hidden or path.name in NOT_SOURCE or path.name.endswith(".egg-info")):
                yield from texts(path)
        else:
            try:
                yield path, path.read_text()
            except UnicodeDecodeError:
                continue  # an image


def module_name(path: Path, root: Path = ROOT) -> str:
    """``shardopt.comm.solo`` for ``shardopt/comm/solo.py``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The dotted names that ``tree``, the code of ``module``, imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package that the module lies in, each further dot its parent.
            num_parents = node.level - is_package
            base = module.rsplit(".", num_parents)[0] if num_parents > 0 else module
            start = ".".join(filter(None, [base if node.level else "", node.module]))
            yield from (f"{start}.{alias.name}" for alias in node.names)
