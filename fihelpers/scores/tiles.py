"""Measures of the weights of a linear layer on a CPU, tile by tile: no class gradient is ever written out.

A tile is a few rows of the weight, `ROWS`, and up to `COLUMNS` of its columns. Its class gradients of one
sample, the products g^T x, are formed in memory that stays in the first cache, turned into the moments of
`fihelpers.influence` and these into the measures, which are added to the running totals. Formed with one
product for each layer and combined afterwards, as `fihelpers.measures` does on other devices, they go through
memory a dozen times instead. The loops are compiled by Numba at their first use, a few seconds once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from fihelpers.influence import LEAST_DAMPING, Cut, Damped, Exact
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
from fihelpers.scores.classgrads import Factors

ROWS = 4  # `_product` writes out the arithmetic of so many rows
STEPS = 8  # and of so many tokens
COLUMNS = 512  # the tiles of the class gradients of 4 classes then take 24 KB
TOGETHER = 32  # rows whose totals stay in the second cache while sample after sample is added to them
# fused multiply-add, and sums in any order; NaN and infinity keep their meaning
FAST = {"contract", "reassoc"}
DAMPED, CUT, NORM, REMOVAL, SQUARE, METRIC, LENGTH, SIGNS = range(8)

Array = NDArray[np.floating[Any]]
Formula = tuple[int, float]  # one of the above, and the number that it takes
KNOWN: tuple[tuple[Measure, int], ...] = (
    (JACOBIAN, NORM),
    (SNIP, REMOVAL),
    (SQUARED_SCORE, SQUARE),
    (FISHER, METRIC),
    (INFORMATION_LENGTH, LENGTH),
    (SALIENCY, SIGNS),
)


def formula(measure: Measure) -> Formula | None:
    """How `_add` is told to compute a measure, None for one that it does not know."""
    if isinstance(measure, Influence):
        return _filtered(measure)
    return next(((kind, 0.0) for known, kind in KNOWN if known == measure), None)


def _filtered(measure: Influence) -> Formula | None:
    """A filter of single elements, each the largest eigenvalue of its own group: `Exact` lets all pass."""
    spectral = measure.spectral
    if isinstance(spectral, Damped) and spectral.lam >= LEAST_DAMPING:
        return DAMPED, spectral.lam
    if isinstance(spectral, Cut):
        return CUT, spectral.atol**2
    if spectral == Damped(0) or (isinstance(spectral, Exact) and spectral.relative(torch.float32) < 1):
        return CUT, 0.0
    return None


def add_measures(
    factors: Factors, value: Tensor, shares: Tensor, formulas: Sequence[Formula], totals: Tensor
) -> Tensor:
    """Add M measures of the weight of a linear layer, summed over B samples, to the totals.

    factors: their gradients are along `turned_classes` and, where a formula is SIGNS, one more along the sum
        of the other classes' log P. value: the weight (out, in), out at least `ROWS`.
    shares: with which the samples count (B,). totals: (M, out, in), in the order of the formulas, of the
        factors' type.

    Returns the sums over the weights of each sample's measures, (M, B) in float64; they are NaN or infinite
    where a gradient is.
    """
    kinds = np.array([kind for kind, _ in formulas], dtype=np.int64)
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    sums = np.zeros((threads, len(formulas), len(factors.x)))
    grads = tuple(g.contiguous().numpy() for g in factors.grads)
    rest = (
        factors.x.contiguous().numpy(),
        factors.start,
        value.to(totals).contiguous().numpy(),
        factors.ceiling.sqrt().to(totals).numpy(),
        shares.to(totals).numpy(),
        kinds,
        np.array([number for _, number in formulas], dtype=totals.numpy().dtype),
        len(grads) - (SIGNS in kinds),
    )
    _add(grads, rest, totals.numpy(), sums)
    return torch.from_numpy(sums.sum(0))


@njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
def _add(grads: Any, rest: Any, totals: Array, sums: Array) -> None:
    """Give each thread some rows. grads, rest: as made by `add_measures`; sums: (threads, M, B)."""
    threads, out = len(sums), totals.shape[1]
    step = math.ceil(out / threads / ROWS) * ROWS
    for thread in prange(threads):
        start, stop = min(thread * step, out), min((thread + 1) * step, out)
        _add_rows(grads, rest, totals, sums[thread], start, stop)


@njit(fastmath=FAST, error_model="numpy", cache=True)
def _add_rows(grads: Any, rest: Any, totals: Array, sums: Array, start: int, stop: int) -> None:
    """Tile after tile of some rows, sample after sample for the tiles of some columns: x stays in cache."""
    x, begin, value, roots, shares, kinds, numbers, turned = rest
    out, width = totals.shape[1:]
    tiles = np.empty((len(grads), ROWS, COLUMNS), x.dtype)
    score, metric = np.empty(COLUMNS, x.dtype), np.empty(COLUMNS, x.dtype)
    for left in range(0, width, COLUMNS):
        right = min(left + COLUMNS, width)
        for top in range(start, stop, TOGETHER):
            end = min(top + TOGETHER, stop)
            for b in range(len(x)):
                for row in range(top, end, ROWS):
                    first = min(row, out - ROWS)  # the last tile reaches back over rows that are done
                    for d in range(len(grads)):
                        _product(grads[d][b], x[b], begin, first, left, right, tiles[d])
                    for r in range(row - first, min(end - first, ROWS)):
                        _moments(tiles, r, turned, roots[b], right - left, score, metric)
                        for m in range(len(kinds)):
                            sums[m, b] += shares[b] * _measure(
                                kinds[m],
                                numbers[m],
                                score,
                                metric,
                                tiles[-1, r],
                                value[first + r, left:right],
                                shares[b],
                                totals[m, first + r, left:right],
                            )


@njit(fastmath=FAST, error_model="numpy", cache=True)
def _product(g: Array, x: Array, begin: int, first: int, left: int, right: int, tile: Array) -> None:
    """The product of g (T, out) and x (T, in) for `ROWS` rows from `first` on and some columns."""
    n, tokens = right - left, len(x)
    a, b, c, d = tile[0], tile[1], tile[2], tile[3]
    for i in range(n):
        a[i] = b[i] = c[i] = d[i] = 0
    whole = tokens - (tokens - begin) % STEPS
    for t in range(begin, whole, STEPS):
        x0, x1, x2, x3 = x[t, left:right], x[t + 1, left:right], x[t + 2, left:right], x[t + 3, left:right]
        x4, x5, x6, x7 = (
            x[t + 4, left:right],
            x[t + 5, left:right],
            x[t + 6, left:right],
            x[t + 7, left:right],
        )
        a0, b0, c0, d0 = g[t, first], g[t, first + 1], g[t, first + 2], g[t, first + 3]
        a1, b1, c1, d1 = g[t + 1, first], g[t + 1, first + 1], g[t + 1, first + 2], g[t + 1, first + 3]
        a2, b2, c2, d2 = g[t + 2, first], g[t + 2, first + 1], g[t + 2, first + 2], g[t + 2, first + 3]
        a3, b3, c3, d3 = g[t + 3, first], g[t + 3, first + 1], g[t + 3, first + 2], g[t + 3, first + 3]
        a4, b4, c4, d4 = g[t + 4, first], g[t + 4, first + 1], g[t + 4, first + 2], g[t + 4, first + 3]
        a5, b5, c5, d5 = g[t + 5, first], g[t + 5, first + 1], g[t + 5, first + 2], g[t + 5, first + 3]
        a6, b6, c6, d6 = g[t + 6, first], g[t + 6, first + 1], g[t + 6, first + 2], g[t + 6, first + 3]
        a7, b7, c7, d7 = g[t + 7, first], g[t + 7, first + 1], g[t + 7, first + 2], g[t + 7, first + 3]
        for i in range(n):
            u0, u1, u2, u3, u4, u5, u6, u7 = x0[i], x1[i], x2[i], x3[i], x4[i], x5[i], x6[i], x7[i]
            a[i] += a0 * u0 + a1 * u1 + a2 * u2 + a3 * u3 + a4 * u4 + a5 * u5 + a6 * u6 + a7 * u7
            b[i] += b0 * u0 + b1 * u1 + b2 * u2 + b3 * u3 + b4 * u4 + b5 * u5 + b6 * u6 + b7 * u7
            c[i] += c0 * u0 + c1 * u1 + c2 * u2 + c3 * u3 + c4 * u4 + c5 * u5 + c6 * u6 + c7 * u7
            d[i] += d0 * u0 + d1 * u1 + d2 * u2 + d3 * u3 + d4 * u4 + d5 * u5 + d6 * u6 + d7 * u7
    for t in range(whole, tokens):
        u = x[t, left:right]
        a0, b0, c0, d0 = g[t, first], g[t, first + 1], g[t, first + 2], g[t, first + 3]
        for i in range(n):
            a[i] += a0 * u[i]
            b[i] += b0 * u[i]
            c[i] += c0 * u[i]
            d[i] += d0 * u[i]


@njit(fastmath=FAST, error_model="numpy", cache=True)
def _moments(tiles: Array, r: int, turned: int, root: float, n: int, score: Array, metric: Array) -> None:
    """Scores and metric of a row of the tiles (D, ROWS, COLUMNS), see `influence.moments_of_turned`."""
    first = tiles[0, r]
    for i in range(n):
        score[i] = first[i] * root
        metric[i] = first[i] * first[i]
    for d in range(1, turned):
        other = tiles[d, r]
        for i in range(n):
            metric[i] += other[i] * other[i]


@njit(fastmath=FAST, error_model="numpy", cache=True)
def _measure(
    kind: int,
    number: float,
    score: Array,
    metric: Array,
    others: Array,
    value: Array,
    share: float,
    total: Array,
) -> float:
    """Add one measure of a row to its total, and return its sum; the formulas are those of `measures`.

    Comparisons are such that NaN passes on to the sum.
    """
    n = len(total)
    found = score[0] * 0
    if kind == DAMPED:
        for i in range(n):
            f = score[i] * score[i] / (metric[i] + number)
            total[i] += share * f
            found += f
    elif kind == CUT:
        for i in range(n):
            # divided before it is squared: squares of tiny gradients would leave the range of float32
            f = score[i] * 0 if metric[i] <= number else score[i] / math.sqrt(metric[i])
            total[i] += share * f * f
            found += f * f
    elif kind == NORM:
        for i in range(n):
            f = abs(score[i])
            total[i] += share * f
            found += f
    elif kind == REMOVAL:
        for i in range(n):
            f = abs(score[i] * value[i])
            total[i] += share * f
            found += f
    elif kind == SQUARE:
        for i in range(n):
            f = score[i] * score[i]
            total[i] += share * f
            found += f
    elif kind == METRIC:
        for i in range(n):
            f = metric[i]
            total[i] += share * f
            found += f
    elif kind == LENGTH:
        for i in range(n):
            f = metric[i] * value[i] * value[i]
            total[i] += share * f
            found += f
    elif kind == SIGNS:
        for i in range(n):
            f = score[i] * 0 if score[i] >= 0 or others[i] <= 0 else -score[i] * others[i]
            total[i] += share * f
            found += f
    return found
