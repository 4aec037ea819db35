"""Figures of chapter 06: what comes of moved dimensions, by measure, budget, direction and kind of attack."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from fichapters import plots
from fichapters.ch06.lab import DAMPED, EXACT, FI, INTACT, JACOBIAN, RANDOM
from fichapters.papers import published

PUBLISHED = {  # accuracies of the paper's second table, means over its models, by the row they stand beside
    INTACT: "embeddings_original",
    EXACT: "embeddings_fi",
    JACOBIAN: "embeddings_jacobian",
    "SNIP": "embeddings_snip",
    RANDOM: "embeddings_random",
}
BUDGETS = "budget, in lengths of the prompt"


def accuracies(table: pd.DataFrame, of: str) -> Figure:
    """Accuracy of each measure with its interval, the paper's hollow beside it, a line where nothing moved.

    table: of `Trials.table(measure)`, with the row "intact". of: the model and the budget, for the axis.
    """
    (start,) = table.accuracy[table.measure == INTACT]
    label = f"accuracy, {of}; hollow: the paper's"
    marks = {name: published(key).value for name, key in PUBLISHED.items()}
    return plots.forest(table, "measure", "accuracy", label=label, line=start, marks=marks)


def budget_curves(table: pd.DataFrame, start: float) -> Figure:
    """Accuracy against the budget: FI by its filters, and the other measures.

    table: of `Trials.table(measure, budget)`. start: the accuracy where nothing moved.
    """
    others = [name for name in dict.fromkeys(table.measure) if name not in FI]
    return plots.curves(
        table,
        "budget",
        panels={"FI, by its filter": [*FI, JACOBIAN, RANDOM], "other measures": [DAMPED, *others]},
        levels={INTACT: start},
        labels=(BUDGETS, ""),
        scale="log",
        columns=2,
    )


def duel_curves(duels: pd.DataFrame, attacked: pd.DataFrame) -> Figure:
    """log P after FI's dimensions minus after another measure's, against the budget.

    duels, attacked: of `lab.duels` along "budget", of log P of the right answer and of the attacked one. Of
    FI the exact and two damped ones are drawn.
    """
    panels = {
        "minus Jacobian norm": duels[duels.other == JACOBIAN],
        "the same, for ŷ": attacked[attacked.other == JACOBIAN],
        "minus random": duels[duels.other == RANDOM],
    }
    table = pd.concat(panels, names=["panel"]).reset_index("panel")
    names = [EXACT, "FI damped 1e-06", DAMPED]
    figure = plots.curves(
        table[table.fi.isin(names)],
        "budget",
        "difference",
        "fi",
        "panel",
        levels={"no difference": 0.0},
        labels=(BUDGETS, f"log P, FI minus another\n(nats, n = {int(table.n.max())})"),
        scale="log",
    )
    for ax in figure.axes:
        ax.tick_params("x", rotation=60)
    return figure


def kinds_of_attack(duels: pd.DataFrame) -> Figure:
    """log P after exact and damped FI's dimensions minus after the Jacobian norm's, by kind of attack.

    duels: of `lab.attack_duels`.
    """
    shown = duels[duels.fi.isin([EXACT, DAMPED]) & (duels.other == JACOBIAN)]
    return plots.forest(shown, "attack", by="fi", label="log P, FI minus Jacobian norm, nats")
