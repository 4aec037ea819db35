"""Figures of chapter 10: ratios beside the count and the paper, and how seconds grow."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fichapters.plots import DASHED
from fichapters.style import INK, LOOKS, WIDTH, new_figure

COLOUR = LOOKS["FI damped 0.0001"].colour
COUNTED = "by the count"


def dots(
    tables: Mapping[str, pd.DataFrame],
    counted: Mapping[str, float],
    peer: str,
    model: str,
    published: Mapping[str, float] | None = None,
) -> Figure:
    """Ratios of times, median and interval, one panel a table, below each other.

    tables: by title, from `lab.middles`. counted: what the count says, an upright line in the row of each
    work. published: by work, hollow. The bare matrix products are a unit, and no work to compare.
    """
    works = {title: t.drop(index="matrix product", errors="ignore") for title, t in tables.items()}
    tall = sum(1.2 + 0.27 * len(table) for table in works.values())
    heights = [1 + len(table) for table in works.values()]
    rows = {"sharex": True, "gridspec_kw": {"height_ratios": heights}}
    figure, axes = new_figure(len(works), 1, size=(WIDTH, 0.6 + tall), **rows)
    for ax, (title, table) in zip(axes[:, 0], works.items(), strict=True):
        places = np.arange(len(table))
        ax.hlines(places, table.low, table.high, color=COLOUR, linewidth=2)
        ax.plot(table.ratio, places, "o", color=COLOUR, label="measured")
        lines = [counted.get(work, np.nan) for work in table.index]
        ax.vlines(lines, places - 0.3, places + 0.3, color=INK, linewidth=1.4, label=COUNTED)
        if published:
            points = [published.get(work, np.nan) for work in table.index]
            ax.plot(points, places, "D", color=INK, markerfacecolor="none", label="published")
        ax.set_yticks(places, table.index)
        ax.set_ylim(len(table) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_title(f"{title} (n = {int(table.n.iloc[0])} rounds)")
    axes[-1, 0].set_xlim(left=0)
    figure.supxlabel(f"time, in times of the {peer} ({model})", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncol=3)
    return figure


def growth(table: pd.DataFrame, model: str) -> Figure:
    """Seconds a prompt of FI against each setting, median and range, with what the count says.

    table: from `lab.growth_table`. The line by the count goes through the last point.
    """
    settings = list(dict.fromkeys(table.of))
    figure, axes = new_figure(1, len(settings), size=(WIDTH, 3.2))
    for ax, setting in zip(axes[0], settings, strict=True):
        part = table[table.of == setting]
        ax.fill_between(part.value, part.low, part.high, color=COLOUR, alpha=0.2, linewidth=0)
        ax.plot(part.value, part.seconds, marker="o", color=COLOUR, label="FI, measured")
        counted = part.operations * part.seconds.iloc[-1] / part.operations.iloc[-1]
        ax.plot(part.value, counted, color=INK, linewidth=1, linestyle=DASHED, label=COUNTED)
        ax.set_xticks(part.value)
        ax.set_ylim(0, 1.5 * part.seconds.max())  # an interruption may be longer than all the rest
        ax.set_xlabel(setting)
    axes[0, 0].set_ylabel("seconds a prompt")
    figure.supxlabel(f"median and range, n = {int(table.n.max())} rounds ({model})", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncol=2)
    return figure
