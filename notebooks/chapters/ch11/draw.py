"""Figures of chapter 11: FI beside its relatives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from fichapters import plots
from fichapters.ch11.lab import SOURCES
from fichapters.style import WIDTH, new_figure

KINDS = {"attention head": ("D", "#C2377A"), "group of neurons": ("o", "#2F6DB5")}


def score_and_damage(scores: pd.DataFrame, falls: np.ndarray, heads: Tensor, names: Sequence[str]) -> Figure:
    """Damage of each component against its score, a panel a relative; heads and neurons are marked apart.

    falls: (components, questions); heads: whether each component is a head (components,).
    """
    damage, is_head = falls.mean(1), heads.numpy()
    figure, axes = new_figure(1, len(names), size=(WIDTH, 3.6), sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        for chosen, (label, (marker, colour)) in zip((is_head, ~is_head), KINDS.items(), strict=True):
            of = scores[name].to_numpy()[chosen]
            ax.plot(of, damage[chosen], marker, color=colour, label=label, alpha=0.8)
        ax.set_yscale("symlog", linthresh=0.01)
        ax.set(title=name.replace(" 0.0001", ""), xlabel="score")
    axes[0, 0].set_ylabel("damage (nats)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    said = f"{len(falls)} components, damage over {falls.shape[1]} questions"
    figure.legend(handles, labels, loc="outside lower center", ncol=2, title=said)
    return figure


def calibrations(table: pd.DataFrame, minus: str) -> Figure:
    """log P by what the scores were calibrated on, minus that by `minus`: a panel a test (`lab.against`)."""
    part = table[table.minus == minus]
    texts = {"zero": "{:.0%} zeroed", "protect": "{:.0%} protected"}
    tests = [texts[test].format(share) for test, share in zip(part.test, part.share, strict=True)]
    shown = part.assign(test=tests, measure=part.measure.str.replace(" 0.0001", ""))
    label = f"log P of the right answer, minus {minus} (nats)"
    # a source has one colour in every figure, even one that is subtracted
    return plots.forest(shown, "measure", by="source", panels="test", label=label, first=SOURCES)
