"""Figures of chapter 05: prompts and pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from fichapters.plots import forest
from fichapters.style import GREY, INK, SEQUENTIAL, WIDTH, new_figure

COLOURS = {
    "neutral": GREY, "aggressive": "#D55E00", "safe": "#2F6DB5", "control": "#00805D", "your own": "#9B6FC4",
}  # fmt: skip
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
LINES = {"neutral": ":", "aggressive": "--", "safe": "-"}
GROUPS = {  # of wordings: marker, whether it is filled, words
    "trained": ("o", True, "trained wordings"),
    "unseen": ("D", False, "new wordings"),
    "first": ("*", True, "first wording alone"),
    "control": ("s", True, ""),  # which its colour says
}


def maps_side_by_side(image: Tensor, maps: Mapping[str, Tensor]) -> Figure:
    """A picture beside its maps of scores, all on one colour scale. maps: {title: (H, W)}."""
    figure, axes = new_figure(1, 1 + len(maps), size=(WIDTH, 2.3))
    _picture(axes[0, 0], image, "picture")
    logs = {title: scores.clamp(min=1e-12).log10().numpy() for title, scores in maps.items()}
    low = min(float(pd.Series(values.ravel()).quantile(0.02)) for values in logs.values())
    high = max(float(values.max()) for values in logs.values())
    for ax, (title, values) in zip(axes[0, 1:], logs.items(), strict=True):
        heat = ax.imshow(values, cmap=SEQUENTIAL, vmin=low, vmax=high)
        _bare(ax, title)
    figure.colorbar(heat, ax=axes[0, -1], shrink=0.7, label="log₁₀ damped FI")
    return figure


def masked_case(
    image: Tensor, scores: Tensor, shown: Tensor, chances: Sequence[Sequence[float]], options: Sequence[str]
) -> Figure:
    """A picture, its map, the masked picture with rings around the mask, and the answers before and after.

    chances: the probabilities of the options, before and after.
    """
    figure, axes = new_figure(2, 2, size=(6.4, 5.4), width_ratios=[1, 1.25])
    _picture(axes[0, 0], image, "picture")
    heat = axes[0, 1].imshow(scores.clamp(min=1e-12).log10().numpy(), cmap=SEQUENTIAL)
    figure.colorbar(heat, ax=axes[0, 1], label="log₁₀ damped FI")
    _bare(axes[0, 1], "map")
    _picture(axes[1, 0], shown, "top pixels black")
    rows, columns = (shown != image).any(0).nonzero(as_tuple=True)
    ring = {"markerfacecolor": "none", "markeredgecolor": "#D55E00", "markersize": 10}
    axes[1, 0].plot(columns, rows, "o", **ring)
    bars, places = axes[1, 1], range(len(options))
    bars.barh([y - 0.2 for y in places], chances[0], 0.38, color=GREY, label="before")
    bars.barh([y + 0.2 for y in places], chances[1], 0.38, color="#D55E00", label="after")
    bars.set_yticks(places, options)
    bars.invert_yaxis()
    bars.set(xlim=(0, 1), xlabel="probability of the answer")
    bars.grid(axis="y", visible=False)
    bars.legend(loc="lower right")
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


def factors(table: pd.DataFrame, name: str, panels: str, shown: Sequence[str]) -> Figure:
    """Factors with their intervals on a log scale, a line for each value of the column `name`.

    panels: the column that has a panel for each value of `shown`. Colours are kinds of prompts, marks are
    groups of wordings; 1 is no change.
    """
    table = table[table.statistic.isin(LABELS)]
    names = list(dict.fromkeys(table[name]))
    most = table.groupby([name, panels]).size().max()
    size = (WIDTH, 1.6 + len(names) * (0.22 + 0.09 * most))
    figure, axes = new_figure(1, len(shown), size=size, sharey=True)
    for ax, value in zip(axes[0], shown, strict=True):
        for (one,), part in table[table[panels] == value].groupby([name], sort=False):
            for k, row in enumerate(part.to_dict("records")):
                place = names.index(one) + 0.24 * (k - (len(part) - 1) / 2)
                colour, (mark, filled, _) = COLOURS[row["kind"]], GROUPS[row["group"]]
                ax.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.4)
                ax.plot(
                    row["factor"], place, mark, color=colour, markerfacecolor=colour if filled else "white"
                )
        ax.axvline(1, color=INK, linewidth=0.8)
        ax.set_title(LABELS.get(value, f"{value} against neutral"), fontsize=10)
        _plain_log(ax)
    axes[0, 0].set_yticks(range(len(names)), [LABELS.get(one, one) for one in names])
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"factor (n = {int(table.n.max())} pictures; bars: 95 % for all together)", fontsize=10)
    figure.legend(handles=_handles(table), loc="outside upper center", ncol=3)
    return figure


def flips(table: pd.DataFrame) -> Figure:
    """Share of answers that flip, for every mask, by the score that chose it; a panel for each prompt."""
    things = {"pixel": "pixels", "patch": "patches"}
    masks = [
        f"{row.number} {things[row.over]}" for row in table.rename(columns={"count": "number"}).itertuples()
    ]
    label = "share of answers that flip"
    return forest(
        table.assign(mask=masks), "mask", "share", by="measure", panels="prompt", label=label, line=None
    )


def _handles(table: pd.DataFrame) -> list[Line2D]:
    """A legend of the groups and the kinds that a table has."""
    handles = []
    for group, (mark, filled, label) in GROUPS.items():
        if label and group in set(table.group):
            face = INK if filled else "white"
            handles.append(
                Line2D([], [], color=INK, marker=mark, linestyle="", label=label, markerfacecolor=face)
            )
    kinds = [kind for kind in COLOURS if kind in set(table.kind)]
    return handles + [Line2D([], [], color=COLOURS[kind], linewidth=3, label=kind) for kind in kinds]


def _plain_log(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def _picture(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.permute(1, 2, 0).round().byte().numpy())
    _bare(ax, title)


def _bare(ax: Axes, title: str) -> None:
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    ax.grid(False)
