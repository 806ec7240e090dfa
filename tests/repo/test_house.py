"""Rules about the text of the files."""

import re
import sys

import pytest

from tests.repo.source import PACKAGE, ROOT, modules, texts

# Spelled so that this file does not hold them. Places and machines of those who work on it
# mean nothing to a reader; what is left to do belongs in an issue.
PRIVATE = re.compile("/wor" + "k/|far" + "m-")
UNFINISHED = re.compile("TO" + "DO|FIX" + "ME")


def lines_with(pattern: re.Pattern, files) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, text in files
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_names_a_private_place():
    assert lines_with(PRIVATE, texts()) == []


def test_nothing_is_left_unfinished():
    assert lines_with(UNFINISHED, ((path, path.read_text()) for path in modules(PACKAGE))) == []


def test_what_is_looked_for_is_found():
    files = [(PACKAGE / "x.py", "pass\n# FIX" + "ME: see /wor" + "k/notes")]
    assert len(lines_with(PRIVATE, files)) == len(lines_with(UNFINISHED, files)) == 1


def file_map(readme: str) -> list[str]:
    """The paths that begin the lines of README's section of files, see CONTRIBUTING.md."""
    sections = re.split(r"^#+ +", readme, flags=re.MULTILINE)
    maps = [text for text in sections if re.match(r".*\bfiles\b", text, re.IGNORECASE)]
    assert len(maps) == 1, f"README.md wants one section with 'files' in its heading: {len(maps)}"
    return re.findall(
        r"^[-|*\s]*`?([\w.][\w./-]*(?:/|\.\w+|file|run))`?(?=[\s:])", maps[0], re.MULTILINE
    )


def test_every_file_of_the_map_exists():
    paths = file_map((ROOT / "README.md").read_text())
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("folder", ["shardopt", "launch"])
def test_the_map_has_every_file(folder):
    listed = file_map((ROOT / "README.md").read_text())
    for path in (ROOT / folder).iterdir():
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))):
            name = f"{folder}/{path.name}"
            # A folder may stand there as itself or by each of its files.
            assert any(entry == name or entry.startswith(f"{name}/") for entry in listed), name


@pytest.mark.parametrize(
    "line", ["shardopt/a.py  what", "- `shardopt/a.py`: what", "| `shardopt/a.py` | what |"]
)
def test_the_map_is_read_in_any_form(line):
    readme = (
        f"# shardopt\n\n## Where the files are\n\nIn order.\n\n{line}\n\n## Next\nother.py no\n"
    )
    assert file_map(readme) == ["shardopt/a.py"]


def test_benchmarks_count_what_passes_through_every_collective():
    """An abstract method more, and the benchmarks that count bytes do not start."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from common import Counted
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    assert not Counted.__abstractmethods__
