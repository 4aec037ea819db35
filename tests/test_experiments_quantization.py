"""The protection sweep on a tiny model: what it keeps, counts and refuses."""

import copy
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model

from fichapters.ch08 import draw, lab
from fichapters.stored import size_report
from fihelpers.evaluate.questions import Evaluator
from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, linear_names, turned_names
from fihelpers.perturb.quantize import Scheme, pack, pack_model, select_channels
from fihelpers.trials import Kept, Trials, collect

SHARES = [0.1, 0.5]


@pytest.fixture(scope="module")
def p(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("task")
    for split in ("dev", "val", "test"):
        (folder / split).mkdir()
        for subject in ("one", "two"):
            lines = [f"w{i} w{i + 1} of {subject},w1,w2,w3,w{i + 4},{'ABCD'[i % 4]}\n" for i in range(8)]
            (folder / split / f"{subject}_{split}.csv").write_text("".join(lines))
    return SimpleNamespace(
        TASK=str(folder),
        SUBJECTS=["one", "two"],
        SEEDS=2,
        SEED=0,
        N_CALIBRATION=3,
        N_TEST=4,
        MATRICES=["o_proj", "all"],
        BITS={"tried": [1, 2], "full": [1, 2]},
        KEPT={"rows": SHARES, "columns": 0.5},
        ROUNDING={"mapping": "symmetric", "group": None, "bits": [1, 2], "groups": [None, 4]},
    )


def changed(p: SimpleNamespace, **settings: Any) -> SimpleNamespace:
    """The settings with others; those of a group by the group's name and theirs, as in ROUNDING__group."""
    found = copy.deepcopy(vars(p))
    for name, value in settings.items():
        group, _, key = name.partition("__")
        found[group] = {**found[group], key: value} if key else value
    return SimpleNamespace(**found)


def with_long_context(kind: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = tiny_model(kind, dtype)
    model.network.config.max_position_embeddings = 512
    if kind == "gpt2":  # whose positions are learned
        model.network.transformer.wpe.weight.data = torch.randn(512, 12, dtype=dtype)
    return model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return with_long_context("qwen2")


@pytest.fixture(scope="module")
def ask(model: LanguageModel, p: SimpleNamespace) -> Evaluator:
    return Evaluator(model, lab.tested_set(p))


@pytest.fixture(scope="module")
def trials(
    model: LanguageModel, p: SimpleNamespace, ask: Evaluator, tmp_path_factory: pytest.TempPathFactory
) -> Trials:
    kept = Kept(tmp_path_factory.mktemp("kept"), "protection", p)
    before = {n: w.clone() for n, w in model.network.named_parameters()}
    trials = lab.protect(model, p, ask, kept)
    assert all(w.equal(before[n]) for n, w in model.network.named_parameters())
    assert len(list(kept.folder.iterdir())) == p.SEEDS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.Ranking, "of", lambda *a: pytest.fail("finished work was done again"))
        again = lab.protect(model, p, ask, kept)
    pd.testing.assert_frame_equal(lab.answer_table(again), lab.answer_table(trials))
    return trials


@pytest.fixture(scope="module")
def swept(model: LanguageModel, p: SimpleNamespace, ask: Evaluator) -> Trials:
    return collect(ask, partial(lab.unprotected, model, p, ask))


def test_everything_is_run_once_for_each_calibration_set(p: SimpleNamespace, trials: Trials) -> None:
    rows, cases, main = lab.answer_table(trials), lab.cases(p), lab.main_cases(p)
    full = len(lab.KEEP_BY["rows"]) * len(SHARES) + len(lab.KEEP_BY["columns"])
    others = len(cases) - len(main)
    assert len(rows) == 1 + len(cases) + p.SEEDS * (2 * full + others * len(lab.EARLIER) * 2)
    assert set(rows.n) == {8}  # four questions of each of the two subjects
    assert np.allclose(rows.accuracy, [c.count("1") / 8 for c in rows.correct])
    for keep in lab.DATA_FREE:  # look at no question
        found = rows[rows.keep == keep]
        assert found[found.seed == 0].correct.tolist() == found[found.seed == 1].correct.tolist()
    first, second = trials.where(keep="random", matrices="all", axis="rows", bits=2, share=0.5).answers(
        "log_prob"
    )
    assert not np.array_equal(first, second)


def test_what_is_kept_is_what_scores_highest(model: LanguageModel, p: SimpleNamespace) -> None:
    ranking = lab.Ranking(model, p, 0)
    case = lab.main_cases(p)[1]
    for axis in ("rows", "columns"):
        width = {n: model.network.get_parameter(n).shape[axis == "columns"] for n in ranking.names["all"]}
        for keep in lab.KEEP_BY[axis]:
            scores, which = ranking.of(keep, case, axis)
            assert scores.metadata["axis"] == axis and scores.metadata["sha256"] == model.sha256
            assert {n: len(v) for n, v in scores.values.items()} == width
            assert (which != "top") == (keep == "random" or "low half" in keep)
    name = ranking.names["o_proj"][0]
    error = pack(model.network.get_parameter(name), Scheme(2)).unpack() - model.network.get_parameter(name)
    assert torch.allclose(ranking.of(lab.ERROR, case, "rows")[0][name], error.square().sum(1))
    metric = ranking.weights["Fisher diagonal"][name]
    assert torch.allclose(ranking.of(lab.LENGTH, case, "rows")[0][name], (metric * error.square()).sum(1))


def test_answers_pair_and_recover(p: SimpleNamespace, trials: Trials) -> None:
    for case, value in product(lab.main_cases(p), lab.VALUES.values()):
        whole = lab.kept_by(trials, case, "SNIP", value)
        assert whole.shape == (2, 8) and lab.kept_by(trials, case, lab.NOTHING, value).shape == (1, 8)
        assert lab.minus(trials, case, ("SNIP", "SNIP"), value, 0) == (0, 0, 0)
        parts = [lab.kept_by(trials, case, "SNIP", value, share) for share in SHARES]
        assert np.allclose(whole, np.mean(parts, 0))
        won, lost = lab.recovered(trials, case, "SNIP", value, 0)[0], lab.is_lost(trials, case, value, 0)
        assert np.isnan(won) != lost
    with pytest.raises(ValueError, match=r"no trial has matrices = 'o_proj', bits = 1.*'mean input'"):
        lab.kept_by(trials, lab.main_cases(p)[0], "mean input", "accuracy")


def test_the_recovered_share() -> None:
    rng = np.random.default_rng(0)
    intact, plain = np.ones(40), (rng.random(40) < 0.3).astype(float)
    for kept, share in ((plain, 0), (intact, 1), ((intact + plain) / 2, 0.5)):
        assert lab.recovered_share(intact, plain, np.stack([kept, kept]), 0) == pytest.approx((share,) * 3)
    value, low, high = lab.recovered_share(intact, plain, (rng.random((3, 40)) < 0.6).astype(float), 0)
    assert low < value < high


def test_tables_of_the_chapter(p: SimpleNamespace, trials: Trials, ask: Evaluator) -> None:
    table, rows, main = lab.summary(trials), lab.answer_table(trials), lab.main_cases(p)
    start = table[table.share == 0]
    for case in main:
        plain = rows[(rows.keep == "nothing") & (rows.matrices == case.matrices) & (rows.bits == case.bits)]
        same = (start.matrices == case.matrices) & (start.bits == case.bits)
        assert (start[same].accuracy == plain.accuracy.iloc[0]).all()
        assert lab.wide(table, case).shape == (14, 2) and lab.wide(table, case, "columns").shape == (15, 1)
    subjects = lab.by_subject(trials, ask.examples)
    whole = subjects.groupby(["matrices", "bits", "keep", "share"]).accuracy.mean()
    exact = rows[(rows.keep == "FI exact") & (rows.axis == "rows")]
    for (matrices, bits, share), value in (
        exact.groupby(["matrices", "bits", "share"]).accuracy.mean().items()
    ):
        assert whole[matrices, bits, "FI exact", share] == pytest.approx(value)
    one = lab.of_subject(subjects, main[0], "one")
    assert set(one) == {"exact", "low_exact", "damped", "low_damped", "random", "nothing"}
    draw.protection_curves(table, main, 0.5, 0.25)
    draw.subject_curves(subjects, main, None)


def test_comparisons_of_the_chapter(p: SimpleNamespace, trials: Trials) -> None:
    cases, main = lab.cases(p), lab.main_cases(p)
    won = lab.recovered_as_claimed(trials, p)
    assert len(won) == 2 * len(cases) and (won.recovered.notna() == won.lost).all()
    high_low = lab.high_against_low(trials, p, "log_prob")
    assert len(high_low) == 2 * len(cases) and (high_low.low <= high_low.high).all()
    duels = lab.duels(trials, p, "accuracy")
    assert len(duels) == 2 * len(lab.DUELS)
    assert lab.grid({"accuracy": duels}, ["axis", "first", "second"], "matrices").shape == (len(lab.DUELS), 2)
    both = lab.grid({"accuracy": high_low, "log P": high_low}, ["matrices", "bits", "filter"])
    assert both.shape == (len(high_low), 2) and (lab.NOTHING_LOST not in both.iloc[0, 0]) == high_low.lost[0]
    won = {
        str(c): {v: lab.recovery(trials, c, "columns", v, 0) for v in ("accuracy", "log_prob")} for c in main
    }
    draw.recovered_dots(won, "columns")


def test_sizes_are_those_of_packed_matrices(
    model: LanguageModel, p: SimpleNamespace, trials: Trials, swept: Trials
) -> None:
    sized = lab.sizes(model, p)
    assert (sized[sized.share == 0].extra == 0).all() and (sized[sized.share > 0].extra > 0).all()
    sweep = lab.where_loss_begins(swept, 0)
    assert set(sweep.group) == {0, 4} and {3, 2} <= set(sweep.bits)  # one bit more than 2 is there, too
    assert 0 <= lab.loss_begins(sweep, "all") <= 2
    for case in lab.main_cases(p):
        cost = lab.per_megabyte(trials, sized, case, lab.LENGTH, 0)
        assert cost.share.tolist() == SHARES and cost.extra.is_monotonic_increasing
        more = lab.one_step_more(trials, swept, sized, p, case, lab.LENGTH)
        kept = lab.kept_by(trials, case, lab.LENGTH, "accuracy", 0.5).mean()
        finer = sweep[(sweep.matrices == case.matrices) & (sweep.bits == case.bits + 1) & (sweep.group == 0)]
        finer = finer[finer.mapping == "symmetric"].iloc[0]
        assert more.difference.iloc[-1] == pytest.approx(finer.accuracy - kept)
        assert (more.unprotected == finer.bits_per_weight).all()
    assert lab.sweep_grid(sweep).shape == (8, 3) and (lab.sweep_grid(sweep) == "").any().any()
    draw.loss_sweep(sweep, 0.5, 0.25)
    draw.size_curves(lab.summary(trials), sized, sweep, lab.main_cases(p), 0.5, None)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_arithmetic_of_published_sizes_is_that_of_packed_matrices(bits: int) -> None:
    shape, share = (40, 24), 0.25
    packed = pack(torch.randn(shape), Scheme(bits), range(10))
    assert lab.extra_bytes(shape, bits, share) == size_report({"w": packed}).extra


def test_published_sizes() -> None:
    assert [lab.claimed(key) for key in ("share", "recovery", "memory")] == [0.05, 0.9, 0.1]
    assert 0 < lab.claimed("bar_low") < lab.claimed("bar_high") < 1
    sizes = lab.published_sizes().set_index("matrices")
    weights = 0.05 * 28 * 3584 * 3584
    assert sizes.megabytes_4["o_proj"] == pytest.approx(1.5 * weights / 1e6, rel=0.01)
    assert sizes.megabytes_1["o_proj"] == pytest.approx(15 / 8 * weights / 1e6, rel=0.01)
    assert sizes.share["o_proj"] * sizes.megabytes_4["o_proj"] / 0.05 == pytest.approx(100)


def test_joint_influence_saturates_and_sums_do_not(p: SimpleNamespace) -> None:
    exact = with_long_context("qwen2", torch.float64)  # where rounding does not blur the ceiling
    ranking = lab.Ranking(exact, p, 0)
    joint, said = lab.joint_influence(ranking)
    assert lab.saturated_matrices(joint, "joint, exact") == (1, 2)  # not the last block's
    assert lab.saturated_matrices(joint, "sum, exact")[0] == 0
    assert len(said) == 1 and "equals its ceiling in the channels of 1 of 2" in said[0]
    assert len(joint) == 3 * 2 * 12 and joint.value.max() <= 1 + 1e-4
    draw.joint_strips(joint)


def test_what_sums_means_and_channels_have_in_common(model: LanguageModel, p: SimpleNamespace) -> None:
    ranking = lab.Ranking(model, p, 0)
    common = lab.sum_against_mean(ranking, lab.main_cases(p)[1], 0.25)
    assert common["layer"] == 1 and 0 <= common["global"] <= 1
    unequal = lab.spreads(ranking, lab.main_cases(p)[1])
    assert unequal.shape == (3, 2) and (unequal >= 1).all().all()


def test_a_protected_model_is_saved_and_opened_again(model: LanguageModel, p: SimpleNamespace) -> None:
    before = {n: w.clone() for n, w in model.network.named_parameters()}
    found = lab.save_and_reopen(lab.Ranking(model, p, 0))
    assert found["difference"] == 0
    assert found["packed"] < found["sixteen_bit"] and found["memory"] < found["memory_before"]
    assert found["packed"] < found["file"] < found["folder"]
    assert all(w.equal(before[n]) for n, w in model.network.named_parameters())


@pytest.mark.parametrize(("kind", "layer"), [("gpt2", "c_proj"), ("mixtral", "experts")])
def test_the_chapter_runs_on_weights_of_other_kinds(kind: str, layer: str, p: SimpleNamespace) -> None:
    """Stored turned, or fused: GPT-2's layers and a mixture's experts."""
    model = with_long_context(kind)
    p = changed(p, SEEDS=1, MATRICES=[layer, "all"], KEPT__rows=[0.25], ROUNDING__groups=[None, 2])
    lab.check_model(model, p)
    before = {n: w.clone() for n, w in model.network.named_parameters()}
    ask = Evaluator(model, lab.tested_set(p))
    swept = collect(ask, partial(lab.unprotected, model, p, ask))
    trials = lab.protect(model, p, ask)
    assert all(w.equal(before[n]) for n, w in model.network.named_parameters())
    ranking = lab.Ranking(model, p, 0)
    names, turned = ranking.names["all"], turned_names(model.network)
    assert set(names) == set(linear_names(model.network)) > set(ranking.names[layer])
    packed = pack_model(model, names, lab.scheme_of(p, lab.main_cases(p)[1]))
    for axis in ("rows", "columns"):
        for keep in lab.KEEP_BY[axis]:
            values = ranking.of(keep, lab.main_cases(p)[1], axis)[0].values
            assert {n: len(v) for n, v in values.items()} == {
                n: w.shape[axis == "columns"] for n, w in packed.items()
            }
    matrix = as_rows(model.network.get_parameter(names[-1]).detach(), names[-1] in turned)
    error = pack(matrix, Scheme(2)).unpack() - matrix
    found = ranking.of(lab.ERROR, lab.main_cases(p)[1], "rows")[0][names[-1]]
    assert torch.allclose(found, error.square().sum(1))
    sized = lab.sizes(model, p)
    plain = sized[(sized.share == 0) & (sized.bits == 2) & (sized.matrices == "all")].iloc[0]
    assert plain.kilobytes * 1000 == size_report(packed).packed
    kept = select_channels(ranking.of(lab.ERROR, lab.main_cases(p)[1], "rows")[0], 0.25)
    kept = size_report(pack_model(model, names, lab.scheme_of(p, lab.main_cases(p)[1]), kept))
    more = sized[(sized.share > 0) & (sized.bits == 2) & (sized.matrices == "all")].iloc[0]
    assert more.kilobytes * 1000 == kept.packed
    lab.one_step_more(trials, swept, sized, p, lab.main_cases(p)[1], lab.LENGTH)
    lab.joint_influence(ranking)
    lab.sum_against_mean(ranking, lab.main_cases(p)[1], 0.25)
    assert (lab.spreads(ranking, lab.main_cases(p)[1]) >= 1).all().all()
    assert lab.save_and_reopen(ranking)["difference"] == 0
    with pytest.raises(ValueError, match=f"no matrices 'q_lin'; known: all, .*{layer}"):
        lab.check_model(model, changed(p, MATRICES=["q_lin", "all"]))
    with pytest.raises(ValueError, match="no group of 9 divides"):
        lab.check_model(model, changed(p, ROUNDING__group=9))


def test_bad_settings_are_named_before_anything_runs(model: LanguageModel, p: SimpleNamespace) -> None:
    lab.check(p)
    lab.check_model(model, p)
    for change, text in [
        ({"BITS__tried": [1, 2, 5]}, "bits must be one of .* not 5"),
        ({"ROUNDING__bits": [16]}, "bits must be one of .* not 16"),
        ({"BITS__full": [1, 4]}, r"compared at 4 bits; add them to \[1, 2\]"),
        ({"BITS__full": [1]}, "two sets of matrices"),
        ({"MATRICES": ["o_proj"]}, "two sets of matrices"),
        ({"KEPT__rows": [0.1, 0.6]}, r"\(0, 0.5\].*not 0.6"),
        ({"KEPT__rows": []}, "not nothing"),
        ({"KEPT__columns": 0.0}, r"\(0, 0.5\].*not 0.0"),
        ({"SEEDS": 0}, "at least 1"),
        ({"ROUNDING__mapping": "odd"}, "not 'odd'"),
    ]:
        with pytest.raises(ValueError, match=text):
            lab.check(changed(p, **change))
    for change, text in [
        ({"MATRICES": ["o_proj", "p_proj"]}, "no matrices 'p_proj'; known: all, q_proj"),
        ({"ROUNDING__group": 5}, "no group of 5 divides"),
        ({"ROUNDING__groups": [None, 8]}, "no group of 8 divides"),
    ]:
        with pytest.raises(ValueError, match=text):
            lab.check_model(model, changed(p, **change))
