"""Figures of the second half of chapter 07: generated text after weights are zeroed."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fichapters.style import INK, WIDTH, look, new_figure

LOW = ", low half"
TITLES = {
    "rouge1": "ROUGE-1",
    "win_rate": "win rate",
    "length_controlled": "at equal length",
}


def damage_of_text(table: pd.DataFrame, floor: float | None = None) -> Figure:
    """The three scores of the answers against the share of weights zeroed, a panel each.

    table: from `experiments.generation.summary`. floor: ROUGE-1 of unrelated answers, drawn as a line.
    """
    figure, axes = new_figure(1, len(TITLES), size=(WIDTH, 4.2), sharex=True)
    for ax, (score, title) in zip(axes[0], TITLES.items(), strict=True):
        for measure, part in table.groupby("measure", sort=False):
            _curve(ax, part.sort_values("rate"), score, _style(str(measure)))
        ax.set(title=title, ylim=(0, 1.03 if score == "rouge1" else 0.55), xlabel="")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlim(left=0)
    if floor is not None:
        dashes = (0, (2, 2))
        axes[0, 0].axhline(floor, color=INK, linewidth=0.8, linestyle=dashes, label="unrelated answer")
    axes[0, 0].set_ylabel(f"against intact answers ({int(table.n.max())} prompts)")
    axes[0, 1].set_xlabel("share of linear weights zeroed")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return figure


def differences_from_random(found: pd.DataFrame, label: str) -> Figure:
    """A measure's score minus that of random zeroing, with its interval, at every rate.

    found: from `experiments.generation.differences`. label: what the score is.
    """
    measures = [m for m in dict.fromkeys(found.measure) if not m.endswith(LOW)]
    figure, axes = new_figure(1, len(measures), size=(WIDTH, 3.4), sharey=True)
    for ax, measure in zip(axes[0], measures, strict=True):
        for name in (measure, measure + LOW):
            part = found[found.measure == name]
            if len(part):
                style = _style(name)
                gaps = [part.difference - part.low, part.high - part.difference]
                label_of = "FI-low" if name.endswith(LOW) else "top share"
                ax.errorbar(part.rate, part.difference, gaps, **{**style, "label": label_of}, capsize=3)
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(title=measure)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlim(left=0)
    axes[0, 0].set_ylabel(f"{label} minus random")
    axes[0, 0].legend(loc="best")
    figure.supxlabel("share of linear weights zeroed", fontsize=10)
    return figure


def _curve(ax: Axes, part: pd.DataFrame, score: str, style: dict[str, Any]) -> None:
    ax.plot(part.rate, part[score], **style)
    low, high = part[f"{score}_low"], part[f"{score}_high"]
    ax.fill_between(part.rate, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _style(measure: str) -> dict[str, Any]:
    """A measure's look; the low half by it has its colour, thin and dotted, with another marker."""
    style = look(measure.removesuffix(LOW))
    if measure.endswith(LOW):
        style |= {"linestyle": ":", "linewidth": 1.0, "marker": "v", "markerfacecolor": "white"}
    return {**style, "label": measure}
