"""The plots that several chapters share: curves with bands, intervals below each other, maps of numbers.

All take a tidy table such as `Trials.table` and `Trials.compare` return, with columns low, high (95 %) and n.
Measures have the colours of :mod:`fichapters.style`, other names get colours in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from fichapters.style import DIVERGING, INK, SEQUENTIAL, WIDTH, look, new_figure

DASHED = (0, (2, 2))
COLOURS = ("#2F6DB5", "#D55E00", "#00805D", "#9B6FC4", "#C97B00", "#C2377A", "#6B4423", "#767676")
MARKERS = "osD^vPX*"


def curves(
    table: pd.DataFrame,
    x: str,
    value: str = "accuracy",
    by: str = "measure",
    panels: Mapping[str, Sequence[str]] | str = "",
    *,
    start: float | Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
    marks: Mapping[str, pd.DataFrame] | None = None,
    labels: tuple[str, str] = ("", ""),
    scale: str = "percent",
    columns: int = 3,
) -> Figure:
    """One line for each name in column `by`, with a band from low to high.

    panels: the names of each panel by its title, or a column that has a panel for each of its values.
    start: the value at x = 0, of all panels or by panel. levels: dashed horizontal lines by their names, such
    as guessing. marks: published points by panel title ("" for all), a table with x, `value` and name.
    labels: of the axes. scale: of x, "percent", "linear" or "log".
    """
    parts = _panels(table, by, panels)
    rows = -(-len(parts) // columns)
    wide = min(columns, len(parts))
    figure, axes = new_figure(rows, wide, size=(WIDTH, 0.8 + 3.1 * rows), sharey=True, sharex=True)
    for ax in axes.flat[len(parts) :]:
        ax.axis("off")
    names = list(dict.fromkeys(table[by]))
    for ax, (title, part) in zip(axes.flat, parts.items(), strict=False):
        begin = start.get(title) if isinstance(start, Mapping) else start
        for name, line in part.groupby(by, sort=False):
            _line(ax, line.sort_values(x), x, value, begin, face(str(name), names))
        for text, level in (levels or {}).items():
            ax.axhline(level, color=INK, linewidth=0.8, linestyle=DASHED, label=text)
        for where, points in (marks or {}).items():
            if where in ("", title):
                _marks(ax, points, x, value)
        ax.set_title(title if panels else "")
    for ax, part in zip(axes.flat, parts.values(), strict=False):  # when all panels are as wide as they get
        _scaled(ax, scale, [*part[x].unique()])
    for line_of_axes in axes:
        line_of_axes[0].set_ylabel(labels[1] or f"{value} ({_count(table)})")
    figure.supxlabel(labels[0] or x, fontsize=10)
    handles = {text: h for ax in axes.flat for h, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncol=3, columnspacing=1)
    return figure


def forest(
    table: pd.DataFrame,
    name: str,
    value: str = "difference",
    by: str = "",
    *,
    label: str = "",
    line: float | None = 0.0,
    marks: Mapping[str, float] | None = None,
    panels: str = "",
    first: Sequence[str] = (),
) -> Figure:
    """A dot with its interval for each row of a table, named by the column `name`, one below the other.

    by: a column whose values have colours, with a legend, and those named `first` stand first; without it
    measures have theirs. line: a vertical line at "no difference". marks: published values by row name,
    hollow. panels: a column that has a panel for each of its values.
    """
    parts = dict(list(table.groupby(panels, sort=False))) if panels else {"": table}
    names = list(dict.fromkeys(table[name]))
    kinds = list(dict.fromkeys([*first, *table[by]])) if by else []
    size = (WIDTH, 1.2 + 0.34 * len(names) * max(1, 0.6 * len(kinds)))
    figure, axes = new_figure(1, len(parts), size=size, sharey=True, sharex=True)
    for ax, (title, part) in zip(axes[0], parts.items(), strict=True):
        for row in part.to_dict("records"):
            shift = 0.6 * ((kinds.index(row[by]) + 0.5) / len(kinds) - 0.5) if by else 0.0
            style = face(str(row[by]), kinds) if by else face(str(row[name]), names)
            _dot(ax, names.index(row[name]) + shift, row, value, style)
        for text, number in (marks or {}).items():
            if text in names:
                ax.plot(
                    [number], [names.index(text)], "D", color=INK, markerfacecolor="none", label="published"
                )
        if line is not None:
            ax.axvline(line, color=INK, linewidth=0.8)
        ax.set_title(str(title))
        ax.grid(axis="y", visible=False)
        if len(parts) > 1:
            ax.xaxis.set_major_locator(MaxNLocator(4))
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"{label or value} ({_count(table)}, bars: 95 %)", fontsize=10)
    handles = {text: h for ax in axes.flat for h, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    if not by:  # the rows say the names already
        handles = {text: h for text, h in handles.items() if text == "published"}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncol=3)
    return figure


def heat(
    grids: Mapping[str, pd.DataFrame], label: str, form: str = ".2f", middle: float | None = None
) -> Figure:
    """Maps of numbers, one below the other, with the numbers written in.

    grids: by title, the index down and the columns across. middle: of a scale with two ends, such as 0 for
    differences.
    """
    tall = sum(0.8 + 0.36 * len(grid) for grid in grids.values())
    heights = [1 + len(grid) for grid in grids.values()]
    figure, axes = new_figure(len(grids), 1, size=(WIDTH, 0.6 + tall), gridspec_kw={"height_ratios": heights})
    every = np.concatenate([grid.to_numpy(float).ravel() for grid in grids.values()])
    ends = (np.nanmin(every), np.nanmax(every))
    if middle is not None:
        reach = max(middle - ends[0], ends[1] - middle)
        ends = (middle - reach, middle + reach)
    colours = SEQUENTIAL if middle is None else DIVERGING
    for ax, (title, grid) in zip(axes[:, 0], grids.items(), strict=True):
        look_of_all = {"cmap": colours, "fmt": form, "vmin": ends[0], "vmax": ends[1]}
        sns.heatmap(grid, ax=ax, annot=True, annot_kws={"size": 9}, cbar=False, **look_of_all)
        ax.set(title=title, xlabel="", ylabel="")
        ax.tick_params(axis="y", labelrotation=0)
    figure.supxlabel(label, fontsize=10)
    return figure


def face(name: str, names: Sequence[str]) -> dict[str, Any]:
    """How a name is drawn: a measure as everywhere, another by its place among the names."""
    try:
        return look(name)
    except KeyError:
        place = [str(other) for other in names].index(name)
        mark = MARKERS[place % len(MARKERS)]
        return {"color": COLOURS[place % len(COLOURS)], "linestyle": "-", "marker": mark, "label": name}


def _panels(
    table: pd.DataFrame, by: str, panels: Mapping[str, Sequence[str]] | str
) -> dict[str, pd.DataFrame]:
    if isinstance(panels, str):
        return {str(k): part for k, part in table.groupby(panels, sort=False)} if panels else {"": table}
    return {title: table[table[by].isin(names)] for title, names in panels.items()}


def _line(
    ax: Axes, part: pd.DataFrame, x: str, value: str, start: float | None, style: dict[str, Any]
) -> None:
    xs, ys = [*part[x]], [*part[value]]
    ax.plot(xs if start is None else [0, *xs], ys if start is None else [start, *ys], **style)
    ax.fill_between(part[x], part.low, part.high, color=style["color"], alpha=0.15, linewidth=0)


def _dot(ax: Axes, y: float, row: Mapping[Any, Any], value: str, style: dict[str, Any]) -> None:
    ax.plot([row["low"], row["high"]], [y, y], color=style["color"])
    ax.plot([row[value]], [y], **{**style, "linestyle": "", "markersize": 7})


def _marks(ax: Axes, points: pd.DataFrame, x: str, value: str) -> None:
    for text, part in points.groupby("name", sort=False):
        ax.plot(part[x], part[value], "D", color=INK, markerfacecolor="none", label=str(text))


def _scaled(ax: Axes, scale: str, values: Sequence[float]) -> None:
    if scale == "log":
        ax.set_xscale("log")
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.xaxis.set_minor_formatter(NullFormatter())
        return
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    if scale == "percent":
        ax.xaxis.set_major_formatter(PercentFormatter(1))


def _count(table: pd.DataFrame) -> str:
    if "n" not in table:
        return f"{len(table)} rows"
    least, most = int(table.n.min()), int(table.n.max())
    return f"n = {most}" if least == most else f"n = {least} to {most}"
