"""Checks of chapter 02: class gradients, FI by hand, its units, its damping, and what it does not rank by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fichapters.exercises import Wrong, equal, exercise, number, tensor
from fihelpers import filters, influence

UNITS = 100.0  # of the exercise on coordinates: how many new units make one old one
APART = 10.0  # how many times larger the Jacobian norm of the second weight must be


@exercise
def free_gradient(s_a: object, P: Tensor, s_b: float, s_c: float) -> str:
    """The class gradient of A from those of B and C, as sum_y P(y) s_y = 0 (method 1b.7)."""
    p_a, p_b, p_c = P.tolist()
    weighted = p_b * s_b + p_c * s_c
    slips = {
        "The size is right. What A gains, the others lose: look at the sign.": weighted / p_a,
        "That is P(A) times the gradient. One division is missing.": -weighted,
        "You added the gradients as they are. Each counts with the probability of its class.": -(s_b + s_c),
    }
    equal(s_a, -weighted / p_a, slips, hint="The sum of P(y) s_y over all three classes is zero.")
    return "So K - 1 backward passes give all K class gradients."


@exercise
def by_hand(metric: object, fi: object, top: object, P: Tensor, s: Tensor) -> str:
    """G, FI and the ceiling of one weight (p = 1); `s` holds a class gradient for each class (method 1)."""
    y, truth = int(P.argmax()), influence.moments(s, P)
    g, own, mean = float(truth.metric), float(s[y]), float((P * s).sum())
    slips = {
        "You left the probabilities out: G is the mean of the squares under P.": float((s**2).sum()),
        "That is the mean of the gradients, which is always zero; G is the mean of their squares.": mean,
        "That is the mean of the absolute values; square the gradients first.": float((P * s.abs()).sum()),
        "That is the root of G.": g**0.5,
    }
    equal(metric, g, slips, name="`metric`", hint="G is the sum of P(y) s_y² over all classes.")
    least = float(s[P.argmin()] ** 2 / g)
    slips = {
        "For `fi` that is the squared Jacobian norm alone; divide by the metric.": own**2,
        "`fi` is not squared yet.": abs(own) / g,
        "`fi` is upside down.": g / own**2,
        "`fi` is that of another class. FI asks about the predicted class, the likeliest.": least,
    }
    equal(fi, float(influence.fi(s, P)), slips, name="`fi`", hint="It is (s of the predicted class)² over G.")
    odds = float(influence.ceiling(P))
    slips = {
        "For `top` those are the odds *for* the answer; the ceiling is the odds against it.": 1 / odds,
        "`top` still has to be divided by P of the predicted class.": 1 - float(P[y]),
        "`top` is one too large.": odds + 1,
    }
    equal(top, odds, slips, name="`top`", hint="It depends on P of the predicted class alone.")
    share = influence.fi(s, P) / odds
    return (
        f"This weight stands at {share:.0%} of its ceiling: nearly all of its effect is about other answers."
    )


@exercise
def half_way(lam: object, P: Tensor, s: Tensor) -> str:
    """The damping under which one weight's FI is half of the exact one (method 1a)."""
    value = number(lam)
    if value <= 0:
        raise Wrong("A damping λ is a positive number.")
    exact = float(influence.fi(s, P))
    left = float(influence.fi(s, P, spectral=filters.Damped(value))) / exact
    if abs(left - 0.5) > 0.005:
        raise Wrong(
            f"With your λ damped FI is {left:.1%} of exact FI, so λ is too "
            f"{'large' if left < 0.5 else 'small'}. Write down h(μ) = μ / (μ + λ), and remember what the "
            "only μ of a single weight is."
        )
    return "λ has the unit of G and acts where G is about as large: know your G before you choose λ."


@exercise
def other_units(factors: Mapping[str, object]) -> str:
    """Factors of s, G and FI when a weight is written in units a hundred times smaller (Theorem A.1)."""
    missing = {"s", "G", "FI"} - set(factors if isinstance(factors, Mapping) else ())
    if missing:
        raise Wrong(f"Give a factor for each of 's', 'G' and 'FI'; {sorted(missing)[0]!r} is missing.")
    slips = {
        "s goes the other way: the new number has to move a hundred times as far for the same effect.": UNITS,
        "s does change: it is a derivative with respect to the number that is stored.": 1.0,
    }
    equal(factors["s"], 1 / UNITS, slips, name="The factor of s", hint="Use the chain rule.")
    slips = {
        "G is a sum of P(y) s_y², so s enters more than once.": 1 / UNITS,
        "G goes the other way, like s.": UNITS**2,
    }
    equal(factors["G"], 1 / UNITS**2, slips, name="The factor of G", hint="Think of s squared.")
    equal(factors["FI"], 1.0, {}, name="The factor of FI", hint="Put the two factors into s² / G.")
    return (
        "Gradient and metric change, FI does not. Damped FI does: λ would have to change by the "
        "same factor as G, and nothing tells it to."
    )


@exercise
def two_orders(others: object, P: Tensor) -> str:
    """Class gradients of two weights that exact FI and the Jacobian norm put in opposite orders.

    others: rows are the classes other than the predicted one, columns the two weights.
    """
    rows = tensor(others, (len(P) - 1, 2), "`others`")
    s = torch.cat([-(P[1:] @ rows)[None] / P[0], rows])
    m = influence.moments(s, P)
    if (m.metric <= 0).any():
        raise Wrong("A weight whose class gradients are all zero moves nothing; give both some effect.")
    first, second = (influence.fi_of_moments(m) / m.ceiling).tolist()
    ratio = float(m.score[1].abs() / m.score[0].abs().clamp_min(1e-300))
    if first <= second:
        raise Wrong(
            f"The first weight's FI is {first:.2f} of the ceiling and the second's {second:.2f}: the "
            "first should be ahead. When do all other answers lose together, so that the whole movement "
            "is about the predicted one?"
        )
    if ratio < APART:
        raise Wrong(
            f"The first has the higher FI. Now the second's Jacobian norm is {ratio:.2g} times the "
            f"first's; make it {APART:.0f} times or more. FI does not mind how large a gradient is."
        )
    return (
        f"FI stands at {first:.2f} and {second:.2f} of the ceiling, while the second gradient is "
        f"{ratio:.0f} times larger. Per unit of information the first weight matters more, per unit of "
        "weight the second."
    )
