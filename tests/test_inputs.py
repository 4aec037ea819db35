"""Scores of inputs: closed forms, the ceiling, and batches that change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fihelpers.filters import Damped
from fihelpers.influence import SaturationWarning, ceiling, fi, saturated
from fihelpers.measures import MEASURES
from fihelpers.scores import inputs as inputs_module
from fihelpers.scores.inputs import class_grads_of_inputs, score_inputs


def linear(classes: int, features: int, seed: int = 0) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Weights (classes, features) in float64 and the classifier log softmax(W x)."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    return w, lambda x: (x.flatten(1) @ w.T).log_softmax(-1)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("classes", "shape"), [(2, (7,)), (4, (3, 2, 2)), (10, (8, 8))])
def test_class_gradients_of_a_linear_classifier(classes: int, shape: tuple[int, ...]) -> None:
    x = inputs(5, *shape)
    w, log_probs = linear(classes, x[0].numel())
    grads, probs, predicted = class_grads_of_inputs(log_probs, x)
    torch.testing.assert_close(probs, log_probs(x).exp().T)
    assert torch.equal(predicted, probs.argmax(0))
    expected = w[:, None] - torch.einsum("kn,kf->nf", probs, w)
    torch.testing.assert_close(grads, expected.reshape(classes, 5, *shape), rtol=1e-9, atol=1e-12)


class Hidden(torch.autograd.Function):
    """Twice x, by a backward pass that cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(2 * grad.numpy())


@pytest.mark.parametrize(("count", "passes"), [(1, 1), (3, 1), (4, 2), (9, 5)])
def test_few_inputs_take_their_classes_together(count: int, passes: int) -> None:
    seen = []

    def log_probs(x: Tensor) -> Tensor:
        y = x * 1
        y.register_hook(seen.append)
        return linear(6, 4)[1](y)

    class_grads_of_inputs(log_probs, inputs(count, 4))
    assert len(seen) == passes


def test_classes_together_and_one_by_one_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(2, 4)
    log_probs = linear(6, 4)[1]
    together = class_grads_of_inputs(lambda x: log_probs(2 * x), x)
    alone = class_grads_of_inputs(lambda x: log_probs(Hidden.apply(x)), x)
    monkeypatch.setattr(inputs_module, "AT_ONCE", 1)
    loop = class_grads_of_inputs(lambda x: log_probs(2 * x), x)
    for other in (alone, loop):
        for found, expected in zip(other, together, strict=True):
            torch.testing.assert_close(found, expected)


def test_class_gradients_are_float32_or_better() -> None:
    w = linear(3, 4)[0].to(torch.bfloat16)
    grads, probs, _ = class_grads_of_inputs(lambda x: x @ w.T, inputs(2, 4).to(torch.bfloat16))
    assert grads.dtype == probs.dtype == torch.float32


@pytest.mark.parametrize("measure", [*MEASURES, "FI summed"])
def test_a_batch_is_scored_as_each_input_alone(measure: str) -> None:
    x = inputs(4, 3, 5)
    log_probs = linear(6, 15)[1]
    (together,) = score_inputs(log_probs, x, over=0, measures=[measure]).values()
    assert together.shape == (4, 5)
    if measure != "random":  # its seed is the place in the batch
        alone = [score_inputs(log_probs, one[None], over=0, measures=[measure]) for one in x]
        torch.testing.assert_close(together, torch.cat([next(iter(a.values())) for a in alone]))


def test_fi_of_inputs_is_that_of_their_class_gradients() -> None:
    x = inputs(4, 3, 5)
    log_probs = linear(6, 15)[1]
    grads, probs, _ = class_grads_of_inputs(log_probs, x)
    found = score_inputs(log_probs, x, over=0, measures=["FI", "FI summed"], spectral=Damped(0.1))
    assert list(found) == ["FI damped 0.1", "FI damped 0.1 summed"]
    torch.testing.assert_close(found["FI damped 0.1"], fi(grads, probs, over=1, spectral=Damped(0.1)))
    single = fi(grads, probs, spectral=Damped(0.1))
    torch.testing.assert_close(found["FI damped 0.1 summed"], single.sum(1))
    named = score_inputs(log_probs, x, over=0, measures=["FI damped 0.10", "FI damped 0.10 summed"])
    assert list(named) == list(found)
    assert all(torch.equal(values, found[name]) for name, values in named.items())


def test_ten_classes_of_digits_are_ranked_and_two_are_not() -> None:
    digits = load_digits()
    x = torch.tensor(digits.images / 16)
    fitted = LogisticRegression().fit(x.flatten(1).numpy(), digits.target)
    w, b = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)

    def log_probs(images: Tensor) -> Tensor:
        return (images.flatten(1) @ w.T + b).log_softmax(-1)

    shown = x[:20]
    scores = score_inputs(log_probs, shown)["FI exact"]
    top = ceiling(log_probs(shown).exp().T)
    assert (scores <= top[:, None, None] * (1 + 1e-9)).all()
    assert saturated(scores, log_probs(shown).exp().T).double().mean() < 0.05
    even = lambda images: torch.stack([log_probs(images)[:, k::2].logsumexp(1) for k in (0, 1)], 1)  # noqa: E731
    with pytest.warns(SaturationWarning):
        score_inputs(even, shown)


def test_functions_that_cannot_be_scored_are_refused() -> None:
    x = inputs(2, 3)
    with pytest.raises(FloatingPointError, match="log-probabilities are NaN or infinite"):
        score_inputs(lambda x: linear(3, 3)[1](x) / 0, x)
    with pytest.raises(FloatingPointError, match="gradients are NaN or infinite"):
        score_inputs(lambda x: linear(3, 3)[1]((x - x).sqrt()), x)
    with pytest.raises(ValueError, match="have no gradient"):
        score_inputs(lambda x: linear(3, 3)[1](x.detach()), x)
    with pytest.raises(ValueError, match=r"gives shape \(2, 1\) for 2 inputs"):
        score_inputs(lambda x: x[:, :1], x)
    with pytest.raises(ValueError, match=r"gives shape \(3,\) for 2 inputs"):
        score_inputs(lambda x: x.sum(0), x)
    with pytest.raises(ValueError, match="Unknown measure 'beauty'"):
        score_inputs(linear(3, 3)[1], x, measures=["beauty"])
