"""The pruning sweep on a tiny model: what it counts, keeps and refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_model

from fichapters.ch07 import draw_pruning as draw
from fichapters.ch07 import pruning as lab
from fihelpers.models.language import LanguageModel

CUTS = lab.usual_cuts([0.05, 0.1], [0.3, 0.6], 0.3)


@pytest.fixture
def plan(tmp_path: Path) -> lab.Plan:
    for split in ("dev", "val", "test"):
        (tmp_path / split).mkdir()
        for subject in ("one", "two"):
            lines = [f"w{i} w{i + 1} of {subject},w1,w2,w3,w{i + 4},{'ABCD'[i % 4]}\n" for i in range(8)]
            (tmp_path / split / f"{subject}_{split}.csv").write_text("".join(lines))
    return lab.Plan(str(tmp_path), ("one", "two"), seeds=2, n_calibration=3, n_test=4, cuts=CUTS)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = tiny_model("qwen2")
    model.network.config.max_position_embeddings = 512
    return model


def test_the_usual_cuts() -> None:
    assert [str(c) for c in CUTS] == [
        "top 0.05 of all weights",
        "top 0.1 of all weights",
        "top 0.1 of each layer",
        "bottom 0.3 of each layer",
        "bottom 0.6 of each layer",
        "bottom 0.3 of each row",
        "bottom 0.3 of all weights",
    ]


def test_sweep(model: LanguageModel, plan: lab.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = lab.run_pruning(model, plan, tmp_path / "cache")
    assert len(rows) == 1 + 2 * len(lab.SHORT) * len(CUTS)
    assert set(rows.n) == {8}  # four questions of each of the two subjects
    assert np.allclose(rows.accuracy, [c.count("1") / 8 for c in rows.correct])
    again = {
        n: part.drop(columns="seed").reset_index(drop=True)
        for n, part in rows[rows.measure == lab.MAGNITUDE].groupby("seed")
    }
    pd.testing.assert_frame_equal(again[0], again[1])  # magnitude looks at no question
    random = rows[rows.measure == lab.RANDOM]
    assert random[random.seed == 0].log_prob.tolist() != random[random.seed == 1].log_prob.tolist()

    table = lab.summary(rows)
    assert (table[table.rate == 0].accuracy == rows.accuracy[0]).all()
    assert (table.low.dropna() <= table.accuracy[table.low.notna()]).all()
    assert lab.wide(table, "bottom").shape == (9, 4) and lab.wide(table, "top").shape == (9, 3)
    found = lab.against(rows, CUTS[3], ["Wanda", "random"], seed=0)
    assert len(found) == 2 * 8 and (found.low <= found.difference).all()
    mean = {m: lab.answers_of(rows, m, CUTS[3]).mean() for m in ("SNIP", "Wanda")}
    assert found.difference["Wanda", "SNIP"] == pytest.approx(mean["SNIP"] - mean["Wanda"])
    assert lab.accuracy(table, "SNIP", CUTS[3])[0] == pytest.approx(mean["SNIP"])
    assert lab.difference(rows, "SNIP", CUTS[3], "SNIP", CUTS[3], seed=0) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"no measure 'Wanda' with the cut: top 0\.2 of each row"):
        lab.answers_of(rows, "Wanda", lab.Cut("top", "row", 0.2))
    draw.top_dots(table, 0.25)

    monkeypatch.setattr(lab, "rank", lambda *a, **k: pytest.fail("finished work was done again"))
    pd.testing.assert_frame_equal(lab.run_pruning(model, plan, tmp_path / "cache"), rows)


def test_the_model_is_as_before_and_a_set_alone_gives_no_interval(
    model: LanguageModel, plan: lab.Plan, tmp_path: Path
) -> None:
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    one = replace(plan, seeds=1, measures=("Wanda", "random"), cuts=CUTS[:1])
    table = lab.summary(lab.run_pruning(model, one, tmp_path / "cache"))
    assert all(p.equal(before[n]) for n, p in model.network.named_parameters())
    assert table.low.isna().all() and "[" not in lab.wide(table, "top").iloc[0, 0]


def test_fi_with_any_filter_prunes(model: LanguageModel, plan: lab.Plan, tmp_path: Path) -> None:
    one = replace(plan, seeds=1, measures=("FI damped 1e-2", "Wanda", "random"), cuts=CUTS[:1])
    table = lab.summary(lab.run_pruning(model, one, tmp_path / "cache"))
    assert list(dict.fromkeys(table.measure)) == ["FI damped 0.01", "Wanda", "random"]
    draw.top_dots(table, 0.25)


def test_what_is_chosen_and_taken_away(model: LanguageModel, plan: lab.Plan) -> None:
    scores = lab.rank(model, plan, 0)
    assert list(scores) == list(lab.SHORT)
    for cut in CUTS:
        common = lab.overlaps(scores, cut)
        assert np.allclose(np.diag(common), 1) and np.allclose(common, common.T)
        gone = lab.removed(scores, cut)
        assert gone.weights.between(cut.rate - 0.05, cut.rate + 0.05).all()
        best = gone.idxmax() if cut.which == "top" else gone.idxmin()
        if cut.scope == "global":  # each measure takes most of what it measures itself
            assert best["size"] == "magnitude" and best["output"] == "Wanda"
            assert best["information"] == "information length"
    whole = lab.removed(scores, lab.Cut("bottom", "layer", 1.0))
    assert np.allclose(whole, 1)
    draw.overlap_maps({str(cut): lab.overlaps(scores, cut) for cut in CUTS[:2]})


def test_a_text_file_is_judged_by_the_intact_models_own_choice(tmp_path: Path) -> None:
    text = tmp_path / "contexts.txt"
    text.write_text("".join(f"w{i} w{i + 2} w{i + 1}\n" for i in range(20)))
    cuts = (lab.Cut("bottom", "layer", 0.5),)
    plan = lab.Plan(str(text), ("text",), 2, 4, None, cuts, measures=("FI exact", "Taylor", "random"))
    rows = lab.run_pruning(tiny_model("llama"), plan, tmp_path / "cache")
    assert set(rows.n) == {10} and rows.accuracy[0] == 1
    assert not np.isclose(rows.log_prob[1:], rows.log_prob[0]).any()


def test_bad_plans_are_named(model: LanguageModel, plan: lab.Plan, tmp_path: Path) -> None:
    for change, text in [
        ({"cuts": (lab.Cut("top", "global", 1.5),)}, r"\(0, 1\], not 1.5"),
        ({"cuts": (lab.Cut("bottom", "row", 0.0),)}, r"\(0, 1\], not 0"),
        ({"seeds": 0}, "at least 1"),
        ({"measures": ("Wandaa",)}, "Unknown measure 'Wandaa'; .*Wanda"),
        ({"subjects": ("three",)}, "three"),
    ]:
        with pytest.raises((ValueError, KeyError, FileNotFoundError), match=text):
            lab.run_pruning(model, replace(plan, **change), tmp_path / "cache")  # type: ignore[arg-type]
    assert not (tmp_path / "cache").exists()
