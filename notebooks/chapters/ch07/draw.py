"""Figures of chapters 01 and 07: what breaks when weights are zeroed, and where they sit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fichapters.style import GREY, INK, SEQUENTIAL, WIDTH, legend_outside, look, new_figure


def damage_curves(table: pd.DataFrame, panels: dict[str, Sequence[str]], chance: float | None) -> Figure:
    """Accuracy against the share of weights zeroed, one panel for each group of measures.

    table: from `experiments.sparsification.summary`. chance: accuracy of guessing, drawn as a line.
    """
    figure, axes = new_figure(1, len(panels), size=(WIDTH, 5.6), sharey=True)
    for ax, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            _curve(ax, table[table.measure == name], name)
        _finish(ax, title, chance)
        ax.set_xlabel("share of linear weights zeroed")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, columnspacing=1)
    n, seeds = int(table.n.max()), int(table.seeds.max())
    axes[0, 0].set_ylabel(f"accuracy ({n} test questions)")
    bands = f"{seeds} calibration sets" if seeds > 1 else "the questions"
    figure.supxlabel(f"bands: 95 % over {bands}", fontsize=9)
    return figure


def reading_by_subject(rows: pd.DataFrame, high: str, low: str, chance: float | None) -> Figure:
    """The top share by FI, a random share, and a random share of the low half; one panel a subject."""
    own = rows[rows.subject == rows.tested_on]
    subjects = list(dict.fromkeys(own.subject))
    rows_of_panels = -(-len(subjects) // 2)
    figure, axes = new_figure(rows_of_panels, 2, size=(WIDTH, 2.8 * rows_of_panels), sharey=True)
    for ax in axes.flat[len(subjects) :]:
        ax.axis("off")
    styles = {
        high: ("FI-high", "#D55E00", "-", "s"),
        "random": ("random", GREY, ":", "o"),
        low: ("FI-low", "#2F6DB5", "--", "v"),
    }
    for ax, subject in zip(axes.flat, subjects, strict=False):
        part = own[own.subject == subject]
        start = float(part[part.measure == "intact"].accuracy.iloc[0])
        for name, (label, colour, dash, marker) in styles.items():
            mean = part[part.measure == name].groupby("rate").accuracy.mean()
            ax.plot([0, *mean.index], [start, *mean], dash, color=colour, marker=marker, label=label)
        _finish(ax, f"{subject} (n = {int(part.n.iloc[0])})", chance)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    axes[0, 0].legend(loc="center left", bbox_to_anchor=(0, 0.42))
    figure.supxlabel("share of linear weights zeroed", fontsize=10)
    return figure


def overlap_map(table: pd.DataFrame, share: float) -> Figure:
    """Which measures choose the same weights: the common share of their top weights."""
    figure, axes = new_figure(size=(WIDTH, 6.2))
    sns.heatmap(
        table, ax=axes[0, 0], cmap=SEQUENTIAL, vmin=0, vmax=1, annot=True, fmt=".2f", annot_kws={"size": 8},
        square=True, cbar_kws={"label": f"common share of the top {share:.0%}"},
    )  # fmt: skip
    axes[0, 0].tick_params(axis="x", labelrotation=40)
    for label in axes[0, 0].get_xticklabels():
        label.set_horizontalalignment("right")
    return figure


def location_map(tables: dict[str, pd.DataFrame], share: float) -> Figure:
    """Share of each matrix that is among the top weights, layer by matrix, one panel a measure."""
    figure, axes = new_figure(len(tables), 1, size=(WIDTH, 2.3 * len(tables) + 0.8), sharex=True)
    for ax, (name, table) in zip(axes[:, 0], tables.items(), strict=True):
        grid = table.pivot(index="layer", columns="matrix", values="top_share")[
            list(dict.fromkeys(table.matrix))
        ]
        sns.heatmap(
            100 * grid, ax=ax, cmap=SEQUENTIAL, annot=True, fmt=".1f", annot_kws={"size": 9}, cbar=False
        )
        ax.set(title=name, xlabel="", ylabel="layer")
        ax.tick_params(axis="x", labelrotation=40)
        for label in ax.get_xticklabels():
            label.set_horizontalalignment("right")
    figure.supxlabel(f"percent of each matrix among the model's top {share:.0%}", fontsize=10)
    return figure


def concentration_curves(table: pd.DataFrame) -> Figure:
    """Share of the total score held by the highest weights; the dotted line is an even spread."""
    figure, axes = new_figure(size=(WIDTH, 4.2))
    ax = axes[0, 0]
    for name, part in table.groupby("measure", sort=False):
        ax.plot(part.weights, part.total, **{**look(str(name)), "marker": None})
    even = np.geomspace(table.weights.min(), 1, 100)
    ax.plot(even, even, ":", color=INK, label="even spread")
    ax.set(
        xscale="log", xlabel="share of the weights, highest score first", ylabel="share of the total score"
    )
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    legend_outside(ax)
    return figure


def transfer_map(table: pd.DataFrame, rate: float, n: str) -> Figure:
    """Accuracy on one subject after zeroing by a ranking calibrated on another."""
    figure, axes = new_figure(size=(5.6, 4.2))
    sns.heatmap(
        table, ax=axes[0, 0], cmap=SEQUENTIAL, annot=True, fmt=".2f", vmin=0, vmax=1,
        cbar_kws={"label": f"accuracy with {rate:.0%} zeroed"},
    )  # fmt: skip
    axes[0, 0].set(xlabel=f"tested on ({n})", ylabel="calibrated on")
    axes[0, 0].tick_params(axis="y", labelrotation=0)
    return figure


def answer_bars(probabilities: dict[str, Sequence[float]], options: Sequence[str], right: int) -> Figure:
    """Class probabilities of one question under several versions of a model; the right option is framed."""
    rows = -(-len(probabilities) // 2)
    figure, axes = new_figure(rows, 2, size=(WIDTH, 2.2 * rows), sharex=True, sharey=True)
    for ax in axes.flat[len(probabilities) :]:
        ax.axis("off")
    for ax, (title, values) in zip(axes.flat, probabilities.items(), strict=False):
        bars = ax.barh(range(len(options)), values, color="#5B8FD0")
        bars[right].set(edgecolor=INK, linewidth=2)
        for y, value in enumerate(values):
            inside = value > 0.8
            place, side = (value - 0.03, "right") if inside else (value + 0.02, "left")
            colour = "white" if inside else INK
            ax.text(place, y, f"{value:.2f}", va="center", ha=side, color=colour, fontsize=9)
        ax.set(title=title, xlim=(0, 1), xlabel="P" if ax in axes[-1] else "")
        ax.set_yticks(range(len(options)), [f"{'ABCD'[i]}. {o}" for i, o in enumerate(options)])
        ax.invert_yaxis() if ax is axes[0, 0] else None
        ax.grid(axis="y", visible=False)
    return figure


def _curve(ax: Axes, part: pd.DataFrame, name: str) -> None:
    part = part.sort_values("rate")
    style = look(name)
    ax.plot(part.rate, part.accuracy, **style)
    ax.fill_between(part.rate, part.low, part.high, color=style["color"], alpha=0.15, linewidth=0)


def _finish(ax: Axes, title: str, chance: float | None) -> None:
    if chance is not None:
        ax.axhline(chance, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        ax.annotate(
            " chance", (0, chance), xycoords=("axes fraction", "data"), ha="left", va="top", fontsize=9
        )
    ax.set(title=title, ylim=(0, 1.03))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(6))
