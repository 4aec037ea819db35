"""Class gradients by plain automatic differentiation: the definition as code (method 1).

One backward pass a class, one prompt at a time, every gradient kept. It is what chapter 02 explains and what
the tests hold every faster score against: `fihelpers.scores.hooks` streams the same gradients of all the
weights of a model, batch by batch, and keeps none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fihelpers.answers import Answers, letters
from fihelpers.models.language import LanguageModel


def class_gradients(log_p: Tensor, x: Tensor) -> Tensor:
    """The derivatives of log P of the K classes, log_p (K,), with respect to any tensor x: (K, *shape).

    log_p must have been computed from x. A class that does not depend on x has the gradient 0.
    """
    passes = [torch.autograd.grad(one, x, retain_graph=True, materialize_grads=True)[0] for one in log_p]
    return torch.stack(passes)


def gradients_of_weight(
    model: LanguageModel, prompt: str, name: str, answers: Answers | None = None
) -> tuple[Tensor, Tensor]:
    """Class gradients (K, *shape) of one parameter for one prompt, and the probabilities P (K,).

    answers: the classes, by default the letters A to D. Raises AttributeError for an unknown name.
    """
    classes = answers or letters(model.tokenizer)
    (batch,) = model.batches([prompt])
    log_p = classes.log_probs(model.last_logits(batch))[0]
    return class_gradients(log_p, model.network.get_parameter(name)), log_p.detach().exp()
