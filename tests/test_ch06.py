"""Chapter 06: the loop that stands in its notebook, and what its lab reads of the answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from opening import NOTEBOOKS, settled
from tiny import tiny_model

from fichapters import results
from fichapters.ch06 import lab
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.embeddings import attack, top_dimensions
from fihelpers.scores.inputs import EmbeddingBatch, embedding_batches
from fihelpers.tasks import Example
from fihelpers.tasks.mcq import format_prompt
from fihelpers.trials import Kept, Trials

LESSON = "06_embedding_attacks"
N = 8  # questions under smoke
CHANGES = {  # what of the lesson's source a reader may write otherwise
    "score": ("    return values\n", "    return [-one for one in values]\n"),
    "choose": ("region=tokens)", "region=tokens, share=0.01)"),
    "move": ("attack, batch, **move)", 'attack, batch, direction="random", **move)'),
    "measure the damage": ("log_p.argmax(1) == right", "log_p.argmax(1) == said"),
}


def lesson(
    folder: Path, monkeypatch: pytest.MonkeyPatch, old: str = "", new: str = "", until: str = ""
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Run the lesson under smoke, with a piece of its source written otherwise: its names and its tables.

    until: the name after whose first assignment no further cell runs; all run by default.
    """
    tables: dict[str, pd.DataFrame] = {}
    p = SimpleNamespace(**settled(LESSON, {}, "smoke"))
    own = SimpleNamespace(**{**vars(p), "PROFILE": "real"})  # its tables are drawn beside no others
    kept = {"kept": lambda name: Kept(folder, name, "about"), "keep": tables.__setitem__}
    run = SimpleNamespace(p=own, name=LESSON, **kept)
    monkeypatch.setattr(results, "begin", lambda name: run)
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = nbformat.read(NOTEBOOKS[LESSON], as_version=4).cells
    cells = cells[: next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))]
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert old in "\n".join(code)
    for source in code[1:]:
        exec(compile(source.replace(old, new) if old else source, LESSON, "exec"), names)
        if until and until in names:
            break
    return names, tables


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    with pytest.MonkeyPatch.context() as patched:
        return lesson(tmp_path_factory.mktemp("kept"), patched)


def test_the_first_order_bounds_every_choice(whole: tuple[dict[str, Any], Any]) -> None:
    rows = whole[0]["trials"].rows()
    assert len(rows) == N * len(whole[0]["MEASURES"]) * 2
    assert (rows.log_prob <= 0).all() and set(rows.correct) <= {0.0, 0.5, 1.0}
    assert set(rows[rows.measure != "random"].correct) <= {0.0, 1.0}  # random is the mean of two draws
    assert (rows.promised <= 0).all()
    best = rows[rows.measure == lab.JACOBIAN].set_index(["id", "budget"]).promised
    pairs = pd.MultiIndex.from_frame(rows[["id", "budget"]])
    assert (rows.promised >= best.reindex(pairs).to_numpy() * (1 + 1e-5)).all()


def test_the_attack_by_hand_is_that_of_the_library(whole: tuple[dict[str, Any], Any]) -> None:
    names = whole[0]
    one, p = names["one"], names["p"]
    scores = names["score"](one, "Jacobian norm", p.SEED)
    torch.testing.assert_close(scores[0], names["scores"]["Jacobian norm"], rtol=1e-3, atol=1e-6)
    chosen = top_dimensions(names["scores"]["Jacobian norm"], p.SHARE, seed=p.SEED)
    by_hand = names["E"] + names["step"](chosen, p.BUDGET * names["E"].norm())
    torch.testing.assert_close(attack(one, [chosen], p.BUDGET)[0], by_hand, rtol=1e-4, atol=1e-5)


def test_the_tables_are_those_that_the_claims_read(whole: tuple[Any, dict[str, pd.DataFrame]]) -> None:
    tables = whole[1]
    kinds = tables["attack_duels"].groupby("attack", sort=False).size()
    assert kinds.tolist() == [30, 30, 6, 6, 6, 12]
    assert len(tables["duels"]) == len(lab.EVERY_FI) * len(lab.PAPER) * 2
    middle = tables["duels"][tables["duels"].budget == 0.05]
    first = tables["attack_duels"][tables["attack_duels"].attack == "one step, l2"]
    both = middle.merge(first, on=["fi", "other"])
    np.testing.assert_allclose(both.difference_x, both.difference_y)
    assert tables["few_against_all"].measure.tolist() == list(lab.EIGHT)
    guided = tables["random_and_guided"]
    assert set(guided.attack) == {"middle budget", "largest budget"} and len(guided) == 10
    for table in (tables["duels"], tables["attack_duels"], guided):
        assert (table.low <= table.difference).all() and (table.difference <= table.high).all()
        assert (table.n == N).all()


@pytest.mark.parametrize("change", CHANGES)
def test_a_readers_change_makes_other_answers(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[dict[str, Any], Any]
) -> None:
    names, _ = lesson(tmp_path, monkeypatch, *CHANGES[change], until="trials")
    value = "correct" if change == "measure the damage" else "log_prob"
    was, now = (found["trials"].rows()[value] for found in (whole[0], names))
    assert not was.equals(now)


def test_finished_batches_are_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = lesson(tmp_path, monkeypatch, until="trials")
    kept = sorted(tmp_path.iterdir())
    again, _ = lesson(tmp_path, monkeypatch, "import torch\n", "import torch  # as ever\n", until="trials")
    assert sorted(tmp_path.iterdir()) == kept
    pd.testing.assert_frame_equal(first["trials"].rows(), again["trials"].rows(), check_dtype=False)


# --- on a tiny model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    made = tiny_model("qwen2")
    made.network.config.max_position_embeddings = 512
    return made


@pytest.fixture(scope="module")
def batches(model: LanguageModel) -> list[EmbeddingBatch]:
    made = []
    for subject, answer in (("one", 0), ("two", 1)):
        for i in range(3):
            options = tuple(f"w{i + k}" for k in range(4))
            question = " ".join(f"w{i + k}" for k in range(3 + i))
            prompt = format_prompt(subject, question, options)
            made.append(Example(f"{subject}/{i}", subject, prompt, options, (answer + i) % 4, question))
    return list(embedding_batches(model, made, None, 4))


def test_the_gradient_promises_what_a_tiny_step_does(batches: list[EmbeddingBatch]) -> None:
    for batch in batches:
        (scores,) = batch.scores(["Jacobian norm"]).values()
        moved = attack(batch, [top_dimensions(values, 0.01) for values in scores], 1e-4)
        with torch.no_grad():
            after, before = (batch.log_probs(x) for x in (moved, batch.embeddings))
        came = (after - before).gather(1, batch.grads.predicted[:, None])[:, 0]
        torch.testing.assert_close(came, lab.first_order(batch, moved), rtol=0.05, atol=2e-6)


def test_other_classes_score_and_the_options_are_attacked(batches: list[EmbeddingBatch]) -> None:
    for batch, top in zip(batches, lab.on_top(batches), strict=True):
        (own,), (other,) = (of.scores(["Jacobian norm"]).values() for of in (batch, top))
        assert [v.shape for v in own] == [v.shape for v in other]
        assert not any(torch.allclose(a, b) for a, b in zip(own, other, strict=True))
        chosen = [top_dimensions(values, 0.01) for values in own]
        assert torch.equal(attack(batch, chosen, 0.1), attack(top, chosen, 0.1))
        for example, values in zip(top.examples, other, strict=True):
            (alone,) = lab.on_top(embedding_batches(batch.model, [example], batch.answers))
            (found,) = alone.scores(["Jacobian norm"])["Jacobian norm"]
            torch.testing.assert_close(found, values, rtol=1e-3, atol=1e-7)


def test_tokens_are_saturated_unless_summed_or_damped(batches: list[EmbeddingBatch]) -> None:
    table = lab.token_saturation(batches, 0).set_index("setting")
    assert (table.n == 6).all()  # 12 hidden dimensions, 4 letters, 8 likeliest tokens and the rest
    assert table.at_ceiling["FI exact"] > 0.9 and table.at_ceiling["FI exact, top 8"] > 0.9
    spread = table.highest - table.lowest
    assert spread["FI exact"] < 0.01 < spread["FI exact summed"]
    assert table.at_ceiling[["FI exact summed", "Jacobian norm", "SNIP", "random"]].isna().all()


def test_answers_of_several_draws_are_averaged() -> None:
    answers = [
        {"id": ["a", "b"], "subject": ["s", "s"], "correct": torch.tensor([True, right]), "log_prob": [x, x]}
        for right, x in ((True, -1.0), (False, -3.0))
    ]
    made = lab.mean(answers)
    assert made["correct"].tolist() == [1.0, 0.5] and made["log_prob"].tolist() == [-2.0, -2.0]
    assert made["id"] == ["a", "b"]


def test_the_untouched_questions_stand_first() -> None:
    from fihelpers.trials import Trial

    values = {"id": np.array(["b", "a"]), "subject": np.array(["s", "t"]), "correct": np.array([1.0, 0.0])}
    after = {**values, "correct": np.array([0.0, 0.0])}
    trials = Trials([Trial(0, {}, values)], [Trial(0, {"measure": "SNIP", "budget": 0.1}, after)])
    grid = lab.by_subject(lab.with_intact(trials))
    assert grid.index.tolist() == ["intact", "SNIP"] and list(grid) == ["s", "t"]
    assert grid.to_numpy().tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_a_task_without_options_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "contexts.txt"
    text.write_text("w1 w2 w3\nw2 w3 w4\n")
    p = SimpleNamespace(TASK=str(text), SUBJECTS=["text"], N_QUESTIONS=None, SEED=0)
    with pytest.raises(ValueError, match="no question as text with options"):
        lab.questions(p)
