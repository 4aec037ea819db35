"""What counts as the package's own files, and what running it leaves beside them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fichapters import runs
from fihelpers import data

ROOT = Path(__file__).resolve().parent.parent
# a loop for arrays that nothing else has compiled it for
COMPILE = """
import sys
import numpy as np
from fihelpers.data import PACKAGE, package_sha256
from fihelpers.scores.kernels import cpu as tiles

before = package_sha256()
tiles._moments(np.ones((1, 1, tiles.STRIP + 2)), 0, 1, 1.0, 2, np.ones(2), np.ones(2, np.float32))
compiled = [path.suffix for path in PACKAGE.rglob("__pycache__/*") if path.suffix in (".nbi", ".nbc")]
print(PACKAGE, len(compiled), before == package_sha256())
"""


@pytest.mark.parametrize(
    ("place", "counts"),
    [
        ("a.py", True),
        ("web/a.js", True),
        ("new/deep/a.yaml", True),
        ("README", True),
        ("__pycache__/a.cpython-311.pyc", False),
        ("__pycache__/tiles._add-130.py311.nbi", False),
        ("deep/__pycache__/tiles._add-130.py311.1.nbc", False),
        ("a.pyc", False),
        (".DS_Store", False),
        (".ipynb_checkpoints/a.py", False),
        ("deep/.a.py.swp", False),
        (".a.json.tmp1234", False),
        ("a.py~", False),
    ],
)
def test_the_hash_sees_what_ships_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, counts: bool
) -> None:
    monkeypatch.setattr(data, "PACKAGE", tmp_path)
    (tmp_path / "b.py").write_text("b = 1")
    hashes = [data.package_sha256()]
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    for content in ("1", "2"):
        (tmp_path / place).write_text(content)
        hashes.append(data.package_sha256())
    assert len(set(hashes)) == (3 if counts else 1)


def test_a_hidden_folder_above_the_package_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is installed lies in .venv, or in a home folder such as .local."""
    package = tmp_path / ".venv" / "fihelpers"
    package.mkdir(parents=True)
    (package / "a.py").write_text("a = 1")
    monkeypatch.setattr(data, "PACKAGE", package)
    before = data.package_sha256()
    (package / "a.py").write_text("a = 2")
    assert data.package_sha256() != before


def test_every_file_that_git_knows_counts() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git, or no repository, to ask")
    listed = subprocess.run(
        [git, "ls-files", "fihelpers"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    known = {ROOT / name for name in listed if (ROOT / name).exists()}
    assert known and known <= set(data.lasting_files(data.PACKAGE))


def test_what_numba_compiles_leaves_the_hash_alone(tmp_path: Path) -> None:
    shutil.copytree(data.PACKAGE, tmp_path / "fihelpers", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment = {name: value for name, value in environment.items() if not name.startswith("NUMBA")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    package, compiled, unchanged = done.stdout.split()
    assert Path(package) == (tmp_path / "fihelpers").resolve()
    assert int(compiled) >= 2 and unchanged == "True"


def test_what_a_download_leaves_in_a_models_folder_runs_nothing_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("w")
    before = runs._stamps(tmp_path)
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "model.metadata").write_text("when")
    assert runs._stamps(tmp_path) == before
    (tmp_path / "config.json").write_text("{}")
    assert runs._stamps(tmp_path) != before
