"""The picture that other sites show beside a link to the book."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fihelpers.figures.described import small_png
from fihelpers.figures.style import GREY, INK, look, use_style

SIZE = (1200, 630)  # pixels, as the sites that show such pictures ask for
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


def _draw(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(SIZE[0] / DPI, SIZE[1] / DPI))
    figure.text(0.05, 0.86, "First order\nlocal influence", size=22, weight="bold", color=GROUND, va="top")
    figure.text(0.05, 0.58, QUESTION, size=15, color=INK, va="top", linespacing=1.35)
    figure.text(0.05, 0.08, "A book that computes its own numbers", size=10, color=GREY)
    ax = figure.add_axes((0.55, 0.19, 0.42, 0.66))
    for name in MEASURES:
        part = table[table.measure == name]
        ax.plot(part.rate, part.accuracy, **{**look(name), "markersize": 7, "linewidth": 2.4})
        ax.fill_between(part.rate, part.low, part.high, color=look(name)["color"], alpha=0.12, linewidth=0)
    ax.set(ylim=(0, 1.02), xlabel="share of weights set to zero, chosen by …")
    ax.set_ylabel(f"accuracy (n = {int(table.n.max())}, 95 % bands)")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(loc="lower center", bbox_to_anchor=(0.46, 1.0), ncols=2)
    return figure
