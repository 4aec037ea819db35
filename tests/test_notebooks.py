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
from fichapters.results import load_results
from fichapters.runs import chapters, run_chapter
from fihelpers.models.language import open_model
from fihelpers.models.vision import open_vision_model

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = chapters(ROOT / "notebooks")
PROFILES = ROOT / "notebooks" / "profiles"
RERUN = "01_first_look"  # the chapter whose numbers are computed again here
WRITTEN_OUT = "02_the_measure"  # the lesson without a loop: one question, line by line
TIMED = "10_cost"  # the lesson whose loop stops the time of works in turn
LONGEST = 15  # lines of a code cell
RECORDS = ("run.record(", "run.table(")
SHOWN = {  # what scores, chooses and perturbs in a lesson's functions, where no weights are zeroed
    "04_fragile_pixels": ("batch.scores(", "top_pixels(", "masked("),
    "05_prompts_and_pixels": ("score(asked", "top_pixels(", "hide("),
    "06_embedding_attacks": ("batch.scores(", "top_dimensions", "attack"),
    "08_quantization": ("score_weights(", "select(", "with quantized("),
    "09_merging": ("score_weights(", "merge(", "with experts.holding("),
    "11_relatives": ("score_weights(", "with zeroed(", "select("),
}

each_chapter = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_other_chapter = pytest.mark.parametrize(  # the rules that hold until a chapter is a lesson
    "path", [path for path in NOTEBOOKS if path.stem not in LESSONS], ids=lambda path: path.stem
)


def _cells(path: Path) -> list[NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook.cells


def _code(path: Path) -> list[NotebookNode]:
    return [cell for cell in _cells(path) if cell.cell_type == "code"]


def test_the_table_of_contents_lists_every_notebook_in_order() -> None:
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())["chapters"]
    listed = [entry["file"] for entry in contents if entry["file"].startswith("chapters/")]
    assert listed == [f"chapters/{path.stem}" for path in NOTEBOOKS]
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


@pytest.mark.parametrize("name", [name for name in LESSONS if name != WRITTEN_OUT])
def test_a_lesson_shows_its_loop(name: str) -> None:
    """Calibrate, score, perturb and evaluate stand in the notebook's own functions."""
    source = "\n".join(cell.source for cell in _code(ROOT / "notebooks" / f"{name}.ipynb"))
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    loops = [node for node in functions if any(isinstance(part, ast.Yield) for part in ast.walk(node))]
    assert loops, "a lesson has a generator of trials"
    if name == TIMED:
        assert all("perf_counter()" in ast.unparse(loop) for loop in loops)
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
    assert "score_weights(" in source


@each_other_chapter
def test_code_cells_are_short_and_define_nothing(path: Path) -> None:
    for cell in _code(path):
        lines = [line for line in cell.source.splitlines() if not line.startswith(("from ", "import "))]
        assert len(lines) <= LONGEST, cell.source
        tree = ast.parse(cell.source)  # fails on "!pip" and other magic, too
        helpers = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
        defined = [node for node in ast.walk(tree) if isinstance(node, helpers)]
        assert not defined, f"move this to the package:\n{cell.source}"
        last = cell.source.splitlines()[-1]
        assert not last.startswith("run.record(") or last.endswith(";"), f"the record is shown:\n{last}"


@each_other_chapter
def test_a_claim_stands_before_each_result_and_a_reading_after_it(path: Path) -> None:
    cells = _cells(path)
    kinds = [cell.cell_type for cell in cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert cells[0].source.startswith("# ")
    recording = [
        place
        for place, cell in enumerate(cells)
        if cell.cell_type == "code" and any(call in cell.source for call in RECORDS)
    ]
    assert recording, "a chapter records its numbers"
    for place in recording:  # a figure, or the cell that computes, may stand between
        assert "markdown" in kinds[place - 2 : place] and "markdown" in kinds[place + 1 : place + 3], (
            f"say what is claimed before, and what came out after:\n{cells[place].source}"
        )


@pytest.mark.alone
def test_the_numbers_of_the_book_come_out_again(tmp_path: Path) -> None:
    kept = ROOT / "data" / "results"
    run_chapter(ROOT / "notebooks" / f"{RERUN}.ipynb", "embedded", {}, tmp_path)
    was, now = (json.loads((place / f"{RERUN}.json").read_text()) for place in (kept, tmp_path))
    assert was["parameters"] == now["parameters"] and was["models"] == now["models"]
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
    records = [(r.model, r.model_sha256) for r in load_results(kept).values()]
    for model in (open_model("mini-lm"), open_vision_model("mini-vlm")):
        assert {sha256 for name, sha256 in [*used, *records] if name == model.name} == {model.sha256}
    for path in NOTEBOOKS:
        opens = re.search(r"open_(vision_)?model\(", path.read_text(encoding="utf-8"))
        if path.stem in LESSONS and opens:
            assert json.loads((kept / f"{path.stem}.json").read_text())["models"]
