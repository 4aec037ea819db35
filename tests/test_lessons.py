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

SMALL = {  # settings of the lessons that change nothing of what they do
    "01_first_look": {"N_TEST": 24, "SHARES": [0.005, 0.02]},
    "07_sparsification": {"SUBJECTS": ["law"], "N_CALIBRATION": 1, "N_TEST": 4, "RATES": [0.02], "SEEDS": 1},
}
CHANGES = {  # what of the lessons' source a reader may write otherwise
    "01_first_look": {
        "perturb": ("return 0 * weights", "return -weights"),
        "choose": ("select(scores[measure], share, seed=p.SEED + k)",
                   'select(scores[measure], share, "bottom")'),
        "score": ("scores = score_weights(model, calibration, measures, only=linear)\n    for",
                  "scores = score_weights(model, calibration[:1], measures, only=linear)\n    for"),
    },
    "07_sparsification": {
        "perturb": ("                with zeroed(model, chosen):\n                    yield labels",
                    "                from fihelpers.perturb.sparsify import changed\n"
                    "                with changed(model, chosen, lambda weights: -weights):\n"
                    "                    yield labels"),
        "choose": ("select(scores, rate, which, seed=seed)", 'select(scores, rate, "bottom")'),
    },
}  # fmt: skip
FIGURES = {  # and what of it makes a figure only
    "01_first_look": ('{"What breaks": measures}', '{"What else breaks": measures}'),
    "07_sparsification": (
        "draw.damage_curves(curves, draw.PANELS,",
        'draw.damage_curves(curves, {"": ["SNIP"]},',
    ),
}


def curves(
    lesson: str, folder: Path, monkeypatch: pytest.MonkeyPatch, old: str = "", new: str = ""
) -> pd.DataFrame:
    """The table of a lesson under smoke, with a piece of its source written otherwise."""
    tables: dict[str, pd.DataFrame] = {}
    p = SimpleNamespace(**{**settled(lesson, {}, "smoke"), **SMALL[lesson]})
    run = SimpleNamespace(p=p, kept=lambda name: Kept(folder, name, "about"), keep=tables.__setitem__)
    monkeypatch.setattr(results, "begin", lambda name: run)
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [c.source for c in nbformat.read(NOTEBOOKS[lesson], as_version=4).cells if c.cell_type == "code"]
    assert old in "\n".join(code)
    for source in code[1:]:
        exec(compile(source.replace(old, new) if old else source, lesson, "exec"), names)
        if "curves" in tables:
            return tables["curves"]
    raise AssertionError("the lesson keeps its curves")


@pytest.mark.parametrize("lesson", SMALL)
def test_changing_a_line_of_a_lesson_changes_its_table(
    lesson: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = curves(lesson, tmp_path, monkeypatch)
    assert len(list(tmp_path.iterdir())) == 1
    for number, (old, new) in enumerate(CHANGES[lesson].values(), start=2):
        changed = curves(lesson, tmp_path, monkeypatch, old, new)
        assert not changed.log_prob.equals(usual.log_prob), new
        assert len(list(tmp_path.iterdir())) == number
    again = curves(lesson, tmp_path, monkeypatch, *FIGURES[lesson])
    pd.testing.assert_frame_equal(again, usual)
    assert len(list(tmp_path.iterdir())) == len(CHANGES[lesson]) + 1  # a changed figure reran nothing
