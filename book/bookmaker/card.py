"""The picture of the book's first page, and the one that other sites show beside a link to the book.

Both show kept numbers and are drawn when these are kept: a build need not import torch for them.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fichapters.described import small_png
from fichapters.kept import KEPT
from fichapters.style import GREY, INK, look, use_style
from fihelpers.data import data_folder

LANDING, CARD = "images/first_look.png", "web/social-card.png"  # in the book's folder
SIZE = (1200, 630)  # pixels, as the sites that show such pictures ask for
LANDING_SIZE = (900, 660)  # pixels; shown at 480 of a screen's
CHANCE = 0.25  # of four letters
DPI = 150
MEASURES = ("random", "FI exact", "FI damped 0.0001", "Jacobian norm")
GROUND = "#0B5FA5"  # the colour of the book's icon
QUESTION = "Which weights,\nwhich pixels of a\nlarge model are\nthe fragile ones?"


def draw(book: Path) -> None:
    """Draw both into the book's folder."""
    landing_picture(book / LANDING)
    social_card(book / CARD)


def social_card(target: Path) -> None:
    """Draw the card that other sites show beside a link to the book, as PNG."""
    with plt.rc_context():
        use_style()
        plt.rcParams["figure.constrained_layout.use"] = False  # the parts stand at places of their own
        figure = Figure(figsize=(SIZE[0] / DPI, SIZE[1] / DPI))
        figure.text(
            0.05, 0.86, "First-order\nlocal influence", size=22, weight="bold", color=GROUND, va="top"
        )
        figure.text(0.05, 0.58, QUESTION, size=15, color=INK, va="top", linespacing=1.35)
        figure.text(0.05, 0.08, "A book that computes its own numbers", size=10, color=GREY)
        ax = figure.add_axes((0.55, 0.19, 0.42, 0.66))
        _curves(ax, _table())
        ax.legend(loc="lower center", bbox_to_anchor=(0.46, 1.0), ncols=2)
        _save(figure, target)


def landing_picture(target: Path) -> None:
    """Draw the picture of the first page (and of README.md), to be read on a phone as well, as PNG."""
    table = _table()
    with plt.rc_context():
        use_style()
        plt.rcParams.update(
            {"font.size": 13, "axes.labelsize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12}
        )
        figure = Figure(figsize=(LANDING_SIZE[0] / DPI, LANDING_SIZE[1] / DPI), layout="constrained")
        ax = figure.add_subplot()
        _curves(ax, table)
        ax.axhline(CHANCE, color=INK, linestyle=":", linewidth=1)
        ax.annotate("chance", (table.rate.max(), CHANCE - 0.02), ha="right", va="top", size=12)
        ax.legend(loc="lower center", bbox_to_anchor=(0.44, 1.0), ncols=2, fontsize=12)
        _save(figure, target)


def _table() -> pd.DataFrame:
    """Chapter 01's curves among the numbers that the project keeps."""
    return pd.read_csv(data_folder() / KEPT / "01_first_look.curves.csv")


def _save(figure: Figure, target: Path) -> None:
    figure.savefig(target, dpi=DPI, bbox_inches=None)
    target.write_bytes(small_png(target.read_bytes()))


def _curves(ax: Axes, table: pd.DataFrame) -> None:
    """Accuracy against the share that is zeroed, a line a measure with its band."""
    for name in MEASURES:
        part = table[table.measure == name]
        ax.plot(part.rate, part.accuracy, **{**look(name), "markersize": 7, "linewidth": 2.4})
        ax.fill_between(part.rate, part.low, part.high, color=look(name)["color"], alpha=0.12, linewidth=0)
    ax.set(ylim=(0, 1.02), xlabel="share of weights set to zero, chosen by …")
    ax.set_ylabel(f"accuracy (n = {int(table.n.max())}, 95 % bands)")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
