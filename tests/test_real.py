"""The profile of a real model: its chapters one after the other, what is refused before, and what is kept."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from opening import NOTEBOOKS, ROOT

from fichapters import real, real_runs, schedule
from fichapters.kept import REAL
from fichapters.parameters import read_minutes, read_profile

NAMES = ["01_first_look", "07_sparsification"]
MOST = 240  # minutes of all chapters, on two quiet cores


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What was run, in place of running it: each chapter leaves a table and its file."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def run(path: Path, profile: str, parameters: dict[str, Any], out: Path, *_: Any) -> Path:
        assert profile == "real"
        seen.append((path.stem, parameters))
        out.mkdir(exist_ok=True)
        (out / f"{path.stem}.json").write_text('{"models": {}}')
        (out / f"{path.stem}.curves.csv").write_text(f"n\n{len(seen)}\n")
        return out / f"{path.stem}.ipynb"

    monkeypatch.setattr(real_runs, "run_chapter", run)
    monkeypatch.setattr(real_runs, "read_minutes", lambda *_: dict.fromkeys(NAMES, 5))
    for module in (real, real_runs):
        monkeypatch.setattr(module, "kept_folder", lambda: tmp_path / "kept")
    monkeypatch.setattr(real_runs, "tokenizer_of", lambda *_: None)
    monkeypatch.setattr(real_runs, "source_of", lambda *_: SimpleNamespace(parameters=10**9))
    return seen


def test_its_chapters_have_minutes_and_do_not_take_longer_than_an_evening() -> None:
    profiles = ROOT / "notebooks" / "profiles"
    minutes = read_minutes(profiles, REAL)
    assert sum(minutes.values()) <= MOST and set(minutes) <= set(NOTEBOOKS)
    for section in read_profile(profiles, REAL):
        assert section in (*minutes, "all", "minutes")
    with pytest.raises(ValueError, match="has no section 'minutes'"):
        read_minutes(profiles, "smoke")


def test_a_chapters_tables_become_the_books_as_soon_as_it_is_done(
    ran: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    stale = tmp_path / "kept" / "07_sparsification.old.csv"
    stale.write_text("n\n1\n")
    real_runs.run(ROOT / "notebooks", tmp_path / "out", {}, ["7"])
    assert ran == [("07_sparsification", {})] and not stale.exists()
    real_runs.run(ROOT / "notebooks", tmp_path / "out", {}, ["1"])
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {f"{name}.{end}" for name in NAMES for end in ("json", "curves.csv")}


def test_another_model_is_told_to_the_chapters_and_leaves_the_book_alone(
    ran: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    given = {"MODEL": "mini-lm", "TASK": "bundled", "SUBJECT": "law"}
    real_runs.run(ROOT / "notebooks", tmp_path / "out", given, ["1", "7"])
    assert ran[0] == ("01_first_look", given)
    assert ran[1] == ("07_sparsification", {"MODEL": "mini-lm", "TASK": "bundled"})
    of_experts = real_runs._of_chapter(given, {"BASE": "", "TASK": ""}, {"TASK": "cloze-experts"})
    assert of_experts == {"BASE": "mini-lm"}
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(("weights", "jobs"), [(134_515_008, 2), (10**9, 1)])
def test_two_chapters_run_at_a_time_where_the_model_leaves_room(
    ran: list[tuple[str, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    weights: int,
    jobs: int,
) -> None:
    """On two cores and 24 GB, of which 22 are free, as the profile says."""
    machine = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=22e9), cpu_count=lambda **_: 2)
    monkeypatch.setattr(schedule, "psutil", machine)
    monkeypatch.setattr(schedule.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(real_runs, "source_of", lambda *_: SimpleNamespace(parameters=weights))
    seen: list[int] = []

    def run_chapters(paths: Any, run: Any, out: Path, foreseen: Any, jobs: int, threads: Any) -> list[Path]:
        seen.append(jobs)
        return [run(path, threads=threads) for path in paths]

    monkeypatch.setattr(real_runs, "run_chapters", run_chapters)
    real_runs.run(ROOT / "notebooks", tmp_path / "out", {}, ["1", "7"])
    assert seen == [jobs] and [name for name, _ in ran] == NAMES
    lines = [line.partition("  ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines[-2:] == ["left: 07_sparsification (5 minutes)", "left: nothing"]


def test_what_cannot_be_run_is_refused_before_anything_runs(
    ran: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    notebooks = ROOT / "notebooks"
    with pytest.raises(ValueError, match="the profile real has no 04_fragile_pixels; it has 01_first_look"):
        real_runs.run(notebooks, tmp_path, {}, ["1", "4"])
    with pytest.raises(ValueError, match="unknown chapter '77'"):
        real_runs.run(notebooks, tmp_path, {}, ["77"])
    few = tmp_path / "few"
    for split in ("dev", "val", "test"):
        (few / split).mkdir(parents=True)
        for subject in ("geography", "culture", "business", "law"):
            (few / split / f"{subject}_{split}.csv").write_text("Which?,a,b,c,d,A\nWhat?,a,b,c,d,B\n")
    with pytest.raises(ValueError, match=r"leaves 2 val questions of 'business' .* 20 are needed"):
        real_runs.run(notebooks, tmp_path, {"TASK": str(few)}, ["7"])
    assert ran == []


def test_a_chapter_draws_its_own_table_beside_the_kept_one(
    ran: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    own = pd.DataFrame({"n": [5]})
    tables: dict[str, pd.DataFrame] = {}

    def chapter(profile: str) -> Any:
        p = SimpleNamespace(PROFILE=profile, MODEL="mini-lm")
        return SimpleNamespace(name="01_first_look", p=p, folder=tmp_path, keep=tables.__setitem__)

    assert list(real.beside(chapter("real"), "curves", own)) == ["mini-lm"]  # it is the real one itself
    with pytest.raises(
        FileNotFoundError, match=r"01_first_look\.curves\.csv of a real model is kept; run make"
    ):
        real.beside(chapter("embedded"), "curves", own)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "01_first_look.curves.csv").write_text("n\n9\n")
    opened = {"smollm2": {"weights": 1234567, "sha256": "ab" * 32}}
    about = {"models": opened, "parameters": {"MODEL": "smollm2"}}
    (kept / "01_first_look.json").write_text(json.dumps(about))
    both = real.beside(chapter("embedded"), "curves", own)
    assert {name: table.n.item() for name, table in both.items()} == {"mini-lm": 5, "smollm2, kept": 9}
    assert tables["curves"] is own
    titles = ["mini-lm", "smollm2, kept\n1,234,567 weights, abababab…"]
    assert real.both(chapter("embedded"), "curves", own).model.tolist() == titles
    assert real.both(chapter("real"), "curves", own).model.tolist() == ["mini-lm"]
    assert real.models(chapter("embedded")) == "smollm2: 1,234,567 weights, SHA-256 abababababababab…"
