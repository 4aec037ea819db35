"""A reader's changes in the cells of a lesson change its table, and only what changed is run again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pandas as pd
import pytest
from opening import NOTEBOOKS, settled

from fichapters import results
from fihelpers.trials import Kept

LESSON = "01_first_look"
CHANGES = {  # what of the lesson's source a reader may write otherwise
    "perturb": ("return 0 * weights", "return -weights"),
    "choose": ("select(scores[measure], share, seed=p.SEED + k)", 'select(scores[measure], share, "bottom")'),
    "score": ("scores = score_weights(model, calibration, measures, only=linear)\n    for",
              "scores = score_weights(model, calibration[:1], measures, only=linear)\n    for"),
}  # fmt: skip


def curves(folder: Path, monkeypatch: pytest.MonkeyPatch, old: str = "", new: str = "") -> pd.DataFrame:
    """The table of the lesson under smoke, with a piece of its source written otherwise."""
    tables: dict[str, pd.DataFrame] = {}
    p = SimpleNamespace(**{**settled(LESSON, {}, "smoke"), "N_TEST": 24, "SHARES": [0.005, 0.02]})
    run = SimpleNamespace(p=p, kept=lambda name: Kept(folder, name, "about"), keep=tables.__setitem__)
    monkeypatch.setattr(results, "begin", lambda name: run)
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [c.source for c in nbformat.read(NOTEBOOKS[LESSON], as_version=4).cells if c.cell_type == "code"]
    assert old in "\n".join(code)
    for source in code[1:]:
        exec(compile(source.replace(old, new) if old else source, LESSON, "exec"), names)
        if "curves" in tables:
            return tables["curves"]
    raise AssertionError("the lesson keeps its curves")


def test_changing_a_line_of_a_lesson_changes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = curves(tmp_path, monkeypatch)
    assert len(list(tmp_path.iterdir())) == 1
    for number, (old, new) in enumerate(CHANGES.values(), start=2):
        changed = curves(tmp_path, monkeypatch, old, new)
        assert not changed.log_prob.equals(usual.log_prob), new
        assert len(list(tmp_path.iterdir())) == number
    again = curves(tmp_path, monkeypatch, '{"What breaks": measures}', '{"What else breaks": measures}')
    pd.testing.assert_frame_equal(again, usual)
    assert len(list(tmp_path.iterdir())) == len(CHANGES) + 1  # a changed figure reran nothing
