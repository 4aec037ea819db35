"""Chapter 11: components and their gates, relatives of FI on them, directions, leverage, and two classes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_examples, tiny_model

from fichapters.ch04.digits import train
from fichapters.ch11 import components as parts_lab
from fichapters.ch11 import draw, lab
from fichapters.ch11.components import COAR, GATE_FI, GATE_LENGTH, JOINT, Coordinates, Settings
from fihelpers.answers import Groups, letters
from fihelpers.influence import ceiling
from fihelpers.models.language import LanguageModel
from fihelpers.scores.weights import score_weights
from fihelpers.trials import Kept

SETTINGS = Settings(ablations=30, held=8, curved=2, attributed=2)
EXAMPLES = tiny_examples(4)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def parts(model: LanguageModel) -> list[parts_lab.Component]:
    return parts_lab.find_components(model, 8)


def test_components_are_all_columns_of_the_reading_matrices(
    model: LanguageModel, parts: list[parts_lab.Component]
) -> None:
    assert [str(c) for c in parts[:2]] == ["layer 0, head 0-5", "layer 0, head 6-11"]
    for name in {c.weight for c in parts}:
        columns = [i for c in parts if c.weight == name for i in range(c.start, c.stop)]
        assert columns == list(range(model.network.get_parameter(name).shape[1]))
    with pytest.raises(ValueError, match="at least 1 neuron"):
        parts_lab.find_components(model, 0)
    with pytest.raises(ValueError, match="Llama or Qwen"):
        parts_lab.find_components(tiny_model("gpt2"), 8)


def test_a_closed_gate_is_zeroed_weights(model: LanguageModel, parts: list[parts_lab.Component]) -> None:
    gates = torch.cat([torch.ones(1, len(parts)), 1 - torch.eye(len(parts))]).double()
    for i, example in enumerate(EXAMPLES):
        right = parts_lab.answers_under(model, example, parts, gates)[:, example.answer]
        falls = parts_lab.damage(model, EXAMPLES, parts)[:, i]
        np.testing.assert_allclose(falls, (right[0] - right[1:]).numpy(), atol=1e-10)


def test_gradients_of_gates_are_slopes_and_sums_are_those_of_the_suite(
    model: LanguageModel, parts: list[parts_lab.Component]
) -> None:
    table = parts_lab.gradient_scores(model, EXAMPLES, parts, Coordinates(), seed=0)
    whole = score_weights(model, EXAMPLES, ["FI exact", "SNIP"], only={c.weight for c in parts})
    for name, scores in whole.items():
        if name in table:
            sums = [float(scores[c.weight][:, c.columns].sum()) for c in parts]
            np.testing.assert_allclose(table[name], sums, rtol=1e-6)
    step, slopes = 1e-2, []  # norms work in float32, whatever the model
    for sign in (1, -1):
        gates = 1 + sign * step * torch.eye(len(parts), dtype=torch.float64)
        slopes.append([parts_lab.answers_under(model, e, parts, gates) for e in EXAMPLES])
    change = []
    for up, down in zip(*slopes, strict=True):
        s = (up - down) / (2 * step)
        change.append(s[:, int(up[0].argmax())] ** 2)
    np.testing.assert_allclose(
        table[parts_lab.GATE_CHANGE], torch.stack(change).mean(0), rtol=5e-3, atol=1e-5
    )


def test_no_unit_moves_exact_fi_and_joint_fi_is_the_odds(
    model: LanguageModel, parts: list[parts_lab.Component]
) -> None:
    moves = lab.moved(model, EXAMPLES[:2], parts, SETTINGS)
    kept = [lab.EXACT, GATE_FI, COAR, JOINT]
    assert (moves.loc[kept, ["rescaled: moved", "rewritten: moved"]] < 1e-6).all(axis=None)
    free = [lab.LENGTH, "SNIP", "Taylor", GATE_LENGTH]
    assert (moves.loc[free, "rescaled: moved"] < 1e-6).all()
    assert (moves.loc[["Jacobian norm", "magnitude", "SAM sharpness"], "rescaled: moved"] > 0.1).all()
    assert moves.loc[GATE_LENGTH, ["rewritten: moved"]].isna().all()
    table = parts_lab.gradient_scores(model, EXAMPLES, parts, Coordinates(), seed=0)
    ones = torch.ones(1, len(parts), dtype=torch.float64)
    probs = torch.cat([parts_lab.answers_under(model, e, parts, ones) for e in EXAMPLES]).exp().T
    np.testing.assert_allclose(table[JOINT], float(ceiling(probs).mean()), rtol=1e-6)
    assert (table[GATE_FI] <= float(ceiling(probs).mean()) * (1 + 1e-9)).all()


def test_a_rescaled_model_answers_the_same(model: LanguageModel) -> None:
    other = parts_lab.rescaled(model, seed=0)
    (batch, *_) = model.batches([e.prompt for e in EXAMPLES])
    with torch.no_grad():
        assert torch.equal(model.last_logits(batch), other.last_logits(batch))
    both = zip(model.network.parameters(), other.network.parameters(), strict=True)
    changed = [not torch.equal(a, b) for a, b in both]
    assert any(changed)


def test_every_relative_has_its_words_and_its_name(
    model: LanguageModel, parts: list[parts_lab.Component]
) -> None:
    scores, fit = lab.scored(model, EXAMPLES[:2], parts, SETTINGS)
    assert set(scores) == set(lab.ROWS) == set(lab.SHORT)
    assert len(fit) == 2 and fit.r2.max() <= 1
    found = lab.agreement(scores, parts_lab.damage(model, EXAMPLES, parts), seed=0)
    table = lab.readable(lab.overview(lab.moved(model, EXAMPLES[:2], parts, SETTINGS), found.table()))
    assert table.loc[lab.RANDOM, "rescaled"] == "no units"
    assert table.loc[GATE_LENGTH, "rewritten"] == "not defined"
    low_high = found.table()
    assert ((low_high.low <= low_high.agreement) & (low_high.agreement <= low_high.high)).all()
    assert {name for members in lab.FAMILIES.values() for name in members} == set(lab.ROWS)
    draw.agreement_dots({"tiny": low_high}, lab.FAMILIES)
    heads = np.array([c.kind == "head" for c in parts])
    draw.score_and_damage(scores, parts_lab.damage(model, EXAMPLES, parts), heads, [lab.EXACT, COAR])


def test_a_linear_model_is_found_and_its_fit_is_whole() -> None:
    rng = np.random.default_rng(0)
    gone = rng.random((60, 5)) < 0.3
    slopes = np.array([-1.0, 0.0, 0.5, -0.2, 0.1])
    found, fit = parts_lab.linear_fit(gone, -0.3 + gone @ slopes, held=20)
    np.testing.assert_allclose(found, slopes, atol=1e-12)
    assert fit["r2"] == pytest.approx(1) and fit["correlation"] == pytest.approx(1)


def test_rank_agreement_is_spearmans_and_a_constant_has_none() -> None:
    rng = np.random.default_rng(0)
    scores = pd.DataFrame({"a": rng.random(30), "flat": np.full(30, 0.17) + 1e-12 * rng.random(30)})
    falls = scores.a.to_numpy()[:, None] ** 3 + np.zeros((30, 4))
    found = lab.agreement(scores, falls, seed=0)
    assert found.value.tolist() == pytest.approx([1, 0])
    assert found.minus("a", "flat") == pytest.approx((1, 1, 1))
    b = rng.random(30)
    truth = scores.a.corr(pd.Series(b), method="spearman")
    assert lab.rank_agreement(scores[["a"]].to_numpy(), b)[0] == pytest.approx(truth)


def test_leverages_fi_and_the_best_direction_of_each_length(model: LanguageModel) -> None:
    rows, checks = lab.directions(model, EXAMPLES, 1e-3, seed=0)
    assert checks.leverage_error.max() < 1e-8
    np.testing.assert_allclose(checks.fi, checks.ceiling, rtol=1e-8)
    shares = lab.shares_table(rows)
    best = ["natural gradient", "gradient", "its signs"]
    for name, length in zip(best, lab.LENGTHS, strict=True):
        assert shares.loc[name, length] == pytest.approx(1, rel=1e-6)
    assert (shares[list(lab.LENGTHS)] <= 1 + 1e-9).all(axis=None)
    np.testing.assert_allclose(shares.measured, shares["Fisher length"], atol=0.02)
    draw.direction_map(shares, len(EXAMPLES))


def test_with_two_classes_every_weight_is_at_the_ceiling(model: LanguageModel) -> None:
    two = lab.merged_letters(model)
    assert two.size == 2 and set(sum(two.tokens, ())) == set(sum(letters(model.tokenizer).tokens, ()))
    found = lab.saturation(model, EXAMPLES, two)
    assert (found.at_ceiling == 1).all() and (found.spread < 1.001).all()
    text = lab.readable_saturation({"two": found})
    assert text.loc[0, "at the ceiling"] == "100.00%" and text.loc[0, "questions"] == len(EXAMPLES)
    assert (lab.saturation(model, EXAMPLES, letters(model.tokenizer)).at_ceiling < 0.5).all()
    assert lab.warned(model, EXAMPLES, two) and not lab.warned(model, EXAMPLES, letters(model.tokenizer))
    words = lab.saturation(model, lab.as_text(EXAMPLES), Groups(("x", "y"), ((5, 6), (7,))))
    assert (words.at_ceiling == 1).all()


def test_nonsense_keeps_the_words_or_the_length_and_the_cue(model: LanguageModel) -> None:
    asked = [lab.replace(e, prompt=e.prompt + lab.CUE) for e in EXAMPLES]
    for old, new in zip(asked, lab.nonsense(asked, lab.SHUFFLED, model, 0), strict=True):
        assert sorted(new.prompt.split()) == sorted(old.prompt.split())
        assert new.prompt.endswith(lab.CUE) and new.answer == old.answer
    first, again = (lab.nonsense(asked, lab.TOKENS, model, seed) for seed in (0, 0))
    assert [e.prompt for e in first] == [e.prompt for e in again] != [e.prompt for e in asked]


def test_sense_and_nonsense_are_compared_with_random_weights(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [lab.replace(e, prompt=e.prompt + lab.CUE) for e in EXAMPLES]
    monkeypatch.setattr(lab, "load_task", lambda *drawn: SimpleNamespace(examples=asked[: drawn[3]]))
    settings = {"n": 2, "n_test": 2, "seeds": 3, "tried": 2, "shares": [0.1], "kept": 0.2, "bits": 4}
    p = SimpleNamespace(TASK="any", SUBJECTS=["one"], SEED=0, NONSENSE={**settings, "measures": ["SNIP"]})
    kept = Kept(tmp_path, "nonsense", None)
    trials = lab.calibrate_on_nonsense(model, p, kept)
    table = lab.against_real(trials, p, "log_prob")
    assert len(table) == 2 * 4 * 7 and (table.n == 2).all()
    rows = lab.overlaps(trials)
    assert set(rows[rows.source == lab.REAL].overlap) == {1.0} and rows.seed.nunique() == 3
    assert set(rows.measure) == {lab.EXACT, lab.DAMPED, lab.LENGTH, "SNIP"}
    gaps = lab.overlap_gaps(trials, p)
    assert len(gaps) == 2 * 4 and (gaps.n == 3).all() and gaps.difference.between(gaps.low, gaps.high).all()
    again = lab.calibrate_on_nonsense(model, p, kept)
    assert len(list(tmp_path.iterdir())) == 3  # a file for each set, read again
    pd.testing.assert_frame_equal(lab.against_real(again, p, "log_prob"), table)


def test_digits_have_constant_exact_fi_and_units_that_matter() -> None:
    digits = train(200, 0)
    scores, falls, r2 = lab.digit_scores(digits, 60, Settings(ablations=120, held=30))
    assert falls.shape == (64, 140) and r2 < 1
    exact = scores[lab.EXACT].to_numpy()
    np.testing.assert_allclose(exact, exact[0], rtol=1e-4)
    found = lab.agreement(scores, falls, seed=0)
    assert found.of(lab.EXACT)[0] == 0
    assert found.minus(GATE_LENGTH, lab.RANDOM)[0] > 0


def test_what_is_quoted_of_other_chapters() -> None:
    for place in lab.QUOTED.values():
        assert lab.from_book(**place).n
    with pytest.raises(KeyError, match="run that chapter"):
        lab.from_book("07_sparsification", "records", name="nothing")
    gaps = lab.against_grad_cam({key: lab.from_book(**place) for key, place in lab.QUOTED.items()})
    assert gaps.measure.tolist() == [lab.EXACT, lab.DAMPED]
    assert gaps.difference.between(gaps.low, gaps.high).all()
