"""The chapters keep the house rules, and the numbers of the book come out again."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from nbformat import NotebookNode
from ruler import LESSONS, beyond, read

from fichapters.parameters import declared, read_profile, settle
from fichapters.runs import chapters, run_chapter
from fihelpers.models.language import open_model
from fihelpers.models.vision import open_vision_model

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = chapters(ROOT / "notebooks")
PROFILES = ROOT / "notebooks" / "profiles"
RERUN = "01_first_look"  # the chapter whose numbers are computed again here
NO_LOOP = ("02_the_measure", "12_claims")  # one question, line by line; and what the others found
TIMED = "10_cost"  # the lesson whose loop stops the time of works in turn
SHOWN = {  # what scores, chooses and perturbs in a lesson's functions, where no weights are zeroed
    "04_fragile_pixels": ("batch.scores(", "top_pixels(", "masked("),
    "05_prompts_and_pixels": ("score(asked", "top_pixels(", "hide("),
    "06_embedding_attacks": ("batch.scores(", "top_dimensions", "attack"),
    "08_quantization": ("score_weights(", "select(", "with quantized("),
    "09_merging": ("scores_of(", "merge(", "with experts.holding("),
    "11_relatives": ("score_weights(", "with zeroed(", "select("),
    "13_a_real_model": ("score_in_turn(", "select(", "with zeroed(", "with lab.holding("),
}

each_chapter = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: Path) -> list[NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook.cells


def _code(path: Path) -> list[NotebookNode]:
    return [cell for cell in _cells(path) if cell.cell_type == "code"]


def test_the_table_of_contents_lists_every_notebook_in_order_and_the_claims_last() -> None:
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())["chapters"]
    listed = [entry["file"] for entry in contents if entry["file"].startswith("chapters/")]
    last = ["12_claims"]  # what all the others found
    ordered = sorted((path.stem for path in NOTEBOOKS), key=lambda name: (name in last, name))
    assert listed == [f"chapters/{name}" for name in ordered]
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {path.stem for path in NOTEBOOKS}


@each_chapter
def test_parameters_are_plain_literals_first_profile_and_seed(path: Path) -> None:
    first, *setting_up = _code(path)[:3]
    assert first.metadata.get("tags") == ["parameters"]
    assert list(declared(path))[:2] == ["PROFILE", "SEED"]
    assert declared(path)["PROFILE"] == "embedded"
    assert all(isinstance(node, ast.Assign) for node in ast.parse(first.source).body)
    assert not first.source.startswith("# Parameters")  # that marks the cell which papermill adds
    assert any(f'run = begin("{path.stem}")' in cell.source for cell in setting_up)


@each_chapter
@pytest.mark.parametrize("profile", sorted(file.stem for file in PROFILES.glob("*.yaml")))
def test_every_profile_fits_every_chapter(path: Path, profile: str) -> None:
    given = {"PROFILE": profile}
    settled = settle(path.stem, declared(path), read_profile(PROFILES, profile), given)
    assert settled.keys() == declared(path).keys()
    if profile == "embedded":  # the notebooks' own defaults are the settings of the book
        assert settled == declared(path)


@each_chapter
def test_code_cells_are_bare(path: Path) -> None:
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"
    for cell in _code(path):
        assert not cell.outputs and cell.execution_count is None, "strip the outputs"
        ast.parse(cell.source)  # fails on "!pip" and other magic, too


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_keeps_the_rulers_bounds(name: str) -> None:
    assert beyond(read(ROOT / "notebooks" / f"{name}.ipynb"), LESSONS[name]) == []


@pytest.mark.parametrize("name", [name for name in LESSONS if name not in NO_LOOP])
def test_a_lesson_shows_its_loop(name: str) -> None:
    """Calibrate, score, perturb and evaluate stand in the notebook's own functions."""
    source = "\n".join(cell.source for cell in _code(ROOT / "notebooks" / f"{name}.ipynb"))
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    loops = [node for node in functions if any(isinstance(part, ast.Yield) for part in ast.walk(node))]
    assert loops, "a lesson has a generator of trials"
    if name == TIMED:
        assert loops and all("perf_counter()" in ast.unparse(loop) for loop in loops)
        return
    assert "collect(" in source
    if name in SHOWN:
        defined = "\n".join(map(ast.unparse, functions))
        assert all(call in defined for call in SHOWN[name]), defined
        return
    for loop in loops:
        called = ast.unparse(loop)
        assert "with zeroed(" in called or "with changed(" in called, called
        assert "select(" in called, called
    assert "score_weights(" in source or "score_in_turn(" in source


@pytest.mark.alone
def test_the_numbers_of_the_book_come_out_again(tmp_path: Path) -> None:
    kept = ROOT / "data" / "results"
    run_chapter(ROOT / "notebooks" / f"{RERUN}.ipynb", "embedded", {}, tmp_path)
    was, now = (json.loads((place / f"{RERUN}.json").read_text()) for place in (kept, tmp_path))
    assert was["parameters"] == now["parameters"] and was["models"].keys() == now["models"].keys()
    assert all(was["models"][name]["sha256"] == about["sha256"] for name, about in now["models"].items())
    same_machine = all(was["versions"][part] == now["versions"][part] for part in ("machine", "torch"))
    tables = sorted(path.name for path in kept.glob(f"{RERUN}.*.csv"))
    assert tables and tables == sorted(path.name for path in tmp_path.glob(f"{RERUN}.*.csv"))
    for name in tables:
        old, new = (pd.read_csv(place / name) for place in (kept, tmp_path))
        tolerance = 1e-6 if same_machine else 0.05  # exact FI breaks its ties by rounding
        pd.testing.assert_frame_equal(old, new, rtol=tolerance, atol=0 if same_machine else 0.03)


def test_every_chapter_has_kept_results_of_the_bundled_models() -> None:
    kept = ROOT / "data" / "results"
    assert {path.stem for path in kept.glob("*.json")} == {path.stem for path in NOTEBOOKS}
    used = [
        (name, about["sha256"])
        for path in kept.glob("*.json")
        for name, about in json.loads(path.read_text()).get("models", {}).items()
    ]
    for model in (open_model("mini-lm"), open_vision_model("mini-vlm")):
        assert {sha256 for name, sha256 in used if name == model.name} == {model.sha256}
    for path in NOTEBOOKS:
        opens = re.search(r"open_(vision_)?model\(", path.read_text(encoding="utf-8"))
        if path.stem in LESSONS and opens:
            assert json.loads((kept / f"{path.stem}.json").read_text())["models"]
