"""What chapter 07 does beside its loops: drawing, the one-letter control, what scores hold, texts."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from tiny import tiny_model

from fichapters.ch07 import draw, foresee, lab
from fichapters.ch07.judges import ApiJudge, LikelihoodJudge, length_controlled_win_rates
from fichapters.parameters import declared
from fihelpers.evaluate.questions import Evaluator
from fihelpers.models.generate import Response
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example
from fihelpers.trials import Kept, Trials, collect

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [Example(str(i), "s", f"w{i} w{i + 1}", (), None, f"w{i}") for i in range(4)]
NO_JUDGE = {"judge_url": "", "judge_model": ""}


def test_a_text_file_is_halved(tmp_path: Path) -> None:
    path = tmp_path / "contexts.txt"
    path.write_text("".join(f"w{i} w{i + 2} w{i + 1}\n" for i in range(20)))
    p = SimpleNamespace(TASK=str(path), SUBJECTS=["text"])
    first, second = (lab.questions(p, split, 10, 0)["text"] for split in ("val", "test"))
    assert [e.prompt.split()[0] for e in first] == [f"w{i}" for i in range(10)]
    assert [e.prompt.split()[0] for e in second] == [f"w{i}" for i in range(10, 20)]
    drawn = [lab.questions(p, "val", 4, seed)["text"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 4
    assert lab.chance({"text": first}) is None
    with pytest.raises(ValueError, match=r"The val half of .* has 10 contexts, fewer than the 11"):
        lab.questions(p, "val", 11, 0)


def test_four_options_leave_a_quarter_to_chance() -> None:
    p = SimpleNamespace(TASK="bundled", SUBJECTS=["law", "business"])
    tested = lab.questions(p, "test", 3, 0)
    assert {name: len(asked) for name, asked in tested.items()} == {"law": 3, "business": 3}
    assert lab.chance(tested) == 0.25


def _said(right: str, said: str) -> dict[str, Any]:
    pairs = list(zip(right, said, strict=True))
    return {
        "correct": [a == b for a, b in pairs],
        "said": [int(b) for _, b in pairs],
        "right": [int(a) for a, _ in pairs],
    }


def test_a_model_that_gives_one_letter_keeps_what_that_letter_gets() -> None:
    def tries(k: int) -> Any:
        yield {"subject": "x", "measure": "SNIP", "rate": 0.1}, _said("02010", "00000")
        yield {"subject": "y", "measure": "SNIP", "rate": 0.1}, _said("12111", "33111")

    left = lab.above_one_letter(collect(lambda: _said("02010", "02010"), tries, sets=2), ["SNIP"], 0.1, 0)
    # x: always 0, three of five right, as the model is; y: always 1, four of five, where the model gets three
    assert left.letter[0] == pytest.approx(0.7) and left.n[0] == 10
    assert left.difference[0] == pytest.approx((3 + 3 - 7) / 10)


def test_what_is_lost_is_a_share_of_what_was_there() -> None:
    table = pd.DataFrame({"accuracy": [0.4, 0.8], "low": [0.3, 0.7], "high": [0.5, 0.9]})
    found = lab.with_loss(table, 0.8)
    assert found.lost.tolist() == pytest.approx([0.5, 0])
    assert found.lost_low.tolist() == pytest.approx([0.375, -0.125])
    assert found.lost_high.tolist() == pytest.approx([0.625, 0.125])
    assert lab.with_loss(table, 0.0).lost.isna().all()


def test_the_highest_weights_hold_at_least_their_even_share() -> None:
    model = tiny_model("qwen2")
    scores = score_weights(model, EXAMPLES, ["SNIP"], only=linear_names(model.network))
    skew = lab.concentration(scores.items())
    values = torch.cat([v.flatten() for v in scores["SNIP"].values.values()]).double()
    highest = values.sort(descending=True).values[: round(0.01 * len(values))]
    assert skew.total[skew.weights == 0.01].item() == pytest.approx(float(highest.sum() / values.sum()))
    assert skew.total.is_monotonic_increasing and skew.total.iloc[-1] == pytest.approx(1)
    assert (skew.total >= skew.weights - 1 / skew.n.iloc[0]).all()
    assert (skew.weights == 0.01).any()


def test_what_is_foreseen_counts_what_the_loops_do() -> None:
    p = SimpleNamespace(**declared(ROOT / "notebooks" / "07_sparsification.ipynb"))
    kept = ROOT / "data" / "results"
    tables = {"zeroing": "curves", "pruning": "pruning", "text": "text"}
    rows = {name: len(pd.read_csv(kept / f"07_sparsification.{t}.csv")) for name, t in tables.items()}
    assert foresee.perturbed(p) == {**rows, "text": rows["text"] // len(lab.SCORES)}


def test_only_of_a_large_model_is_anything_foreseen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    p = SimpleNamespace(**declared(ROOT / "notebooks" / "07_sparsification.ipynb"))
    few = {"N_CALIBRATION": 2, "N_TEST": 1, "SUBJECTS": ["law"]}
    vars(p).update(few, TEXT={**p.TEXT, "n_calibration": 2, "n_test": 1})
    model = open_model()
    linear = linear_names(model.network)
    asks = {"law": Evaluator(model, lab.questions(p, "test", 1, 0, model)["law"])}
    foresee.announce(p, model, linear, asks)
    assert not capsys.readouterr().out
    monkeypatch.setattr(foresee, "LARGE", 0)
    foresee.announce(p, model, linear, asks)
    told = capsys.readouterr().out
    assert "time: about" in told and "scores, and choosing by them" in told
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    with pytest.raises(MemoryError, match=r"the rest of the chapter needs .* more than the 1.0 MB"):
        foresee.announce(p, model, linear, asks)


def test_a_model_that_leaves_no_room_is_refused_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    p = SimpleNamespace(**declared(ROOT / "notebooks" / "07_sparsification.ipynb"))
    lab.check(p, ["FI exact"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    with pytest.raises(MemoryError, match="scoring the weights of mini-lm in float32 needs"):
        lab.check(p, ["FI exact"])


def _texts(*lines: str) -> list[Response]:
    return [Response((1,), True, line) for line in lines]


@pytest.fixture
def written() -> Trials:
    def compared(level: float, k: int) -> Mapping[str, Any]:
        lengths = [10 + 3 * k, 20, 30 + k, 40 - 5 * k]
        return {
            "rouge1": [level] * 4,
            "win_rate": np.clip(level / 2 + 0.05 * np.arange(4), 0, 1),
            "characters": lengths,
        }

    def tries(k: int) -> Any:
        for measure, level in {"FI exact": 0.5, "Jacobian norm": 0.2, "random": 0.6}.items():
            for rate in (0.06, 0.1):
                yield (
                    {"measure": measure, "rate": rate},
                    compared(level - rate + 0.001 * k * (rate == 0.1), k),
                )

    return collect(
        lambda: {"rouge1": [1] * 4, "win_rate": [0.5] * 4, "characters": [10, 20, 30, 40]}, tries, sets=2
    )


def test_win_rates_at_equal_length_are_fitted_over_all_settings(written: Trials) -> None:
    intact = _texts("a" * 10, "a" * 20, "a" * 30, "a" * 40)
    found, fit = lab.at_equal_length(written, intact)
    everything = [*written.intact, *written.tried]
    expected = length_controlled_win_rates(
        [t.values["win_rate"] for t in everything],
        [t.values["characters"] for t in everything],
        [10, 20, 30, 40],
    )
    assert fit == expected.fit
    assert [t.values["length_controlled"][0] for t in found.tried] == expected.win_rates[1:].tolist()


def test_texts_are_compared_with_random_zeroing_set_by_set(written: Trials) -> None:
    intact = _texts("a" * 10, "a" * 20, "a" * 30, "a" * 40)
    tables, versus = lab.text_tables(lab.at_equal_length(written, intact)[0])
    assert set(tables.score) == {"rouge1", "win_rate", "length_controlled"} and len(tables) == 3 * 6
    rouge = versus[versus.score == "rouge1"].set_index(["first", "rate"])
    assert rouge.loc[("Jacobian norm", 0.06), "difference"] == pytest.approx(-0.4)
    assert set(rouge.verdict) == {"below"} and not ({"random"} & set(versus["first"]))
    wide = lab.widest(versus)
    assert len(wide) == 3 * 2 and (wide[wide.score == "rouge1"].below == 2).all()
    draw.damage_of_text(tables, 0.1)
    draw.text_differences(versus[versus.score == "rouge1"], "ROUGE-1")


def test_the_judge_is_the_stand_in_unless_an_address_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIHELPERS_JUDGE_KEY", "secret")
    run: Any = SimpleNamespace(kept=lambda name: Kept(tmp_path, name, ""))
    model = tiny_model("qwen2")
    assert isinstance(lab.judge_of(model, NO_JUDGE, run), LikelihoodJudge)
    asked = {"judge_url": "https://judge.example/v1", "judge_model": "j"}
    behind = lab.judge_of(model, asked, run)
    assert isinstance(behind, ApiJudge) and behind.model == "j"


def test_an_intact_model_that_says_nothing_is_refused_by_prompt() -> None:
    with pytest.raises(ValueError, match=r"ends its answer to '1' at once.*leave that prompt"):
        lab.what_it_can(tiny_model("qwen2"), EXAMPLES[:2], _texts("w1", " "), 3)


def test_the_bundled_model_recites_its_instructions() -> None:
    model = open_model()
    asked = lab.instructions(model, {"task": "bundled-instructions"}, "test", 6, 0)
    intact = lab.greedy(model, [e.prompt for e in asked], 40)
    able = lab.what_it_can(model, asked, intact, 40)
    assert able["reference"] > 0.99
    assert able["answer to another prompt"] < 0.5 and able["asked in other words"] < 0.9


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
