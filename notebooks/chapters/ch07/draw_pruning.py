"""Figures of chapter 07 on pruning methods. The curves are those of `figures.sparsification`."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fichapters.style import INK, SEQUENTIAL, WIDTH, look, new_figure


def top_dots(table: pd.DataFrame, chance: float | None) -> Figure:
    """Accuracy after zeroing a top share by each measure, with its interval, one panel a cut.

    table: from `experiments.pruning.summary`. chance: accuracy of guessing, drawn as a line.
    """
    top = table[(table.which == "top") & (table.rate > 0)]
    cuts = list(top.groupby(["scope", "rate"], sort=False))
    names = list(dict.fromkeys(top.measure))
    figure, axes = new_figure(1, len(cuts), size=(WIDTH, 3.9), sharey=True)
    for ax, ((scope, rate), part) in zip(axes[0], cuts, strict=True):
        for row in part.itertuples():
            _dot(ax, names.index(row.measure), row)
        if chance is not None:
            ax.axvline(chance, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        place = "all weights" if scope == "global" else f"each {scope}"
        ax.set(title=f"top {100 * rate:g}% of\n{place}", xlim=(0, 1.03), xlabel="accuracy")
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.supxlabel(
        f"{int(top.n.max())} test questions; bars: 95 % over {int(top.seeds.max())} calibration sets; "
        "dashed: guessing",
        fontsize=9,
    )
    return figure


def overlap_maps(tables: dict[str, pd.DataFrame]) -> Figure:
    """The common share of what any two measures choose, one panel a cut (its title)."""
    figure, axes = new_figure(len(tables), 1, size=(WIDTH, 4.9 * len(tables)))
    for ax, (title, table) in zip(axes[:, 0], tables.items(), strict=True):
        sns.heatmap(
            table, ax=ax, cmap=SEQUENTIAL, vmin=0, vmax=1, annot=True, fmt=".2f", annot_kws={"size": 9},
            square=True, cbar_kws={"label": "common share", "shrink": 0.7},
        )  # fmt: skip
        ax.set_title(title)
        ax.tick_params(axis="x", labelrotation=40)
        for label in ax.get_xticklabels():
            label.set_horizontalalignment("right")
    return figure


def _dot(ax: Axes, y: int, row: object) -> None:
    style = {**look(row.measure), "linestyle": "", "markersize": 7}  # type: ignore[attr-defined]
    ax.plot([row.accuracy], [y], **style)  # type: ignore[attr-defined]
    ax.plot([row.low, row.high], [y, y], color=style["color"])  # type: ignore[attr-defined]
