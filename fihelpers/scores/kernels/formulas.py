"""Which measures the kernels know, by number, and the same sums by plain operations of torch.

A kernel is told what to compute by a kind and a number, since neither compiled loops nor a GPU know of
Python's objects. Nothing here needs a compiler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fihelpers.filters import LEAST_DAMPING, Cut, Damped, Exact
from fihelpers.influence import moments_of_turned
from fihelpers.measures import (
    FISHER,
    INFORMATION_LENGTH,
    JACOBIAN,
    SALIENCY,
    SNIP,
    SQUARED_SCORE,
    Influence,
    Measure,
)
from fihelpers.scores.hooks import Factors

DAMPED, CUT, NORM, REMOVAL, SQUARE, METRIC, LENGTH, SIGNS = range(8)
KNOWN: dict[int, Measure] = {
    NORM: JACOBIAN,
    REMOVAL: SNIP,
    SQUARE: SQUARED_SCORE,
    METRIC: FISHER,
    LENGTH: INFORMATION_LENGTH,
    SIGNS: SALIENCY,
}

Formula = tuple[int, float]  # one of the kinds above, and the number that it takes


def formula(measure: Measure) -> Formula | None:
    """How a kernel is told to compute a measure, None for one that it does not know.

    A filter is of single elements, each the largest eigenvalue of its own group: `Exact` lets all pass.
    """
    if not isinstance(measure, Influence):
        return next(((kind, 0.0) for kind, known in KNOWN.items() if known == measure), None)
    spectral = measure.spectral
    if isinstance(spectral, Damped) and spectral.lam >= LEAST_DAMPING:
        return DAMPED, spectral.lam
    if isinstance(spectral, Cut):
        return CUT, spectral.atol**2
    if spectral == Damped(0) or (isinstance(spectral, Exact) and spectral.relative(torch.float32) < 1):
        return CUT, 0.0
    return None


def measure_of(formula: Formula) -> Measure:
    """The measure of a formula; that of `Exact` is a cut at 0."""
    kind, number = formula
    if kind == DAMPED:
        return Influence(Damped(number))
    return Influence(Cut(math.sqrt(number))) if kind == CUT else KNOWN[kind]


def add_by_torch(
    factors: Factors, value: Tensor, shares: Tensor, formulas: Sequence[Formula], totals: Tensor
) -> Tensor:
    """What a kernel's `add_measures` does, with all class gradients of the layer written out.

    Arguments and result as in `fihelpers.scores.kernels.cpu.add_measures`; computed in the precision of the
    factors.
    """
    measures = [measure_of(one) for one in formulas]
    grads = torch.einsum("dbto,bti->dboi", torch.stack(list(factors.grads)), factors.x)
    others = any(one.reads_others for one in measures)
    m = moments_of_turned(grads[:-1] if others else grads, factors.ceiling, grads[-1] if others else None)
    values = torch.stack([one.of_moments(m, one.given(value)) for one in measures])
    weighted = values * shares.to(values)[:, None, None]
    totals += weighted.sum(1)
    return weighted.sum((-2, -1)).double()
