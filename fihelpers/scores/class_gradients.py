"""Class gradients by plain automatic differentiation: the definition as code (method 1).

One backward pass a class, every gradient kept. It is what chapter 02 explains and what the tests hold every
faster score against: `fihelpers.scores.hooks` streams the same gradients of all the weights of a model, batch
by batch, and keeps none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def class_gradients(log_p: Tensor, x: Tensor) -> Tensor:
    """The derivatives of log P of the K classes, log_p (K,), with respect to any tensor x: (K, *shape).

    log_p must have been computed from x. A class that does not depend on x has the gradient 0.
    """
    passes = [torch.autograd.grad(one, x, retain_graph=True, materialize_grads=True)[0] for one in log_p]
    return torch.stack(passes)
