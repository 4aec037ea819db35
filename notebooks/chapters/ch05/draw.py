"""Figures of chapter 05: prompts and pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from fichapters import plots
from fichapters.style import GREY, WIDTH, new_figure

COLOURS = {"neutral": GREY, "aggressive": "#D55E00", "safe": "#2F6DB5"}
LABELS = {  # of the statistics that a figure shows, in its order
    "ceiling": "odds",
    "damped mean": "damped FI, mean",
    "damped max": "damped FI, maximum",
    "slope mean": "slope, mean",
    "slope max": "slope, maximum",
    "top mean": "top 8 + rest, mean",
    "top max": "top 8 + rest, maximum",
}
PANELS = {  # of the distributions: classes and measure
    "exact, four letters": ("letters", "exact"),
    "damped, four letters": ("letters", "damped"),
    "exact, top 8 + rest": ("top 8 + rest", "exact"),
}
GROUPS = {"trained": "trained wordings", "unseen": "new wordings", "first": "first wording alone"}
LINES = {"neutral": ":", "aggressive": "--", "safe": "-"}


def maps_side_by_side(image: Tensor, maps: Mapping[str, Tensor]) -> Figure:
    """A picture beside its maps of scores, all on one colour scale. maps: {title: (H, W)}."""
    logs = {title: _logs(scores) for title, scores in maps.items()}
    low, high = min(map(_low, logs.values())), max(float(values.max()) for values in logs.values())
    panels = [("picture", image, ""), *((title, values, "") for title, values in logs.items())]
    label = f"log₁₀ damped FI, from {low:.2g} (dark) to {high:.2g} (light)"
    return plots.pictures([panels], (low, high), label)


def masked_case(
    image: Tensor, scores: Tensor, shown: Tensor, chances: Sequence[Sequence[float]], options: Sequence[str]
) -> Figure:
    """A picture, its map, and the masked picture with rings around the mask, with the answers to both.

    chances: the probabilities of the options, before and after.
    """
    said = ["\n".join(f"{p:.2f}  {name}" for p, name in zip(P, options, strict=True)) for P in chances]
    logs = _logs(scores)
    panels = [
        ("picture", image, said[0]),
        ("log₁₀ damped FI", logs, ""),
        ("top pixels black", shown, said[1]),
    ]
    figure = plots.pictures([panels], (_low(logs), float(logs.max())))
    rows, columns = (shown != image).any(0).nonzero(as_tuple=True)
    figure.axes[2].plot(columns, rows, "o", markerfacecolor="none", markeredgecolor="#D55E00", markersize=10)
    return figure


def distributions(pixels: pd.DataFrame) -> Figure:
    """Densities of pixels by log10 FI under the three kinds of instruction, for three scores.

    pixels: counts, with columns kind, classes, measure, log10, count.
    """
    figure, axes = new_figure(1, len(PANELS), size=(WIDTH, 3.4))
    for ax, (title, (classes, measure)) in zip(axes[0], PANELS.items(), strict=True):
        part = pixels[(pixels.classes == classes) & (pixels.measure == measure)]
        step = part.log10.drop_duplicates().diff().median()
        for kind, dash in LINES.items():
            counts = part[part.kind == kind].set_index("log10")["count"]
            ax.plot(counts.index, counts / counts.sum() / step, dash, color=COLOURS[kind], label=kind)
        filled = part[part["count"] > 0].log10
        ax.set(xlim=(filled.min() - 0.3, filled.max() + 0.3), ylim=(0, None))
        ax.set_title(title, fontsize=10)
    each = int(part[part.kind == "safe"]["count"].sum())
    axes[0, 0].set_ylabel("density of pixels")
    figure.supxlabel(f"log₁₀ FI of a pixel (n = {each:,} under each instruction)", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncol=len(LINES))
    return figure


def factors(table: pd.DataFrame, name: str, panels: str, by: str = "") -> Figure:
    """Factors with their intervals on a log scale, a line for each value of the column `name`.

    panels: a column that has a panel for each of its values; by: one whose values have colours. 1 is no
    change.
    """
    shown = table[table.statistic.isin(LABELS)]
    shown = shown.replace({"statistic": LABELS, "group": GROUPS})
    shown = shown.assign(kind=shown.kind + " against neutral")
    label = "factor, all comparisons together"
    figure = plots.forest(shown, name, "factor", by, panels=panels, label=label, line=1)
    for ax in figure.axes:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    return figure


def flips(table: pd.DataFrame) -> Figure:
    """Share of answers that flip, for every mask, by the score that chose it; a panel for each prompt."""
    things = {"pixel": "pixels", "patch": "patches"}
    masks = [f"{n} {things[over]}" for n, over in zip(table["count"], table.over, strict=True)]
    shown, label = table.assign(mask=masks), "share of answers that flip"
    return plots.forest(shown, "mask", "share", "measure", panels="prompt", label=label, line=None)


def _logs(scores: Tensor) -> Tensor:
    return scores.clamp(min=1e-12).log10()


def _low(logs: Tensor) -> float:
    """Where the dark end of a map's colours begins: few pixels are darker."""
    return float(logs.quantile(0.02))
