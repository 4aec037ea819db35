"""The picture of the book's first page, and the one that other sites show beside a link to the book."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fichapters.described import small_png
from fichapters.style import GREY, INK, look, use_style

SIZE = (1200, 630)  # pixels, as the sites that show such pictures ask for
LANDING_SIZE = (900, 660)  # pixels; shown at 480 of a screen's
CHANCE = 0.25  # of four letters
DPI = 150
MEASURES = ("random", "FI exact", "FI damped 0.0001", "Jacobian norm")
GROUND = "#0B5FA5"  # the colour of the book's icon
QUESTION = "Which weights,\nwhich pixels of a\nlarge model are\nthe fragile ones?"


def social_card(curves: Path, target: Path) -> None:
    """Draws the card from chapter 01's table of curves (a CSV file) and writes it as PNG."""
    table = pd.read_csv(curves)
    with plt.rc_context():
        use_style()
        plt.rcParams["figure.constrained_layout.use"] = False  # the parts stand at places of their own
        figure = _draw(table)
        figure.savefig(target, dpi=DPI, bbox_inches=None)
    target.write_bytes(small_png(target.read_bytes()))


def landing_picture(curves: Path, target: Path) -> None:
    """Draws the same curves for the first page, to be read on a phone as well, and writes them as PNG."""
    table = pd.read_csv(curves)
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


def _draw(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(SIZE[0] / DPI, SIZE[1] / DPI))
    figure.text(0.05, 0.86, "First-order\nlocal influence", size=22, weight="bold", color=GROUND, va="top")
    figure.text(0.05, 0.58, QUESTION, size=15, color=INK, va="top", linespacing=1.35)
    figure.text(0.05, 0.08, "A book that computes its own numbers", size=10, color=GREY)
    ax = figure.add_axes((0.55, 0.19, 0.42, 0.66))
    _curves(ax, table)
    ax.legend(loc="lower center", bbox_to_anchor=(0.46, 1.0), ncols=2)
    return figure
