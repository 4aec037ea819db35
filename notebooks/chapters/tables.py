"""What the tables of several chapters share: averages and paired differences between measures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from fichapters.claims import judge
from fihelpers.evaluate.stats import paired_difference
from fihelpers.trials import Trials

RESAMPLES = 2000


def difference(a: pd.Series, b: pd.Series, seed: int) -> tuple[float, float, float]:
    """Mean of a - b over what both index, and its bootstrap interval: (mean difference, low, high)."""
    return paired_difference(a.to_numpy(), b.to_numpy(), seed=seed, resamples=RESAMPLES)


def average(values: pd.Series, seed: int) -> tuple[float, float, float]:
    """Mean over pictures or questions, and its bootstrap interval over them: (mean, low, high)."""
    return difference(values, 0 * values, seed)


def with_ends(drawn: np.ndarray | pd.Series) -> tuple[float, float, float]:
    """The first of some numbers, and the 95 % percentile interval of the others, widened to hold it."""
    value, *others = np.asarray(drawn).tolist()
    low, high = np.quantile(others, [0.025, 0.975])
    return value, min(float(low), value), max(float(high), value)


def measures_of(trials: Trials) -> list[str]:
    """The measures in the order in which they were tried, "intact" among them."""
    return list(dict.fromkeys(trial.labels["measure"] for trial in trials.tried))


def compare(
    trials: Trials,
    pairs: Iterable[tuple[Any, Any]],
    *at: str,
    seed: int,
    value: str = "log_prob",
    label: str = "measure",
) -> pd.DataFrame:
    """`Trials.compare` with the resamples of the chapters about inputs, of log P of the right answer."""
    return trials.compare(pairs, *at, label=label, value=value, seed=seed, resamples=RESAMPLES)


def with_verdict(table: pd.DataFrame, **bounds: float) -> pd.DataFrame:
    """A table with columns low and high, and what each interval says of the bounds (see `claims.judge`)."""
    said = [judge(low, high, **bounds) for low, high in zip(table.low, table.high, strict=True)]
    return table.assign(verdict=said)
