"""Chapter 06's experiment on a tiny model: what is moved, counted, carried over and judged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model

from fichapters import tables
from fichapters.ch06 import draw, lab
from fihelpers.models.language import LanguageModel
from fihelpers.tasks import Example
from fihelpers.tasks.mcq import format_prompt
from fihelpers.trials import Kept, Trial, Trials

HIDDEN = 12
SHARE = 0.01
MEASURES = ("FI exact", "FI damped 0.0001", f"FI exact{lab.ON_TOP}", "Jacobian norm", "SNIP", "random")
MOVES = (lab.Move(0.02, SHARE), lab.Move(0.3, SHARE), lab.Move(0.3, 1.0))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    made = tiny_model("qwen2")
    made.network.config.max_position_embeddings = 512
    return made


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    made = []
    for subject, answer in (("one", 0), ("two", 1)):
        for i in range(3):
            options = tuple(f"w{i + k}" for k in range(4))
            question = " ".join(f"w{i + k}" for k in range(3 + i))
            prompt = format_prompt(subject, question, options)
            made.append(Example(f"{subject}/{i}", subject, prompt, options, (answer + i) % 4, question))
    return made


@pytest.fixture(scope="module")
def questions(model: LanguageModel, examples: list[Example]) -> list[lab.Scored]:
    return lab.scored(model, examples, 4)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("kept"), "attacks", None)


@pytest.fixture(scope="module")
def trials(questions: list[lab.Scored], kept: Kept) -> Trials:
    return lab.attacked(questions, MEASURES, MOVES, 0, kept, draws=2)


@pytest.fixture(scope="module")
def rows(trials: Trials) -> pd.DataFrame:
    return trials.rows()


def test_every_move_of_every_question_is_made(rows: pd.DataFrame) -> None:
    assert len(rows) == 6 * (1 + len(MEASURES)) * len(MOVES)
    assert (rows.log_prob <= 0).all() and set(rows.correct) <= {0.0, 0.5, 1.0}
    assert set(rows[rows.measure != "random"].correct) <= {0.0, 1.0}  # random is the mean of two draws
    rows = rows[rows.measure != lab.INTACT]
    part = rows[np.isclose(rows.share, SHARE)]
    assert (part.dims >= 1).all() and (part.tokens <= part.dims).all()
    # the gradient's own step lowers the attacked answer, and to first order nobody lowers it more
    small = part[np.isclose(part.budget, 0.02)]
    assert (small.promised <= 0).all()
    best = small[small.measure == lab.JACOBIAN].set_index("id").promised
    assert (small.promised >= best.reindex(small.id).to_numpy() - 1e-12).all()
    # moving everything is the same for every measure
    assert (rows[rows.share == 1].groupby("id").log_prob.agg(np.ptp) < 1e-9).all()


def test_the_first_order_is_what_comes_of_a_tiny_budget(questions: list[lab.Scored], kept: Kept) -> None:
    # the tiny model normalises in float32, so a smaller budget would be lost in rounding
    tiny = lab.attacked(questions, ["Jacobian norm"], [lab.Move(1e-4, SHARE)], 0, kept)
    came = lab.promises(lab.curves(tiny, "budget"), ["Jacobian norm"])
    assert came.kept.iloc[0] == pytest.approx(1, abs=5e-3)


def test_the_answers_are_those_of_the_model_itself(
    questions: list[lab.Scored], rows: pd.DataFrame, model: LanguageModel
) -> None:
    for batch in questions:
        log_p = batch.letters.log_probs(batch.letters.embeddings).detach()
        intact = rows[rows.measure == lab.INTACT].drop_duplicates("id").set_index("id")
        for example, one in zip(batch.examples, log_p, strict=True):
            assert intact.log_prob[example.id] == pytest.approx(float(one[example.answer]))
            assert intact.attacked[example.id] == pytest.approx(float(one.max()))


def test_the_question_region_keeps_the_rest_untouched(questions: list[lab.Scored]) -> None:
    move = lab.Move(0.1, 0.5, region="question")
    for batch in questions:
        positions = batch.positions("Jacobian norm", move, 0, 0)
        moved = batch.moved(positions, move, 0) != batch.letters.embeddings
        for row, (region, chosen) in enumerate(zip(batch.regions, positions, strict=True)):
            own = moved[row, batch.letters.padding[row] :]
            assert not own[~region].any() and not moved[row, : batch.letters.padding[row]].any()
            assert own.flatten().nonzero()[:, 0].tolist() == chosen.tolist()


def test_finished_batches_are_not_made_again(
    questions: list[lab.Scored], rows: pd.DataFrame, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.Scored, "moved", lambda *a: pytest.fail("finished work was done again"))
    again = lab.attacked(questions, MEASURES, MOVES, 0, kept, draws=2)
    pd.testing.assert_frame_equal(again.rows(), rows)


def test_what_cannot_be_run_is_named(questions: list[lab.Scored], tmp_path: Path) -> None:
    kept = Kept(tmp_path, "attacks", None)
    with pytest.raises(ValueError, match="Unknown measure 'FI exat'"):
        lab.attacked(questions, ["FI exat"], MOVES, 0, kept)
    for bad in (lab.Move(-0.1, SHARE), lab.Move(float("nan"), SHARE)):
        with pytest.raises(ValueError, match="budget must be a finite number"):
            lab.attacked(questions, MEASURES, [bad], 0, kept)
    with pytest.raises(ValueError, match="no questions"):
        lab.attacked([], MEASURES, MOVES, 0, kept)
    assert not list(tmp_path.iterdir())


def test_a_task_without_options_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "contexts.txt"
    text.write_text("w1 w2 w3\nw2 w3 w4\n")
    with pytest.raises(ValueError, match="no question with lettered options"):
        lab.load_questions(str(text), ["text"], None, 0)


def test_tables_of_the_attacks(trials: Trials, rows: pd.DataFrame) -> None:
    intact = rows[rows.measure == lab.INTACT].drop_duplicates("id")
    table = lab.by_subject(trials, MOVES[0])
    assert list(table) == ["one", "two", "all"]
    assert table.loc[lab.INTACT, "all"] == pytest.approx(intact.correct.mean())
    less = lab.against(trials, MOVES[1], "random", 0)
    assert list(less.index) == [lab.INTACT, *MEASURES[:-1]]
    assert (less.log_prob_low <= less.log_prob).all() and (less.log_prob <= less.log_prob_high).all()
    curve = lab.curves(trials.where(share=SHARE), "budget")
    assert np.allclose(curve[curve.budget == 0].log_prob, intact.log_prob.mean())
    assert lab.accuracies(trials).n.tolist() == [3, 3, 6]
    with pytest.raises(ValueError, match="no trial has budget = 0"):
        lab.wide(trials, lab.Move(0.5, SHARE), "correct")


def test_duels(trials: Trials) -> None:
    whole = lab.duels(trials, [MOVES[2]], lab.OPPONENTS, 0)
    assert len(whole) == 3 * 3  # three settings of FI were tried
    assert np.allclose(whole.difference, 0, atol=1e-9)
    assert tables.duel_grid(whole).shape == (3, 3)
    counts = tables.duel_counts(lab.duels(trials, MOVES[:2], lab.OPPONENTS, 0))
    assert (counts.sum(axis=1) == 2).all()
    same = trials.where(budget=0.3)
    few = lab.compare(same, [(SHARE, 1.0)], "measure", seed=0, label="share").set_index("measure")
    top, everything = (lab.by_subject(trials, move, "log_prob")["all"] for move in MOVES[1:])
    assert few.difference["random"] == pytest.approx(top["random"] - everything["random"])
    found = lab.outcomes(trials, {"large": MOVES[1]}, ["FI exact"], 0)
    assert found["first"].tolist() == ["random", "FI exact"] and (found.low <= found.high).all()
    assert found.second.tolist() == [lab.INTACT, "random"] and (found.n == 6).all()
    same = lab.compare(trials, [("SNIP", "SNIP")], "budget", "share", seed=0)
    assert (same[["difference", "low", "high"]] == 0).all(axis=None)


def test_heavy_damping_chooses_what_the_jacobian_norm_chooses(
    questions: list[lab.Scored], kept: Kept
) -> None:
    heavy = lab.Influence(lab.Damped(1e9))
    for batch in questions:
        chosen = (batch.positions(measure, MOVES[1], 0, 0) for measure in (heavy, "Jacobian norm"))
        assert all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))
    measures = (*lab.DAMPED, "FI damped 0.0001", f"FI damped 0.0001{lab.ON_TOP}", "Jacobian norm")
    table = lab.dampings(lab.attacked(questions, measures, MOVES[:2], 0, kept), 0)
    assert table.damping.tolist() == 2 * [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]
    assert (table.low <= table.difference).all() and (table.difference <= table.high).all()
    draw.damping_curves(table).canvas.draw()


def test_dimensions_are_carried_from_the_end(questions: list[lab.Scored], examples: list[Example]) -> None:
    maps = lab.Maps(tuple(questions), "Jacobian norm", 0)
    assert [e.id for e in maps.order] == [e.id for e in examples]
    first, second, last = examples[0], examples[1], examples[2]
    assert torch.equal(maps.seen_from(first, "own"), maps.maps[first.id])
    donor = maps.maps[second.id]
    given = maps.seen_from(first, "same subject")
    assert len(given) == len(maps.maps[first.id]) < len(donor)
    assert torch.equal(given, donor[-len(given) :])
    longer = maps.seen_from(last, "same subject")  # the first again, in a circle
    short = maps.maps[first.id]
    assert torch.equal(longer[-len(short) :], short) and not longer[: -len(short)].any()
    assert torch.equal(maps.seen_from(first, "other subject"), maps.maps[examples[3].id][-len(given) :])
    everyone = sum(float(maps.maps[e.id][-1].sum()) for e in examples[1:])
    assert float(maps.seen_from(first, "all others")[-1].sum()) == pytest.approx(everyone)


def test_transfer(questions: list[lab.Scored], trials: Trials, kept: Kept) -> None:
    carried = lab.carried(questions, ["Jacobian norm", "random"], MOVES[1], 0, kept)
    own = carried.where(place="places", source="own", measure=lab.JACOBIAN).answers("log_prob")
    before = trials.where(measure=lab.JACOBIAN, **vars(MOVES[1])).answers("log_prob")
    assert np.allclose(np.sort(own), np.sort(before))
    hidden = carried.where(place="hidden").rows()
    assert (hidden.dims == hidden.tokens).all()
    table = lab.carried_table(carried, 0)
    assert len(table) == 2 * (4 + 1) and (table.n == 6).all()
    assert list(dict.fromkeys(table.index.get_level_values("place"))) == list(lab.PLACES)
    assert table.loc[("places", "random", "own"), "less_random"] == 0
    draw.carried_dots(table, {"places": "places", "hidden": "one"}).canvas.draw()
    with pytest.raises(ValueError, match="two questions of"):
        lone = lab.scored(questions[0].letters.model, list(questions[0].examples[:1]), 1)
        lab.carried(lone, ["random"], MOVES[1], 0, kept)


def test_kinds_of_tokens(model: LanguageModel, examples: list[Example]) -> None:
    example = examples[0]
    kinds, texts = lab.token_kinds(model, example), lab.token_texts(model, example)
    told = list(zip(texts, kinds, strict=True))
    assert told[-2:] == [("Answer", "Answer:"), (":", "Answer:")]
    asked = [text for text, kind in told if kind == "question"]
    assert " ".join(asked) == example.question
    assert [text for text, kind in told if kind == "options"] == list(example.options)
    assert [text for text, kind in told if kind == "option letters"] == list("A.B.C.D.")
    assert told[0] == ("The", "instruction")
    with pytest.raises(ValueError, match="does not end with its question"):
        lab.token_kinds(model, replace(example, prompt="w1 w2"))


def test_tokens_are_saturated_unless_summed_or_damped(questions: list[lab.Scored], kept: Kept) -> None:
    tokens = lab.describe_tokens(questions)
    assert len(tokens) == sum(sum(b.lengths) for b in questions) * len(lab.TOKEN_SETTINGS)
    assert np.allclose(tokens.groupby(["id", "setting"]).over_mean.mean(), 1)
    full = lab.token_saturation(tokens, 0)
    # 12 hidden dimensions, 4 letters, 8 likeliest tokens and the rest
    assert full.at_ceiling["FI exact"] > 0.9 and full.at_ceiling["FI exact, top 8"] > 0.9
    assert full.highest["FI exact"] - full.lowest["FI exact"] < 0.01
    assert full.highest["FI exact summed"] - full.lowest["FI exact summed"] > 0.01
    levels = lab.token_levels(tokens)
    assert levels.loc["share of tokens"].sum() == pytest.approx(1)
    draw.level_map(levels.drop(index="share of tokens"), "levels").canvas.draw()
    struck = lab.token_attacks(questions, [0.1], 0, kept).rows()
    assert set(struck[struck.measure != lab.INTACT].dims) == {HIDDEN}
    assert set(struck[struck.measure != lab.INTACT].tokens) == {1}


def test_where_the_chosen_dimensions_lie(questions: list[lab.Scored]) -> None:
    where = lab.chosen_kinds(questions, ["Jacobian norm", "random"], MOVES[0], 0)
    assert np.allclose(where[list(lab.KINDS)].sum(axis=1), 1)
    draw.share_map(where[list(lab.KINDS)], "share").canvas.draw()


def test_one_question(questions: list[lab.Scored], trials: Trials, rows: pd.DataFrame) -> None:
    chosen = lab.typical(trials, "Jacobian norm", MOVES[1])
    case = lab.look_at(questions, chosen, ["Jacobian norm", "random"], MOVES[1], 0)
    assert case.example.id == chosen
    after = rows[(rows.id == chosen) & (rows.measure == lab.JACOBIAN) & (rows.budget == 0.3)]
    expected = after[np.isclose(after.share, SHARE)].log_prob.iloc[0]
    assert float(case.probs["Jacobian norm"][case.example.answer].log()) == pytest.approx(expected)
    frames, labels, alt = draw.token_frames(case)
    assert len(frames) == len(labels) == len(alt) == len(case.scores)
    frames[0].canvas.draw()
    draw.case_bars(case).canvas.draw()


def test_the_case_is_of_median_confidence_among_those_that_flip() -> None:
    move = lab.Move(0.1, SHARE)

    def typical(intact: tuple[int, ...], after: tuple[int, ...]) -> str:
        names = {"id": np.array(list("abcde")), "subject": np.array(["one"] * 5)}
        sure = {lab.INTACT: -np.arange(5.0), "m": np.full(5, -9.0)}
        right = {lab.INTACT: np.array(intact), "m": np.array(after)}
        values = {of: {**names, "correct": right[of], "attacked": sure[of]} for of in sure}
        tried = [Trial(0, {"measure": name, **vars(move)}, found) for name, found in values.items()]
        return lab.typical(Trials([], tried), "m", move)

    assert typical((1, 1, 1, 1, 0), (1, 0, 0, 0, 0)) == "c"
    assert typical((1, 1, 1, 1, 0), (1, 1, 1, 1, 1)) == "b"


def test_figures_of_the_attacks(trials: Trials) -> None:
    curve = lab.curves(trials.where(share=SHARE), "budget")
    draw.damage_curves(curve, {"all": MEASURES, "some": MEASURES[:2]}, "budget", "budget").canvas.draw()
    spread = lab.curves(trials.where(budget=0.3), "share")
    draw.damage_curves(spread, {"all": MEASURES}, "share", "share").canvas.draw()
    duels = lab.duels(trials, MOVES[:2], ["Jacobian norm", "random"], 0)
    draw.duel_curves(duels, ["Jacobian norm", "random"], ["FI exact"], "budget").canvas.draw()
    draw.direction_curves({"gradient": curve, "random": curve}, ["SNIP", "random"], "budget").canvas.draw()
