"""Checks of chapter 03: ceiling, saturation, decomposition, effective sample size, and the filter."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fichapters.exercises import Wrong, equal, exercise, names, number
from fihelpers import filters, influence

COMPARED = 10  # weights at the top of each ranking
SHARED = 9  # of them that damped FI and the Jacobian norm must have in common


@exercise
def largest_confidence(answer: object, reported: float) -> str:
    """The largest P(y_hat) with which an FI of `reported` is possible (method 1b.1)."""
    slips = {
        "You solved FI = 1 / P; the ceiling has 1 - P above the line.": 1 / reported,
        "You solved FI = P / (1 - P): the ceiling is the odds *against* the answer.": reported
        / (1 + reported),
    }
    hint = "Set the ceiling equal to the reported value, and solve for P."
    equal(answer, 1 / (1 + reported), slips, hint=hint)
    return (
        "A value above the ceiling is never a discovery: something was computed in another way than defined."
    )


@exercise
def flat_maps(answer: object, plans: Mapping[str, tuple[int, int]]) -> str:
    """The plans, name -> (K, p), whose exact FI is generically the ceiling everywhere (method 1b.2)."""
    chosen = set(names(answer, list(plans)))
    for name, (k, p) in plans.items():
        flat = p >= k - 1
        if flat and name not in chosen:
            raise Wrong(f"{name!r} is missing. Count: how many directions can {k} probabilities move in?")
        if not flat and name in chosen:
            raise Wrong(
                f"{name!r} can rank: one perturbation has p = {p} dimensions, fewer than the directions "
                f"in which {k} probabilities can move."
            )
    return "Count classes and dimensions before you look at a map: p ≥ K - 1 means one colour everywhere."


@exercise
def two_rankings(by_fi: object, by_change: object, s: Tensor, P: Tensor, theta: Tensor) -> str:
    """Orders of weights "a", "b", ..., by exact FI and by the change when zeroed (method 1b.4)."""
    parts = influence.decompose(s, P, -theta)
    offered = "abcdefgh"[: len(theta)]
    by_fi_hint = "FI is s² of the predicted class over the sum of P(y) s_y²; the weight itself plays no part."
    change_hint = "To first order zeroing moves log P by s of the predicted class times the weight."
    for label, answer, values, hint in (
        ("`by_fi`", by_fi, parts.fi, by_fi_hint),
        ("`by_change`", by_change, parts.change2, change_hint),
    ):
        if not isinstance(answer, str) or sorted(answer) != list(offered):
            raise Wrong(f"{label} should hold each of the letters {offered} once, such as {offered!r}.")
        right = "".join(offered[i] for i in values.argsort(descending=True).tolist())
        if answer == right[::-1]:
            raise Wrong(f"{label} has them from the smallest up; the largest comes first.")
        if answer != right:
            raise Wrong(f"{label} is not in order yet. {hint}")
    return (
        "Change² = FI × G θ². FI says how well aimed a weight is, the information length how far it is "
        "thrown."
    )


@exercise
def effective(all_of_them: object, without_largest: object, values: Tensor) -> str:
    """(sum FI)² / sum FI², of all questions and without the largest (method 1b.6)."""
    rest = values.sort().values[:-1]
    for name, answer, v in (
        ("`all_of_them`", all_of_them, values),
        ("`without_largest`", without_largest, rest),
    ):
        size = float(v.sum() ** 2 / (v**2).sum())
        slips = {
            f"{name} is upside down.": 1 / size,
            f"For {name} you squared before adding, above the line as well as below.": 1.0,
            f"For {name} you forgot to square the sum.": float(v.sum() / (v**2).sum()),
            f"{name} has been divided by the number of questions; leave it as a number of questions.": size
            / len(v),
        }
        equal(answer, size, slips, name=name, hint="It lies between 1 and the number of questions.")
    return (
        "One unsure question spoke for nearly all of them. Give this number beside every average of scores."
    )


def many_weights() -> tuple[Tensor, Tensor]:
    """P (4,) and class gradients s (4, 300) of weights that move the answer by very different amounts."""
    generator = torch.Generator().manual_seed(3)
    P = torch.tensor([0.7, 0.15, 0.1, 0.05], dtype=torch.float64)
    strength = 10 ** (-3 * torch.rand(300, generator=generator, dtype=torch.float64))
    others = torch.randn(3, 300, generator=generator, dtype=torch.float64) * strength
    return P, torch.cat([-(P[1:] @ others)[None] / P[0], others])


def shared_top(lam: float, P: Tensor, s: Tensor) -> int:
    """How many of the ten weights of highest damped FI are among the ten of largest Jacobian norm."""
    damped = influence.fi(s, P, spectral=filters.Damped(lam)).topk(COMPARED).indices
    jacobian = s[P.argmax()].abs().topk(COMPARED).indices
    return len(set(damped.tolist()) & set(jacobian.tolist()))


@exercise
def filter_takes_over(lam: object, P: Tensor, s: Tensor) -> str:
    """The smallest power of ten at which damped FI's top ten are (nine of them) the Jacobian norm's."""
    value = number(lam)
    if value <= 0 or abs(math.log10(value) - round(math.log10(value))) > 1e-9:
        raise Wrong("λ should be a power of ten, such as 1e-5.")
    found, before = shared_top(value, P, s), shared_top(value / 10, P, s)
    if found < SHARED:
        raise Wrong(f"With λ = {value:g} the two top tens share {found} weights. Which way must λ go?")
    if before >= SHARED:
        raise Wrong(
            f"With λ = {value:g} they share {found}, and with a tenth of it still {before}: try smaller ones."
        )
    largest = float(influence.moments(s, P).metric.max())
    return (
        f"They share {found}, and {before} with a tenth of it; with exact FI they share "
        f"{shared_top(0, P, s)}. The largest G here is {largest:.1g}: once λ is about as large, only the "
        "size of the gradient is left."
    )
