"""Checks of chapter 11: leverage, what a change of units moves, two classes, and an attribution by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fichapters.exercises import Wrong, distribution, exercise, names, tensor
from fihelpers.influence import ceiling
from fihelpers.measures import MEASURES

UNMOVED = 1e-6  # relative
CLOSE = 0.005


@exercise
def leverages(answer: object, P: Tensor) -> str:
    """Leverage of every class where the metric has full rank, K - 1: h_y = 1 - P(y)."""
    values = tensor(answer, (len(P),))
    truth = 1 - P
    if not torch.allclose(values, truth, atol=CLOSE):
        if torch.allclose(values, truth / P, atol=CLOSE):
            raise Wrong("That is FI of each class, if it were the predicted one. Leverage is P times that.")
        if torch.allclose(values, P, atol=CLOSE):
            raise Wrong("Those are the probabilities themselves. The surest answer has the *least* leverage.")
        raise Wrong(f"They sum to {values.sum():.3f}; leverages sum to the rank, which is {len(P) - 1} here.")
    return (
        "The leverages sum to the rank, and FI of the predicted answer is its leverage over its probability: "
        "at full rank nothing about the perturbation is left in it."
    )


@exercise
def untouched(answer: object, factor: float, class_grads: Tensor, P: Tensor, theta: Tensor) -> str:
    """Which measures are the same when weights are written in other units: theta times factor."""
    given = ("FI exact", "FI damped 0.0001", "Jacobian norm", "SNIP", "information length", "Fisher diagonal")
    same = []
    for name in given:
        before = MEASURES[name](class_grads, P, value=theta)
        after = MEASURES[name](class_grads / factor, P, value=theta * factor)
        if torch.allclose(before, after, rtol=UNMOVED, atol=0):
            same.append(name)
    chosen = names(answer, given)
    wrong = [name for name in chosen if name not in same]
    if wrong:
        raise Wrong(
            f"{wrong[0]!r} moves: its gradient shrinks as the weight grows, and nothing makes up for it."
        )
    if len(chosen) < len(same):
        raise Wrong(f"Those stay, but {len(same) - len(chosen)} of the list that stay are missing.")
    return (
        "A gradient alone has a unit. Divide by another gradient, or multiply by the weight, and it has none."
    )


@exercise
def two_answers(answer: object, P: Tensor, slopes: Sequence[float]) -> str:
    """Exact FI of several weights where there are two classes: the odds, for each of non-zero slope."""
    p = distribution(P, 2, "`P`")
    values = tensor(answer, (len(slopes),))
    top = float(ceiling(p))
    truth = torch.tensor([top if s else 0.0 for s in slopes], dtype=torch.float64)
    if torch.allclose(values, truth, rtol=CLOSE, atol=1e-9):
        return "With two answers exact FI says whether a weight matters at all, and nothing else of it."
    if not torch.allclose(values == 0, truth == 0):
        raise Wrong("A weight without any gradient has FI zero, and only such a weight.")
    if len({round(float(v), 6) for v in values if v}) > 1:
        raise Wrong("You gave weights different values. Put the slopes into $s^2 / G$: what is left of them?")
    if torch.allclose(values[values > 0], torch.tensor(1 / top, dtype=torch.float64), rtol=CLOSE):
        raise Wrong("Those are the odds *for* the predicted answer; the ceiling is the odds against it.")
    raise Wrong("All are equal, which is right, but the common value is not. What is the ceiling of FI?")


@exercise
def attributed(answer: object, gone: Tensor, log_p: Tensor) -> str:
    """COAR by hand: by how much log P falls with each of the parts, by least squares with a constant."""
    parts = gone.shape[1]
    values = tensor(answer, (parts,))
    design = torch.cat([torch.ones(len(gone), 1, dtype=torch.float64), gone.double()], 1)
    truth = -torch.linalg.lstsq(design, log_p.double()[:, None]).solution[1:, 0]
    if torch.allclose(values, truth, rtol=0.01, atol=CLOSE):
        return (
            f"Part {int(truth.argmax()) + 1} is needed most. Averages with and without a part would have "
            "mixed in whatever else was gone by chance."
        )
    if torch.allclose(values, -truth, rtol=0.01, atol=CLOSE):
        raise Wrong("The sign is turned: a part that is needed should get a number above zero.")
    bare = torch.linalg.lstsq(gone.double(), log_p.double()[:, None]).solution[:, 0]
    if torch.allclose(values, -bare, rtol=0.01, atol=CLOSE):
        raise Wrong("The regression lacks a constant, so the intact model would have probability one.")
    raise Wrong("Regress `log_p` on a column of ones and the columns of `gone`, and turn the sign.")
