"""The committed numbers of the embedded profile: one chapter is run again and compared."""

from pathlib import Path

from fihelpers.data import data_folder
from fihelpers.models import open_model
from fihelpers.results import compare, load_results, versions
from fihelpers.runs import run_chapter

CHAPTER = "01_first_look"
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def test_a_chapter_gives_the_committed_numbers(tmp_path: Path) -> None:
    old = {k: r for k, r in load_results(data_folder() / "results").items() if k[0] == CHAPTER}
    assert old, "data/results has no numbers of the chapter; run build --keep-results"
    run_chapter(NOTEBOOKS / f"{CHAPTER}.ipynb", "embedded", {}, tmp_path)
    new = load_results(tmp_path)
    same_machine = all(r.versions["machine"] == versions()["machine"] for r in old.values())
    assert compare(old, new, same_machine) == []


def test_every_chapter_has_committed_numbers_that_fit_the_bundled_model() -> None:
    records = load_results(data_folder() / "results")
    chapters = {path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")}
    assert {chapter for chapter, _ in records} == chapters
    assert {r.profile for r in records.values()} == {"embedded"}
    hashes = {r.model_sha256 for r in records.values() if r.model == "mini-lm"}
    assert hashes == {open_model("mini-lm").sha256}
