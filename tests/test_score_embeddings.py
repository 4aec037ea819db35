"""Scores of embeddings: those of plain autograd, the ceiling, and padding that changes nothing."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_examples, tiny_model
from torch import Tensor

from fihelpers.answers import Answers, Top, letters
from fihelpers.filters import Damped
from fihelpers.influence import SaturationWarning, ceiling
from fihelpers.measures import MEASURES
from fihelpers.models.language import LanguageModel
from fihelpers.scores.inputs import (
    EmbeddingBatch,
    embedding_batches,
    score_embeddings,
)
from fihelpers.tasks import Example

KINDS = ("qwen2", "llama", "gpt_neox", "gpt2")
LAM = 1e-3


def plain(kind: str, example: Example, answers: Answers | None) -> tuple[Tensor, Tensor, Tensor]:
    """By the network itself, without padding: class gradients (K, T, hidden), P (K,), embeddings."""
    model = tiny_model(kind)
    ids = torch.tensor([model.tokenizer(example.prompt)["input_ids"]])
    x = model.network.get_input_embeddings()(ids).detach()
    start = answers or letters(model.tokenizer)
    classes = start.fix(model.network(input_ids=ids).logits[:, -1])

    def log_probs(x: Tensor) -> Tensor:
        return classes.log_probs(model.network(inputs_embeds=x).logits[:, -1])[0]

    grads = torch.autograd.functional.jacobian(log_probs, x)
    return grads[:, 0], log_probs(x).detach().exp(), x[0]


def formulas(grads: Tensor, probs: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The measures of single dimensions as method 1 and 3 write them."""
    y = probs.argmax()
    metric = torch.einsum("k,kth->th", probs, grads.square())
    own, others = -grads[y], -(grads.sum(0) - grads[y])
    return {
        "FI exact": own.square() / metric,
        f"FI damped {LAM:g}": own.square() / (metric + LAM),
        "Jacobian norm": own.abs(),
        "SNIP": (own * x).abs(),
        "saliency": torch.where((own < 0) | (others > 0), 0, -own * others),
        "Fisher diagonal": metric,
        "information length": metric * x.square(),
        "magnitude": x.abs(),
    }


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-4) -> bool:
    """The networks' norms and softmax stay in float32."""
    furthest = float((found - expected).abs().max())
    return found.shape == expected.shape and furthest <= tolerance * float(expected.max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answers", [None, Top(3)], ids=str)
def test_padded_batches_of_dimensions_are_scored_as_autograd_scores_each_alone(
    kind: str, answers: Top | None
) -> None:
    examples = tiny_examples(5)
    measures = [*formulas(torch.ones(2, 1, 1), torch.ones(2) / 2, torch.ones(1, 1))]
    measures = ["FI" if name.startswith("FI damped") else name for name in measures]
    model = tiny_model(kind)
    scores = score_embeddings(model, examples, measures, Damped(LAM), answers=answers, batch_size=3)
    for i, example in enumerate(examples):
        expected = formulas(*plain(kind, example, answers))
        assert scores.keys() == expected.keys()
        for name, values in expected.items():
            assert close(scores[name][i], values), f"{name} of example {i}"


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batches_of_tokens_are_scored_as_the_metric_of_each_alone(kind: str) -> None:
    examples = tiny_examples(4)
    scores = score_embeddings(tiny_model(kind), examples, ["FI", "SNIP"], Damped(LAM), over="token")
    for i, example in enumerate(examples):
        grads, probs, x = plain(kind, example, None)
        own = grads[probs.argmax()]
        metric = torch.einsum("k,kti,ktj->tij", probs, grads, grads) + LAM * torch.eye(x.shape[1])
        assert close(scores["SNIP"][i], (own * x).norm(dim=1))
        influence = (own * torch.linalg.solve(metric, own)).sum(1)
        assert close(scores[f"FI damped {LAM:g}"][i], influence)


@pytest.mark.filterwarnings("ignore::fihelpers.influence.SaturationWarning")  # tokens are saturated
@pytest.mark.parametrize("over", ["dimension", "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_examples_together_are_scored_as_each_alone(kind: str, over: str) -> None:
    model, examples = tiny_model(kind), tiny_examples(6)
    measures = [*MEASURES, "FI summed"]
    together = score_embeddings(model, examples, measures, Damped(), over=over)  # type: ignore[arg-type]
    for i, example in enumerate(examples):
        alone = score_embeddings(model, example, measures, Damped(), over=over)  # type: ignore[arg-type]
        for name, (values,) in alone.items():
            assert values.max() > 0
            assert close(together[name][i], values), f"{name} of example {i}"


def test_random_scores_depend_on_the_example_only() -> None:
    model, examples = tiny_model("qwen2"), tiny_examples(5)
    first = score_embeddings(model, examples, ["random"])["random"]
    turned = score_embeddings(model, examples[::-1], ["random"], batch_size=2)["random"][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, turned, strict=True))
    assert not torch.equal(first[0][:4], first[3][:4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("over", ["dimension", "token"])
@pytest.mark.parametrize("answers", [None, Top(8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore::fihelpers.influence.SaturationWarning")  # tokens are saturated
def test_fi_never_passes_its_ceiling(kind: str, over: str, answers: Top | None, dtype: torch.dtype) -> None:
    measures = ["FI", "FI cut 0.001", "FI damped 0.0001"]
    for batch in embedding_batches(tiny_model(kind, dtype), tiny_examples(6), answers, batch_size=4):
        tops = ceiling(batch.grads.probs)
        for name, scores in batch.scores(measures, over).items():  # type: ignore[arg-type]
            for top, values in zip(tops, scores, strict=True):
                assert values.dtype == (dtype if dtype == torch.float64 else torch.float32)
                assert values.isfinite().all() and (values >= 0).all()
                assert (values <= top * (1 + 1e-5)).all()
                assert values.max() > 0, name


def test_tokens_under_four_letters_are_saturated_and_one_warning_says_so() -> None:
    model, examples = tiny_model("qwen2"), tiny_examples(5)
    with pytest.warns(SaturationWarning) as caught:
        found = score_embeddings(model, examples, ["FI", "SNIP"], over="token", batch_size=2)["FI exact"]
    assert len(caught) == 1
    batches = embedding_batches(model, examples)
    tops = {i: ceiling(b.grads.probs[:, k]) for b in batches for k, i in enumerate(b.index)}
    for i, values in enumerate(found):
        torch.testing.assert_close(values, tops[i].expand(len(values)))
    # more classes than dimensions, single dimensions, sums of them, another filter: none is saturated
    score_embeddings(model, examples, answers=Top(20), over="token")
    score_embeddings(model, examples)
    score_embeddings(model, examples, ["FI summed"], over="token")
    score_embeddings(model, examples, spectral=Damped(1e-2), over="token")


def test_padding_has_no_gradient_and_no_score() -> None:
    (batch,) = embedding_batches(tiny_model("qwen2"), tiny_examples(5))
    lengths = [len(e.prompt.split()) for e in batch.examples]
    assert [batch.embeddings.shape[1] - start for start in batch.padding] == lengths
    assert len(set(lengths)) > 1
    for row, start in enumerate(batch.padding):
        assert (batch.grads.class_grads[:, row, :start] == 0).all()
        assert batch.grads.class_grads[:, row, start:].abs().amax((0, 2)).min() > 0
    assert [s.shape for s in batch.scores(["SNIP"])["SNIP"]] == [(n, 12) for n in lengths]
    assert [s.shape for s in batch.scores(["SNIP"], "token")["SNIP"]] == [(n,) for n in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_answers_its_own_embeddings_as_the_model_answers_the_prompts(kind: str) -> None:
    model = tiny_model(kind)
    for batch in embedding_batches(model, tiny_examples(5), Top(3), batch_size=2):
        expected = batch.answers.log_probs(model.last_logits(batch.batch))
        torch.testing.assert_close(batch.log_probs(batch.embeddings), expected)


def test_classes_are_those_of_the_intact_prompts() -> None:
    model, examples = tiny_model("llama"), tiny_examples(4)
    texts = [replace(example, options=(), answer=None) for example in examples]
    (batch,) = embedding_batches(model, texts)
    assert batch.log_probs(batch.embeddings).shape == (4, 9)  # 8 likeliest tokens and the rest
    assert batch.answers.fix(torch.randn(4, 32)) is batch.answers
    (own,) = embedding_batches(model, texts, Top(3))
    again = list(embedding_batches(model, texts, own.answers.rows(torch.tensor(own.index).argsort())))
    torch.testing.assert_close(again[0].grads.probs, own.grads.probs)


def test_nothing_is_left_behind_in_the_model() -> None:
    model = tiny_model("qwen2")
    before = {name: p.clone() for name, p in model.network.state_dict().items()}
    score_embeddings(model, tiny_examples(3), ["FI", "SNIP"])
    assert all(p.grad is None and p.requires_grad for p in model.network.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.network.state_dict().items())


def broken(value: float) -> LanguageModel:
    model = tiny_model("llama")
    model.network.lm_head.weight.data.fill_(value)
    return model


def test_input_that_cannot_be_scored_is_refused() -> None:
    model, (example, *_) = tiny_model("qwen2"), tiny_examples(1)
    with pytest.raises(ValueError, match="no examples to score"):
        score_embeddings(model, [])
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        score_embeddings(model, example, batch_size=0)
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        score_embeddings(model, replace(example, prompt=""))
    with pytest.raises(ValueError, match="prompt 1 has 33 tokens, more than the 32"):
        score_embeddings(model, [example, replace(example, prompt="w1 " * 33)])
    with pytest.raises(ValueError, match="over must be one of dimension, token, not 'limb'"):
        score_embeddings(model, example, over="limb")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown measure 'beauty'"):
        score_embeddings(model, example, ["beauty"])
    with pytest.raises(FloatingPointError, match="'tiny-llama' gives NaN or infinite logits for prompt 0"):
        score_embeddings(broken(torch.nan), example)


def test_a_batch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = EmbeddingBatch.log_probs

    def counted(self: EmbeddingBatch, embeddings: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return original(self, embeddings)

    monkeypatch.setattr(EmbeddingBatch, "log_probs", counted)
    batches = list(embedding_batches(tiny_model("qwen2"), tiny_examples(5), batch_size=2))
    assert calls == 0
    for measures in (["FI"], ["SNIP", "random"], ["FI damped 0.0001"]):
        for batch in batches:
            batch.scores(measures)
    assert calls == len(batches) == 3
