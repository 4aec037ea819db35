"""Scores over the steps of sampled responses, against the naive computation on tiny random models."""

import json
from collections.abc import Sequence

import pytest
import torch
from tiny import WORDS, tiny_examples, tiny_model
from torch import Tensor

from fihelpers.answers import Top, letters
from fihelpers.filters import Damped
from fihelpers.influence import SaturationWarning
from fihelpers.measures import Influence, Measure, find_measure
from fihelpers.models.generate import Response, sample
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.scores import sequences
from fihelpers.scores.class_gradients import class_gradients
from fihelpers.scores.sequences import contexts_of, score_sequences
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example

KINDS = ["qwen2", "llama", "gpt_neox"]
MEASURES = [Influence(), Influence(Damped(1e-3)), *map(find_measure, ("Jacobian norm", "SNIP", "saliency"))]
MATRIX = {"qwen2": "model.layers.1.mlp.up_proj.weight", "llama": "model.layers.0.self_attn.v_proj.weight",
          "gpt_neox": "gpt_neox.layers.1.attention.dense.weight"}  # fmt: skip


def model_for(kind: str, ends: bool) -> LanguageModel:
    """Where it `ends`, about every third token ends a response, so that there are some of every length."""
    model = tiny_model(kind)
    model.network.generation_config.eos_token_id = list(range(1, 32, 3)) if ends else None
    return model


def step_weights(steps: int, discount: float | None) -> list[float]:
    w = [1.0 if discount is None else discount**l for l in range(steps)]  # noqa: E741
    return [x / sum(w) for x in w]


def naive_steps(
    model: LanguageModel, example: Example, horizon: int, samples: int, discount: float | None, seed: int
) -> list[tuple[list[int], float]]:
    """Every step of every response by itself: the tokens before it, and its weight."""
    start = model.tokenizer(example.prompt)["input_ids"]
    (drawn,) = sample(model, [example.prompt], samples, 20, seed)
    steps = []
    for response in drawn:
        w = step_weights(min(horizon, len(response.ids) + 1), discount)
        steps += [(start + list(response.ids[:l]), x / samples) for l, x in enumerate(w)]  # noqa: E741
    return steps


def weights_of_step(
    model: LanguageModel, ids: Sequence[int], name: str, measures: Sequence[Measure]
) -> dict[str, Tensor]:
    """The measures of one tensor of weights at one step, by autograd."""
    log_p = Top(8).log_probs(model.network(input_ids=torch.tensor([list(ids)])).logits[0, -1])
    weight = model.network.get_parameter(name)
    grads = class_gradients(log_p, weight)
    return {m.name: m(grads, log_p.exp().detach(), value=weight.detach()) for m in measures}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("samples", "discount"), [(1, None), (10, None), (3, 0.7)])
def test_one_step_is_the_single_step_score(kind: str, samples: int, discount: float | None) -> None:
    model, examples = tiny_model(kind), tiny_examples(5)
    ours = score_sequences(model, examples, horizon=1, samples=samples, discount=discount, batch_size=2)
    single = score_weights(model, examples, answers=Top(8), batch_size=2)
    assert set(ours) == set(single)
    for name, scores in single.items():
        assert all(torch.equal(ours[name][key], value) for key, value in scores.values.items())
        assert scores.metadata.items() <= ours[name].metadata.items()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("discount", [None, 0.6])
@pytest.mark.parametrize("ends", [True, False])
def test_distinct_contexts_equal_the_naive_computation(kind: str, discount: float | None, ends: bool) -> None:
    model, examples = model_for(kind, ends), tiny_examples(3)
    name = MATRIX[kind]
    ours = score_sequences(
        model, examples, MEASURES, horizon=4, samples=6, discount=discount, seed=2, only=[name], batch_size=7
    )
    truth = {m.name: torch.zeros_like(ours[m.name][name]) for m in MEASURES}
    per_example = torch.zeros(3, dtype=torch.float64)
    for i, example in enumerate(examples):
        for ids, weight in naive_steps(model, example, 4, 6, discount, 2):
            for measure, values in weights_of_step(model, ids, name, MEASURES).items():
                truth[measure] += weight * values / 3
                per_example[i] += weight * float(values.mean()) * (measure == "SNIP")
    for measure, values in truth.items():
        torch.testing.assert_close(ours[measure][name], values, rtol=1e-6, atol=1e-10, msg=measure)
    found = torch.tensor(json.loads(ours["SNIP"].metadata["per_example"]), dtype=torch.float64)
    torch.testing.assert_close(found, per_example, rtol=1e-4, atol=0)
    steps = sum(len(naive_steps(model, e, 4, 6, None, 2)) for e in examples)
    about = ours["SNIP"].metadata
    assert int(about["steps"]) == steps > int(about["contexts"]) >= 3
    assert (steps < 72) == ends == (float(about["ended"]) > 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [True, False])
def test_the_discounted_form_is_as_near_the_long_run_as_it_says(kind: str, ends: bool) -> None:
    model, examples = model_for(kind, ends), tiny_examples(3)
    for discount in (0.4, 0.7):
        runs = {
            horizon: score_sequences(
                model, examples, ["FI"], Damped(1e-3), horizon=horizon, samples=4, discount=discount,
                only=[MATRIX[kind]],
            )["FI damped 0.001"]
            for horizon in (1, 2, 4, 8, 20)
        }  # fmt: skip
        last = runs.pop(20)
        distances, bounds = [], []
        for horizon, scores in runs.items():
            distances.append(float((scores[MATRIX[kind]] - last[MATRIX[kind]]).abs().max()))
            bounds.append(float(scores.metadata["truncation_error"]))
            left_out = float(scores.metadata["left_out"])
            assert left_out == pytest.approx(
                discount**horizon * (1 - float(scores.metadata["ended"])), abs=1e-5
            )
            assert bounds[-1] == pytest.approx(8 * left_out)
        assert all(d <= b for d, b in zip(distances, bounds, strict=True))
        assert distances[-1] < distances[0] / 4 and bounds[-1] < 0.5


def test_weights_of_the_steps_by_hand() -> None:
    """Two of three responses agree in their first token; one of these ends after it, the third at once."""
    responses = [Response((7, 8), False, ""), Response((7,), True, ""), Response((), True, "")]
    found = contexts_of([(1, 2)], [responses], 3, None)
    shares = {context.ids: context.share for context in found}
    expected = {(1, 2): (1 / 3 + 1 / 2 + 1) / 3, (1, 2, 7): (1 / 3 + 1 / 2) / 3, (1, 2, 7, 8): 1 / 9}
    assert shares == pytest.approx(expected)
    assert {context.example for context in found} == {0}
    found = contexts_of([(1, 2)], [responses], 3, 0.5)
    shares = {context.ids: context.share for context in found}
    expected = {(1, 2): (4 / 7 + 2 / 3 + 1) / 3, (1, 2, 7): (2 / 7 + 1 / 3) / 3, (1, 2, 7, 8): 1 / 21}
    assert shares == pytest.approx(expected)


def test_responses_that_all_end_at_once_leave_the_single_step() -> None:
    model, examples = tiny_model("llama"), tiny_examples(2)
    model.network.generation_config.eos_token_id = list(range(len(WORDS)))
    ours = score_sequences(model, examples, ["SNIP"], horizon=5, samples=3, discount=0.9)["SNIP"]
    single = score_weights(model, examples, ["SNIP"], answers=Top(8))["SNIP"]
    assert all(torch.equal(ours[key], value) for key, value in single.values.items())
    assert ours.metadata["ended"] == "1" and float(ours.metadata["left_out"]) == 0
    assert ours.metadata["steps"] == "6" and ours.metadata["contexts"] == "2"


def test_batches_do_not_change_scores() -> None:
    model, examples = model_for("gpt_neox", True), tiny_examples(4)
    measures = ["FI damped 0.0001", "SNIP", "random"]
    whole = score_sequences(model, examples, measures, horizon=3, samples=4, batch_size=100)
    parts = score_sequences(model, examples, measures, horizon=3, samples=4, batch_size=3)
    for name, scores in whole.items():
        assert scores.metadata.keys() == parts[name].metadata.keys()
        for key, value in scores.values.items():
            torch.testing.assert_close(parts[name][key], value, rtol=1e-7, atol=1e-11)


def test_other_classes_and_the_metadata() -> None:
    model, examples = model_for("llama", False), tiny_examples(2)
    scores = score_sequences(
        model, examples, ["FI", "SNIP"], horizon=2, samples=3, seed=5, discount=0.5,
        answers=letters(model.tokenizer),
    )  # fmt: skip
    about = scores["FI exact"].metadata
    assert about["classes"] == "A B C D" and about["n"] == "2" and about["spectral"] == "exact"
    expected = {"horizon": "2", "samples": "3", "seed": "5", "discount": "0.5", "steps": "12"}
    assert expected.items() <= about.items()
    assert float(about["truncation_error"]) == 3 * float(about["left_out"])
    assert "left_out" in scores["SNIP"].metadata and "truncation_error" not in scores["SNIP"].metadata
    plain = score_sequences(model, examples, ["FI"], horizon=2, samples=3)["FI exact"].metadata
    assert not {"discount", "left_out", "truncation_error"} & plain.keys()


def test_two_classes_warn_of_saturation_over_all_steps() -> None:
    model, examples = tiny_model("llama"), tiny_examples(2)
    with pytest.warns(SaturationWarning):
        score_sequences(model, examples, ["FI"], horizon=3, samples=3, answers=Top(1), only=[MATRIX["llama"]])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("qwen2")
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    score_sequences(model, tiny_examples(2), ["FI"], horizon=3, samples=2)
    for name, p in model.network.named_parameters():
        assert p.equal(before[name]) and p.requires_grad and p.grad is None


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny_model("qwen2"), tiny_examples(2)
    long = [Example("0", "tiny", "w1 " * 29, (), None, ""), *examples]
    score_sequences(model, long[:1], ["SNIP"], horizon=4, samples=1)  # 29 + 3 tokens are as many as fit
    with pytest.raises(ValueError, match="prompt 0 has 29 tokens and 4 more to come, more than the 32"):
        score_sequences(model, long, ["SNIP"], horizon=5)
    monkeypatch.setattr(sequences, "sample", lambda *_, **__: pytest.fail("sampled before it checked"))
    with pytest.raises(ValueError, match="calibration set is empty"):
        score_sequences(model, [])
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        score_sequences(model, [*examples, Example("x", "tiny", " ", (), None, "")])
    for horizon in (0, -1):
        with pytest.raises(ValueError, match=f"horizon must be at least 1, got {horizon}"):
            score_sequences(model, examples, horizon=horizon)
    with pytest.raises(ValueError, match="number of samples must be at least 1, got 0"):
        score_sequences(model, examples, samples=0)
    for discount in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="discount must lie between 0 and 1"):
            score_sequences(model, examples, discount=discount)
    with pytest.raises(ValueError, match="Unknown measure 'Fi'"):
        score_sequences(model, examples, ["Fi"])
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        score_sequences(model, examples, horizon=1, batch_size=0)


def test_an_unknown_parameter_is_named_before_anything_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "sample", lambda *_, **__: pytest.fail("sampled before it checked"))
    with pytest.raises(ValueError, match="no parameter 'nope'"):
        score_sequences(tiny_model("qwen2"), tiny_examples(1), ["FI"], only=["nope"])


@pytest.mark.parametrize("horizon", [1, 4])
def test_nan_logits_name_the_prompt(horizon: int) -> None:
    model = tiny_model("llama")
    examples = [*tiny_examples(3), Example("x", "tiny", "C", (), None, "")]  # the shortest comes last
    token = WORDS.index("C")
    model.network.get_input_embeddings().register_forward_hook(
        lambda module, inputs, out: out.masked_fill((inputs[0][:, :1] == token)[..., None], torch.nan)
    )
    with pytest.raises(FloatingPointError, match=r"tiny-llama.* prompt 3"):
        score_sequences(model, examples, ["SNIP"], horizon=horizon, samples=2, batch_size=1)


def test_sequence_scores_of_the_bundled_model() -> None:
    """A real tokenizer and answers that the model has learnt: most samples share their first steps."""
    model = open_model("mini-lm")
    prompts = ["Instruction: Name a colour.\nResponse:", "Instruction: Say hello.\nResponse:"]
    examples = [Example(str(i), "text", p, (), None, p) for i, p in enumerate(prompts)]
    only = ["model.layers.3.mlp.down_proj.weight"]
    scores = score_sequences(model, examples, ["FI damped 0.0001", "SNIP"], samples=6, only=only)
    about = scores["SNIP"].metadata
    assert int(about["contexts"]) < int(about["steps"]) <= 60
    assert all(torch.isfinite(s[only[0]]).all() and s[only[0]].max() > 0 for s in scores.values())
