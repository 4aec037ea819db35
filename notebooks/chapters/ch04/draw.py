"""Figures of chapter 04: pictures, maps of fragile pixels, masks, and what they do to the answer."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fichapters import plots
from fichapters.ch04.lab import FI, PAPER, Case
from fichapters.papers import published
from fichapters.style import INK, SEQUENTIAL, WIDTH, new_figure
from fihelpers.evaluate.questions import Outcome
from fihelpers.scores.pixels import image_of
from fihelpers.tasks import Example

RIGHT, WRONG = "#2F6DB5", "#C9C9C9"  # bars of the right answer and of the others
NOISES = {  # what the earlier version's figure is called -> the change
    "noise_fi": "FI damped 0.0001",
    "noise_poisson": "Poisson",
    "noise_salt": "salt & pepper",
    "noise_speckle": "speckle",
    "noise_erasing": "random erasing",
}


def gallery(examples: Sequence[Example], outcome: Outcome, each: int = 2) -> Figure:
    """The first pictures of every subject with their questions and P of the options; the right one is marked.

    outcome: what was answered to the examples.
    """
    subjects = dict.fromkeys(e.subject for e in examples)
    places = [[i for i, e in enumerate(examples) if e.subject == s][:each] for s in subjects]
    figure, axes = new_figure(each, len(places), size=(WIDTH, 3.3 * each))
    for ax in axes.flat:
        ax.axis("off")
    for column, here in zip(axes.T, places, strict=True):
        for ax, place in zip(column, here, strict=False):
            example = examples[place]
            _picture(ax, image_of(example), example.subject)
            lines = [textwrap.fill(example.question, 23)]
            said = outcome.log_probs[place].exp().tolist()
            for i, (option, p) in enumerate(zip(example.options, said, strict=False)):
                lines.append(f"{'✓' if i == example.answer else '  '} {'ABCDEF'[i]}. {option}  {p:.2f}")
            ax.text(0, -0.05, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=9)
    return figure


def one_picture(
    example: Example, maps: Mapping[str, Tensor], hidden: Mapping[int, Tensor], probs: Tensor
) -> Figure:
    """A picture, its maps (H, W), itself with more and more pixels hidden, and P of the options each time.

    hidden: pictures by the number of hidden pixels, from 0 on; probs: of these, (len(hidden), K).
    """
    figure, axes = new_figure(3, len(hidden), size=(WIDTH, 6.2), height_ratios=(1.2, 1.2, 1))
    for ax in axes[:2].flat:
        ax.axis("off")
    for ax, (name, values) in zip(axes[0], maps.items(), strict=False):
        ax.imshow(values.numpy(), cmap=SEQUENTIAL, vmax=float(values.quantile(0.99)), interpolation="nearest")
        ax.set_title(textwrap.fill(name, 16), fontsize=9)
    for column, (count, image) in enumerate(hidden.items()):
        _picture(axes[1, column], image, f"{count} hidden" if count else "untouched")
        _bars(axes[2, column], probs[column], example, column == 0)
    figure.suptitle(example.question, fontsize=11)
    return figure


def setting_maps(image: Tensor, maps: Mapping[str, tuple[Tensor, float]]) -> Figure:
    """One picture and its map under every setting, each from 0 to its own 99th percentile.

    maps: values of any grid and the ceiling of FI, from `lab.setting_maps`. The title gives the spread of a
    map of FI as a share of the ceiling: the 5th and the 95th percentile.
    """
    figure, axes = new_figure(2, 5, size=(WIDTH, 4.1))
    for ax in axes.flat:
        ax.axis("off")
    _picture(axes[0, 0], image, "the picture")
    for ax, (name, (values, top)) in zip(axes.flat[1:], maps.items(), strict=False):
        grid = values.mean(0) if values.dim() == 3 else values
        highest = float(grid.quantile(0.99)) or 1.0
        ax.imshow(grid.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=highest, interpolation="nearest")
        low, high = np.quantile(values.double().numpy(), [0.05, 0.95]) / top
        told = "" if "Jacobian" in name else f"{low:.2g} to {high:.2g}"
        ax.set_title(f"{name.replace(', ', ',' + chr(10))}\n{told}", fontsize=9, fontweight="normal")
    return figure


def ten_pixels(table: pd.DataFrame) -> Figure:
    """What ten pixels cost, by measure and category, beside the paper's mean over its models.

    table: of `lab.by_category`. Hollow: the paper's, where FI has no filter that it names.
    """
    counts = table.groupby("subject").n.max()
    shown = table.assign(subject=[f"{s}\nn = {counts[s]}" for s in table.subject])
    figure = plots.forest(shown, "measure", panels="subject", label="accuracy minus that of the untouched")
    names = list(dict.fromkeys(table.measure))
    start = published("pixels_original").value
    marks = dict.fromkeys(FI, "pixels_fi")
    marks |= {"Jacobian norm": "pixels_jacobian", "saliency": "pixels_saliency", "random": "pixels_random"}
    whole = figure.axes[-1]
    for name, key in marks.items():
        lost = published(key).value - start
        whole.plot([lost], [names.index(name)], "D", color=INK, markerfacecolor="none", label="published")
    for ax in figure.axes:
        ax.xaxis.set_major_locator(MaxNLocator(2))
    figure.legend([whole.lines[-1]], ["the paper, mean of its models"], loc="outside upper center")
    return figure


def duels(*tables: pd.DataFrame) -> Figure:
    """FI minus the paper's other measures, a panel for each mask; tables: of `lab.duels`."""
    forms = {"count": "{:g} pixels", "share": "{:.0%} of the pixels", "patches": "{:g} patches"}
    both = pd.concat(tables)
    both = both[both.other.isin(PAPER)]
    both["masked"] = [forms[kind].format(n) for kind, n in zip(both.kind, both.amount, strict=True)]
    return plots.forest(both, "fi", by="other", panels="masked", label="log P, FI minus the other, nats")


def falls(table: pd.DataFrame) -> Figure:
    """What changes do to P of the right answer, beside the earlier version's one picture (hollow).

    table: of `Trials.compare` with the untouched pictures.
    """
    before = published("noise_before").value
    marks = {change: published(key).value - before for key, change in NOISES.items()}
    return plots.forest(table, "first", label="P of the right answer minus untouched", marks=marks)


def covered(case: Case, count: int) -> Tensor:
    """The case's picture with that many of its pixels black."""
    return case.image * ~case.masks[count] if count else case.image


def _picture(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.permute(1, 2, 0).clamp(0, 255).round().byte().numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=9)


def _bars(ax: Axes, probs: Tensor, example: Example, named: bool) -> None:
    right = [i == example.answer for i in range(len(probs))]
    ax.barh(range(len(probs)), probs.tolist(), color=[RIGHT if r else WRONG for r in right])
    for y, p in enumerate(probs.tolist()):
        inside = p > 0.6
        colour = "white" if inside and right[y] else INK
        x, side = (p - 0.03, "right") if inside else (p + 0.03, "left")
        ax.text(x, y, f"{p:.2f}", va="center", ha=side, fontsize=9, color=colour)
    ax.set(xlim=(0, 1), xlabel="P")
    ax.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
    names = [f"{'ABCDEF'[i]}. {option}" for i, option in enumerate(example.options)]
    ax.set_yticks(range(len(probs)), names if named else [""] * len(probs))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
