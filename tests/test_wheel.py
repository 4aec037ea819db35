"""The wheel: outside a checkout it scores a local model, and says of the rest what is missing."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fihelpers.data import data_folder
from fihelpers.extras import EXTRAS
from fihelpers.scores.store import Scores

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("fihelpers", "notebooks/chapters", "book/bookmaker", "data/minis")
# as if only what is always installed were there
BARE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({[*EXTRAS, "matplotlib", "seaborn", "IPython", "papermill", "nbformat"]!r}))
sys.argv[0] = "fihelpers"
runpy.run_module("fihelpers", run_name="__main__")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, built from a copy of the sources, since a build leaves folders beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # with the setuptools that torch brings, which is new enough
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", folder / "made", folder], check=True, capture_output=True)
    (made,) = (folder / "made").glob("*.whl")
    installed = folder / "elsewhere" / "installed"
    with zipfile.ZipFile(made) as archive:
        archive.extractall(installed)
    return installed


def command(wheel: Path, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    environment.pop("FIHELPERS_DATA", None)
    return subprocess.run(
        [sys.executable, "-c", BARE, *arguments], cwd=place, env=environment, capture_output=True, text=True
    )


def test_it_scores_a_local_model_with_nothing_but_its_dependencies(wheel: Path, tmp_path: Path) -> None:
    shutil.copytree(data_folder() / "models" / "mini-lm", tmp_path / "model")
    shutil.copytree(data_folder() / "mcq", tmp_path / "questions")
    done = command(wheel, tmp_path, "score", "model", "questions", "--out", "made.safetensors", "-n", "4")
    assert done.returncode == 0, done.stderr
    assert "run pip install 'fihelpers[fast]'" in done.stderr
    scores = Scores.load(tmp_path / "made.safetensors")
    assert scores.metadata["n"] == "4" and all(value.isfinite().all() for value in scores.values.values())


@pytest.mark.parametrize("arguments", [["run", "07"], ["build"], ["bench", "pixels"], ["manifest"]])
def test_what_needs_a_checkout_says_so(arguments: list[str], wheel: Path, tmp_path: Path) -> None:
    done = command(wheel, tmp_path, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("fihelpers: ")
    assert "run from a checkout" in done.stderr or "run pip install 'fihelpers[" in done.stderr
