"""Chapter 03 on a tiny random model: what each of its tables must say whatever the model."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny import tiny_examples, tiny_model
from torch import Tensor

from fichapters.ch03 import draw as figures
from fichapters.ch03 import lab
from fihelpers import Evaluator, collect, select, zeroed
from fihelpers.filters import Damped
from fihelpers.influence import ceiling, fi, saturated
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import load_task

EXAMPLES = tiny_examples(4)
GUESSES = ["first-order change", "information length", "SNIP", "FI exact", "random"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("qwen2", torch.float32)


@pytest.fixture(scope="module")
def names(model: LanguageModel) -> list[str]:
    return lab.look_at(model.network)


@pytest.fixture(scope="module")
def scores(model: LanguageModel, names: list[str]) -> dict[str, Scores]:
    return score_weights(model, EXAMPLES, ["FI exact", "SNIP", "squared score"], only=names)


# --- questions and weights to look at


def test_blocks_are_counted_from_either_end(model: LanguageModel, names: list[str]) -> None:
    assert lab.look_at(model.network, [0, -1]) == names and len(names) == 14
    part = lab.parts_of(names)
    kinds = {kind: [lab.matrix_of(n) for n in names if part[n] == kind] for kind in part.values()}
    assert kinds[lab.LAST_KV] == ["k_proj", "v_proj"]
    assert kinds[lab.LAST_REST] == ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert all(lab.layer_of(n) == 0 for n in names if part[n] == lab.EARLIER)


def test_questions_are_spread_over_the_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def loaded(task: str, subject: str, split: str, n: int, seed: int, *, tokenizer: object) -> list[object]:
        asked.append((subject, n))
        return EXAMPLES[:n]

    monkeypatch.setattr(lab, "load_task", loaded)
    assert len(lab.draw("any", ["a", "b", "c"], "val", 4, 0)) == 4
    assert asked == [("a", 2), ("b", 1), ("c", 1)]


def test_more_questions_than_there_are_are_refused() -> None:
    p = SimpleNamespace(TASK="bundled", SUBJECTS=["law"], N_CALIBRATION=4, N_TEST=100_000, SEED=0)
    with pytest.raises(ValueError, match="fewer than the 100000 asked for"):
        lab.check(p)


def test_log_probs_are_those_of_an_evaluator(model: LanguageModel) -> None:
    both = (lab.log_probs(model, EXAMPLES).detach(), Evaluator(model, EXAMPLES)().log_probs)
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_statements_to_finish_have_their_own_classes() -> None:
    model = open_model("mini-lm")
    told = load_task("cloze", "geography", "val", 3, tokenizer=model.tokenizer).examples
    name = lab.look_at(model.network, [0, -1])[0]
    asked = [q.probs for q in lab.questions(model, told, [name])]
    torch.testing.assert_close(torch.stack(asked), lab.log_probs(model, told).exp(), rtol=1e-4, atol=1e-6)
    halves = lab.class_sets(model, told)["two halves (K = 2)"]
    found = [q.probs for q in lab.questions(model, told, [name], halves)]
    pairs = torch.stack(asked).unflatten(1, (2, 2)).sum(-1)
    torch.testing.assert_close(torch.stack(found), pairs, rtol=1e-4, atol=1e-6)


# --- ceiling and saturation


def test_no_fi_passes_the_ceiling_and_whole_matrices_reach_it(model: LanguageModel, names: list[str]) -> None:
    for q in lab.questions(model, EXAMPLES, names):
        top = ceiling(q.probs)
        assert fi(q.flat(), q.probs).max() <= top * (1 + 1e-5)
        for grads in q.grads.values():
            torch.testing.assert_close(fi(grads, q.probs, over=(0, 1)), top, rtol=1e-4, atol=0)


def at_ceiling(grads: Tensor, probs: Tensor, width: int) -> tuple[int, int]:
    groups = grads[..., : grads.shape[-1] // width * width].unflatten(-1, (-1, width))
    values = fi(groups, probs, over=-1)
    return int(saturated(values, probs).sum()), int((values > 0).sum())


def test_groups_saturate_where_their_rank_allows_it(names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is counted is not warned of
        table = lab.saturation(at_ceiling, tiny_model("qwen2"), EXAMPLES[:2], names, [1, 3, "row"], 0)
    at = table.set_index(["k", "part", "size"])["share"]
    two, four, nine = table["k"].unique()
    assert (two, four, nine) == (2, 4, 9)
    assert at[two].min() > 0.99
    assert at[four, lab.EARLIER, "1"] < 0.1 and at[four, lab.EARLIER, "3"] > 0.99
    assert at[nine, lab.EARLIER, "3"] < 0.1
    assert at[four, lab.LAST_REST, "row"] == 0  # an outer product: p grows, the rank does not
    assert table[["low", "share", "high"]].apply(lambda row: row.is_monotonic_increasing, axis=1).all()
    one = lab.saturation(at_ceiling, tiny_model("qwen2"), EXAMPLES[:1], names, [1], 0)
    assert (one.low == one.share).all() and (one.n == 1).all()  # one question has no spread


def test_a_filter_and_single_weights_tell_rows_apart(model: LanguageModel, names: list[str]) -> None:
    table = lab.row_spread(model, EXAMPLES[:2], names, Damped(1e-2)).set_index("score")
    assert table.loc["FI exact", "spread"] < 1.1 and table.loc["FI exact", "at_ceiling"] > 0.9
    assert table.drop("FI exact")["spread"].min() > table.loc["FI exact", "spread"]


# --- the filter sweep


def test_the_sweep_runs_from_exact_to_the_squared_score(model: LanguageModel, names: list[str]) -> None:
    ranked = ["FI exact", "FI damped 1e-12", "FI damped 1e+06", "FI cut 1e-12", "FI cut 1e+06"]
    ranked += ["squared score", "random"]
    ask, halves = Evaluator(model, EXAMPLES), [EXAMPLES[:2], EXAMPLES[2:]]

    def tries(k: int):  # type: ignore[no-untyped-def]
        scores = score_weights(model, halves[k], ranked, only=names)
        likeness = lab.alike(scores, "squared score")
        for measure, values in scores.items():
            with zeroed(model, select(values, 0.1, seed=k)):
                yield {"measure": measure}, lab.noted(ask(), likeness[measure])

    sweep = collect(ask, tries, sets=2)
    alike = sweep.table("measure", value="alike").set_index("measure").alike
    assert alike["FI damped 1e+06"] > 0.999 and alike["squared score"] == pytest.approx(1)
    assert alike["FI damped 1e-12"] == pytest.approx(alike["FI exact"], abs=1e-3)
    assert alike["FI cut 1e+06"] == 0  # nothing passes, and a constant ranks nothing
    pairs = lab.paired(sweep, [("FI exact", "FI cut 1e-12"), ("FI exact", "random")], 0)
    none = pairs[pairs.minus == "FI cut 1e-12"]
    assert np.allclose(none[["difference", "low", "high"]], 0) and (pairs.n == 4).all()
    damage = sweep.table("measure")
    levels = damage.set_index("measure").accuracy
    gap = pairs[(pairs.minus == "random") & (pairs.of == "accuracy")].difference.item()
    assert gap == pytest.approx(levels["FI exact"] - levels["random"])
    likeness = sweep.table("measure", value="alike")
    figures.filter_sweep(damage, likeness, sweep.start().mean(), [1e-8, 1e-4]).canvas.draw()


def test_rescaling_keeps_the_function_and_exact_fi_only(model: LanguageModel) -> None:
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    table = lab.invariance(model, EXAMPLES, 0.1, seed=0).set_index("measure")
    assert table["log_prob"].max() < 1e-6
    for same in ("FI exact", "SNIP", "information length"):
        assert table.loc[same, "change"] < 1e-4 and table.loc[same, "kept"] > 0.95
    for moved in ("Jacobian norm", "Fisher diagonal", "magnitude", "FI damped 0.0001"):
        assert table.loc[moved, "change"] > 1e-2
    assert all(p.equal(before[n]) for n, p in model.network.named_parameters())


def test_a_network_without_gated_layers_cannot_be_rescaled() -> None:
    with pytest.raises(ValueError, match="up_proj"):
        lab.rescaled(tiny_model("gpt_neox"), 0)


# --- ties, averages, a printed value


def test_exact_fi_of_the_last_block_is_constant_along_rows(scores: dict[str, Scores]) -> None:
    values = scores["FI exact"].values
    parts = lab.parts_of(list(values))
    tied = {n: float((v.amax(1) - v.amin(1) <= 1e-3 * v.amax(1)).double().mean()) for n, v in values.items()}
    assert {share for n, share in tied.items() if parts[n] == lab.LAST_REST} == {1}
    assert max(share for n, share in tied.items() if parts[n] != lab.LAST_REST) == 0
    grid = lab.by_place(tied)
    assert grid.loc[1, "up_proj"] == 1 and grid.loc[0, "up_proj"] == 0
    assert list(grid)[:2] == ["q_proj", "k_proj"]


def test_each_question_adds_its_share(
    model: LanguageModel, names: list[str], scores: dict[str, Scores]
) -> None:
    each = lab.by_question(scores["FI exact"])
    alone = score_weights(model, EXAMPLES[1:2], ["FI exact"], only=names)["FI exact"]
    assert len(each) == len(EXAMPLES)
    assert each[1] == pytest.approx(lab.flatten(alone.values).mean().item(), rel=1e-4)
    shares = {"FI exact": each / each.sum()}
    assert isinstance(figures.contributions(shares, [0.5] * len(each), {"FI exact": 2.0}), Figure)


def test_the_printed_value_is_above_its_ceiling() -> None:
    (line,) = lab.above_ceiling().itertuples()
    assert line.n - 1 < line.FI  # more than any prediction among four classes allows
    assert line.times == pytest.approx(line.FI * line.P / (1 - line.P))


# --- one at a time


def test_items_are_weights_and_rows_of_the_named_matrices(model: LanguageModel, names: list[str]) -> None:
    weights = dict(model.network.named_parameters())
    singles, rows = lab.some_weights(model, names, 30, 0), lab.some_rows(model, names, 12, 0)
    assert len(singles) == 30 and len(rows) == 12
    assert len({(n, int(at)) for item in singles for n, at in item.items()}) == 30
    for item in rows:
        ((name, at),) = item.items()
        width = weights[name].shape[1]
        assert name in names and len(at) == width and at[0] % width == 0
        assert lab.pick(weights, [item]).equal(weights[name][int(at[0]) // width])


def test_first_order_change_predicts_and_is_bounded(names: list[str]) -> None:
    model = tiny_model("qwen2")
    singles = lab.some_weights(model, names, 30, 0)
    said = lab.guesses(model, EXAMPLES[:2], names, singles, GUESSES)
    torch.testing.assert_close(said["first-order change"], said["SNIP"])
    product = said["FI exact"] * said["information length"]
    torch.testing.assert_close(said["SNIP"].square(), product)  # of one weight and one question
    rows = lab.some_rows(model, names, 12, 0)
    of_rows = lab.guesses(model, EXAMPLES[:2], names, rows, GUESSES)
    bound = of_rows["FI exact"] * of_rows["information length"]
    assert (of_rows["first-order change"].square() <= bound * (1 + 1e-6)).all()  # of a group
    assert of_rows["random"].unique().numel() == 12 and {v.shape for v in of_rows.values()} == {(2, 12)}


def test_rank_correlations_see_order_and_nothing_else() -> None:
    truth = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    said = {"FI exact": -truth, "good": truth.exp(), "constant": torch.ones_like(truth)}
    table = lab.rank_correlations(said, truth, 0, resamples=50).set_index("measure")
    assert table.correlation.round(9).to_dict() == {"FI exact": -1, "good": 1, "constant": 0}
    assert (table.low <= table.correlation).all() and (table.correlation <= table.high).all()
    assert (table.exact_high == table.high["FI exact"]).all()
    assert (table.n == 20).all() and (table.questions == 3).all()
