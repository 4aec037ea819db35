"""The files around the package agree with each other and with what the package imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
import yaml

from fihelpers import extras

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ROOMS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
INSTALL = "-e .[all,test]"


def _normal(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins(lines: list[str]) -> dict[str, str]:
    pairs = [line.split("==") for line in lines if "==" in line]
    return {_normal(name): pinned for name, pinned in pairs}


def _direct() -> set[str]:
    """Distributions that pyproject.toml asks for."""
    return _names(PROJECT["dependencies"]).union(*map(_names, EXTRAS.values())) - {"fihelpers"}


def _names(requirements: list[str]) -> set[str]:
    return {_normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


CONSTRAINTS = _pins((ROOT / "constraints.txt").read_text().splitlines())
ENVIRONMENT: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text())


def test_the_conda_environment_has_the_versions_of_the_constraints() -> None:
    (pip,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    pins = _pins(pip)
    assert pins == {name: CONSTRAINTS[name] for name in _direct()}
    assert [line for line in pip if "==" not in line] == ["-c constraints.txt", INSTALL]
    assert INSTALL in (ROOT / "Makefile").read_text().replace('"', "")


def test_this_environment_has_the_versions_of_the_constraints() -> None:
    wrong = {name: version(name) for name in _direct() if version(name).split("+")[0] != CONSTRAINTS[name]}
    assert not wrong, "install with -c constraints.txt"


def test_torchvision_is_not_needed() -> None:
    for name in ("pyproject.toml", "constraints.txt", "environment.yml"):
        assert "torchvision" not in (ROOT / name).read_text()


def _imported(node: ast.AST, everywhere: bool = True) -> set[str]:
    """Top-level names that a tree imports, wherever in it, or only as it is loaded, with nothing optional."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {str(node.module).partition(".")[0]}
    late = isinstance(node, ast.FunctionDef | ast.Lambda)
    if not everywhere and (
        late or (isinstance(node, ast.With) and ast.unparse(node.items[0]) == "optional()")
    ):
        return set()
    return set().union(*(_imported(child, everywhere) for child in ast.iter_child_nodes(node)))


def _undeclared(files: list[Path], everywhere: bool, declared: set[str]) -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    names = set().union(*(_imported(tree, everywhere) for tree in trees)) - sys.stdlib_module_names
    beside = {path.stem for folder in ("tests", "tools") for path in (ROOT / folder).glob("*.py")}
    own = {"triton", *ROOMS, *beside}  # triton comes with a torch that is made for GPUs
    providers = packages_distributions()
    return {name for name in names - own if not declared & {_normal(p) for p in providers.get(name, [])}}


@pytest.mark.parametrize("folder", [*ROOMS.values(), "tests", "tools"])
def test_every_import_is_a_declared_dependency(folder: str) -> None:
    assert not _undeclared([*(ROOT / folder).rglob("*.py")], True, _direct())


def test_the_library_is_loaded_with_what_is_always_installed() -> None:
    kernels = ROOT / "fihelpers" / "scores" / "kernels"  # the extra `fast`, and triton
    files = [path for path in (ROOT / "fihelpers").rglob("*.py") if path.parent != kernels]
    assert not _undeclared(files, False, _names(PROJECT["dependencies"]))


def test_each_extra_is_named_where_its_packages_are_missing() -> None:
    named = {extra: set() for extra in extras.EXTRAS.values()}
    for package, extra in extras.EXTRAS.items():
        named[extra].add(_normal(package))
    assert named == {extra: _names(EXTRAS[extra]) for extra in named}
    parts = re.findall(r"[\w]+", EXTRAS["all"][0].partition("[")[2])
    assert len(EXTRAS["all"]) == 1 and {*parts, "all", "test"} == set(EXTRAS)
    said = r"package captum .* pip install 'fihelpers\[pixels\]'"
    with pytest.raises(ModuleNotFoundError, match=said), extras.optional():
        raise ModuleNotFoundError("No module named 'captum.attr'", name="captum.attr")
    assert "'fihelpers[all]'" in extras.missing("seaborn")


def test_make_installs_once(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def commands(target: str) -> str:
        return subprocess.run(
            ["make", "--dry-run", "--no-print-directory", target],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    for target in ("book", "test", "lab"):
        assert "pip install" in commands(target)
    (tmp_path / ".venv" / "oracles").mkdir(parents=True)
    for folder in (".venv", ".venv/oracles"):
        (tmp_path / folder / ".installed").touch()
    assert commands("book").splitlines() == [".venv/bin/python -m fihelpers build --profile embedded"]
    assert "pip install" not in commands("test") + commands("lab")
    newer = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (newer, newer))
    assert "pip install" in commands("book")


def test_a_missing_browser_is_said_aloud_or_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from fibook import browser
    from fibook.commands import _check_pages

    monkeypatch.setattr(browser, "find_browser", lambda: None)
    monkeypatch.delenv("FIHELPERS_REQUIRE_BROWSER", raising=False)
    _check_pages(tmp_path)
    assert "SKIPPED: no Chromium or Chrome was found" in capsys.readouterr().err
    monkeypatch.setenv("FIHELPERS_REQUIRE_BROWSER", "1")
    with pytest.raises(FileNotFoundError, match="install Chromium"):
        _check_pages(tmp_path)
    monkeypatch.setattr(browser, "find_browser", lambda: Path("browser"))
    monkeypatch.setattr(browser, "check_pages", lambda html, browser: ["intro.html: console error"])
    with pytest.raises(ValueError, match=r"the pages have faults:\nintro.html: console error"):
        _check_pages(tmp_path)
