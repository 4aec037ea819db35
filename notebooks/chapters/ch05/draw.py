"""Figures of chapter 05: prompts and pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from torch import Tensor

from fichapters.style import GREY, INK, SEQUENTIAL, new_figure

COLOURS = {"neutral": GREY, "aggressive": "#D55E00", "safe": "#2F6DB5", "control": "#00805D"}
MARKERS = {"trained": "o", "unseen": "D", "first": "*", "control": "s"}
LINES = {"neutral": ":", "aggressive": "--", "safe": "-"}
MARKS = {"neutral": "o", "aggressive": "^", "safe": "s"}  # where kinds stand side by side


def prompt_effects(table: pd.DataFrame) -> Figure:
    """Accuracy under every prompt, and the change of log P(y_hat) against no instruction.

    table: from `lab.accuracies`.
    """
    figure, axes = new_figure(1, 2, size=(7.2, 0.26 * len(table) + 1.6), sharey=True)
    left, right = axes[0]
    for ax, column, names in (
        (left, "accuracy", ("low", "high")),
        (right, "log_chosen", ("log_chosen_low", "log_chosen_high")),
    ):
        _forest(ax, table, column, names)
    right.axvline(0, color=INK, linewidth=0.8)
    left.set(xlabel=f"accuracy (n = {table.n.max()} pictures)")
    left.set_title("How often it is right")
    right.set(xlabel=f"change of log P(ŷ), nats (n = {table.n.max()})")
    right.set_title("How sure it is, against none")
    _name_rows(left, list(table.prompt))
    _kinds_legend(figure)
    return figure


def distributions(bins: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Densities of pixels by log10 FI under the three kinds of instruction, a panel for each measure.

    bins: rows of `lab.Scan.bins`; titles: {measure: title}.
    """
    figure, axes = new_figure(1, len(titles), size=(7.2, 3.0))
    for ax, (measure, title) in zip(axes[0], titles.items(), strict=True):
        part = bins[bins.measure == measure]
        for kind in ("neutral", "aggressive", "safe"):
            counts = part[part.kind == kind].groupby("log10")["count"].sum()
            if counts.sum():
                share = counts / counts.sum() / 0.1
                ax.plot(share.index, share, LINES[kind], color=COLOURS[kind], label=kind)
        filled = part[part["count"] > 0]["log10"]
        ax.set(xlim=(filled.min() - 0.3, filled.max() + 0.3), ylim=(0, None))
        ax.set_title(title, fontsize=10)
        pixels = part.groupby("kind")["count"].sum().max()
        ax.set_xlabel(f"log₁₀ FI of a pixel\n(n = {int(pixels):,} pixels each)")
    axes[0, 0].set_ylabel("density of pixels")
    axes[0, 0].legend(loc="best")
    return figure


def contrast_forest(table: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """How many times larger a statistic is than under neutral instructions, aggressive and safe beside.

    table: from `lab.contrasts`; labels: {statistic: words}, which sets the rows.
    """
    figure, axes = new_figure(1, 2, size=(7.2, 0.36 * len(labels) + 1.5), sharey=True, sharex=True)
    for ax, kind in zip(axes[0], ("aggressive", "safe"), strict=True):
        for group, shift in (("trained", -0.22), ("unseen", 0.0), ("first", 0.22)):
            part = table[(table.kind == kind) & (table.group == group)].set_index("statistic")
            rows = [(y, part.loc[name]) for y, name in enumerate(labels) if name in part.index]
            for y, row in rows:
                ax.plot([row.low, row.high], [y + shift] * 2, color=COLOURS[kind], linewidth=1.4)
                ax.plot(row.factor, y + shift, MARKERS[group], color=COLOURS[kind], **_face(group, kind))
        ax.axvline(1, color=INK, linewidth=0.8)
        ax.set_xscale("log")
        ax.set_title(f"{kind} against neutral")
        ax.set_xlabel(f"factor (n = {int(table.n.max())} pictures)")
        _plain_log(ax)
    _name_rows(axes[0, 0], list(labels.values()))
    _groups_legend(figure)
    return figure


def wording_forest(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Factor of each statistic under every prompt against no instruction, a panel for each statistic.

    table: from `lab.against_none`; titles: {statistic: title}.
    """
    names = list(dict.fromkeys(table.prompt))
    figure, axes = new_figure(1, len(titles), size=(7.2, 0.26 * len(names) + 1.6), sharey=True)
    for ax, (statistic, title) in zip(axes[0], titles.items(), strict=True):
        part = table[table.statistic == statistic]
        _forest(ax, part, "factor", ("low", "high"))
        ax.axvline(1, color=INK, linewidth=0.8)
        ax.set_xscale("log")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(f"factor against none\n(n = {int(table.n.max())} pictures)")
        _plain_log(ax)
    _name_rows(axes[0, 0], names)
    _kinds_legend(figure)
    return figure


def robustness(accuracy: pd.DataFrame, protection: pd.DataFrame) -> Figure:
    """Accuracy by kind of instruction in every condition, and what the instruction adds to the neutral one.

    accuracy: from `lab.by_condition`; protection: from `lab.protection`.
    """
    figure, axes = new_figure(1, 2, size=(7.2, 4.2), width_ratios=[1.15, 1])
    left, right = axes[0]
    conditions = list(dict.fromkeys(accuracy.condition))
    for ax, table, value, kinds in (
        (left, accuracy, "value", list(dict.fromkeys(accuracy.kind))),
        (right, protection, "difference", ["aggressive", "safe"]),
    ):
        for k, kind in enumerate(kinds):
            part = table[table.kind == kind].set_index("condition").loc[conditions]
            x = np.arange(len(conditions)) + 0.17 * (k - (len(kinds) - 1) / 2)
            colour = COLOURS.get(kind, INK)
            ax.vlines(x, part.low, part.high, color=colour, linewidth=1.4)
            ax.plot(x, part[value], MARKS.get(kind, "D"), color=colour, markersize=4, label=kind)
        ax.set_xticks(range(len(conditions)), conditions, rotation=40, ha="right", rotation_mode="anchor")
        ax.grid(axis="x", visible=False)
    right.axhline(0, color=INK, linewidth=0.8)
    left.set(ylabel=f"accuracy, 95 % (n = {int(accuracy.n.max())} pictures)")
    left.set_title("Corrupted pictures")
    right.set(ylabel=f"accuracy less neutral's, 95 %\n(n = {int(protection.n.max())} pictures)")
    right.set_title("Difference, paired")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(labels))
    return figure


def flip_bars(table: pd.DataFrame) -> Figure:
    """Share of answers that change when the top pixels or patches are black, with Wilson's intervals.

    table: from `lab.flip_table`.
    """
    colours = {"FI damped": "#9B6FC4", "FI exact": "#08306B", "random": GREY}
    groups = list(dict.fromkeys(zip(table["unit"], table["number"], strict=True)))
    figure, axes = new_figure(size=(7.2, 3.4))
    ax = axes[0, 0]
    for j, (way, colour) in enumerate(colours.items()):
        part = table[table.way == way]
        at = [
            groups.index((u, c)) + 0.27 * (j - 1) for u, c in zip(part["unit"], part["number"], strict=True)
        ]
        ax.bar(at, part.share, 0.25, color=colour, label=way)
        bars = [(part.share - part.low).clip(lower=0), part.high - part.share]
        ax.errorbar(at, part.share, bars, fmt="none", ecolor=INK, elinewidth=1)
    ax.set_xticks(range(len(groups)), [f"{number} {unit}" for unit, number in groups])
    ax.set(xlabel="masked with black", ylabel=f"answers that flip (n = {table.n.max()})")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(loc="upper left")
    ax.grid(axis="x", visible=False)
    return figure


def show_case(
    image: Tensor, scores: Tensor, shown: Tensor, before: Sequence[float], after: Sequence[float],
    options: Sequence[str],
) -> Figure:  # fmt: skip
    """One picture, its map of FI, the masked picture with rings around the mask, and both answers."""
    figure, axes = new_figure(1, 4, size=(7.2, 2.5), width_ratios=[1, 1.2, 1, 1.3])
    first, second, third, last = axes[0]
    _picture(first, image)
    heat = second.imshow(scores.clamp(min=1e-12).log10().numpy(), cmap=SEQUENTIAL)
    figure.colorbar(heat, ax=second, shrink=0.6)
    _bare(second)
    _picture(third, shown)
    rows, columns = (shown != image).any(0).nonzero(as_tuple=True)
    third.plot(columns, rows, "o", markerfacecolor="none", markeredgecolor="#D55E00", markersize=10)
    for ax, title in zip(axes[0], ("picture", "log₁₀ FI", "top pixels masked", "P(answer)"), strict=True):
        ax.set_title(title, fontsize=10)
    y = np.arange(len(options))
    last.barh(y - 0.2, before, 0.38, color=GREY, label="before")
    last.barh(y + 0.2, after, 0.38, color="#D55E00", label="after")
    last.set_yticks(y, [f"{'ABCDEF'[i]}. {option}" for i, option in enumerate(options)])
    last.set(xlim=(0, 1))
    last.invert_yaxis()
    last.grid(axis="y", visible=False)
    last.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncol=2, columnspacing=1)
    return figure


def map_frame(image: Tensor, scores: Tensor, limits: tuple[float, float], title: str) -> Figure:
    """One picture beside its map of FI, on a colour scale that all frames share. limits: of log10 FI."""
    figure, axes = new_figure(1, 2, size=(6.4, 3.0), width_ratios=[1, 1.25])
    _picture(axes[0, 0], image)
    heat = axes[0, 1].imshow(
        scores.clamp(min=1e-12).log10().numpy(), cmap=SEQUENTIAL, vmin=limits[0], vmax=limits[1]
    )
    _bare(axes[0, 1])
    figure.colorbar(heat, ax=axes[0, 1], shrink=0.85, label="log₁₀ damped FI")
    axes[0, 0].set_title("picture", fontsize=10)
    axes[0, 1].set_title(title, fontsize=10)
    return figure


def closeness_scatter(changes: pd.DataFrame) -> Figure:
    """Change of the closeness of picture and text against the change of log FI, a point a pair."""
    figure, axes = new_figure(size=(7.2, 3.6))
    ax = axes[0, 0]
    for kind, part in changes.groupby("kind", sort=False):
        ax.plot(part.closer, part.change, ".", color=COLOURS[str(kind)], alpha=0.35, markersize=4)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set(
        xlabel="change of the cosine between picture and text", ylabel="change of log mean damped FI",
    )  # fmt: skip
    ax.set_title(f"Against no instruction (n = {len(changes)} pairs of picture and wording)")
    _kinds_legend(figure)
    return figure


def _forest(ax: Axes, table: pd.DataFrame, column: str, names: tuple[str, str]) -> None:
    for y, row in enumerate(table.to_dict("records")):
        colour = COLOURS[row["kind"]]
        ax.plot([row[names[0]], row[names[1]]], [y, y], color=colour, linewidth=1.4)
        ax.plot(row[column], y, MARKERS[row["group"]], color=colour, **_face(row["group"], row["kind"]))


def _face(group: str, kind: str) -> dict[str, Any]:
    return {"markerfacecolor": "white" if group == "unseen" else COLOURS[kind]}


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _plain_log(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def _kinds_legend(figure: Figure) -> None:
    handles = [Line2D([], [], color=c, marker="o", linestyle="", label=k) for k, c in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncol=len(handles))


def _groups_legend(figure: Figure) -> None:
    labels = {"trained": "trained wordings", "unseen": "new wordings", "first": "first wording alone"}
    handles = [
        Line2D([], [], color=INK, marker=MARKERS[group], linestyle="", label=label,
               markerfacecolor="white" if group == "unseen" else INK)
        for group, label in labels.items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncol=len(handles))


def _picture(ax: Axes, image: Tensor) -> None:
    ax.imshow(image.permute(1, 2, 0).round().byte().numpy())
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
