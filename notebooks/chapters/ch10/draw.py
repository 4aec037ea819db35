"""Figures of chapter 10: what FI costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fichapters.style import GREY, INK, LOOKS, WIDTH, legend_outside, new_figure

COLOURS = {"FI": LOOKS["FI damped 0.0001"].colour, "Jacobian norm": LOOKS["Jacobian norm"].colour}
MILLION = 1e6
MARKERS = {"FI": "o", "Jacobian norm": "s"}


def parts(table: pd.DataFrame, title: str) -> Figure:
    """Operations of every work by part, in forward passes. table: from `lab.count_table`."""
    figure, axes = new_figure(size=(WIDTH, 2.9))
    ax, left = axes[0, 0], np.zeros(len(table))
    names = [c for c in table.columns if c not in ("together", "leading")]
    for name, colour in zip(names, sns.color_palette("cividis", len(names)), strict=True):
        ax.barh(table.index, table[name], left=left, color=colour, label=name, height=0.65)
        left += table[name].to_numpy()
    _ticks(ax, table.leading, 0.42, "leading term")
    ax.set(xlabel="operations, in forward passes (2NT)", title=title)
    ax.invert_yaxis()
    legend_outside(ax)
    return figure


def ratio_dots(tables: Mapping[str, pd.DataFrame], counted: Mapping[str, float], peer: str) -> Figure:
    """Times a peer's time, median and interval, one panel a table; ticks: by the count."""
    figure, axes = new_figure(len(tables), 1, size=(WIDTH, 2.5 * len(tables)), sharex=True)
    for ax, (title, table) in zip(axes[:, 0], tables.items(), strict=True):
        _dots(ax, table)
        _ticks(ax, pd.Series([counted.get(name, np.nan) for name in table.index]), 0.3, "by the count")
        ax.set_title(f"{title}, {int(table.n.iloc[0])} rounds")
        legend_outside(ax)
    axes[-1, 0].set_xlabel(f"time, in times of the {peer}")
    return figure


def over_floor(table: pd.DataFrame) -> Figure:
    """Time over the floor of every work, median and interval. table: from `lab.over_floor`."""
    figure, axes = new_figure(size=(WIDTH, 2.7))
    ax = axes[0, 0]
    _dots(ax, table)
    ax.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), label="floor")
    ax.set_xlim(left=0)
    ax.set_xlabel(f"time over the time of its matrix products alone ({int(table.n.iloc[0])} rounds)")
    legend_outside(ax)
    return figure


def sweeps(table: pd.DataFrame, logarithmic: Sequence[str]) -> Figure:
    """Seconds against every setting, median and range. table: from `lab.sweep_table`."""
    settings = list(dict.fromkeys(table.of))
    rows = -(-(len(settings) + 1) // 2)
    figure, axes = new_figure(rows, 2, size=(WIDTH, 2.6 * rows))
    flat = list(axes.flat)
    for ax, setting in zip(flat, settings, strict=False):
        part = table[table.of == setting]
        if part.value.max() > MILLION:
            part, setting_unit = part.assign(value=part.value / MILLION), f"{setting}, million"
        else:
            setting_unit = setting
        for work, line in part.groupby("work", sort=False):
            _line(ax, str(work), line)
        if setting in logarithmic:
            _logarithmic(ax)
        else:
            ax.set_ylim(0, 1.5 * part.seconds.max())  # an interruption may be longer than all the rest
            ax.set_xticks(sorted(set(part.value)))
        ax.set(xlabel=setting_unit, ylabel="seconds" if setting == "prompts n" else "seconds a prompt")
    handles, labels = flat[1].get_legend_handles_labels()
    for ax in flat[len(settings) :]:
        ax.set_axis_off()
    note = f"median and range, {int(table.n.max())} rounds"
    flat[len(settings)].legend(handles, labels, loc="center left", title=note)
    return figure


def pixel_dots(tables: Mapping[int, pd.DataFrame], counted: float, paper: float) -> Figure:
    """Times the Jacobian norm of the same pictures, by batch size; lines: by the count and in the paper."""
    figure, axes = new_figure(len(tables), 1, size=(WIDTH, 2.5 * len(tables)), sharex=True)
    for ax, (batch, table) in zip(axes[:, 0], tables.items(), strict=True):
        _dots(ax, table.drop(index="Jacobian norm"))
        ax.axvline(counted, color=INK, linewidth=1, label="FI by the count")
        ax.axvline(paper, color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), label="FI in the paper")
        ax.set_title(f"batch {batch}, {int(table.n.iloc[0])} rounds")
        legend_outside(ax)
    axes[-1, 0].set_xlabel("time, in times of the Jacobian norm")
    axes[-1, 0].set_xlim(left=0)
    return figure


def foreseen_bars(table: pd.DataFrame) -> Figure:
    """Bytes and seconds predicted and measured. table: from `lab.foreseen`."""
    kinds = list(dict.fromkeys(table.index.get_level_values("what")))
    figure, axes = new_figure(1, len(kinds), size=(WIDTH, 2.8), sharey=True)
    for ax, kind in zip(axes[0], kinds, strict=True):
        part = table.xs(kind, level="what")
        places = np.arange(len(part))
        for shift, name, colour in ((-0.2, "predicted", GREY), (0.2, "measured", COLOURS["FI"])):
            ax.barh(places + shift, part[name], height=0.36, color=colour, label=name)
        ax.set_yticks(places, part.index)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlabel(kind)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def agreement_dots(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Overlap of the top 1 % and rank correlation of each layer, bfloat16 with float32, one row a table.

    tables: by title, from `ch03.precision.agreement_by_answer`.
    """
    figure, axes = new_figure(1, 2, size=(WIDTH, 1.5 + 0.7 * len(tables)), sharey=True)
    columns = {"overlap": "share of the top 1 % in common", "spearman": "rank correlation (Spearman)"}
    for ax, (column, label) in zip(axes[0], columns.items(), strict=True):
        for place, table in enumerate(tables.values()):
            values = table[column].dropna()
            ax.plot(values, np.full(len(values), place), "|", color=COLOURS["FI"], markersize=14, alpha=0.7)
            ax.plot([values.median()], [place], "o", color=INK, label="median" if place == 0 else None)
        ax.set(xlim=(-0.03, 1.03), xlabel=label)
    layers = max(len(table) for table in tables.values())
    axes[0, 0].set_yticks(range(len(tables)), list(tables))
    axes[0, 0].set_ylim(len(tables) - 0.5, -0.5)
    figure.supxlabel(f"bars: one of {layers} linear layers each; dots: median over the layers", fontsize=9)
    return figure


def _dots(ax: Axes, table: pd.DataFrame) -> None:
    places = np.arange(len(table))
    ax.hlines(places, table.low, table.high, color=COLOURS["FI"], linewidth=2)
    ax.plot(table.ratio, places, "o", color=COLOURS["FI"], label="measured")
    ax.set_yticks(places, table.index)
    ax.set_ylim(len(table) - 0.5, -0.5)


def _ticks(ax: Axes, values: pd.Series, half: float, label: str) -> None:
    """A short upright line in each row."""
    places = np.arange(len(values))
    ax.vlines(values, places - half, places + half, color=INK, linewidth=1.2, label=label)


def _logarithmic(ax: Axes) -> None:
    """Both axes on a logarithmic scale, with plain numbers at 1, 2 and 5."""
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())


def _line(ax: Axes, work: str, line: pd.DataFrame) -> None:
    colour = COLOURS[work]
    ax.plot(line.value, line.seconds, marker=MARKERS[work], color=colour, label=work)
    ax.fill_between(line.value, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
