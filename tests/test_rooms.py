"""The four rooms: imports go in one direction, in no circle, and stand at the top of a module."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS: dict[str, Path] = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
ARROWS = {
    "fihelpers": {"fihelpers"},
    "fiminis": {"fiminis", "fihelpers"},
    "fichapters": {"fichapters", "fihelpers"},
    "fibook": {"fibook", "fichapters", "fihelpers"},
}
LATE = {"commands", "__main__"}  # modules of commands, which import late so that --help is fast
OPTIONAL = {"fihelpers.scores.kernels.cpu", "fihelpers.scores.kernels.gpu"}  # need Numba or Triton


@cache
def modules() -> dict[str, Path]:
    """The file of every module by its name, a package's being its __init__."""
    found = {}
    for room, folder in ROOMS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([room, *parts]).removesuffix(".__init__")] = path
    return found


def imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[str, bool]]:
    """The modules that a tree imports, and whether within a function; not what types alone need."""

    def walk(node: ast.AST, within: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "write the whole name of a module"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in known else str(node.module)), within
        within = within or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, within)

    return ((name, late) for name, late in walk(tree, False) if name.partition(".")[0] in ROOMS)


@cache
def needs() -> dict[str, list[tuple[str, bool]]]:
    """What each module imports, see `imports`."""
    known = set(modules())
    return {
        name: list(imports(ast.parse(path.read_text("utf-8")), known)) for name, path in modules().items()
    }


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The names on one circle of a graph, the first again at the end; [] where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, set())):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def test_every_room_imports_only_what_lies_below_it() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, found in needs().items()
        for other, _ in found
        if other.partition(".")[0] not in ARROWS[name.partition(".")[0]]
    ]
    assert wrong == []


def test_every_imported_module_exists() -> None:
    wrong = [
        f"{name}: {other}" for name, found in needs().items() for other, _ in found if other not in modules()
    ]
    assert wrong == []


def test_no_module_needs_itself_by_way_of_others() -> None:
    edges = {name: {other for other, _ in found} for name, found in needs().items()}
    assert circle(edges) == []


def test_imports_of_the_rooms_stand_at_the_top() -> None:
    late = [
        f"{name} imports {other} within a function"
        for name, found in needs().items()
        for other, within in found
        if within and name.rpartition(".")[2] not in LATE and other not in OPTIONAL
    ]
    assert late == []


def test_the_packages_are_the_folders() -> None:
    folders = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(SETUPTOOLS["packages"]) == folders
    below = {path.parent for path in modules().values()}
    assert below == {modules()[name].parent for name in folders}, "a folder of modules needs an __init__.py"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import fihelpers.data", [("fihelpers.data", False)]),
        ("from fihelpers import data, zeroed", [("fihelpers.data", False), ("fihelpers", False)]),
        ("def f():\n    from fichapters.runs import run", [("fichapters.runs", True)]),
        ("try:\n    import fibook\nexcept ImportError:\n    pass", [("fibook", False)]),
        ("if TYPE_CHECKING:\n    import fibook", []),
        ("import torch", []),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, found: list[tuple[str, bool]]) -> None:
    assert list(imports(ast.parse(source), {"fihelpers.data"})) == found


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"a"}}) == ["a", "a"]
