"""The suite's one style: a look for every figure, and one fixed colour, dash and marker for every measure.

Colour tells the family (blue for exact and cut FI, purple for damped FI, warm for the measures that keep the
gradient's size), and dash and marker tell its members apart for readers who do not see the colours.
"""

from __future__ import annotations

import colorsys
import zlib
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fichapters.described import DescribedFigure, show_described
from fihelpers.measures import Influence, find_measure

INK = "#262626"
GREY = "#767676"
SEQUENTIAL = "cividis"  # for heat maps of something that only grows; readable without colour vision
DIVERGING = "RdBu_r"  # for heat maps around a middle
LOW_HALF = ", low half"  # after a measure's name: weights drawn from the half that it scores lowest


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
    "activation spikes": Look("#111155", "", "2"),
    "random": Look(GREY, (1, 1), "."),
}
FAMILY = {"exact": 0.60, "cut": 0.58, "damped": 0.76}  # hues of the filters that have no look of their own
SHAPES = ("o", "v", "^", "<", ">", "s", "D", "P", "X", "h", "d", "p", "H", "8")
PATTERNS: tuple[tuple[float, ...] | str, ...] = ("", (4, 1.5), (1.5, 1), (6, 1.5, 1.5, 1.5), (3, 1, 1, 1))
PALETTE: dict[str, str] = {name: look.colour for name, look in LOOKS.items()}

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


def look_of(name: str) -> Look:
    """The look of a measure, by its name as `fihelpers.measures.find_measure` knows it.

    FI with a filter that is in no table gets one of its family, always the same for the same filter. Raises
    KeyError, in words, for another name that has none here.
    """
    if name in LOOKS:
        return LOOKS[name]
    try:
        measure = find_measure(name)
    except ValueError:
        measure = None
    if not isinstance(measure, Influence):
        raise KeyError(f"No look is set for {name!r}; add it to LOOKS in notebooks/chapters/style.py.")
    kind = str(measure.spectral).partition(" ")[0]
    drawn = zlib.crc32(name.encode())
    colour = colorsys.hls_to_rgb(FAMILY[kind], 0.25 + 0.2 * (drawn % 97) / 96, 0.55)
    return Look(to_hex(colour), PATTERNS[drawn % len(PATTERNS)], SHAPES[drawn % len(SHAPES)])


def look(name: str) -> dict[str, Any]:
    """Keyword arguments of `Axes.plot` for a measure, or the low half by it; raises what `look_of` raises."""
    colour, dash, marker = look_of(name.removesuffix(LOW_HALF))
    if name.endswith(LOW_HALF):
        return {"color": colour, "linestyle": ":", "linewidth": 1.0, "marker": "v", "label": name}
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


def legend_outside(axes: Axes) -> None:
    """Put the legend to the right of the axes."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)
