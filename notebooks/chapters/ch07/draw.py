"""Figures of chapters 01 and 07: what breaks when weights are zeroed, whatever chose them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fichapters.style import GREY, INK, WIDTH, legend_outside, look, new_figure
from fihelpers.measures import MEASURES

LOW = ", low half"
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
    table: pd.DataFrame,
    panels: Mapping[str, Sequence[str]],
    intact: float,
    chance: float | None,
    share: str = "rate",
    part: str = "linear weights",
) -> Figure:
    """Accuracy against the share of weights zeroed, one panel for each group of measures.

    table: of `Trials.table(measure, share)`. intact: the accuracy at share 0. chance: accuracy of guessing,
    drawn as a line.
    """
    figure, axes = new_figure(1, len(panels), size=(WIDTH, 5.6), sharey=True)
    for ax, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            _curve(ax, table[table.measure == name], share, "accuracy", intact, _style(name))
        _finish(ax, title, chance)
        ax.set_xlabel(f"share of {part} zeroed")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, columnspacing=1)
    axes[0, 0].set_ylabel(f"accuracy ({int(table.n.max())} test questions)")
    figure.supxlabel(_bands(table), fontsize=9)
    return figure


def differences(table: pd.DataFrame, title: str) -> Figure:
    """Paired differences with their intervals, one line each; the zero line is "no difference".

    table: of `Trials.compare`, one row a pair.
    """
    figure, axes = new_figure(size=(WIDTH, 0.5 + 0.36 * len(table)))
    ax = axes[0, 0]
    for y, row in enumerate(table.itertuples()):
        style = _style(str(row.first))
        ax.plot([row.low, row.high], [y, y], color=style["color"])
        ax.plot([row.difference], [y], **{**style, "linestyle": "", "markersize": 7})
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_yticks(
        range(len(table)), [f"{a} minus {b}" for a, b in zip(table["first"], table.minus, strict=True)]
    )
    ax.invert_yaxis()
    ax.set_xlabel(f"difference of {title} (n = {int(table.n.max())}, bars: 95 %)")
    ax.grid(axis="y", visible=False)
    return figure


def reading_by_subject(
    table: pd.DataFrame, filters: Sequence[str], intact: Mapping[str, float], chance: float | None
) -> Figure:
    """The top share by FI, a random share, and a random share of the low half.

    table: of `Trials.table(subject, measure, rate)`. A row for each of `filters` ("FI exact"), a panel a
    subject. intact: the accuracy of each at share 0.
    """
    size = (WIDTH, 2.3 * len(filters))
    figure, axes = new_figure(len(filters), len(intact), size=size, sharey=True, sharex=True)
    for line, name in zip(axes, filters, strict=True):
        styles = {
            name: ("FI-high", "#D55E00", "-", "s"),
            "random": ("random", GREY, ":", "o"),
            name + LOW: ("FI-low", "#2F6DB5", "--", "v"),
        }
        for ax, (subject, start) in zip(line, intact.items(), strict=True):
            for measure, (label, colour, dash, marker) in styles.items():
                part = table[(table.subject == subject) & (table.measure == measure)]
                ys = [start, *part.accuracy]
                ax.plot([0, *part.rate], ys, dash, color=colour, marker=marker, label=label)
            _finish(ax, subject, chance)
            _percent(ax, 3)
        line[0].set_ylabel(f"accuracy\n({name})")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncol=3)
    figure.supxlabel(
        f"share of linear weights zeroed ({int(table.n.max())} questions a subject)", fontsize=10
    )
    return figure


def top_dots(table: pd.DataFrame, chance: float | None) -> Figure:
    """Accuracy after zeroing a top share by each measure, with its interval, one panel a cut.

    table: of `Trials.table(which, scope, measure, rate)`. chance: accuracy of guessing, drawn as a line.
    """
    top = table[table.which == "top"]
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
    figure.supxlabel(f"{int(top.n.max())} test questions; {_bands(top)}; dashed: guessing", fontsize=9)
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


def damage_of_text(table: pd.DataFrame, floor: float) -> Figure:
    """The scores of written answers against the share of weights zeroed, a panel each.

    table: of `lab.text_tables`. floor: ROUGE-1 of unrelated answers, drawn as a line.
    """
    figure, axes = new_figure(1, len(TEXT), size=(WIDTH, 4.2), sharex=True)
    for ax, (score, title) in zip(axes[0], TEXT.items(), strict=True):
        for measure, part in table[table.score == score].groupby("measure", sort=False):
            _curve(ax, part, "rate", "value", part.intact.iloc[0], _style(str(measure)))
        ax.set(title=title, ylim=(0, 1.03 if score == "rouge1" else 0.55), xlabel="")
        _percent(ax, 5)
    dashes = (0, (2, 2))
    axes[0, 0].axhline(floor, color=INK, linewidth=0.8, linestyle=dashes, label="unrelated answer")
    axes[0, 0].set_ylabel(f"against intact answers ({int(table.n.max())} prompts)")
    axes[0, 1].set_xlabel("share of linear weights zeroed")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return figure


def text_differences(table: pd.DataFrame, label: str) -> Figure:
    """A measure's score minus that of random zeroing, with its interval, at every rate.

    table: of `Trials.compare(…, "rate")`. label: what the score is.
    """
    measures = [m for m in dict.fromkeys(table["first"]) if not m.endswith(LOW)]
    figure, axes = new_figure(1, len(measures), size=(WIDTH, 3.4), sharey=True)
    for ax, measure in zip(axes[0], measures, strict=True):
        for name in (measure, measure + LOW):
            part = table[table["first"] == name]
            if len(part):
                gaps = [part.difference - part.low, part.high - part.difference]
                label_of = "FI-low" if name.endswith(LOW) else "top share"
                ax.errorbar(
                    part.rate, part.difference, gaps, **{**_style(name), "label": label_of}, capsize=3
                )
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(title=measure)
        _percent(ax, 4)
    axes[0, 0].set_ylabel(f"{label} minus random")
    axes[0, 0].legend(loc="best")
    figure.supxlabel("share of linear weights zeroed", fontsize=10)
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


def _curve(
    ax: Axes, part: pd.DataFrame, share: str, value: str, intact: float, style: dict[str, Any]
) -> None:
    part = part.sort_values(share)
    ax.plot([0, *part[share]], [intact, *part[value]], **style)
    ax.fill_between(part[share], part.low, part.high, color=style["color"], alpha=0.15, linewidth=0)


def _style(measure: str) -> dict[str, Any]:
    """A measure's look; the low half by it has its colour, thin and dotted, with another marker."""
    style = look(measure.removesuffix(LOW))
    if measure.endswith(LOW):
        style |= {"linestyle": ":", "linewidth": 1.0, "marker": "v", "markerfacecolor": "white"}
    return {**style, "label": measure}


def _bands(table: pd.DataFrame) -> str:
    sets = int(table.sets.max())
    return f"bars and bands: 95 % over {f'{sets} calibration sets' if sets > 1 else 'the questions'}"


def _percent(ax: Axes, ticks: int) -> None:
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.xaxis.set_major_locator(MaxNLocator(ticks))
    ax.set_xlim(left=0)


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


def _dot(ax: Axes, y: int, row: object) -> None:
    style = {**look(row.measure), "linestyle": "", "markersize": 7}  # type: ignore[attr-defined]
    ax.plot([row.accuracy], [y], **style)  # type: ignore[attr-defined]
    ax.plot([row.low, row.high], [y, y], color=style["color"])  # type: ignore[attr-defined]
