"""The public surface is what ``__all__`` says: importable, documented, and it needs only torch."""

import ast
import re
import subprocess
import sys

import pytest

import shardopt
from tests.repo.source import PACKAGE, ROOT, modules

ALLOWED = {*sys.stdlib_module_names, "torch", "shardopt"}


def names_for_type_checkers() -> set[str]:
    """What ``__init__.py`` imports for those who only read it."""
    (block,) = (node for node in INIT.body if isinstance(node, ast.If))
    return {alias.asname or alias.name for node in block.body for alias in node.names}


INIT = ast.parse((PACKAGE / "__init__.py").read_text())


def test_all_is_what_can_be_imported():
    assert len(set(shardopt.__all__)) == len(shardopt.__all__) > 0
    assert names_for_type_checkers() == set(shardopt.__all__) - {"__version__"}
    assert set(shardopt.__all__) <= set(dir(shardopt))


def test_a_star_brings_all_of_it():
    names: dict[str, object] = {}
    exec("from shardopt import *", names)
    assert set(names) - {"__builtins__"} == set(shardopt.__all__)


def test_a_part_that_is_no_public_name_is_found_as_well():
    assert shardopt.comm.SoloCollectives is not None
    with pytest.raises(AttributeError, match="module 'shardopt' has no attribute 'nonsense'"):
        shardopt.nonsense  # noqa: B018


def test_torch_is_imported_with_the_first_name_that_needs_it():
    lines = (
        "import sys, shardopt, shardopt.checkpoint, shardopt.cli",
        "shardopt.errors.CorruptError, shardopt.Guards",
        "assert 'torch' not in sys.modules",
        "shardopt.ShardedOptimizer",
        "assert 'torch' in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", [name for name in shardopt.__all__ if name != "__version__"])
def test_a_public_name_is_documented(name):
    value = getattr(shardopt, name)
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"\b{re.escape(name)}\b", readme), "not in README.md"
    # Not inspect.getdoc, which would do with what a parent says.
    assert value.__doc__, "no docstring"


def imports_at_import(node: ast.AST) -> set[str]:
    """The top-level names imported when a module is: not in functions, not for types alone."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return set() if node.level else {node.module.split(".")[0]}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return set()
    return set().union(*map(imports_at_import, ast.iter_child_nodes(node)))


def test_torch_is_all_that_import_needs():
    found = {path: imports_at_import(ast.parse(path.read_text())) for path in modules(PACKAGE)}
    assert any("torch" in names for names in found.values())
    excess = {str(path.relative_to(ROOT)): names - ALLOWED for path, names in found.items()}
    assert {path: names for path, names in excess.items() if names} == {}


def test_a_forbidden_import_is_found():
    source = (
        "try:\n    import mpi4py.MPI\nexcept ImportError:\n    pass\ndef f():\n    import numpy"
    )
    assert imports_at_import(ast.parse(source)) == {"mpi4py"}
