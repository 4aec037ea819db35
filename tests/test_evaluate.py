"""Evaluation: the same answers as the plain way, and intervals that are what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tiny import tiny_model

from fihelpers.answers import Answers, Groups, Top
from fihelpers.evaluate.questions import Evaluator, Outcome, answer_all
from fihelpers.evaluate.stats import (
    crossed_difference,
    mean_interval,
    paired_difference,
    spearman,
    wilson,
)
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.tasks import Example, load_task

LETTERS = Groups(tuple("ABCD"), ((1,), (2, 9), (3,), (4,)))
STARTS = {"law": "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10", "art": "w3 w1 w4 w1 w5 w9 w2 w6 w5 w3", "text": ""}
ENDS = ("w1 w2", "w4", "w5 w6 w7 w8 w9", "w2 w2 w11", "w3 w1 w9 w4")


def lettered(n: int = 10) -> list[Example]:
    """Questions of two subjects in turn, each subject with a beginning of its own."""
    subjects = [("law", "art")[i % 2] for i in range(n)]
    prompts = [f"{STARTS[s]} {ENDS[i // 2 % 5]}" for i, s in enumerate(subjects)]
    return [
        Example(f"{s}/{i}", s, p, tuple("abcd"), i % 4, p)
        for i, (s, p) in enumerate(zip(subjects, prompts, strict=True))
    ]


def plain(n: int = 5) -> list[Example]:
    return [Example(f"text/{i}", "text", ENDS[i], (), None, ENDS[i]) for i in range(n)]


def slowly(model: LanguageModel, examples: list[Example], answers: Answers) -> torch.Tensor:
    """One prompt at a time, the logits of every position."""
    ids = [torch.tensor([model.tokenizer(example.prompt)["input_ids"]]) for example in examples]
    with torch.no_grad():
        return torch.cat([answers.log_probs(model.network(input_ids=row).logits[:, -1]) for row in ids])


def greedy_tokens(model: LanguageModel, examples: list[Example]) -> torch.Tensor:
    ids = [torch.tensor([model.tokenizer(example.prompt)["input_ids"]]) for example in examples]
    return torch.stack([model.network(input_ids=row).logits[0, -1].argmax() for row in ids])


def disturb(model: LanguageModel, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize(
    ("examples", "answers"), [(lettered(), LETTERS), (lettered(), Top(5)), (plain(), Top(5))], ids=str
)
def test_answers_are_those_of_each_prompt_alone(
    kind: str, batch_size: int, examples: list[Example], answers: Answers
) -> None:
    model = tiny_model(kind)
    outcome = answer_all(model, examples, answers, batch_size)
    expected = slowly(model, examples, answers)
    torch.testing.assert_close(outcome.log_probs, expected, rtol=1e-9, atol=1e-9)
    greedy = isinstance(answers, Top)
    assert outcome.predicted.tolist() == ([0] * len(examples) if greedy else expected.argmax(-1).tolist())


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox", "gpt2"])
def test_a_perturbed_model_is_judged_on_the_classes_of_the_intact_one(kind: str) -> None:
    model, examples = tiny_model(kind), plain()
    evaluator = Evaluator(model, examples, Top(3), batch_size=2)
    intact = evaluator()
    assert intact.accuracy == 1
    before = greedy_tokens(model, examples)
    disturb(model)
    perturbed = evaluator()
    rows = [intact.classes.rows(torch.tensor([i])) for i in range(len(examples))]
    expected = [slowly(model, [example], row) for example, row in zip(examples, rows, strict=True)]
    torch.testing.assert_close(perturbed.log_probs, torch.cat(expected), rtol=1e-9, atol=1e-9)
    assert perturbed.answer.tolist() == intact.predicted.tolist()
    kept = before == greedy_tokens(model, examples)
    assert perturbed.correct.tolist() == kept.tolist()
    assert not kept.all()


def test_another_model_is_judged_by_reference() -> None:
    intact, examples = tiny_model("llama"), plain()
    reference = answer_all(intact, examples, Top(3))
    other = tiny_model("llama")
    disturb(other)
    outcome = answer_all(other, examples, Top(3), batch_size=2, reference=reference)
    evaluator = Evaluator(intact, examples, Top(3))
    evaluator()
    disturb(intact)
    torch.testing.assert_close(outcome.log_probs, evaluator().log_probs, rtol=1e-9, atol=1e-9)
    assert outcome.answer.tolist() == reference.predicted.tolist()


def test_right_answers_are_the_questions_own_and_stay() -> None:
    model, examples = tiny_model("qwen2"), lettered()
    evaluator = Evaluator(model, examples, LETTERS)
    first = evaluator()
    disturb(model)
    second = evaluator()
    for outcome in (first, second):
        assert outcome.answer.tolist() == [example.answer for example in examples]
    assert not torch.allclose(first.log_probs, second.log_probs)


def test_classes_without_a_right_answer_take_the_intact_models_choice() -> None:
    model = tiny_model("qwen2")
    examples = [*lettered(3), *plain(2)]
    evaluator = Evaluator(model, examples, LETTERS)
    first = evaluator()
    assert first.answer.tolist() == [0, 1, 2, *first.predicted[3:].tolist()]
    disturb(model)
    assert evaluator().answer.tolist() == first.answer.tolist()


def test_evaluation_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen2")
    (batch,) = model.batches([example.prompt for example in lettered()])
    before = model.network(batch.input_ids, attention_mask=batch.attention_mask).logits
    outcome = answer_all(model, lettered(), LETTERS)
    after = model.network(batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(before, after)
    (outcome.log_probs * torch.ones(4, requires_grad=True)).sum().backward()  # an ordinary tensor


def test_a_failed_evaluation_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen2")
    weight = model.network.get_parameter("model.embed_tokens.weight").data
    kept, weight[:] = weight.clone(), torch.nan
    with pytest.raises(FloatingPointError, match="tiny-qwen2"):
        answer_all(model, lettered(), LETTERS)
    weight[:] = kept
    assert not any(module._forward_pre_hooks for module in model.network.modules())


def test_an_outcome_counts() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.25, 0.35, 0.4]])
    outcome = Outcome(
        probs.log(), probs.argmax(-1), torch.tensor([0, 2, 2, 2]), Groups(("a", "b"), ((1,), (2,)))
    )
    assert outcome.correct.tolist() == [True, False, True, True]
    assert outcome.accuracy == 0.75
    torch.testing.assert_close(outcome.log_prob.exp(), torch.tensor([0.7, 0.3, 0.5, 0.4]))
    assert outcome.confidence == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("examples", "answers", "message"),
    [
        ([], LETTERS, "no examples to answer"),
        (
            lettered(2),
            Groups(("yes", "no"), ((1,), (2,))),
            "'law/0' has 4 options, but there are 2 answer classes",
        ),
    ],
)
def test_examples_that_cannot_be_judged_are_refused(examples, answers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluator(tiny_model("qwen2"), examples, answers)


def test_a_reference_of_other_examples_is_refused() -> None:
    model = tiny_model("qwen2")
    reference = answer_all(model, plain(3), Top(3))
    with pytest.raises(ValueError, match="the reference has 3 examples, not the 4 given"):
        answer_all(model, plain(4), Top(3), reference=reference)


def test_a_real_model_keeps_its_choices_until_it_is_damaged(real_data: Path, tmp_path: Path) -> None:
    model = open_model(real_data / "stories260K")
    path = tmp_path / "openings.txt"
    path.write_text("Once upon a time\nLily and Tom went to the park. They saw a big\nThe cat was very\n")
    task = load_task(path)
    answers = Top(8)
    evaluator = Evaluator(model, task.examples, answers)
    intact = evaluator()
    assert intact.accuracy == 1 and intact.log_probs.shape == (3, 9)
    torch.testing.assert_close(intact.log_probs, slowly(model, list(task), answers), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.network.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(-3)
    assert evaluator().log_prob.mean() < intact.log_prob.mean() - 1


@given(n=st.integers(1, 10_000), data=st.data())
def test_wilson_holds_the_share_and_mirrors(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    mirrored = wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(n=st.integers(1, 1000), data=st.data())
def test_wilsons_ends_are_where_the_score_test_is_at_its_level(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(1, n))
    low, _ = wilson(successes, n)
    z = (successes / n - low) / np.sqrt(low * (1 - low) / n)
    assert z == pytest.approx(1.959964, rel=1e-5)


def test_wilson_gives_the_textbook_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_what_is_no_proportion_is_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="is no proportion"):
        wilson(successes, n)


@pytest.mark.parametrize("level", [0, 1, 95, float("nan")])
def test_a_level_is_between_0_and_1(level: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired_difference([1.0], [0.0], seed=0, level=level)


def test_a_paired_difference_is_seeded_and_antisymmetric() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 2, size=60), rng.normal(0, 2, size=60)
    first = paired_difference(a, b, seed=3)
    assert first == paired_difference(a, b, seed=3) != paired_difference(a, b, seed=4)
    mean, low, high = first
    assert mean == pytest.approx(a.mean() - b.mean()) and low < mean < high
    assert paired_difference(b, a, seed=3) == pytest.approx((-mean, -high, -low))


def test_a_paired_difference_cancels_what_both_share() -> None:
    shared = torch.linspace(-100, 100, 50)
    assert paired_difference(shared, shared, seed=0) == (0, 0, 0)
    mean, low, high = paired_difference(shared + 1, shared, seed=0)
    assert (mean, low, high) == pytest.approx((1, 1, 1), abs=1e-4)


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_questions() -> None:
    difference = np.random.default_rng(0).normal(0.3, 2, size=400)
    mean, low, high = paired_difference(difference, np.zeros(400), seed=0, level=0.9)
    half = 1.645 * difference.std() / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_the_bootstrap_resamples_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.arange(7.0), np.zeros(7)
    whole = paired_difference(a, b, seed=0, resamples=1000)
    monkeypatch.setattr("fihelpers.evaluate.stats.BLOCK", 70)  # draws the same numbers, ten rows at a time
    assert paired_difference(a, b, seed=0, resamples=1000) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("a", "b", "resamples", "message"),
    [
        ([], [], 10, "a must be a non-empty list"),
        ([1.0], [1.0, 2.0], 10, "a has 1 values and b has 2"),
        ([1.0, float("nan")], [1.0, 2.0], 10, "a holds NaN or infinity at position 1"),
        ([[1.0]], [[1.0]], 10, r"got shape \(1, 1\)"),
        ([1.0], [1.0], 0, "at least 1, got 0"),
    ],
)
def test_values_that_cannot_be_paired_are_refused(a, b, resamples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b, seed=0, resamples=resamples)


def test_rank_correlation_is_spearmans_with_ties_and_none_of_a_constant() -> None:
    a = np.array([[1.0, 2.0, 2.0, 4.0], [3.0, 1.0, 2.0, 2.0]])
    assert spearman(a, a**3) == pytest.approx([1, 1])
    assert spearman(a, -a) == pytest.approx([-1, -1])
    b = [0.3, 0.1, 0.2, 0.2]
    assert spearman(a, b) == pytest.approx([spearmanr(row, b).statistic for row in a])
    assert np.isnan(spearman(a, np.ones(4))).all()


def test_the_mean_interval_is_the_t_interval() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert mean_interval(torch.full((5,), 0.5)) == (0.5, 0.5, 0.5)


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_the_mean_interval_moves_and_scales_with_its_values(values: list[float]) -> None:
    mean, low, high = mean_interval(values)
    assert low <= mean <= high
    scaled = mean_interval([3 - 2 * value for value in values])
    assert scaled == pytest.approx((3 - 2 * mean, 3 - 2 * high, 3 - 2 * low), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "non-empty"), ([1.0], "at least two values, got 1"), ([1.0, np.inf], "infinity")],
)
def test_values_without_a_spread_are_refused(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_interval(values)


def test_crossed_difference_covers_seeds_and_questions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 40)), rng.random((5, 40))
    mean, low, high = crossed_difference(a, b, seed=0)
    assert mean == pytest.approx(float((a - b).mean())) and low < mean < high
    assert crossed_difference(a, a, seed=0) == (0, 0, 0)
    assert crossed_difference(a, b, seed=0) == crossed_difference(a, b, seed=0)
    # seeds that differ widen the interval; bootstrapping the questions alone would not see them
    shifted = b + np.array([0, 1, 2, 3, 4])[:, None]
    _, wide_low, wide_high = crossed_difference(a, shifted, seed=0)
    _, narrow_low, narrow_high = paired_difference(a.mean(0), shifted.mean(0), seed=0)
    assert wide_high - wide_low > 3 * (narrow_high - narrow_low)
    for bad in (a[0], a[:, :0], a[:2], np.full((5, 40), np.nan)):
        with pytest.raises(ValueError, match=r"shape|NaN"):
            crossed_difference(bad, b, seed=0)
