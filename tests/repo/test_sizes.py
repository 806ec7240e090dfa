"""Modules and functions stay small enough to be read at once."""

import ast

import pytest

from tests.repo.source import ROOT, modules

MAX_MODULE = 300  # lines
MAX_FUNCTION = 40  # lines, without the docstring


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the ``def`` to the end, without the docstring."""
    count = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        count -= docstring.end_lineno - docstring.lineno + 1
    return count


def too_long(source: str) -> list[str]:
    """What is too long in a module, in words."""
    found = []
    if (length := len(source.splitlines())) > MAX_MODULE:
        found.append(f"{length} lines")
    for node in ast.walk(ast.parse(source)):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and (length := num_lines(node)) > MAX_FUNCTION:
            found.append(f"line {node.lineno}: {node.name} has {length} lines")
    return found


@pytest.mark.parametrize("folder", ["shardopt", "launch"])
def test_sizes(folder):
    files = modules(ROOT / folder)
    assert files
    found = {str(path.relative_to(ROOT)): too_long(path.read_text()) for path in files}
    assert {path: what for path, what in found.items() if what} == {}


def test_what_is_too_long_is_found():
    body = '    """A docstring\n    of two lines."""\n' + "    pass\n" * (MAX_FUNCTION - 1)
    assert too_long("def f():\n" + body) == []
    assert too_long("def f():\n" + body + "    pass\n") == [
        f"line 1: f has {MAX_FUNCTION + 1} lines"
    ]
    assert too_long("\n" * MAX_MODULE) == []
    assert too_long("\n" * (MAX_MODULE + 1)) == [f"{MAX_MODULE + 1} lines"]
