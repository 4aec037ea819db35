"""Figures of chapter 03 that no other chapter has; the rest are those of `fichapters.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fichapters import plots
from fichapters.style import GREY, INK, PALETTE, WIDTH, look, new_figure
from fihelpers.filters import Cut, Damped, spectral_of


def ceilings(table: pd.DataFrame, printed: pd.DataFrame) -> Figure:
    """FI of single weights and of whole matrices against P(y_hat), with the curve of the ceiling.

    table: a row a question, with confidence, largest, median and matrix. printed: P and FI of the
    earlier version of the paper.
    """
    figure, axes = new_figure(size=(WIDTH, 4.4))
    ax = axes[0, 0]
    least = min(0.25, table.confidence.min())
    p = np.linspace(least, (1 + table.confidence.max()) / 2, 300)
    ax.plot(p, (1 - p) / p, color=INK, label="ceiling, (1 − P(ŷ)) / P(ŷ)")
    ax.plot(table.confidence, table.matrix, "o", mfc="none", color="#D55E00", label="a whole matrix")
    ax.plot(table.confidence, table.largest, "v", color=PALETTE["FI exact"], label="largest single weight")
    ax.plot(table.confidence, table["median"], ".", color=GREY, label="median single weight")
    ax.plot(
        printed.P, printed.FI, "D", mfc="none", color=INK, markersize=8, label="printed for a pixel (2025)"
    )
    ax.set(yscale="log", xlabel=f"confidence P(ŷ) (n = {len(table)} questions)", ylabel="exact FI")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncol=3, columnspacing=1)
    return figure


def filter_sweep(damage: pd.DataFrame, alike: pd.DataFrame, intact: float, metric: Sequence[float]) -> Figure:
    """Likeness to the squared Jacobian norm, and accuracy after zeroing, against the scale of the filter.

    damage, alike: of `Trials.table(measure)`, for accuracy and for alike; what has no scale is a level line.
    metric: two ends of a band of G, the mu of a single weight.
    """
    parts = {
        "rank correlation with the squared score": alike.rename(columns={"alike": "value"}),
        "accuracy": damage.rename(columns={"accuracy": "value"}),
    }
    table = pd.concat(parts, names=["of"]).reset_index("of")
    table = table.assign(**pd.DataFrame(map(_placed, table.measure), table.index, ["filter", "scale"]))
    untouched = {"of": "accuracy", "filter": "nothing zeroed", "value": intact}
    flat = pd.concat([table[table.scale.isna()], pd.DataFrame([untouched])])
    flat = flat.assign(low=flat.value, high=flat.value)  # bands of lines that cross all others hide them
    ends = [flat.assign(scale=end) for end in (table.scale.min(), table.scale.max())]
    counts = f"n = {int(damage.n.max())} questions, {int(damage.sets.max())} calibration sets"
    labels = (
        f"scale of the filter on G: λ of damping, a² of a cut\n({counts}; grey: middle nine tenths of all G)",
        "mean, band: 95 %",
    )
    shown = pd.concat([table.dropna(subset="scale"), *ends], ignore_index=True)
    figure = plots.curves(shown, "scale", "value", "filter", "of", labels=labels, scale="log", columns=1)
    for ax in figure.axes:
        ax.axvspan(*metric, color="#EFEFEF", zorder=0)
    return figure


def _placed(measure: str) -> tuple[str, float]:
    """A measure's line, and where on the axis of G it begins to let pass: a cut acts on the root of G."""
    spectral = spectral_of(measure.removeprefix("FI ")) if measure.startswith("FI ") else None
    if isinstance(spectral, Damped):
        return "FI damped by λ", spectral.lam
    if isinstance(spectral, Cut):
        return "FI cut at a", round(spectral.atol**2, 12)
    return measure, np.nan


def contributions(
    shares: Mapping[str, np.ndarray], confidence: Sequence[float], worth: Mapping[str, float]
) -> Figure:
    """Each question's share of an average against its confidence, one panel a measure (method 1b.6).

    worth: the effective number of questions of each.
    """
    figure, axes = new_figure(1, len(shares), size=(WIDTH, 3.4), sharey=True)
    n = len(confidence)
    for ax, (measure, share) in zip(axes[0], shares.items(), strict=True):
        ax.plot(confidence, share, "o", color=look(measure)["color"], alpha=0.7)
        ax.axhline(1 / n, color=INK, linewidth=1, linestyle="--")
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_title(f"{measure}:\nworth {worth[measure]:.1f} of {n}")
    axes[0, 0].set_ylabel("share of the sum")
    figure.supxlabel(f"confidence P(ŷ) (n = {n} questions, dashed: equal shares)", fontsize=10)
    return figure
