"""The public surface is what ``__all__`` says: importable, documented, and it needs only torch."""

import ast
import inspect
import re
import sys

import pytest

import shardopt
from tests.repo.source import PACKAGE, ROOT, modules

ALLOWED = {*sys.stdlib_module_names, "torch", "shardopt"}


def test_all_is_what_can_be_imported():
    public = {
        name
        for name, value in vars(shardopt).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert len(set(shardopt.__all__)) == len(shardopt.__all__) > 0
    assert public - set(shardopt.__all__) == set(), "imported there, but not in __all__"


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
