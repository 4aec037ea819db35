"""Figures of chapter 09: what merging costs, and what protection gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fichapters.style import INK, PALETTE, WIDTH, look, new_figure

PLAIN = {  # colour, marker and dash of the merges without protection
    "task arithmetic": ("#08306B", "o", "-"),
    "TIES": ("#D55E00", "s", "--"),
}
SHADES = ("#F4A582", "#D55E00", "#7F2704", "#411400")  # of TIES by density


def gamma_curves(tried: pd.DataFrame, domains: Sequence[str], alone: Mapping[str, float], n: int) -> Figure:
    """Validation accuracy over gamma in each domain, without protection.

    tried: the rows of the search without protection. alone: accuracy of each domain's expert there, a line.
    n: questions of both domains.
    """
    figure, axes = new_figure(1, len(domains), size=(WIDTH, 3.7), sharey=True)
    for ax, domain in zip(axes[0], domains, strict=True):
        ax.axhline(alone[domain], color=INK, linewidth=1, label="the expert alone")
        ax.axhline(0.25, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), label="guessing")
        for i, ((method, density), part) in enumerate(
            tried.groupby(["name", "density"], dropna=False, sort=False)
        ):
            colour, marker, dash = PLAIN[str(method)]
            if not np.isnan(density):
                colour = SHADES[(i - 1) % len(SHADES)]
            kept = "" if np.isnan(density) else f", {density:.0%} kept"
            part = part.sort_values("task_weight")
            ax.plot(
                part.task_weight, part[domain], dash, color=colour, marker=marker, label=f"{method}{kept}"
            )
        ax.set(title=domain, xlabel="task weight γ", ylim=(0, 1.03))
    axes[0, 0].set_ylabel(f"accuracy\n({n} validation questions in all)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3)
    return figure


def share_curves(curve: pd.DataFrame, plain: Mapping[str, float], n: int) -> Figure:
    """Mean validation accuracy over the protected share k, one panel a method (Fig. 5 of the paper).

    curve: from `Search.curve`. plain: of each method, the accuracy without protection. Bands reach from the
    lowest to the highest calibration set.
    """
    figure, axes = new_figure(1, len(plain), size=(WIDTH, 3.7), sharey=True)
    for ax, (method, without) in zip(axes[0], plain.items(), strict=True):
        ax.axhline(without, color=INK, linewidth=1, linestyle=(0, (2, 2)), label="without protection")
        for name, part in curve[curve.curve.str.startswith(f"{method}, ")].groupby("by", sort=False):
            by_share = part.groupby("share")["mean"].agg(["mean", "min", "max"])
            style = look(str(name))
            ax.plot(by_share.index, by_share["mean"], **style)
            ax.fill_between(
                by_share.index, by_share["min"], by_share["max"], color=style["color"], alpha=0.15
            )
        ax.set(title=method, xscale="log", xlabel="protected share k")
        ax.set_xticks([0.01, 0.1, 1.0])
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.minorticks_off()
    sets = int(curve["set"].max()) + 1
    axes[0, 0].set_ylabel(
        f"mean accuracy of both domains\n({n} validation questions, {sets} calibration sets)"
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4)
    return figure


def gains(table: pd.DataFrame, what: str) -> Figure:
    """Differences with their 95 % intervals, a line each, coloured by what protects.

    table: columns label, by, difference, low, high. what: the title of the horizontal axis, with n.
    """
    labels = list(dict.fromkeys(table.label))
    kinds = list(dict.fromkeys(table.by))
    most = int(table.label.value_counts().max())
    figure, axes = new_figure(size=(WIDTH, 1.3 + max(0.36, 0.19 * most) * len(labels)))
    ax = axes[0, 0]
    ax.axvline(0, color=INK, linewidth=1)
    for y, label in enumerate(labels):
        part = table[table.label == label]
        for i, row in enumerate(part.itertuples()):
            _dot(ax, y + 0.7 / most * (i - (len(part) - 1) / 2), row, _colour(str(row.by)))
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlabel(what)
    ax.grid(axis="y", visible=False)
    if len(kinds) > 1:
        for kind in kinds:
            ax.plot([], [], "o", color=_colour(kind), label=kind)
        figure.legend(loc="outside upper center", ncol=4 if len(kinds) <= 4 else 3)
    return figure


def _colour(name: str) -> str:
    return PALETTE.get(name, "#6E7500")


def _dot(ax: Axes, y: float, row: object, colour: str) -> None:
    low, high, value = (float(getattr(row, key)) for key in ("low", "high", "difference"))
    ax.plot([low, high], [y, y], color=colour, linewidth=1.6)
    ax.plot(value, y, "o", color=colour, markersize=5)
