"""Figures of chapter 04: maps of fragile pixels, masks, and what they do to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from torch import Tensor

from fichapters.ch04.lab import RANDOM, Case
from fichapters.style import INK, SEQUENTIAL, WIDTH, look, new_figure
from fihelpers.tasks import Example

RIGHT, WRONG = "#2F6DB5", "#C9C9C9"  # bars of the right answer and of the others


def gallery(pictures: Sequence[tuple[Tensor, Example, Tensor]], columns: int = 4) -> Figure:
    """Pictures (3, H, W) with their questions, their options and P of each; the right one is marked."""
    rows = -(-len(pictures) // columns)
    figure, axes = new_figure(rows, columns, size=(WIDTH, 3.3 * rows))
    for ax in axes.flat:
        ax.axis("off")
    for ax, (image, example, probs) in zip(axes.flat, pictures, strict=False):
        _picture(ax, image, example.subject)
        lines = [_wrapped(example.question, 23)]
        for i, (option, p) in enumerate(zip(example.options, probs.tolist(), strict=True)):
            mark = "✓" if i == example.answer else "  "
            lines.append(f"{mark} {'ABCDEF'[i]}. {option}  {p:.2f}")
        ax.text(0, -0.05, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=9)
    return figure


def setting_maps(image: Tensor, maps: Mapping[str, tuple[Tensor, float]]) -> Figure:
    """One picture and its map under every setting, each from 0 to its own 99th percentile.

    maps: values of any grid and the ceiling of FI. The title gives the spread of the map as a share of the
    ceiling: the 5th and the 95th percentile.
    """
    figure, axes = new_figure(2, 5, size=(WIDTH, 4.1))
    for ax in axes.flat:
        ax.axis("off")
    _picture(axes[0, 0], image, "the picture")
    axes[0, 0].set_title("the picture", fontsize=9)
    for ax, (name, (values, top)) in zip(axes.flat[1:], maps.items(), strict=False):
        grid = values.mean(0) if values.dim() == 3 else values
        ax.imshow(
            grid.numpy(),
            cmap=SEQUENTIAL,
            vmin=0,
            vmax=float(grid.quantile(0.99)) or 1.0,
            interpolation="nearest",
        )
        low, high = np.quantile(values.double().numpy(), [0.05, 0.95])
        share = 1.0 if "Jacobian" in name else top
        told = f"{low / share:.2g} to {high / share:.2g}"
        ax.set_title(f"{name.replace(', ', ',' + chr(10))}\n{told}", fontsize=9, fontweight="normal")
    return figure


def deletion_curves(
    table: pd.DataFrame, panels: Mapping[str, Sequence[str]], xlabel: str, percent: bool
) -> Figure:
    """log P of the right answer (above) and accuracy (below) against the amount masked, by measure.

    table: from `lab.curves`; amounts are shares (percent) or counts, drawn at even steps.
    """
    figure, axes = new_figure(2, len(panels), size=(WIDTH, 6.4), sharey="row", sharex=True)
    steps = sorted(table.amount.unique())
    for column, (title, names) in enumerate(panels.items()):
        for name in names:
            part = table[table.measure == name].sort_values("amount")
            x = part.amount if percent else [steps.index(a) for a in part.amount]
            for row, value in enumerate(("log_prob", "accuracy")):
                axes[row, column].plot(x, part[value], **look(name))
        axes[0, column].set_title(title)
        bottom = axes[1, column]
        bottom.set_xlabel(xlabel)
        if percent:
            bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            bottom.set_xticks(range(len(steps)), [f"{s:g}" for s in steps])
        bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=2, columnspacing=1.0)
    n = int(table.n.max())
    axes[0, 0].set_ylabel(f"log P, right answer (nats, n = {n})")
    axes[1, 0].set_ylabel(f"accuracy (n = {n})")
    return figure


def area_dots(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Mean height of the deletion curve of log P less that of random masks, with intervals; a panel each."""
    figure, axes = new_figure(1, len(tables), size=(WIDTH, 4.0), sharey=True)
    order = list(next(iter(tables.values())).sort_values("less_log_prob", ascending=False).index.drop(RANDOM))
    for ax, (title, table) in zip(axes[0], tables.items(), strict=True):
        for y, name in enumerate(order):
            row = table.loc[name]
            _dot(ax, row.less_log_prob, row.less_log_prob_low, row.less_log_prob_high, y, look(name))
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.set_title(f"{title} (n = {int(table.n.max())})")
    axes[0, 0].set_yticks(range(len(order)), order)
    figure.supxlabel(
        "mean height of the curve of log P, less that of random masks (nats; left: more damage)", fontsize=10
    )
    return figure


def ratio_dots(table: pd.DataFrame) -> Figure:
    """Mean score on drawn things over that on the paper, by setting, with intervals."""
    figure, axes = new_figure(size=(WIDTH, 3.2))
    ax = axes[0, 0]
    for y, row in enumerate(table.itertuples()):
        _dot(ax, row.ratio, row.low, row.high, y, {"color": "#2F6DB5", "marker": "o"})
    ax.axvline(1, color=INK, linewidth=0.8)
    ax.set_yticks(range(len(table)), table.index)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel=f"mean on drawn things / mean on the paper (n = {int(table.n.max())})")
    ax.xaxis.set_major_locator(LogLocator(base=2))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    return figure


def fill_dots(tables: Mapping[str, pd.DataFrame], names: Sequence[str], share: float) -> Figure:
    """What each fill does at one share: log P less that of random masks with the same fill, by measure."""
    figure, axes = new_figure(1, len(tables), size=(WIDTH, 3.2), sharey=True, sharex=True)
    for ax, (fill, table) in zip(axes[0], tables.items(), strict=True):
        for y, name in enumerate(names):
            row = table.loc[name]
            _dot(ax, row.log_prob, row.log_prob_low, row.log_prob_high, y, look(name))
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.set_title(fill)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    n = int(next(iter(tables.values())).n.max())
    figure.supxlabel(
        f"log P less that of random masks of {share:.0%} of the pixels (nats, n = {n})", fontsize=10
    )
    return figure


def case_figure(case: Case) -> Figure:
    """The picture, its map, the mask that was shown, and the answer before and after."""
    figure, axes = new_figure(2, 3, size=(WIDTH, 5.0), height_ratios=(1.5, 1))
    count = case.shown
    _picture(axes[0, 0], case.image, "picture")
    axes[0, 1].imshow(case.scores.numpy(), cmap=SEQUENTIAL, interpolation="nearest")
    axes[0, 1].set_title(case.measure)
    _picture(axes[0, 2], covered(case, count), f"{count} pixels masked")
    for ax in axes[0]:
        ax.axis("off")
    more = max(case.masks)
    for ax, n in zip(axes[1], (0, count, more), strict=True):
        _bars(ax, case.probs[n], case.example, f"{n} masked" if n else "untouched", ax is axes[1, 0])
    figure.suptitle(case.example.question, fontsize=11)
    return figure


def covered(case: Case, count: int) -> Tensor:
    """The case's picture with that many of its pixels black."""
    return case.image * ~case.masks[count] if count else case.image


def noise_pictures(case: Case, pictures: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """The same picture under the mask and under noises, (image, P of the options) by name."""
    figure, axes = new_figure(2, len(pictures), size=(WIDTH, 3.2), height_ratios=(1.1, 1))
    for column, (name, (image, probs)) in enumerate(pictures.items()):
        _picture(axes[0, column], image, "")
        axes[0, column].set_title(name, fontsize=9)
        axes[0, column].axis("off")
        _bars(axes[1, column], probs, case.example, "", column == 0)
    return figure


def _picture(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.permute(1, 2, 0).clamp(0, 255).round().byte().numpy(), interpolation="nearest")
    ax.set_title(title)


def _bars(ax: Axes, probs: Tensor, example: Example, title: str, named: bool) -> None:
    right = [i == example.answer for i in range(len(probs))]
    ax.barh(range(len(probs)), probs.tolist(), color=[RIGHT if r else WRONG for r in right])
    for y, p in enumerate(probs.tolist()):
        inside = p > 0.6
        colour = "white" if inside and right[y] else INK
        x, side = (p - 0.03, "right") if inside else (p + 0.03, "left")
        ax.text(x, y, f"{p:.2f}", va="center", ha=side, fontsize=9, color=colour)
    ax.set(xlim=(0, 1), xlabel="P")
    ax.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
    ax.set_title(title, fontsize=10)
    names = [f"{'ABCDEF'[i]}. {option}" for i, option in enumerate(example.options)]
    ax.set_yticks(range(len(probs)), names if named else [""] * len(probs))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def _dot(ax: Axes, middle: float, low: float, high: float, y: float, style: Mapping[str, object]) -> None:
    ax.plot([low, high], [y, y], color=style["color"], linewidth=1.4)
    ax.plot([middle], [y], color=style["color"], marker=style["marker"], linestyle="none")


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
