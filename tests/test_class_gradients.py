"""Class gradients by plain autograd: against small steps of a weight, and against their own identity."""

import torch
from tiny import tiny_examples, tiny_model
from torch import Tensor

from fihelpers.answers import letters
from fihelpers.filters import Damped
from fihelpers.influence import ceiling, fi
from fihelpers.models.language import LanguageModel
from fihelpers.scores.class_gradients import class_gradients

NAME = "model.layers.0.mlp.up_proj.weight"
PROMPT = tiny_examples(1)[0].prompt


def gradients_of_weight(model: LanguageModel, prompt: str, name: str) -> tuple[Tensor, Tensor]:
    """Class gradients (4, *shape) of one parameter for one prompt, and the probabilities P (4,)."""
    (batch,) = model.batches([prompt])
    log_p = letters(model.tokenizer).log_probs(model.last_logits(batch))[0]
    return class_gradients(log_p, model.network.get_parameter(name)), log_p.detach().exp()


def test_they_are_what_a_small_step_of_a_weight_does_to_log_p() -> None:
    model, name = tiny_model("gpt2"), "transformer.h.0.mlp.c_fc.weight"  # computes in float64 throughout
    grads, probs = gradients_of_weight(model, PROMPT, name)
    weight, step = model.network.get_parameter(name), 1e-5
    found = []
    for signed in (step, -step):
        weight.data[3, 5] += signed
        with torch.no_grad():
            logits = model.last_logits(model.batches([PROMPT])[0])
            found.append(letters(model.tokenizer).log_probs(logits)[0])
        weight.data[3, 5] -= signed
    assert grads.shape == (4, *weight.shape) and weight.grad is None
    torch.testing.assert_close(grads[:, 3, 5], (found[0] - found[1]) / (2 * step), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(probs, torch.stack(found).exp().mean(0), rtol=1e-6, atol=0)


def test_weighted_by_the_probabilities_they_add_up_to_zero() -> None:
    grads, probs = gradients_of_weight(tiny_model("qwen2"), PROMPT, NAME)
    assert torch.einsum("k,koi->oi", probs, grads).abs().max() < 1e-6 * grads.abs().max()


def test_fi_of_a_weight_is_the_squared_score_over_the_metric() -> None:
    model = tiny_model("llama")
    grads, probs = gradients_of_weight(model, PROMPT, NAME)
    score, metric = grads[probs.argmax()], torch.einsum("k,koi->oi", probs, grads.square())
    exact = fi(grads, probs)
    torch.testing.assert_close(exact, score**2 / metric, rtol=1e-4, atol=1e-9)
    assert (exact <= ceiling(probs) * (1 + 1e-9)).all()
    damped = fi(grads, probs, spectral=Damped(0.01))
    torch.testing.assert_close(damped, score**2 / (metric + 0.01), rtol=1e-4, atol=1e-9)


def test_any_tensor_will_do_and_what_is_not_read_has_no_gradient() -> None:
    logits = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    unread = torch.ones(2, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)
    truth = torch.eye(3, dtype=torch.float64) - log_p.exp()
    torch.testing.assert_close(class_gradients(log_p, logits), truth)
    assert torch.equal(class_gradients(log_p, unread), torch.zeros(3, 2, dtype=torch.float64))
