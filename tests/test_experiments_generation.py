"""Generated text after weights are zeroed, on a tiny model: what is counted, kept and refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_model

from fichapters.ch07 import draw_text as draw
from fichapters.ch07 import text as lab
from fichapters.ch07.judges import LikelihoodJudge, length_controlled_win_rates
from fihelpers.models.generate import Response, greedy
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.tasks import Example

MEASURES = ("FI exact", "SNIP", "random")


@pytest.fixture
def plan(tmp_path: Path) -> lab.Plan:
    rows = [{"instruction": f"w{i} w{i + 1}", "output": "w1", "dataset": "d"} for i in range(12)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return lab.Plan(
        str(path), (0.0, 0.05, 0.5), seeds=2, n_calibration=3, n_test=5, length=6, measures=MEASURES,
        low_of=("FI exact",), horizon=2, samples=2,
    )  # fmt: skip


@pytest.fixture
def rows(plan: lab.Plan, tmp_path: Path) -> pd.DataFrame:
    return lab.run_sweep(tiny_model("qwen2"), plan, tmp_path / "cache")


def test_sweep(plan: lab.Plan, rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # every measure and FI-low at every rate for every calibration set, and the intact model
    assert len(rows) == 1 + (len(MEASURES) + 1) * 3 * 2
    untouched = rows[rows.rate == 0]
    assert (untouched.rouge1 == 1).all() and (untouched.win_rate == 0.5).all()
    assert (untouched.length_controlled == 0.5).all()
    for row in rows.itertuples():
        assert 0 <= row.rouge1 <= 1 and 0 <= row.win_rate <= 1 and row.n == 5
    assert (rows[rows.rate == 0.5].rouge1 < 1).any()

    monkeypatch.setattr(lab, "score_sequences", lambda *a, **k: pytest.fail("finished work was done again"))
    again = lab.run_sweep(tiny_model("qwen2"), plan, tmp_path / "cache")
    pd.testing.assert_frame_equal(again, rows)


def test_fi_with_any_filter_is_swept_and_drawn(plan: lab.Plan, tmp_path: Path) -> None:
    asked = ("FI damped 1e-2", "FI cut 0.1", "random")
    new = replace(plan, measures=asked, low_of=("FI cut 0.10",), seeds=2, rates=(0.5,))
    table = lab.summary(lab.run_sweep(tiny_model("qwen2"), new, tmp_path / "cache"))
    assert set(table.measure) == {"FI damped 0.01", "FI cut 0.1", "random", "FI cut 0.1, low half"}
    draw.damage_of_text(table)


def test_win_rates_at_equal_length_are_fitted_over_the_whole_sweep(
    plan: lab.Plan, rows: pd.DataFrame, tmp_path: Path
) -> None:
    said = f"jointly over {(rows.win_rate != 0.5).sum()} settings"
    assert set(rows.length_fit) == set(lab.summary(rows).length_fit) == {said}
    assert not {"preferences", "lengths"} & set(rows)
    # the same numbers by hand, from what each answer was preferred by and how long it is
    model, examples = tiny_model("qwen2"), lab.tested_set(plan, None)
    bench = lab.Bench(model, examples, plan.length)
    answers = [[replace(answer, text=answer.text[: 9 * k]) for answer in bench.intact] for k in range(1, 4)]
    table = pd.DataFrame([bench.compare(texts) for texts in [bench.intact, *answers]])
    found = lab.at_equal_length(table, bench.intact, None, " (as told)")
    preferences = [bench.judge.prefer(bench.prompts, texts, bench.intact) for texts in answers]
    lengths = [[len(answer.text) for answer in texts] for texts in [*answers, bench.intact]]
    expected = length_controlled_win_rates(preferences, lengths[:3], lengths[3])
    assert list(found.length_controlled) == [0.5, *expected.win_rates]
    assert set(found.length_fit) == {expected.fit + " (as told)"}
    assert list(table.win_rate) == list(found.win_rate)

    # one setting beside the intact model says nothing of the prompts, and the table says that
    few = replace(plan, seeds=1, rates=(0.5,), measures=("SNIP",), low_of=())
    alone = lab.run_sweep(tiny_model("qwen2"), few, tmp_path / "few")
    assert set(lab.summary(alone).length_fit) == {"without difficulties: fewer than 3 settings"}


@pytest.mark.parametrize("there", [True, False])
def test_difficulties_of_alpaca_eval_come_from_the_hub_where_it_answers(
    there: bool, plan: lab.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Info:
        sha = "c" * 40

    csv = tmp_path / "difficulty.csv"
    csv.write_text("index,instruction_difficulty\n" + "".join(f"{i},{i / 4 - 1}\n" for i in range(12)))

    def download(_: str, name: str, **options: str) -> str:
        assert options == {"repo_type": "dataset", "revision": Info.sha}
        if name == "alpaca_eval.json":
            return plan.task
        if not there:
            raise OSError("no network")
        return str(csv)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: Info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    asked = replace(plan, task="tatsu-lab/alpaca_eval", n_test=4)
    known, source = lab.known_difficulties(asked.task, lab.tested_set(asked, None))
    said = set(lab.run_sweep(tiny_model("qwen2"), asked, tmp_path / "cache").length_fit)
    if there:
        rows = [int(example.id.rpartition("/")[2]) - 1 for example in lab.tested_set(asked, None)]
        assert known is not None and list(known) == [i / 4 - 1 for i in rows]
        assert said == {"given difficulties" + source} and Info.sha in source
    else:
        assert known is None and "the published difficulties could not be had" in source
        assert said.pop().startswith("jointly over")
    assert lab.known_difficulties(plan.task, []) == (None, "")


def test_an_interrupted_sweep_goes_on(
    plan: lab.Plan, rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, scored = lab.score_sequences, []

    def fails_second(*args: object, **options: object) -> object:
        if scored:
            raise KeyboardInterrupt
        scored.append(options["seed"])
        return whole(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lab, "score_sequences", fails_second)
    with pytest.raises(KeyboardInterrupt):
        lab.run_sweep(tiny_model("qwen2"), plan, tmp_path / "other")
    monkeypatch.setattr(lab, "score_sequences", lambda *a, **k: scored.append(k["seed"]) or whole(*a, **k))
    found = lab.run_sweep(tiny_model("qwen2"), plan, tmp_path / "other")
    assert scored == [0, 1]
    pd.testing.assert_frame_equal(found, rows)


def test_an_answer_with_any_line_breaks_is_kept_as_it_stands(
    plan: lab.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, compare = "a\rb\r\nc\nd\u2028e", lab.Bench.compare
    monkeypatch.setattr(lab.Bench, "compare", lambda *a: compare(*a) | {"first": odd})
    rows = lab.run_sweep(tiny_model("qwen2"), replace(plan, seeds=1, rates=(0.5,)), tmp_path / "cache")
    assert rows["first"].tolist() == [odd] * (2 + len(MEASURES))


def test_summary_and_differences(plan: lab.Plan, rows: pd.DataFrame) -> None:
    table = lab.summary(rows)
    part = rows[(rows.measure == "SNIP") & (rows.rate == 0.5)]
    line = table[(table.measure == "SNIP") & (table.rate == 0.5)].iloc[0]
    assert line.rouge1 == pytest.approx(part.rouge1.mean()) and line.seeds == 2 and line.n == 5
    assert line.rouge1_low <= line.rouge1 <= line.rouge1_high
    for score in lab.SCORED:
        wide = lab.table_of(table, score, [0.5])
        assert list(wide.columns) == [0.0, 0.5]
        assert set(wide.index) == {*MEASURES, "FI exact, low half"}
        found = lab.differences(rows, score)
        assert "random" not in set(found.measure) and (found[found.rate == 0].difference == 0).all()
        assert (found.low <= found.difference).all() and (found.difference <= found.high).all()
        said = found.verdict.map({"more damage than random": -1, "less damage than random": 1}).fillna(0)
        assert (said == (found.low > 0).astype(int) - (found.high < 0).astype(int)).all()
        peak = lab.widest(found)
        assert all(peak.difference[m] == found[found.measure == m].difference.min() for m in peak.index)
        assert lab.nearest(plan.rates, 0.1) == 0.05
        assert (peak.worse + peak.better <= peak.rates).all()
    draw.damage_of_text(table, floor=0.2)
    draw.differences_from_random(lab.differences(rows, "rouge1"), "ROUGE-1")
    answers = lab.first_answers(rows, MEASURES, 0.5)
    assert list(answers) == ["intact", *MEASURES]
    assert answers["SNIP"] == rows[(rows.measure == "SNIP") & (rows.rate == 0.5)]["first"].iloc[0]


def test_a_difference_is_paired_and_has_the_sign_of_the_damage(rows: pd.DataFrame) -> None:
    changed = rows.copy()
    at = changed.rate == 0.5
    changed.loc[at & (changed.measure == "random"), "rouge1"] = [0.5, 0.9]
    changed.loc[at & (changed.measure == "SNIP"), "rouge1"] = [0.1, 0.5]
    found = lab.differences(changed, "rouge1").set_index(["measure", "rate"]).loc[("SNIP", 0.5)]
    assert [found.difference, found.low, found.high] == pytest.approx([-0.4] * 3)  # the same in both sets
    assert found.verdict == "more damage than random"
    one = lab.differences(changed[changed.seed == 0], "rouge1")
    assert one.low.isna().all() and set(one.verdict) == {"no difference seen"}


def test_text_contexts_are_halved(tmp_path: Path, plan: lab.Plan) -> None:
    path = tmp_path / "openings.txt"
    path.write_text("".join(f"w{i} w{i + 2}\n" for i in range(20)))
    rows = lab.run_sweep(
        tiny_model("llama"),
        replace(plan, task=str(path), n_test=None, rates=(0.5,), seeds=1),
        tmp_path / "cache",
    )
    assert set(rows.n) == {10}
    assert lab.summary(rows).rouge1_low.isna().all()  # one calibration set has no spread


def test_bad_plans_are_named(plan: lab.Plan, tmp_path: Path) -> None:
    for change, text in [
        ({"rates": (1.5,)}, r"\[0, 1\], not 1.5"),
        ({"seeds": 0}, "at least 1"),
        ({"measures": ("FI exat",)}, "Unknown measure 'FI exat'"),
        ({"length": 0}, "at least 1"),
        ({"length": 99}, "99"),
    ]:
        with pytest.raises(ValueError, match=text):
            lab.run_sweep(tiny_model("qwen2"), replace(plan, **change), tmp_path / "cache")  # type: ignore[arg-type]
    assert not (tmp_path / "cache").exists()


def test_the_model_is_intact_again_and_its_answers_are_ties(plan: lab.Plan) -> None:
    model = tiny_model("qwen2")
    model.network.generation_config.eos_token_id = 4
    examples = lab.tested_set(plan, None)
    bench = lab.Bench(model, examples, 6)
    assert bench.intact == greedy(model, [e.prompt for e in examples], 6) == bench.answers()
    found = bench.compare(bench.intact)
    assert (found["rouge1"], found["win_rate"]) == (1, 0.5)
    assert 0 <= bench.floor() <= 1
    nothing = [Response((), True, "") for _ in examples]  # answers that end at once
    silent = bench.compare(nothing)
    assert silent["rouge1"] == 0 and silent["characters"] == 0 and silent["ended"] == 1


def test_an_intact_model_that_says_nothing_is_refused_by_prompt(
    plan: lab.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = lab.tested_set(plan, None)
    spoken = Response((5,), True, "w1")
    answers = [spoken, Response((), True, ""), *[spoken] * (len(examples) - 2)]
    monkeypatch.setattr(lab, "greedy", lambda *_: answers)
    with pytest.raises(ValueError, match=f"ends its answer to '{examples[1].id}' at once.*leave that prompt"):
        lab.Bench(tiny_model("qwen2"), examples, 6)


def test_the_judge_is_the_stand_in_unless_an_address_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIHELPERS_JUDGE_KEY", "secret")
    model = tiny_model("qwen2")
    assert isinstance(lab.judge_of(model, lab.Plan(), tmp_path), LikelihoodJudge)
    plan = lab.Plan(judge_url="https://judge.example/v1", judge_model="j")
    assert lab.judge_of(model, plan, tmp_path).label == "j (API)"


def test_a_plan_of_settings() -> None:
    plan = lab.plan_of({"rates": [0.1], "length": 9}, seed=3)
    assert plan == replace(lab.Plan(), rates=(0.1,), length=9, seed=3)
    with pytest.raises(ValueError, match=r"no setting 'lenght'; did you mean length\?"):
        lab.plan_of({"lenght": 9}, seed=0)


def test_stories_need_the_folder_of_a_model(real_data: Path, tmp_path: Path) -> None:
    plan = lab.Plan(
        rates=(0.05,), seeds=1, n_calibration=4, measures=("SNIP", "random"), low_of=(), samples=2
    )
    assert lab.stories(plan, tmp_path) is None
    rows = lab.stories(replace(plan, story_model=str(real_data / "stories260K")), tmp_path)
    assert rows is not None and set(rows.n) == {40}
    rouge = rows.set_index("measure").rouge1
    assert rouge["SNIP"] < rouge["random"] < rouge["intact"] == 1


def test_a_story_model_that_is_not_there_is_refused_before_anything_runs() -> None:
    with pytest.raises(FileNotFoundError, match="no folder 'no/such' with a story model"):
        lab.plan_of({"story_model": "no/such"}, 0)


def test_another_judge_may_be_given(plan: lab.Plan, tmp_path: Path) -> None:
    class Fixed(LikelihoodJudge):
        label = "always a"

        def prefer(self, prompts, a, b):  # type: ignore[no-untyped-def]
            return np.ones(len(prompts))

    model = tiny_model("qwen2")
    rows = lab.run_sweep(model, replace(plan, seeds=1), tmp_path / "cache", Fixed(model))
    assert (rows.win_rate == 1).all()


def test_a_chat_model_is_asked_by_its_own_template() -> None:
    model, example = _chat_model(), Example("1", "s", "Instruction: w1\nResponse:", (), None, "w1")
    assert lab.framed(model, example).prompt == "w4 w2 w1 w3"
    context = Example("1", "text", "w1", (), None, "w1")
    assert lab.framed(model, context) == context
    assert lab.framed(tiny_model("qwen2"), example) == example


def _chat_model() -> LanguageModel:
    model = tiny_model("qwen2")
    model.tokenizer.bos_token = "w4"
    turns = "w4 {% for m in messages %}w2 {{ m['content'] }}{% endfor %}"
    model.tokenizer.chat_template = turns + "{% if add_generation_prompt %} w3{% endif %}"
    return model


def test_the_bundled_model_recites_its_instructions() -> None:
    plan = lab.Plan("bundled-instructions", (0.1,), 1, 2, 6, 40)
    examples = lab.tested_set(plan, None)
    model = open_model()
    bench = lab.Bench(model, examples, 40)
    assert [a.text.strip() for a in bench.intact] == [e.reference for e in examples]
    assert lab.recited(examples, bench.intact) == 1
    assert lab.recited(examples, [Response((), True, "")] * 6) == 0
    other_words = lab.reworded(model, 6, 40)
    assert len(other_words) == 6 and bench.floor() < 0.5 and other_words.mean() < 0.9
