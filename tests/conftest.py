"""What several test files share: real data where it is there, and a checkout with a very small chapter."""

import os
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data and models, which is no part of the project."""
    folder = os.environ.get("FIHELPERS_REAL_DATA")
    if not folder:
        pytest.skip("FIHELPERS_REAL_DATA names no folder of real data")
    return Path(folder)


WriteChapter = Callable[..., Path]


@pytest.fixture
def write_chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteChapter:
    """Makes the working directory a small checkout; the function writes a chapter with these last cells."""
    profiles = tmp_path / "notebooks" / "profiles"
    profiles.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    (profiles / "embedded.yaml").write_text("# as the notebooks say\n")
    (profiles / "smoke.yaml").write_text("all: {N: 2}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIHELPERS_DATA", str(tmp_path / "data"))

    def write(*cells: str, name: str = "01_tiny") -> Path:
        parameters = 'PROFILE = "embedded"\nSEED = 0\nN = 3\nRATES = [0, 0.5]\nMODEL = "mini"\nLIMIT = None'
        begin = f'from fichapters.results import begin\n\nrun = begin("{name}")'
        sources = [parameters, begin, *cells]
        notebook = new_notebook(cells=[new_markdown_cell("# Tiny"), *map(new_code_cell, sources)])
        notebook.cells[1].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    return write
