"""The plots that several chapters share: curves with bands, intervals below each other, maps of numbers.

All take a tidy table such as `Trials.table` and `Trials.compare` return, with columns low, high (95 %) and n.
Measures have the colours of :mod:`fichapters.style`, other names get colours in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from fichapters.style import INK, SEQUENTIAL, WIDTH, look, new_figure

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
    labels: tuple[str, str] = ("", ""),
    scale: str = "percent",
    columns: int = 3,
) -> Figure:
    """One line for each name in column `by`, with a band from low to high.

    panels: the names of each panel by its title, or a column that has a panel for each of its values.
    start: the value at x = 0, of all panels or by panel. levels: dashed horizontal lines by their names, such
    as guessing. labels: of the axes. scale: of x, "percent", "linear" or "log".
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
        ax.set_title(title if panels else "")
    for ax, part in zip(axes.flat, parts.values(), strict=False):  # when all panels are as wide as they get
        _scaled(ax, scale, [*part[x].unique()])
    for line_of_axes in axes:
        line_of_axes[0].set_ylabel(labels[1] or f"{value} ({_count(table)})")
    figure.supxlabel(labels[0] or x, fontsize=10)
    _legend(figure)
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
    parts = _panels(table, by, panels)
    names = list(dict.fromkeys(table[name]))
    kinds = list(dict.fromkeys([*first, *table[by]])) if by else []
    size = (WIDTH, 1.2 + 0.34 * len(names) * max(1, 0.5 * len(kinds)))
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
        ax.set_title(title)
        ax.grid(axis="y", visible=False)
        if len(parts) > 1:
            ax.xaxis.set_major_locator(MaxNLocator(4))
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"{label or value} ({_count(table)}, bars: 95 %)", fontsize=10)
    _legend(figure, "" if by else "published")  # the rows say the names already
    return figure


def heat(grids: Mapping[str, pd.DataFrame], label: str, form: str = ".2f") -> Figure:
    """Maps of numbers, one below the other, with the numbers written in.

    grids: by title, the index down and the columns across.
    """
    heights = [1 + len(grid) for grid in grids.values()]
    size = (WIDTH, 0.6 + sum(0.44 + 0.36 * height for height in heights))
    figure, axes = new_figure(len(grids), 1, size=size, gridspec_kw={"height_ratios": heights})
    every = np.concatenate([grid.to_numpy(float).ravel() for grid in grids.values()])
    ends = {"vmin": np.nanmin(every), "vmax": np.nanmax(every)}
    for ax, (title, grid) in zip(axes[:, 0], grids.items(), strict=True):
        sns.heatmap(
            grid, ax=ax, annot=True, annot_kws={"size": 9}, cbar=False, cmap=SEQUENTIAL, fmt=form, **ends
        )
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


def _legend(figure: Figure, only: str = "") -> None:
    """One legend of all panels above them, each name once, or `only` one name."""
    handles = {
        text: handle
        for ax in figure.axes
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)
        if only in ("", text)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncol=3, columnspacing=1)


def _scaled(ax: Axes, scale: str, values: Sequence[float]) -> None:
    if scale == "log":
        ax.set_xscale("log")
        shown = values if len(values) < 9 else [value for value in values if math.log10(value).is_integer()]
        ax.set_xticks(shown, [f"{value:g}" for value in shown])
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


def pictures(
    rows: Sequence[Sequence[tuple[str, Tensor, str]]],
    ends: tuple[float, float] | None = None,
    label: str = "",
) -> Figure:
    """Rows of pictures (3, H, W) of grey levels and of maps (H, W), each with its title and a text below it.

    ends: what is darkest and what is lightest in all maps; by default 0 and each map's own 99th percentile.
    """
    lines = [max(len(text.splitlines()) for _, _, text in row) for row in rows]
    heights = [2.05 + 0.17 * count for count in lines]
    size = (WIDTH, sum(heights))
    figure, axes = new_figure(len(rows), max(map(len, rows)), size=size, height_ratios=heights)
    for ax in axes.flat:
        ax.axis("off")
    for line_of_axes, row in zip(axes, rows, strict=True):
        for ax, (title, values, text) in zip(line_of_axes, row, strict=False):
            shown = values.cpu().numpy()
            if values.dim() == 3:
                shown = shown.transpose(1, 2, 0).clip(0, 255).round().astype(np.uint8)
            low, high = ends or (0, float(np.quantile(shown, 0.99)) or 1.0)
            ax.imshow(shown, cmap=SEQUENTIAL, vmin=low, vmax=high, interpolation="nearest")
            ax.set_title(title, fontsize=9)
            ax.text(0, -0.05, text, transform=ax.transAxes, va="top", fontsize=9)
    figure.supxlabel(label, fontsize=10)
    return figure
