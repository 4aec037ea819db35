"""The sparsification sweep on a tiny model: what it counts, keeps and refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_model

from fichapters.ch01.lab import Look
from fichapters.ch07 import draw, lab
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores.weights import score_weights

MEASURES = ("FI exact", "FI damped 0.0001", "SNIP", "magnitude", "random")


@pytest.fixture
def plan(tmp_path: Path) -> lab.Plan:
    for split in ("dev", "val", "test"):
        (tmp_path / split).mkdir()
        for subject in ("one", "two"):
            lines = [f"w{i} w{i + 1} of {subject},w1,w2,w3,w{i + 4},{'ABCD'[i % 4]}\n" for i in range(8)]
            (tmp_path / split / f"{subject}_{split}.csv").write_text("".join(lines))
    return lab.Plan(
        task=str(tmp_path), subjects=("one", "two"), rates=(0.0, 0.02, 0.5), seeds=2,
        n_calibration=3, n_test=6, measures=MEASURES,
    )  # fmt: skip


def test_sweep(plan: lab.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    model.network.config.max_position_embeddings = 512
    rows = lab.run_sweep(model, plan, tmp_path / "cache")
    own = rows[rows.subject == rows.tested_on]
    # every measure at every rate for every subject and seed, FI-low for two filters, and the intact model
    assert len(own) == 2 + 2 * 2 * 3 * (len(MEASURES) + 2)
    assert len(rows) - len(own) == 2 * 2  # the transfer ranking, on the other subject, at one rate
    intact = {r.subject: r.correct for r in own[own.measure == lab.INTACT].itertuples()}
    assert all(r.correct == intact[r.subject] for r in own[own.rate == 0].itertuples())
    assert np.allclose(own.accuracy, [c.count("1") / 6 for c in own.correct])

    table = lab.summary(rows)
    start = table[(table.rate == 0) & (table.measure == "SNIP")]
    assert np.allclose(start.accuracy, own[own.measure == lab.INTACT].accuracy.mean())
    assert (table.low.dropna() <= table.accuracy[table.low.notna()]).all()
    mean, low, high = lab.difference(rows, "FI exact", "random", 0.5, seed=0)
    assert low <= mean <= high
    assert lab.difference(rows, "SNIP", "SNIP", 0.5, seed=0) == (0, 0, 0)
    one = lab.one_letter(rows, "SNIP", 0.5)
    assert one.shape == (2, 12) and set(np.unique(one)) <= {0, 1}
    # each subject's six right answers are A, B, C, D, A, B: a letter gets a third of them, or a sixth
    assert set((one.reshape(2, 2, 6).sum(-1)).flatten()) <= {1, 2}
    mean, low, high = lab.left_above_one_letter(rows, "SNIP", 0.5, seed=0)
    assert low <= mean <= high and mean == pytest.approx((lab.answers_of(rows, "SNIP", 0.5) - one).mean())
    assert lab.chance(plan) == 0.25
    carried = lab.transfer(rows, plan)
    assert carried.shape == (2, 2) and not carried.isna().any(axis=None)

    monkeypatch.setattr(lab, "score_weights", lambda *a, **k: pytest.fail("finished work was done again"))
    pd.testing.assert_frame_equal(lab.run_sweep(model, plan, tmp_path / "cache"), rows)


def test_fi_with_any_filter_is_swept_and_drawn(plan: lab.Plan, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.network.config.max_position_embeddings = 512
    asked = ("FI damped 1e-2", "FI cut 0.1", "random")
    new = replace(plan, measures=asked, low_of=("FI cut 0.10",), seeds=1, rates=(0.02, 0.5))
    assert (new.measures, new.low_of) == (("FI damped 0.01", "FI cut 0.1", "random"), ("FI cut 0.1",))
    table = lab.summary(lab.run_sweep(model, new, tmp_path / "cache"))
    assert set(table.measure) == {*new.measures, "FI cut 0.1, low half"}
    draw.damage_curves(table, {"FI": list(new.measures)}, 0.25)
    draw.overlap_map(lab.overlaps({m: lab.pooled_scores(model, new)[m] for m in new.measures}, 0.1), 0.1)


def test_a_text_file_is_judged_by_the_intact_models_own_choice(tmp_path: Path) -> None:
    text = tmp_path / "contexts.txt"
    text.write_text("".join(f"w{i} w{i + 2} w{i + 1}\n" for i in range(20)))
    plan = lab.Plan(str(text), ("text",), (0.5,), 2, 4, None, MEASURES, low_of=())
    rows = lab.run_sweep(tiny_model("llama"), plan, tmp_path / "cache")
    assert set(rows.n) == {10}
    assert (rows[rows.measure == lab.INTACT].accuracy == 1).all()
    assert not np.isclose(rows[rows.measure == "magnitude"].log_prob, rows.log_prob.iloc[0]).any()
    with pytest.raises(ValueError, match="first half"):
        lab.calibration_set(lab.Plan(str(text), ("text",), (0.5,), 1, 11, None), "text", 0)


def test_a_model_that_gives_one_letter_keeps_what_that_letter_gets() -> None:
    lines = [("x", "x", k, "SNIP", 0.1, "10101", "02010", "00000") for k in range(2)]
    columns = ["subject", "tested_on", "seed", "measure", "rate", "correct", "right", "said"]
    rows = pd.DataFrame(lines, columns=columns)
    assert lab.one_letter(rows, "SNIP", 0.1).tolist() == [[1, 0, 1, 0, 1]] * 2
    assert lab.left_above_one_letter(rows, "SNIP", 0.1, seed=0) == (0, 0, 0)


def test_where_the_top_weights_sit(plan: lab.Plan) -> None:
    model = tiny_model("qwen2")
    model.network.config.max_position_embeddings = 512
    scores = lab.pooled_scores(model, plan)
    places = lab.locations(scores["SNIP"], 0.1)
    assert places.top.sum() == round(0.1 * scores["SNIP"].numel())
    assert set(places.layer) == {0, 1} and "q_proj" in set(places.matrix)
    common = lab.overlaps({m: scores[m] for m in MEASURES}, 0.1)
    assert np.allclose(np.diag(common), 1) and common.equals(common.T)
    skew = lab.concentration({"SNIP": scores["SNIP"]})
    assert skew.total.is_monotonic_increasing and skew.total.iloc[-1] == pytest.approx(1)
    assert (skew.total >= skew.weights - 1e-9).all()  # the highest weights hold at least their even share
    needed, rows = lab.rows_holding_half(scores["SNIP"], 0.1)
    assert 1 <= needed <= rows / 2
    draw.location_map({"SNIP": places}, 0.1)
    draw.overlap_map(common, 0.1)


def test_bad_plans_are_named(plan: lab.Plan, tmp_path: Path) -> None:
    from dataclasses import replace

    model = tiny_model("qwen2")
    for change, text in [
        ({"rates": (1.5,)}, r"\[0, 1\], not 1.5"),
        ({"seeds": 0}, "at least 1"),
        ({"measures": ("FI exat",)}, "Unknown measure 'FI exat'"),
        ({"subjects": ("three",)}, "three"),
    ]:
        with pytest.raises((ValueError, KeyError, FileNotFoundError), match=text):
            lab.run_sweep(model, replace(plan, **change), tmp_path / "cache")  # type: ignore[arg-type]
    assert not (tmp_path / "cache").exists()


def test_first_look(plan: lab.Plan) -> None:
    model = tiny_model("qwen2")
    model.network.config.max_position_embeddings = 512
    examples = lab.tested_set(plan, "one")
    look = Look(model, examples)
    names = ["FI exact", "FI damped 0.0001", "Jacobian norm", "random"]
    scores = score_weights(model, examples, names, only=linear_names(model.network))
    table = look.sweep(scores, [0.5], 0)
    assert list(table.measure.unique()) == names
    assert (table[table.rate == 0].accuracy == look.correct().mean()).all()
    assert sum(look.probabilities(look.examples[0])) == pytest.approx(1)
