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

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALL = "-e .[book,test]"


def _normal(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins(lines: list[str]) -> dict[str, str]:
    pairs = [line.split("==") for line in lines if "==" in line]
    return {_normal(name): pinned for name, pinned in pairs}


def _direct() -> set[str]:
    """Distributions that pyproject.toml asks for."""
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(item for extra in extras for item in extra)]
    return {_normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in wanted}


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


def _imported(source: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("folder", ["fihelpers", "tests"])
def test_every_import_is_a_declared_dependency(folder: str) -> None:
    files = [*(ROOT / folder).rglob("*.py")]
    own = {"fihelpers", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    imported = set().union(*map(_imported, files)) - own - sys.stdlib_module_names
    providers = packages_distributions()
    imported.discard("triton")  # comes with a torch that is made for GPUs
    undeclared = [name for name in imported if not _direct() & {_normal(p) for p in providers.get(name, [])}]
    assert not undeclared


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
    from fihelpers.__main__ import _check_pages

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
