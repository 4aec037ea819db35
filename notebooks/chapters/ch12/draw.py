"""The figure of chapter 12: every claim by filter, at one glance."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fichapters.claims import FAILS, FILTERS, HOLDS
from fichapters.style import INK, WIDTH, new_figure

COLOURS = {
    "every setting holds": "#2F6DB5",
    "some hold": "#A9C8EE",
    "none holds; most do not": "#E8965A",
    "none holds; most undecided": "#DDDDDD",
}
STEP = 0.25  # inches a claim


def verdict_grid(condensed: pd.DataFrame, cells: pd.DataFrame, title: str) -> Figure:
    """A row a claim, a column a filter: how many of the deciding settings hold, and both verdicts.

    condensed: from `claims.condense`, with a column real, the verdict on a real model; cells: from
    `claims.counts` by id and filter. A cell reads "2/5": two of five settings hold.
    """
    rows = len(condensed)
    figure, axes = new_figure(size=(WIDTH, STEP * rows + 1.3))
    ax = axes[0, 0]
    for y, line in enumerate(condensed.itertuples()):
        for x, name in enumerate(FILTERS):
            if (line.id, name) in cells.index:
                _cell(ax, x, y, cells.loc[(line.id, name)])
        for x, verdict in enumerate((line.verdict, line.real)):
            ax.text(len(FILTERS) - 0.35 + 1.5 * x, y, verdict, va="center", fontsize=9)
    ax.set(
        xlim=(-0.5, len(FILTERS) + 2.7),
        ylim=(rows - 0.5, -0.5),
        xlabel=f"filter; each cell: settings that hold / settings that decide; {rows} claims",
        title=title,
    )
    places = [*range(len(FILTERS)), len(FILTERS) + 0.2, len(FILTERS) + 1.7]
    ax.set_xticks(places, [*FILTERS, "miniatures", "real model"])
    ax.set_yticks(range(rows), [f"{line.short}  {line.id}" for line in condensed.itertuples()])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _cell(ax: Axes, x: int, y: int, counts: pd.Series) -> None:
    holds, total = counts[HOLDS], counts.sum()
    if holds:
        label = "every setting holds" if holds == total else "some hold"
    else:
        label = "none holds; most do not" if counts[FAILS] > total / 2 else "none holds; most undecided"
    ax.add_patch(Rectangle((x - 0.46, y - 0.43), 0.92, 0.86, color=COLOURS[label], linewidth=0))
    ink = "white" if label == "every setting holds" else INK
    ax.text(x, y, f"{holds}/{total}", ha="center", va="center", fontsize=9, color=ink)
