"""Figures of the end of chapter 04: digits, the maps of their pixels, and their deletion curves."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from fichapters.ch04.digits import Digits
from fichapters.ch04.lab import INTACT
from fichapters.style import SEQUENTIAL, WIDTH, look, new_figure


def pictures(digits: Digits, scores: Mapping[str, Tensor], count: int = 6) -> Figure:
    """Some test digits and their maps by each measure."""
    figure, axes = new_figure(1 + len(scores), count, size=(WIDTH, 1.15 * (1 + len(scores))))
    for column in range(count):
        axes[0, column].imshow(digits.x[column].numpy(), cmap="Greys", vmin=0, vmax=1)
        for row, values in enumerate(scores.values(), start=1):
            axes[row, column].imshow(values[column].numpy(), cmap=SEQUENTIAL)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(visible=False)
    for ax, name in zip(axes[:, 0], ("digit", *scores), strict=True):
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def curves(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Deletion curves of the digits: log P of the right class against pixels changed; a panel a change."""
    figure, axes = new_figure(1, len(tables), size=(WIDTH, 4.2), sharey=True)
    for ax, (title, table) in zip(axes[0], tables.items(), strict=True):
        for name, part in table.groupby("measure", sort=False):
            if name != INTACT:
                ax.plot(part.amount, part.log_prob, **look(str(name)))
        ax.set(title=title, xlabel="pixels changed, of 64")
    n = int(next(iter(tables.values())).n.max())
    axes[0, 0].set_ylabel(f"mean log P of the right digit (nats, n = {n})")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3)
    return figure
