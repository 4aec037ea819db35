"""The suite's one style: a look for every figure, and one fixed colour, dash and marker for every measure.

Colour tells the family (blue for exact and cut FI, purple for damped FI, warm for the measures that keep the
gradient's size), and dash and marker tell its members apart for readers who do not see the colours.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fihelpers.figures.described import DescribedFigure, show_described

INK = "#262626"
GREY = "#767676"
SEQUENTIAL = "cividis"  # for heat maps of something that only grows; readable without colour vision
DIVERGING = "RdBu_r"  # for heat maps around a middle


class Look(NamedTuple):
    """How one measure is drawn. `dash` is a seaborn dash pattern ("" is a solid line)."""

    colour: str
    dash: tuple[float, ...] | str
    marker: str


LOOKS: dict[str, Look] = {
    "FI exact": Look("#08306B", "", "o"),
    "FI cut 0.001": Look("#2F6DB5", (4, 1.5), "v"),
    "FI cut 0.01": Look("#5B8FD0", (1.5, 1), "^"),
    "FI damped 1e-06": Look("#5E3C99", (6, 1.5, 1.5, 1.5), "<"),
    "FI damped 0.0001": Look("#9B6FC4", (3, 1, 1, 1), ">"),
    "Jacobian norm": Look("#D55E00", "", "s"),
    "SNIP": Look("#C2377A", (4, 1.5), "D"),
    "saliency": Look("#8C6D1F", (1.5, 1), "P"),
    "Fisher diagonal": Look("#C97B00", (6, 1.5, 1.5, 1.5), "X"),
    "information length": Look("#00805D", "", "h"),
    "magnitude": Look("#6B4423", (3, 1, 1, 1), "d"),
    "FI exact, top 8": Look("#1583A8", (4, 1.5), "p"),
    "FI exact summed": Look("#3F3FBF", (1.5, 1), "H"),
    "Grad-CAM": Look("#B2182B", (6, 1.5, 1.5, 1.5), "*"),
    "integrated gradients": Look("#6E7500", (3, 1, 1, 1), "8"),
    "Wanda": Look("#111111", "", "x"),
    "SparseGPT": Look("#007C91", (4, 1.5), "+"),
    "Taylor": Look("#E0457B", (1.5, 1), "1"),
    "random": Look(GREY, (1, 1), "."),
}
PALETTE: dict[str, str] = {name: look.colour for name, look in LOOKS.items()}
DASHES: dict[str, tuple[float, ...] | str] = {name: look.dash for name, look in LOOKS.items()}
MARKERS: dict[str, str] = {name: look.marker for name, look in LOOKS.items()}

_RC = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#DDDDDD",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.dpi": 150,
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "ytick.color": INK,
    "ytick.labelsize": 9,
}


WIDTH = 7.2  # inches of the book's column; what is wider is shrunk, text and all


def use_style() -> None:
    """Set the style of every figure drawn from now on. A chapter calls it once, after its imports."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=_RC)
    show_described(get_ipython())


def look(name: str) -> dict[str, Any]:
    """Keyword arguments of `Axes.plot` for one measure, by its name in `fihelpers.measures.MEASURES`.

    Raises KeyError, in words, for a name that has no look here.
    """
    if name not in LOOKS:
        raise KeyError(f"No look is set for {name!r}; add it to LOOKS in fihelpers/figures/style.py.")
    colour, dash, marker = LOOKS[name]
    line = "-" if isinstance(dash, str) else (0, dash)
    return {"color": colour, "linestyle": line, "marker": marker, "label": name}


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 4.0), **options: Any
) -> tuple[Figure, np.ndarray[Any, np.dtype[Any]]]:
    """A figure of `size` inches and its axes, always an array (rows, columns).

    pyplot forgets it at once: it is shown when a cell ends with it, once, and leaves no figure open. What is
    shown carries the figure's titles and labels as its alt text.
    """
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, FigureClass=DescribedFigure, **options
    )
    plt.close(figure)
    return figure, axes


def legend_outside(axes: Axes, names: Collection[str] | None = None, title: str | None = None) -> None:
    """Put the legend to the right of the axes; `names` keeps some of its entries, in their order."""
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    kept = [name for name in (names or handles) if name in handles]
    axes.legend(
        [handles[name] for name in kept],
        kept,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0.0,
    )
