"""What a chapter keeps: tables and, beside them, what they come from."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import WriteChapter
from tiny import tiny_model

from fichapters.results import Chapter, begin


@pytest.fixture
def run(tmp_path: Path) -> Chapter:
    return Chapter("01_tiny", {"PROFILE": "smoke", "SEED": 3, "RATES": [0, 0.5]}, tmp_path)


def notebook(monkeypatch: pytest.MonkeyPatch, cells: list[str], **names: Any) -> None:
    """Make the test a notebook that has executed some cells and holds some names."""
    shell = SimpleNamespace(history_manager=SimpleNamespace(input_hist_parsed=cells), user_ns=names)
    monkeypatch.setattr("fichapters.results.get_ipython", lambda: shell)


def about(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "01_tiny.json").read_text())
    return content


def test_what_a_chapter_runs_with_is_on_disk_at_once(run: Chapter, tmp_path: Path) -> None:
    kept = about(tmp_path)
    assert (kept["chapter"], kept["profile"], kept["models"]) == ("01_tiny", "smoke", {})
    assert kept["parameters"] == vars(run.p) == {"PROFILE": "smoke", "SEED": 3, "RATES": [0, 0.5]}
    assert {"python", "fihelpers", "torch", "transformers", "machine"} == set(kept["versions"])


def test_a_table_is_read_back_as_it_was(run: Chapter, tmp_path: Path) -> None:
    frame = pd.DataFrame({"rate": [0.0, 0.1], "accuracy": [0.9, 1 / 3]})
    run.keep("curve", frame)
    run.keep("named", frame.set_index("rate"))
    for name in ("curve", "named"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"01_tiny.{name}.csv"), frame)


@pytest.mark.parametrize("name", ["a:b", "../a", ""])
def test_a_name_that_is_no_name_of_a_file_is_refused(run: Chapter, tmp_path: Path, name: str) -> None:
    for call in (lambda: run.keep(name, pd.DataFrame()), lambda: run.kept(name)):
        with pytest.raises(ValueError, match="must consist of letters"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["01_tiny.json"]


def test_the_file_names_the_models_that_were_opened(
    run: Chapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen2", torch.float32)
    copy = tiny_model("qwen2")
    copy.sha256 = "1" * 64
    notebook(monkeypatch, [], model=model, exact=copy, other=3)
    run.keep("some", pd.DataFrame({"n": [1]}))
    weights = sum(tensor.numel() for tensor in model.network.parameters())
    expected = {"revision": None, "sha256": "0" * 64, "weights": weights}
    assert about(tmp_path)["models"] == {"tiny-qwen2": expected}


def test_begin_settles_the_running_notebook(
    write_chapter: WriteChapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chapter()
    cells = ['PROFILE = "embedded"\nSEED = 4\nN = 3', '# Parameters\nPROFILE = "smoke"']
    notebook(monkeypatch, cells)
    run = begin("01_tiny")
    assert vars(run.p) == {"PROFILE": "smoke", "SEED": 4, "N": 2}
    assert about(Path("results/smoke"))["parameters"]["SEED"] == 4
    cells[1] += "\nM = 3"
    with pytest.raises(ValueError, match=r"01_tiny has no parameter M .given 3."):
        begin("01_tiny")
    cells[:] = ['PROFILE = "embedded"']
    with pytest.raises(ValueError, match="must declare SEED"):
        begin("01_tiny")


def test_begin_outside_a_notebook_says_so() -> None:
    with pytest.raises(ValueError, match="outside a notebook"):
        begin("01_tiny")
