"""Figures of chapter 11: FI beside its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fichapters.style import GREY, INK, SEQUENTIAL, WIDTH, new_figure

COLOURS = {  # of a family of relatives, with a mark for readers who do not see the colour
    "FI": ("#08306B", "o"),
    "gradient": ("#D55E00", "s"),
    "gradient and size": ("#00805D", "D"),
    "no gradient": (GREY, "v"),
    "removal": ("#C2377A", "*"),
}
SOURCES = {  # of calibration questions
    "real questions": ("#08306B", "o"),
    "other real questions": ("#5B8FD0", "s"),
    "shuffled words": ("#D55E00", "^"),
    "random tokens": ("#8C6D1F", "v"),
}


def agreement_dots(tables: Mapping[str, pd.DataFrame], families: Mapping[str, Sequence[str]]) -> Figure:
    """Rank agreement of every relative with the damage, and its interval, a panel a model.

    tables: by title, from `lab.Agreement.table`; families: which relatives are of a kind.
    """
    listed = dict.fromkeys(name for members in families.values() for name in members)
    names = [name for name in listed if any(name in table.index for table in tables.values())]
    of = {name: family for family, members in families.items() for name in members}
    figure, axes = new_figure(1, len(tables), size=(WIDTH, 1.4 + 0.22 * len(names)), sharey=True)
    for ax, (title, table) in zip(axes[0], tables.items(), strict=True):
        ax.axvline(0, color=INK, linewidth=0.8)
        for y, name in enumerate(names):
            if name in table.index:
                row = table.loc[name]
                colour, marker = COLOURS[of[name]]
                ax.plot([row.low, row.high], [y, y], color=colour)
                ax.plot([row.agreement], [y], color=colour, marker=marker, linestyle="", markersize=7)
        ax.set(title=title, xlabel="rank correlation (Spearman) with the damage; bars: 95 %")
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    _family_legend(figure, axes[0, 0])
    return figure


def _family_legend(figure: Figure, ax: Axes) -> None:
    handles = [
        ax.plot([], [], color=colour, marker=marker, linestyle="", label=family)[0]
        for family, (colour, marker) in COLOURS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncol=len(handles))


def score_and_damage(
    scores: pd.DataFrame, falls: np.ndarray, heads: np.ndarray, names: Sequence[str]
) -> Figure:
    """Damage of each component against its score, a panel a relative; heads and neurons are marked apart.

    falls: (components, questions); heads: whether each component is a head.
    """
    damage = falls.mean(1)
    figure, axes = new_figure(2, (len(names) + 1) // 2, size=(WIDTH, 5.6), sharey=True)
    for ax, name in zip(axes.flat, names, strict=False):
        for chosen, marker, colour, label in (
            (heads, "D", "#C2377A", "attention head"),
            (~heads, "o", "#2F6DB5", "group of neurons"),
        ):
            ax.plot(scores[name][chosen], damage[chosen], marker=marker, color=colour, linestyle="",
                    label=label, alpha=0.8)  # fmt: skip
        ax.set_yscale("symlog", linthresh=0.01)
        ax.set(title=name, xlabel="score")
    for ax in axes[:, 0]:
        ax.set_ylabel("damage (nats)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    said = f"{len(falls)} components, damage over {falls.shape[1]} questions"
    figure.legend(handles, labels, loc="outside lower center", ncol=2, title=said)
    return figure


def direction_map(shares: pd.DataFrame, n: int) -> Figure:
    """What a direction changes per squared length, as a share of the most possible (rows directions)."""
    figure, axes = new_figure(size=(WIDTH, 3.4))
    titles = {"measured": "Fisher length,\nstep taken"} | {
        c: c.replace(" ", "\n") for c in shares.columns[:-1]
    }
    shown = shares.rename(columns=titles)
    sns.heatmap(
        shown, ax=axes[0, 0], cmap=SEQUENTIAL, vmin=0, vmax=1, annot=True, fmt=".2g", annot_kws={"size": 10},
        cbar_kws={"label": "share of the most possible"},
    )  # fmt: skip
    axes[0, 0].set(
        title=f"squared change of the answer per squared … (mean of {n} questions)", ylabel="", xlabel=""
    )
    axes[0, 0].tick_params(axis="both", labelrotation=0)
    return figure


def nonsense_dots(table: pd.DataFrame, minus: str, n: int, seeds: int) -> Figure:
    """Mean log P of the right answer by what the scores were calibrated on, minus `minus`; a panel a test.

    table: from `lab.against_real`.
    """
    part = table[table.minus == minus]
    tests = list(part.groupby(["test", "share"], sort=False))
    measures = list(dict.fromkeys(part.measure))
    figure, axes = new_figure(1, len(tests), size=(WIDTH, 4.2), sharey=True)
    for ax, ((test, share), rows) in zip(axes[0], tests, strict=True):
        ax.axvline(0, color=INK, linewidth=0.8)
        for row in rows.itertuples():
            colour, marker = SOURCES[row.source]
            y = measures.index(row.measure) + 0.18 * (list(SOURCES).index(row.source) - 1.5)
            ax.plot([row.low, row.high], [y, y], color=colour)
            ax.plot([row.difference], [y], color=colour, marker=marker, linestyle="", markersize=6)
        what = f"zeroed {share:.0%}" if test == "zero" else f"kept {share:.0%} of rows,\nrest quantized"
        ax.set(title=what, xlabel="log P minus random (nats)")
    axes[0, 0].set_yticks(
        range(len(measures)), [m.replace(" 0.0001", "\n0.0001").replace("n l", "n\nl") for m in measures]
    )
    axes[0, 0].invert_yaxis()
    handles = [
        axes[0, 0].plot([], [], color=colour, marker=marker, linestyle="", label=name)[0]
        for name, (colour, marker) in SOURCES.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncol=4,
        title=f"calibrated on ({n} tested questions, {seeds} sets)",
    )
    return figure
