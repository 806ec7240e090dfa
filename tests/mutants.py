"""Sources of shardopt with one synchronisation taken out, to see that a test notices.

A site is a call, in the package, that moves data between ranks, waits for it, or checks that ranks
agree. ``apply(site)`` makes every later import of the module see a version in which that one call
does nothing: a rank keeps what it has and goes on.
"""

import ast
import contextlib
import importlib.abc
import importlib.machinery
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "shardopt"

NOTHING = ("agree", "agree_on_values", "agree_on_gradients", "_agree_on_tensors")
MOVES = ("all_gather", "all_gather_object", "broadcast", "send", "receive", "isend", "irecv")
REDUCES = ("reduce_scatter", "all_to_all_single", "all_reduce")
OF_MPI = ("Iallgatherv", "Ialltoallv", "Iallgather", "Ireduce", "Ibcast", "Isend", "Irecv")
OTHERS = (
    "all_gather_rows",
    "sum_rows",
    "gather_texts",
    "broadcast_text",
    "all_or_none",
    "wait",
    "wait_for",
)
EVALUATES = ("gather", "gather_everything", "_gather_rows")
CALLEES = {*NOTHING, *MOVES, *REDUCES, *OF_MPI, *OTHERS, *EVALUATES}
CALLEES |= {"send_tensors", "receive_tensors"}


def sites() -> list[str]:
    """Every site of the package: ``file::function::callee``, numbered where one repeats."""
    found = []
    sources = set(PACKAGE.rglob("*.py")) - set((PACKAGE / "selftest").glob("*.py"))  # tests
    for path in sorted(sources):
        found += _sites_in(path)
    return found


def apply(site: str) -> None:
    """Take ``site`` out of the package, which must not have been imported yet."""
    assert not any(name.split(".")[0] == "shardopt" for name in sys.modules), "too late"
    assert site in _sites_in(ROOT / site.split("::")[0]), site
    sys.meta_path.insert(0, _Finder(site))


def _sites_in(path: pathlib.Path) -> list[str]:
    finder = _Sites(path)
    finder.visit(ast.parse(path.read_text()))
    return finder.names


class _Sites(ast.NodeTransformer):
    """Names the sites of one file; replaces one of them if asked to."""

    def __init__(self, path: pathlib.Path, replace: str | None = None):
        self.path = str(path.relative_to(ROOT))
        self.replace = replace
        self.scope: list[str] = []
        self.names: list[str] = []

    def visit_FunctionDef(self, node):
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()
        return node

    visit_ClassDef = visit_FunctionDef

    def visit_Call(self, node):
        self.generic_visit(node)
        method = isinstance(node.func, ast.Attribute)
        callee = node.func.attr if method else getattr(node.func, "id", "")
        if callee not in CALLEES or not self.scope:
            return node
        name = f"{self.path}::{'.'.join(self.scope)}::{callee}"
        repeated = sum(known.split("#")[0] == name for known in self.names)
        name += f"#{repeated + 1}" if repeated else ""
        self.names.append(name)
        if name != self.replace:
            return node
        stub = ast.Attribute(ast.Name("__mutants__", ast.Load()), f"no_{callee}", ast.Load())
        receiver = [node.func.value] if method else []
        return ast.Call(stub, [*receiver, *node.args], node.keywords)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, site: str):
        self.site = site

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] != "shardopt":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path or [str(ROOT)], target)
        file = self.site.split("::")[0]
        if spec and spec.origin and spec.origin.endswith(file):
            spec.loader = _Loader(fullname, spec.origin, self.site)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, site: str):
        super().__init__(fullname, path)
        self.site = site

    def get_code(self, fullname):
        """Compile the mutant; never from, nor into, the cache."""
        path = pathlib.Path(self.path)
        mutated = _Sites(path, self.site).visit(ast.parse(path.read_text()))
        return compile(ast.fix_missing_locations(mutated), self.path, "exec")

    def exec_module(self, module):
        module.__mutants__ = sys.modules[__name__]
        super().exec_module(module)


# -- what stands in the place of a call ------------------------------------------------------------


class _Done:
    rows = None

    def wait(self):
        return None

    def Test(self):
        return True


def _nothing(*args, **kwargs):
    return _Done()


for _name in (*NOTHING, *MOVES, *REDUCES, *OF_MPI, "send_tensors", "receive_tensors"):
    globals()[f"no_{_name}"] = _nothing


def no_wait(handle):
    """What is under way stays so."""


def no_wait_for(arrivals, parameters):
    """What is under way stays so."""


def no_all_or_none(collectives):
    """An error stays on its rank."""
    return contextlib.nullcontext()


def no_all_gather_rows(collectives, row):
    """Every rank takes its own for everybody's."""
    return row.detach().cpu()[None].repeat(collectives.world_size, 1)


def no_sum_rows(collectives, row):
    """Every rank takes its own for the sum."""
    return row.detach().cpu()


def no_gather(*args):
    """Parameters stay where they are: no handle by any bucket."""
    return {}


no_gather_everything = no_gather


def no__gather_rows(sums, row):
    """A sum over ranks is this rank's own."""
    return row.detach().cpu()[None]


def no_gather_texts(collectives, text):
    """Every rank takes its own for everybody's."""
    return [text] * collectives.world_size


def no_broadcast_text(collectives, text, source):
    """Every rank keeps its own."""
    return text
