"""Chapter 03's experiments on a tiny random model: what each must give whatever the model."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny import SHAPE, WORDS, tiny_examples, tiny_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from fichapters.ch03 import draw as figures
from fichapters.ch03 import lab as limits
from fihelpers.answers import Groups, letters
from fihelpers.filters import Cut, Damped, Exact
from fihelpers.influence import SaturationWarning, fi
from fihelpers.measures import MEASURES
from fihelpers.models.language import LanguageModel
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights

EXAMPLES = tiny_examples(4)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("qwen2", torch.float32)


@pytest.fixture(scope="module")
def names(model: LanguageModel) -> list[str]:
    return limits.look_at(model.network)


@pytest.fixture(scope="module")
def scores(model: LanguageModel, names: list[str]) -> dict[str, Scores]:
    return score_weights(model, EXAMPLES, [*MEASURES, limits.SQUARED_SCORE], only=names)


def test_blocks_are_counted_from_either_end(model: LanguageModel, names: list[str]) -> None:
    assert limits.look_at(model.network, [0, 1]) == names and len(names) == 14
    last = limits.look_at(model.network, [-1])
    assert {limits.layer_of(n) for n in last} == {1} and set(last) < set(names)
    part = limits.parts_of(names)
    assert [limits.matrix_of(n) for n in last if part[n] == limits.LAST_KV] == ["k_proj", "v_proj"]
    assert all(part[n] == limits.EARLIER for n in names if limits.layer_of(n) == 0)


def test_rescaling_keeps_the_function_and_exact_fi_only(model: LanguageModel) -> None:
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    table = limits.invariance(model, EXAMPLES, 0.1, seed=0).set_index("measure")
    assert table["log_prob"].max() < 1e-6
    for same in ("FI exact", "SNIP", "information length"):
        assert table.loc[same, "change"] < 1e-4 and table.loc[same, "kept"] > 0.95
    for moved in ("Jacobian norm", "Fisher diagonal", "magnitude", "FI damped 0.0001"):
        assert table.loc[moved, "change"] > 1e-2
    assert all(p.equal(before[n]) for n, p in model.network.named_parameters())


def test_a_network_without_gated_layers_cannot_be_rescaled() -> None:
    with pytest.raises(ValueError, match="up_proj"):
        limits.gated_pairs(tiny_model("gpt_neox").network)


def test_no_fi_passes_the_ceiling_and_whole_matrices_reach_it(model: LanguageModel, names: list[str]) -> None:
    table = limits.ceilings(model, EXAMPLES, names)
    assert (table["largest"] <= table["ceiling"] * (1 + 1e-5)).all()
    assert np.allclose(table["matrix_low"], table["ceiling"], rtol=1e-4)
    assert np.allclose(table["doubt"] / table["confidence"], table["ceiling"])


def test_groups_saturate_where_their_rank_allows_it(names: list[str]) -> None:
    table = limits.saturation(tiny_model("qwen2"), EXAMPLES[:2], names, [1, 3], rows=4, seed=0)
    at = table.set_index(["k", "part", "size"])["share"]
    two, four, nine = table["k"].unique()
    assert (two, four, nine) == (2, 4, 9)
    assert at[two].min() > 0.99
    assert at[four, limits.EARLIER, "1"] < 0.1 and at[four, limits.EARLIER, "3"] > 0.99
    assert at[nine, limits.EARLIER, "3"] < 0.1
    assert at[four, limits.LAST_REST, "row"] == 0  # an outer product: p grows, the rank does not
    assert isinstance(figures.draw_saturation(table), Figure)


def test_a_filter_and_single_weights_tell_rows_apart(model: LanguageModel, names: list[str]) -> None:
    many = [n for n, part in limits.parts_of(names).items() if part == limits.EARLIER]
    table = limits.row_spread(model, EXAMPLES[:2], many, Damped(1e-2)).set_index("score")
    assert table.loc["FI exact", "spread"] < 1.1
    assert table.drop("FI exact")["spread"].min() > table.loc["FI exact", "spread"]
    assert list(limits.keyed(table.reset_index(), "score").index) == ["exact", "mean", "jacobian"]


def test_the_sweep_runs_from_exact_to_the_jacobian(model: LanguageModel, names: list[str]) -> None:
    tried = [Exact(), Damped(1e-12), Damped(1e6), Cut(1e-12), Cut(1e6)]
    sweep = limits.filter_sweep(model, [EXAMPLES[:2], EXAMPLES[2:]], EXAMPLES, names, tried, 0.1)
    found = limits.likeness(sweep, tried)
    assert len(found) == 2 * (len(tried) + 2)
    assert found.set_index("ranking").kind["FI cut 1e+06"].tolist() == ["cut", "cut"]
    ranks = found.groupby("ranking")[["with_exact", "with_jacobian"]].min()
    assert ranks.loc["FI damped 1e-12", "with_exact"] > 0.999
    assert ranks.loc["FI damped 1e+06", "with_jacobian"] > 0.999
    assert ranks.loc["FI cut 1e-12", "with_exact"] > 0.999
    assert np.isnan(found.set_index("ranking")["with_exact"]["FI cut 1e+06"]).all()
    table = limits.damage(sweep, found).set_index("ranking")
    assert table.loc["intact", "accuracy"] == sweep.start().mean()
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    assert (table["n"] == 4).all() and table.loc["FI exact", "seeds"] == 2
    same = limits.minus(sweep, [("FI exact", "FI cut 1e-12")], "log_prob", 0)
    assert np.allclose(same[["difference", "low", "high"]], 0)
    gaps = limits.minus(sweep, [("FI exact", "random")], "accuracy", 0)
    gap, low, high = gaps.loc[0, ["difference", "low", "high"]]
    assert gap == pytest.approx(table.loc["FI exact", "accuracy"] - table.loc["random", "accuracy"])
    assert low <= gap <= high
    figure = figures.draw_sweep(found, table.reset_index(), [1e-8, 1e-6, 1e-4])
    figure.canvas.draw()


def test_the_decomposition_holds_per_sample_and_bounds_groups(
    model: LanguageModel, names: list[str], scores: dict[str, Scores]
) -> None:
    table = limits.decomposition_errors(model, EXAMPLES, names)
    assert table["error"].max() < 1e-10 and (table["weights"] > 0).all()
    assert limits.row_inequality(model, EXAMPLES[:2], names).max() <= 1 + 1e-6
    ratio = limits.between_averages(scores)
    assert (ratio - 1).abs().median() > 1e-3
    one = limits.between_averages(
        score_weights(model, EXAMPLES[:1], ["FI", limits.SQUARED_SCORE, "Fisher diagonal"], only=names)
    )
    assert (one - 1).abs().max() < 1e-3  # an average of one sample is the sample


def test_zeroing_agrees_with_its_first_order_prediction(model: LanguageModel, names: list[str]) -> None:
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    single = limits.zero_weights(model, EXAMPLES[:2], names, 30, seed=0)
    rows = limits.zero_rows(model, EXAMPLES[:2], names, 12, 0, Damped(1e-4))
    assert len(single) == 60 and len(rows) == 24 and not rows.isna().any().any()
    table = limits.rank_correlations(single, seed=0, resamples=50).set_index("measure")
    assert table.loc["SNIP", "correlation"] > 0.9 > table.loc["random", "high"]
    assert (table["low"] <= table["correlation"]).all() and (table["correlation"] <= table["high"]).all()
    assert all(p.equal(before[n]) for n, p in model.network.named_parameters())
    both = (table.reset_index(), limits.rank_correlations(rows, 0, 50))
    figures.draw_correlations(*both).canvas.draw()


def test_rows_of_the_last_block_are_constant(scores: dict[str, Scores]) -> None:
    table = limits.constant_rows(scores["FI exact"])
    one = table["part"] == limits.LAST_REST
    assert table[one]["share"].min() == 1 and table[~one]["share"].max() == 0
    assert limits.constant_rows(scores["SNIP"])["share"].max() == 0
    assert limits.keyed(limits.constant_by_part(table), "part")["share"].to_dict() == {
        "early": 0,
        "kv": 0,
        "rest": 1,
    }
    figures.draw_constant_rows(table).canvas.draw()


def test_values_that_query_heads_do_not_share_tie_too() -> None:
    network = Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, num_key_value_heads=SHAPE["num_attention_heads"])
    ).double()
    model = replace(tiny_model("qwen2"), network=network.eval())
    name = "model.layers.1.self_attn.v_proj.weight"
    shared, own = (
        limits.constant_rows(score_weights(m, EXAMPLES, ["FI"], only=[name])["FI exact"])["share"].item()
        for m in (tiny_model("qwen2"), model)
    )
    assert shared == 0 and own == 1


def test_stripes_tell_rows_from_columns() -> None:
    by_row = Scores({"w": torch.arange(6.0)[:, None] + 1e-3 * torch.rand(6, 5)})
    rows, columns = limits.stripes(by_row, ["w"])
    assert rows > 0.9 > 0.2 > columns
    assert limits.stripes(Scores({"w": by_row["w"].T}), ["w"]) == pytest.approx((columns, rows))


def test_rounding_to_digits_makes_ties(scores: dict[str, Scores]) -> None:
    exact = scores["FI exact"]
    coarse = limits.rounded(exact)
    for name, value in exact.values.items():
        torch.testing.assert_close(coarse[name], value.double(), rtol=6e-4, atol=0)
    q = coarse["model.layers.1.self_attn.q_proj.weight"]
    assert (q.amax(1) - q.amin(1) <= 1e-3 * q.amax(1)).all()
    table = limits.picks(exact, 0.05, [0, 1, 2])
    assert table["agree"].between(0, 1).all() and table["whole_rows"].between(0, 1).all()


def test_effective_sizes_lie_between_one_and_n(scores: dict[str, Scores]) -> None:
    shares = limits.contributions({m: scores[m] for m in ("FI exact", "Jacobian norm")})
    assert np.allclose(shares.groupby("measure")["share"].sum(), 1)
    table = limits.effective_sizes(shares)
    assert table["effective"].between(1, len(EXAMPLES)).all() and (table["n"] == len(EXAMPLES)).all()
    figures.draw_contributions(shares.assign(confidence=0.5), ["FI exact", "Jacobian norm"]).canvas.draw()


def test_the_own_backward_pass_fails_where_the_model_is_sure(model: LanguageModel, names: list[str]) -> None:
    table = limits.own_score_errors(model, EXAMPLES[:2], names[0], [1, 100])
    sure = table[table["sharpness"] == 100].groupby("way")[["doubt", "error", "excess"]].max()
    own, others = sure.loc["own backward pass"], sure.loc["from the other classes"]
    assert own["doubt"] < 1e-3 and own["error"] > 10 * others["error"]
    assert table[table["way"] == "from the other classes"]["excess"].max() <= 1 + 1e-5 < own["excess"]
    assert limits.null_residual(model, EXAMPLES, names)["residual"].max() < 1e-5
    figures.draw_own_scores(table).canvas.draw()


def test_the_formula_as_it_stands_is_right_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    free = torch.randn(3, 5, 3, generator=generator, dtype=torch.float64)
    grads = torch.cat([-(probs[1:, None, None] * free).sum(0, keepdim=True) / probs[0], free])
    with pytest.warns(SaturationWarning):
        bounded = fi(grads, probs, over=-1)
    torch.testing.assert_close(limits.as_it_stands(grads, probs), bounded)


def test_float32_is_close_norm_wise(model: LanguageModel, names: list[str]) -> None:
    found = limits.precisions(model, EXAMPLES, names, ["FI exact", "Fisher diagonal"])
    table = limits.rounding(found, 0.05).set_index(["measure", "dtype"])
    assert len(table) == 4 and (table["questions"] == len(EXAMPLES)).all() and (table["worst"] >= 1).all()
    float32, bfloat16 = table.loc[("FI exact", "float32")], table.loc[("FI exact", "bfloat16")]
    assert float32["largest"] < 1e-3 < bfloat16["largest"] and float32["kept"] > 0.9
    same = limits.rounding({"float64": found["float64"], "float32": found["float64"]}, 0.05)
    assert same.loc[0, ["differing", "worst", "largest", "kept"]].tolist() == [0, 1, 0, 1]
    shown = limits.differences(found, "float32", shown=100)
    assert shown["size"].between(0, 1).all()
    assert 100 <= len(shown) <= 200
    figures.draw_rounding(shown, int(float32["n"])).canvas.draw()


def test_the_same_precision_changes_no_answer(model: LanguageModel) -> None:
    assert limits.changed_answers(model, EXAMPLES, torch.float32) == []


def test_all_tokens_hold_all_the_probability(model: LanguageModel) -> None:
    half = len(WORDS) // 2
    whole = Groups(("first", "second"), (tuple(range(half)), tuple(range(half, len(WORDS)))))
    assert limits.mass_of(model, EXAMPLES, whole) == pytest.approx(1)
    assert 0 < limits.mass_of(model, EXAMPLES, letters(model.tokenizer)) < 1


def test_questions_are_spread_over_the_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        limits, "load_task", lambda t, s, split, n, seed: asked.append((s, n)) or EXAMPLES[:n]
    )
    assert len(limits.draw("any", ["a", "b", "c"], "val", 4, 0)) == 4
    assert asked == [("a", 2), ("b", 1), ("c", 1)]


def test_saturation_is_not_warned_of_by_the_experiments(model: LanguageModel, names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limits.row_spread(model, EXAMPLES[:1], names, Damped(1e-4))
        limits.ceilings(model, EXAMPLES[:1], names)
