"""Figures of chapter 04: pictures, maps of fragile pixels, masks, and what they do to the answer."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fichapters import plots
from fichapters.ch04.lab import FI, PAPER
from fichapters.papers import published
from fichapters.style import INK
from fihelpers.evaluate.questions import Outcome
from fihelpers.scores.pixels import image_of
from fihelpers.tasks import Example

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
    drawn: dict[str, list[tuple[str, Tensor, str]]] = {}
    for example, probs in zip(examples, outcome.log_probs.exp(), strict=True):
        text = f"{textwrap.fill(example.question, 23)}\n{options(example, probs)}"
        drawn.setdefault(example.subject, []).append((example.subject, image_of(example), text))
    columns = [panels[:each] for panels in drawn.values()]
    return plots.pictures(list(zip(*columns, strict=False)))


def one_picture(
    example: Example, maps: Mapping[str, Tensor], hidden: Mapping[int, Tensor], probs: Tensor
) -> Figure:
    """A picture, its maps (H, W), itself with more and more pixels hidden, and P of the options each time.

    hidden: pictures by the number of hidden pixels, from 0 on; probs: of these, (len(hidden), K).
    """
    first = [(textwrap.fill(name, 24), values, "") for name, values in maps.items()]
    second = [
        (f"{count} hidden" if count else "untouched", image, options(example, p))
        for (count, image), p in zip(hidden.items(), probs, strict=True)
    ]
    return plots.pictures([first, second], label=example.question)


def setting_maps(image: Tensor, maps: Mapping[str, tuple[Tensor, float]]) -> Figure:
    """One picture and its map under every setting, each from 0 to its own 99th percentile.

    maps: values of any grid and the ceiling of FI, from `lab.setting_maps`. The title gives the spread of a
    map of FI as a share of the ceiling: the 5th and the 95th percentile.
    """
    panels = [("the picture", image, "")]
    for name, (values, top) in maps.items():
        low, high = np.quantile(values.double().numpy(), [0.05, 0.95]) / top
        told = "" if "Jacobian" in name else f"{low:.2g} to {high:.2g}"
        grid = values.mean(0) if values.dim() == 3 else values
        panels.append((f"{name.replace(', ', ',' + chr(10))}\n{told}", grid, ""))
    return plots.pictures([panels[:5], panels[5:]])


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


def options(example: Example, probs: Tensor) -> str:
    """The options, a line each, with P (K,) of each and a tick before the right one."""
    lines = []
    for i, (option, p) in enumerate(zip(example.options, probs.tolist(), strict=False)):
        lines.append(f"{'✓' if i == example.answer else '  '} {'ABCDEF'[i]}. {option}  {p:.2f}")
    return "\n".join(lines)
