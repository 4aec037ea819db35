"""Figures of chapter 13: spikes, zeroing by the piece, who finds the weights, what keeping them brings.

Each takes a table for each model, by its name.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fichapters import plots
from fichapters.style import INK, WIDTH, new_figure

Tables = Mapping[str, pd.DataFrame]
LEVELS = {"guessing": 0.25}


def spikes(tables: Tables) -> Figure:
    """The largest output of each MLP, and the largest term of that sum, over the blocks; a panel a model."""
    figure, axes = new_figure(1, len(tables), size=(WIDTH, 3.4), sharey=True)
    for ax, (model, table) in zip(axes[0], tables.items(), strict=True):
        block = table.name.str.extract(r"(\d+)")[0].astype(int)  # as every architecture numbers its weights
        ordered = table.assign(block=block).sort_values("block")
        ax.plot(ordered.block, ordered.output.abs(), "o-", color=INK, label="largest output")
        ax.plot(ordered.block, ordered.term.abs(), "D", color="#D55E00", label="its largest term")
        ax.set(title=model, yscale="log", xlabel="block")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0, 0].set_ylabel("size, one prompt")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncol=2)
    return figure


def by_count(tables: Tables) -> Figure:
    """Accuracy against the number of zeroed weights, a panel a model."""
    joined = _joined(tables)
    label = f"accuracy (n = {int(joined.n.max())} questions)"
    return plots.curves(
        joined, "count", "accuracy", "measure", "model",
        levels=LEVELS, scale="log", labels=("linear weights zeroed", label), columns=2,
    )  # fmt: skip


def ranks(tables: Tables) -> Figure:
    """The rank of each spike's weight by each score, as a power of ten."""
    grids = {}
    for model, table in tables.items():
        grid = table.pivot_table("rank", "measure", "weight", sort=False)
        grids[f"{model} ({int(table.n.max())} rankings)"] = np.log10(grid)
    return plots.heat(
        grids, "weight of the first, second … spike; rank as a power of ten, 0 is the first", ".1f"
    )


def rounded(tables: Tables) -> Figure:
    """Accuracy after rounding, by which weights are kept, a panel a model, a colour for the bits."""
    joined = _joined(tables)
    names = (joined.by + ", " + joined.kept.astype(str)).where(joined.by != "nothing", "nothing")
    shown = joined.assign(kept=names, bits=joined.bits.astype(str) + " bit")
    return plots.forest(shown, "kept", "accuracy", by="bits", label="accuracy", line=0.25, panels="model")


def _joined(tables: Tables) -> pd.DataFrame:
    return pd.concat(tables, names=["model"]).reset_index("model")
