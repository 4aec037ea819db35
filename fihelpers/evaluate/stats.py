"""How sure one can be of a mean, a share or a difference (method.md, section 4)."""

from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, rankdata
from scipy.stats import t as student_t

LEVEL = 0.95
BLOCK = 5_000_000  # resampled values held at once by the bootstrap (40 MB)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's score interval (low, high) of a proportion, of 95 % as all in this module.

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is no proportion; give 0 <= successes <= n, n >= 1.")
    low, high = binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int,
    resamples: int = 10_000,
    level: float = LEVEL,
) -> tuple[float, float, float]:
    """Return the mean of a - b over questions and its bootstrap interval: (mean difference, low, high).

    a and b (N,) belong to the same questions, in the same order (correct or not, log-probabilities);
    questions are resampled, with the percentiles of the resampled means as the interval.
    Raises ValueError for empty, unequal or non-finite input, and for a level that is none.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must lie between 0 and 1, got {level}.")
    left, right = _values(a, "a"), _values(b, "b")
    if len(left) != len(right):
        raise ValueError(f"a has {len(left)} values and b has {len(right)}; pair them question by question.")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}.")
    difference = left - right
    n = len(difference)
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // n)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = np.concatenate([difference[rng.integers(n, size=(block, n))].mean(1) for block in blocks])
    return float(difference.mean()), *_ends(means, level)


def crossed_difference(
    a: ArrayLike, b: ArrayLike, *, seed: int, resamples: int = 10_000
) -> tuple[float, float, float]:
    """Return the mean of a - b over seeds and questions and its interval: (mean difference, low, high).

    a and b (S, N): a row for each calibration set, a column for each question, paired. Both are resampled, so
    that the interval covers the choice of the calibration sets and of the questions.
    Raises ValueError for input that is empty, unequal or not finite.
    """
    left, right = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if left.ndim != 2 or left.shape != right.shape or left.size == 0:
        raise ValueError(f"a and b need one shape (seeds, questions), got {left.shape} and {right.shape}.")
    difference = left - right
    if not np.isfinite(difference).all():
        raise ValueError("a or b holds NaN or infinite values; leave them out.")
    set_weights, question_weights = resampled(*difference.shape, seed, resamples)
    means = ((set_weights @ difference) * question_weights).sum(1)
    return float(difference.mean()), *_ends(means)


def _ends(means: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=2)
def resampled(sets: int, n: int, seed: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a bootstrap's weights (resamples, sets) and (resamples, n); a table's differences share them."""
    rng = np.random.default_rng(seed)
    set_weights = rng.multinomial(sets, np.full(sets, 1 / sets), size=resamples) / sets
    question_weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    return set_weights, question_weights


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Return the mean of a few values, such as one a seed, and its t interval: (mean, low, high).

    Raises ValueError for fewer than two values, which have no spread, or non-finite ones.
    """
    numbers = _values(values, "values")
    n = len(numbers)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}; use more seeds.")
    half = float(student_t.ppf((1 + LEVEL) / 2, n - 1)) * float(numbers.std(ddof=1)) / sqrt(n)
    mean = float(numbers.mean())
    return mean, mean - half, mean + half


def spearman(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Return Spearman's rank correlation along the last axis, broadcast over the others.

    Tied values have the mean of their ranks; the correlation is NaN where one side is constant.
    """
    x, y = (rankdata(values, axis=-1) for values in (a, b))
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (x, y))
    size = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.divide((x * y).sum(-1), size, out=np.full(np.shape(size), np.nan), where=size > 0)


def _values(values: ArrayLike, name: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0:
        raise ValueError(f"{name} must be a non-empty list of numbers, got shape {numbers.shape}.")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinity at position {np.isfinite(numbers).argmin()}.")
    return numbers
