"""Figures of chapter 03 that no other chapter has; the rest are those of `fichapters.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fichapters.style import GREY, INK, PALETTE, WIDTH, look, new_figure
from fihelpers.filters import Cut, Damped, spectral_of

SQUARED = "squared score"
LOOKS: dict[
    type[object], tuple[str, str, str, str, float]
] = {  # kind of filter: label, marker, line, colour; shift, so that bars stand side by side
    Damped: ("FI damped by λ", "o", "-", "#9B6FC4", 1.0),
    Cut: ("FI cut at a", "^", ":", "#2F6DB5", 1.3),
}
LEVELS = {  # what has no scale: colour, line
    "FI exact": (PALETTE["FI exact"], "-"),
    SQUARED: (PALETTE["Jacobian norm"], "-"),
    "random": (GREY, "--"),
}


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

    damage, alike: of `Trials.table(measure)`, for accuracy and for alike. metric: two ends of a band of G,
    the mu of a single weight.
    """
    figure, axes = new_figure(2, 1, size=(WIDTH, 6.4), sharex=True)
    panels = {"rank correlation\nwith the squared score": (alike, "alike"), "accuracy": (damage, "accuracy")}
    for ax, (title, (table, value)) in zip(axes[:, 0], panels.items(), strict=True):
        ax.axvspan(*metric, color="#EFEFEF", zorder=0, label="middle nine tenths of all G")
        for kind in LOOKS:
            _line_of_kind(ax, table, value, kind)
        for name, (colour, line) in LEVELS.items():
            row = table[table.measure == name].iloc[0]
            ax.axhline(row[value], color=colour, linestyle=line, linewidth=1.2, label=name)
        ax.set(xscale="log", ylabel=title)
    axes[1, 0].axhline(intact, color=INK, linewidth=1.2, label="nothing zeroed")
    axes[1, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    counts = f"n = {int(damage.n.max())} questions, {int(damage.sets.max())} calibration sets, bars: 95 %"
    axes[1, 0].set_xlabel(f"scale of the filter on G: λ of damping, a² of a cut\n({counts})")
    handles = dict(zip(*axes[1, 0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=3, columnspacing=1)
    return figure


def _line_of_kind(ax: Axes, table: pd.DataFrame, value: str, kind: type[object]) -> None:
    """One kind of filter along its scale, with bars where there are several calibration sets."""
    label, marker, line, colour, shift = LOOKS[kind]
    scales = table.measure.map(_scales(table.measure, kind))
    part = table.assign(scale=scales).dropna(subset=["scale"]).sort_values("scale")
    bars = np.nan_to_num([part[value] - part.low, part.high - part[value]])
    xs, ys = shift * part.scale, part[value]
    ax.errorbar(xs, ys, bars, label=label, marker=marker, linestyle=line, color=colour, capsize=3)


def _scales(measures: Sequence[str], kind: type[object]) -> Mapping[str, float]:
    """Where on the axis of G each filter of a kind begins to let pass: a cut acts on the root of G."""
    named = [name for name in measures if name.startswith("FI ")]
    filters = {name: spectral_of(name.removeprefix("FI ")) for name in named}
    return {
        name: f.lam if isinstance(f, Damped) else f.atol**2
        for name, f in filters.items()
        if isinstance(f, kind) and isinstance(f, Damped | Cut)
    }


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
