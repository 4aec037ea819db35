"""Figures of chapters 01 and 07: what breaks when weights are zeroed, whatever chose them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fichapters import plots
from fichapters.style import INK, LOW_HALF, WIDTH, legend_outside, look, new_figure
from fihelpers.measures import MEASURES

PANELS = {
    "FI, by spectral filter": [m for m in MEASURES if m.startswith("FI")] + ["random"],
    "Other measures": ["FI exact", *(m for m in MEASURES if not m.startswith("FI"))],
}
PRUNING_PANELS = {
    "FI beside Wanda": ["FI exact", "FI damped 0.0001", "Wanda", "random"],
    "Scores that know the weight's size": [
        "SNIP", "information length", "magnitude", "Taylor", "Wanda", "SparseGPT",
    ],
}  # fmt: skip
TEXT = {"rouge1": "ROUGE-1", "win_rate": "win rate", "length_controlled": "at equal length"}


def damage_curves(
    table: pd.DataFrame, panels: Mapping[str, Sequence[str]], intact: float, chance: float | None
) -> Figure:
    """Accuracy against the share of weights zeroed, one panel for each group of measures.

    table: of `Trials.table("measure", "rate")`. intact: the accuracy at share 0. chance: that of guessing,
    drawn as a line.
    """
    share = f"share of linear weights zeroed (bands: 95 % {_over(table)})"
    labels = (share, f"accuracy ({int(table.n.max())} test questions)")
    levels = {} if chance is None else {"guessing": chance}
    return plots.curves(table, "rate", panels=panels, start=intact, levels=levels, labels=labels, columns=2)


def differences(table: pd.DataFrame, title: str) -> Figure:
    """Paired differences with their intervals, one line each; the zero line is "no difference".

    table: of `Trials.compare`, one row a pair.
    """
    return plots.forest(
        table.assign(pair=table["first"] + " minus " + table.minus), "pair", label=f"difference of {title}"
    )


def top_dots(table: pd.DataFrame, chance: float | None) -> Figure:
    """Accuracy after zeroing a top share by each measure, with its interval, one panel a cut.

    table: of `Trials.table(which, scope, measure, rate)`. chance: accuracy of guessing, drawn as a line.
    """
    top = table[table.which == "top"]
    places = top.scope.map({"global": "all weights", "layer": "each layer"})
    shown = top.assign(cut=[f"top {100 * r:g}% of\n{p}" for r, p in zip(top.rate, places, strict=True)])
    label = f"accuracy {_over(top)}; the line is guessing"
    return plots.forest(shown, "measure", "accuracy", line=chance, panels="cut", label=label)


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


def damage_of_text(table: pd.DataFrame, floor: float | None = None, scale: str = "percent") -> Figure:
    """The scores of written answers against the share of weights zeroed, a panel each.

    table: of `lab.text_tables`. floor: ROUGE-1 of unrelated answers, drawn as a line. scale: of the shares.
    """
    shown = table.assign(panel=table.score.map(TEXT))
    starts = None if scale == "log" else shown.groupby("panel").intact.first().to_dict()
    dashed = "" if floor is None else " (dashed: ROUGE-1 of unrelated answers)"
    asked = f"against intact answers ({int(table.n.max())} prompts)"
    labels = (f"share of linear weights zeroed{dashed}", asked)
    figure = plots.curves(shown, "rate", "value", panels="panel", start=starts, labels=labels, scale=scale)
    if floor is not None:
        figure.axes[0].axhline(floor, color=INK, linewidth=0.8, linestyle=plots.DASHED)
    return figure


def text_differences(table: pd.DataFrame, label: str) -> Figure:
    """A measure's score minus that of random zeroing, with its interval, at every rate.

    table: of `Trials.compare(…, "rate")`. label: what the score is.
    """
    names = table["first"]
    half = names.str.endswith(LOW_HALF).map({True: "FI-low", False: "top share"})
    shown = table.assign(measure=names.str.removesuffix(LOW_HALF), half=half)
    return plots.curves(
        shown, "rate", "difference", "half", "measure",
        levels={"no difference": 0}, labels=("share of linear weights zeroed", f"{label} minus random"),
    )  # fmt: skip


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


def _over(table: pd.DataFrame) -> str:
    """What the intervals of a table are over."""
    sets = int(table.sets.max())
    return f"over {sets} calibration sets" if sets > 1 else "over the questions"
