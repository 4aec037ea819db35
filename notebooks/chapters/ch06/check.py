"""Checks of chapter 06: budgets, the gradient's promise and its end, two norms, and a control."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fichapters.exercises import Wrong, choice, equal, exercise, number, tensor

ALMOST = 0.999  # of the best promise


@exercise
def one_token(answer: object, tokens: int) -> str:
    """The L2 budget whose displacement is as long as one of the prompt's equally long embeddings."""
    slips = {
        "A length is a root of a sum of squares, so it does not grow with the number of tokens but more "
        "slowly.": 1 / tokens,
        "That is the length of the prompt in tokens; the budget is a share of it.": tokens**0.5,
    }
    equal(answer, tokens**-0.5, slips, hint="How long is the whole prompt, measured in tokens?")
    return (
        "A budget of a few percent sounds small, and it can be a whole word's worth put into a few numbers."
    )


@exercise
def promise(answer: object, s: Tensor, length: float, budget: float, chosen: int) -> str:
    """The first-order change of log P(y_hat) by an L2 step on the `chosen` largest gradients."""
    top = s.abs().topk(chosen).values
    reach = budget * length
    truth = -reach * float(top.norm())
    slips = {
        "The size is right. The attack lowers the answer's probability: look at the sign.": -truth,
        "You moved all dimensions; only the chosen ones may move.": -reach * float(s.norm()),
        "You added the absolute values: that is the promise under the other norm.": -reach * float(top.sum()),
        "The step has the length budget × length of the prompt.": -budget * float(top.norm()),
        "You took the largest values with their sign; the size of a gradient is its absolute value.": -reach
        * float(s.topk(chosen).values.norm()),
    }
    equal(answer, truth, slips, hint="It is the step's length times the norm of the chosen gradients.")
    return (
        "No other two dimensions promise more for this length: while steps are small the largest "
        "gradients win."
    )


@exercise
def best_moves(l2_move: object, linf_move: object, s: Tensor, radius: float) -> str:
    """The displacements that lower log P(y_hat) most, to first order, within an L2 and an L-infinity ball."""
    for name, answer, order, best in (
        ("`l2_move`", l2_move, 2.0, -radius * float(s.norm())),
        ("`linf_move`", linf_move, float("inf"), -radius * float(s.abs().sum())),
    ):
        move = tensor(answer, s.shape, name)
        size, change = float(torch.linalg.vector_norm(move, order)), float(move @ s)
        if size > radius * (1 + 1e-6):
            raise Wrong(f"{name} has the norm {size:.3g}, more than the {radius:g} that are allowed.")
        if change > 0:
            raise Wrong(f"{name} raises log P. Go against the gradient.")
        if change > ALMOST * best:
            raise Wrong(
                f"{name} is allowed and brings {change / best:.0%} of what is possible. "
                + (
                    "Which direction does a fixed length serve best?"
                    if order == 2
                    else "Each entry has a limit of its own: does any of them stop short of it?"
                )
            )
    return (
        "L2 spends its length in proportion to the gradient, L-infinity moves every entry as far as it may."
    )


@exercise
def what_the_control_says(answer: object) -> str:
    """How to read equal damage by the gradient's and by a random direction on well chosen dimensions."""
    others = {
        "the attack follows the gradient": "Then a random direction should do much less on the same "
        "dimensions.",
        "the model is robust": "Look at the size of the damage.",
        "the choice of dimensions is irrelevant": "Compare with random dimensions, moved just as far.",
    }
    choice(answer, "the choice matters and the direction does not", others)
    return "The measure says *where* to strike. With so large a step any blow there will do."


def attacked(E: Tensor) -> Tensor:
    """log P of the predicted one of three answers; like a language model's first layer, it first divides E by
    its own root mean square, so that its length is lost. E: (4,), float64. Differentiable."""
    weights = torch.tensor([[1.2, -0.3, 0.5, 0.1], [-0.4, 0.9, 0.2, -0.6], [0.1, -0.5, -0.8, 0.7]]).double()
    return (weights @ (E / E.square().mean().sqrt())).log_softmax(0)[0]


@exercise
def gradient_fails(answer: object, E: Tensor, budgets: Sequence[float]) -> str:
    """The first budget at which less than half of the change that the gradient promises comes."""
    x = E.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(attacked(x), x)
    kept = {}
    for budget in budgets:
        step = -budget * E.norm() * gradient / gradient.norm()
        kept[budget] = float((attacked(E + step) - attacked(E)) / (gradient @ step))
    value = number(answer)
    if value not in kept:
        raise Wrong(f"Choose one of the budgets {', '.join(f'{b:g}' for b in budgets)}.")
    if kept[value] >= 0.5:
        raise Wrong(f"With {value:g} still {kept[value]:.0%} of the promise comes. Go on.")
    if any(kept[b] < 0.5 for b in budgets if b < value):
        raise Wrong(f"With {value:g} only {kept[value]:.0%} comes, but it fell below one half earlier.")
    shown = ", ".join(f"{b:g}: {share:.0%}" for b, share in kept.items())
    return (
        f"What comes of the promise, by budget: {shown}. It can be more at first, as the answer gives "
        "way, and is less in the end: a longer push on what is normalised changes less and less."
    )
