"""A module imports only from lower levels, or from files above it in its own room.

"Above" is an order in which the files can be read: nothing imports in a circle.
"""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.repo.source import PACKAGE, ROOT, imported_names, module_name, modules

LEVELS = (
    {"errors", "layout", "policies", "launchers"},
    {"comm", "algos", "sched"},
    {"sparse", "buffers", "planner"},
    {
        "guard",
        "shard",
        "rows",
        "update",
        "arrivals",
        "evaluation",
        "local_state",
        "validation",
        "gradients",
    },
    {"optimizer", "state", "inner", "checks"},
    {"checkpoint", "scaler"},
    {"cli", "__main__", "integrations", "compat"},
    {"__init__"},
    {"selftest"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
STRANGERS = LEVELS[1]  # rooms of one level that do not import one another


def room_of(module: str) -> str:
    """The first name below the package: a file or a folder."""
    return [*module.split("."), "__init__"][1]


def may_import(importer: str, imported: str) -> bool:
    here, there = room_of(importer), room_of(imported)
    if here == there:
        return True
    if here in STRANGERS and there in STRANGERS:
        return False
    return here in LEVEL and there in LEVEL and LEVEL[there] <= LEVEL[here]


def import_graph(root=ROOT) -> dict[str, set[str]]:
    """Each module of the package -> the modules of the package that it imports."""
    files = {module_name(path, root): path for path in modules(root / PACKAGE.name)}
    graph = {}
    for module, path in files.items():
        names = imported_names(ast.parse(path.read_text()), module, path.name == "__init__.py")
        ours = (name for name in names if name.split(".")[0] == PACKAGE.name)
        # `from shardopt.layout import Slot` names an attribute of a module.
        graph[module] = {name if name in files else name.rpartition(".")[0] for name in ours} - {
            module
        }
    return graph


def violations(graph: dict[str, set[str]]) -> list[str]:
    found = [
        f"{importer} imports {imported}"
        for importer, targets in graph.items()
        for imported in sorted(targets)
        if not may_import(importer, imported)
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("circle: " + " imports ".join(reversed(error.args[1])))
    return found


def test_imports_go_down():
    graph = import_graph()
    assert any(graph.values())
    assert violations(graph) == []


def test_every_room_has_a_level():
    rooms = {room_of(module) for module in import_graph()}
    assert rooms <= set(LEVEL)


@pytest.mark.parametrize(
    ("path", "line", "violation"),
    [
        (
            "layout.py",
            "from shardopt.comm import Collectives",
            "shardopt.layout imports shardopt.comm",
        ),
        ("layout.py", "from . import optimizer", "shardopt.layout imports shardopt.optimizer"),
        ("comm/solo.py", "import shardopt.algos", "shardopt.comm.solo imports shardopt.algos"),
        ("comm/solo.py", "from ..sched import x", "shardopt.comm.solo imports shardopt.sched"),
        ("comm/solo.py", "from shardopt import Guards", "shardopt.comm.solo imports shardopt"),
        ("errors.py", "def f():\n    from .layout import Slot", "circle: "),
        ("comm/solo.py", "from shardopt.comm import Collectives", "circle: "),
    ],
)
def test_a_violation_is_found(tmp_path, path, line, violation):
    sources = {
        "__init__.py": "from shardopt.optimizer import ShardedOptimizer",
        "errors.py": "",
        "layout.py": "from shardopt.errors import LayoutError",
        "optimizer.py": "from shardopt import comm, layout",
        "comm/__init__.py": "from .solo import SoloCollectives",
        "comm/solo.py": "from shardopt.errors import LayoutError\nimport torch",
        "algos/__init__.py": "",
        "sched/__init__.py": "",
    }
    for name, text in sources.items():
        file = tmp_path / "shardopt" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert violations(import_graph(tmp_path)) == []
    (tmp_path / "shardopt" / path).write_text(line)
    assert any(found.startswith(violation) for found in violations(import_graph(tmp_path)))
