"""Experts that a run fine-tunes by itself: what they learn, that a killed run ends alike, what is refused."""

from pathlib import Path

import pytest
import torch
from standins import save_model
from tiny_vision import save_vision_model

from fichapters.ch09 import tune
from fichapters.ch09.tune import Recipe, drawn, learned, place, rate_factor
from fihelpers import cache
from fihelpers.data import data_folder
from fihelpers.models.files import ModelWeights, open_weights
from fihelpers.models.language import open_model
from fihelpers.perturb.merge import Merger
from fihelpers.perturb.merge_methods import Average
from fihelpers.tasks import load_task

SHORT = Recipe(steps=7, batch=4, rate=1e-3)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.HOME, str(tmp_path / "home"))
    monkeypatch.setattr(tune, "RECIPE", SHORT)
    monkeypatch.setattr(tune, "KEPT_EVERY", 2)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "base"
    save_model(folder)
    return str(folder)


def tensors(weights: ModelWeights) -> dict[str, torch.Tensor]:
    return {name: weights.read(name) for name in weights.layouts}


def interrupt(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training end at a step, counted from the first that is still to be done."""
    honest, calls = tune._loss, []

    def loss(*given: object) -> torch.Tensor:
        calls.append(0)
        if len(calls) > at:
            raise KeyboardInterrupt
        return honest(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(tune, "_loss", loss)


def test_other_names_stay_as_they_are() -> None:
    assert place("mini-math", "no such base") == "mini-math"


def test_an_expert_learns_questions_with_their_answers_and_none_of_the_statements() -> None:
    texts = learned("health")
    assert ("Question: What is the forceps good for?\nAnswer:", " holding small parts") in texts
    assert len(texts) == len(set(texts)) > 300
    statements = [e.prompt for split in ("val", "test") for e in load_task("cloze-experts", "health", split)]
    assert not [text for text in texts for statement in statements if statement in "".join(text)]


def test_the_answer_counts_whole_and_the_question_less(base: str) -> None:
    model = open_model(base)
    ((ids, weights),) = tune._rows(model, [("Question: What is 2 times 3?\nAnswer:", " 6")], SHORT)
    assert sorted(set(weights.tolist())) == pytest.approx([SHORT.question, 1.0])
    assert model.tokenizer.decode(ids[weights == 1]).strip() == "6"


def test_the_loss_is_the_weighted_mean_over_texts_of_any_length(base: str) -> None:
    model = open_model(base)
    rows = tune._rows(model, learned("math")[:3], SHORT)
    sums, counts = 0.0, 0.0
    with torch.no_grad():
        for ids, weights in rows:
            log_p = model.network(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            each = -log_p[torch.arange(len(ids) - 1), ids[1:]]
            sums += float((each * weights[1:]).sum())
            counts += float(weights[1:].sum())
        assert float(tune._loss(model.network, rows)) == pytest.approx(sums / counts, rel=1e-5)


def test_every_text_is_seen_once_before_any_is_seen_again() -> None:
    seen = [i for step in range(10) for i in drawn(20, step, SHORT)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]


def test_the_rate_rises_and_then_falls_to_almost_nothing() -> None:
    recipe = Recipe(steps=100)
    rates = [rate_factor(step, recipe) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert max(rates) == 1 and 0 < rates[-1] < 0.02


def test_two_experts_can_be_merged_with_their_base_and_are_made_once(
    base: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [place(f"tuned:{subject}", base) for subject in ("math", "health")]
    experts = [open_weights(folder) for folder in folders]
    merged = Merger(open_weights(base), *experts, Average()).state()
    for name, tensor in merged.items():
        a, b = (expert.read(name) for expert in experts)
        assert not a.equal(b)
        torch.testing.assert_close(tensor, (a + b) / 2)
    model = open_model(folders[0])
    assert model.network.config.tie_word_embeddings and "lm_head.weight" not in merged
    text = "Question: What is 2 times 3?\nAnswer: 6"
    assert model.tokenizer(text)["input_ids"] == open_model(base).tokenizer(text)["input_ids"]
    assert sorted(p.name for p in home.glob("experts/*/*")) == ["base-health", "base-math"]
    monkeypatch.setattr(tune, "_make", lambda *_: pytest.fail("made a second time"))
    assert place("tuned:math", base) == folders[0]


def test_an_expert_has_learned_something(base: str) -> None:
    before, after = open_model(base), open_model(place("tuned:math", base))
    rows = tune._rows(before, learned("math"), SHORT)
    with torch.no_grad():
        assert tune._loss(after.network, rows) < tune._loss(before.network, rows) - 0.1


@pytest.mark.parametrize("stops", [(1,), (2,), (5,), (3, 1, 2)])
def test_a_run_that_was_killed_ends_with_the_same_weights(
    base: str, home: Path, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = tensors(open_weights(place("tuned:math", base)))
    monkeypatch.setenv(cache.HOME, str(tmp_path / "other"))
    for stop in stops:
        with monkeypatch.context() as within:
            interrupt(stop, within)
            with pytest.raises(KeyboardInterrupt):
                place("tuned:math", base)
        assert not list(tmp_path.glob("other/experts/*/base-math"))
    for left in tmp_path.glob("other/experts/*"):
        (left / ".checkpoint.half").mkdir()  # what kill -9 leaves amid writing
    resumed = Path(place("tuned:math", base))
    found = tensors(open_weights(resumed))
    assert found.keys() == whole.keys()
    assert all(found[name].equal(whole[name]) for name in whole)
    assert list(resumed.parent.iterdir()) == [resumed]


def test_another_recipe_or_base_makes_another_expert(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = place("tuned:math", base)
    monkeypatch.setattr(tune, "RECIPE", Recipe(steps=3, batch=4))
    second = place("tuned:math", base)
    save_model(tmp_path / "base", seed=1)
    assert len({first, second, place("tuned:math", str(tmp_path / "base"))}) == 3


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("tuned:law", None, "unknown subject 'law'; use one of health, math"),
        ("tuned:", None, "unknown subject ''; use one of health, math"),
        ("tuned:math", "mini-vlm", "'mini-vlm' is no language model"),
        ("tuned:math", "qwen2_vl", "is no language model"),
        ("tuned:math", "nowhere", "no model 'nowhere'"),
        ("tuned:math", "empty", "model 'empty' has no config.json"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_a_model_is_opened(
    base: str, name: str, other: str | None, message: str,
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tune, "open_model", lambda *_: pytest.fail("opened"))
    (tmp_path / "empty").mkdir()
    save_vision_model("qwen2_vl", tmp_path / "qwen2_vl")
    place_of = {"empty": str(tmp_path / "empty"), "qwen2_vl": str(tmp_path / "qwen2_vl")}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        place(name, place_of.get(other, other) if other else base)
    assert "\n" not in str(caught.value)
    assert not list(home.glob("experts/*"))


def test_a_base_too_large_for_memory_or_disk_is_refused_at_once(
    base: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "open_model", lambda *_: pytest.fail("opened"))
    with monkeypatch.context() as within, pytest.raises(MemoryError, match="fine-tuning base-math needs"):
        within.setattr(tune, "COPIES", 10**12)
        place("tuned:math", base)
    with monkeypatch.context() as within, pytest.raises(OSError, match="fine-tuning base-math needs"):
        within.setattr(tune, "CHECKPOINTS", 10**12)
        place("tuned:math", base)
    assert not list(home.glob("experts/*"))


def test_a_text_that_the_base_cannot_read_is_said(base: str, tmp_path: Path) -> None:
    model = open_model(base)
    model.network.config.max_position_embeddings = 3
    with pytest.raises(ValueError, match="more than the 3 that model 'base' can read; take another base"):
        tune.train(model, learned("math"), SHORT, tmp_path / "checkpoint.safetensors")


def test_a_bundled_base_is_taken_by_its_name() -> None:
    assert Path(place("tuned:health", "mini-lm")).name == "mini-lm-health"
    assert (data_folder() / "models" / "mini-health").is_dir()  # the book's own, which is another model
