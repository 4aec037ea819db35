"""The figure of chapter 12: every claim by filter, at one glance."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fichapters.claims import FILTERS, NO_FILTER, kind_of
from fichapters.style import INK, WIDTH, new_figure

COLOURS = {
    "every setting holds": "#2F6DB5",
    "some hold": "#A9C8EE",
    "none holds; most do not": "#E8965A",
    "none holds; most undecided": "#DDDDDD",
}
STEP = 0.25  # inches a claim


def verdict_grid(condensed: pd.DataFrame) -> Figure:
    """A row a claim, a column a filter: how many of the deciding settings hold, and the verdict beside them.

    condensed: from `claims.condense`. A cell reads "2/5": two of five settings hold.
    """
    columns = [*FILTERS, NO_FILTER]
    rows = len(condensed)
    held = [_held(condensed[condensed.kind == "claim"], name) for name in ("exact", "damped")]
    figure, axes = new_figure(size=(WIDTH, STEP * rows + 1.3))
    ax = axes[0, 0]
    for y, (_, line) in enumerate(condensed.iterrows()):
        for x, name in enumerate(columns):
            if line[name]:
                _cell(ax, x, y, [int(count) for count in line[name].split("/")])
        ax.text(len(columns) - 0.35, y, kind_of(line.verdict), va="center", fontsize=9)
    ax.set(
        xlim=(-0.5, len(columns) + 1.5),
        ylim=(rows - 0.5, -0.5),
        xlabel=f"filter; each cell: settings that hold / settings that decide; {rows} claims",
        title="Settings that hold: " + "; ".join(held),
    )
    ax.set_xticks([*range(len(columns)), len(columns) + 0.4], [*columns, "verdict"])
    ax.set_yticks(range(rows), [f"{line.short}  {line.id}" for line in condensed.itertuples()])
    ax.tick_params(length=0)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _held(condensed: pd.DataFrame, name: str) -> str:
    counts = [[int(count) for count in cell.split("/")] for cell in condensed[name] if cell]
    return f"{name} {sum(found[0] for found in counts)} of {sum(map(sum, counts))}"


def _cell(ax: Axes, x: int, y: int, counts: list[int]) -> None:
    holds, fails, total = counts[0], counts[1], sum(counts)
    if holds:
        label = "every setting holds" if holds == total else "some hold"
    else:
        label = "none holds; most do not" if fails > total / 2 else "none holds; most undecided"
    ax.add_patch(Rectangle((x - 0.46, y - 0.43), 0.92, 0.86, color=COLOURS[label], linewidth=0))
    ink = "white" if label == "every setting holds" else INK
    ax.text(x, y, f"{holds}/{total}", ha="center", va="center", fontsize=9, color=ink)
