"""Figures of chapter 06: attacks on embeddings, how far their dimensions carry over, and fragile tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fichapters.ch06.lab import INTACT, ON_TOP, RANDOM, Case
from fichapters.style import DIVERGING, GREY, INK, SEQUENTIAL, WIDTH, look, new_figure

LINE = 66  # characters of a line of coloured tokens
NARROW = 11  # characters of a line of a narrow panel's title
BREAK = "↵"  # how a line break is drawn
SOURCE_MARKS = {"own": "o", "same subject": "s", "other subject": "D", "all others": "^"}


def damage_curves(
    table: pd.DataFrame, panels: Mapping[str, Sequence[str]], along: str, xlabel: str, percent: bool = True
) -> Figure:
    """log P of the right answer (above) and accuracy (below) against the budget or the share, by measure.

    table: from `lab.curves`; its amounts are drawn at even steps.
    """
    figure, axes = new_figure(2, len(panels), size=(WIDTH, 7.2), sharey="row", sharex=True)
    steps = sorted(table[along].unique())
    for column, (title, names) in enumerate(panels.items()):
        for name in names:
            part = table[table.measure == name].sort_values(along)
            x = [steps.index(amount) for amount in part[along]]
            for row, value in enumerate(("log_prob", "accuracy")):
                axes[row, column].plot(x, part[value], **_look(name))
        axes[0, column].set_title(title)
        bottom = axes[1, column]
        _steps(bottom, steps, percent)
        bottom.set_xlabel(xlabel)
        bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.37), ncol=1)
    n = int(table.n.max())
    axes[0, 0].set_ylabel(f"log P of the right answer\n(nats, n = {n})")
    axes[1, 0].set_ylabel(f"accuracy\n(n = {n})")
    return figure


def duel_curves(table: pd.DataFrame, others: Sequence[str], names: Sequence[str], xlabel: str) -> Figure:
    """log P after FI's dimensions minus after another measure's, by budget, with intervals; a panel each.

    table: from `lab.duels`.
    """
    figure, axes = new_figure(1, len(others), size=(WIDTH, 4.2), sharey=True)
    for ax, other in zip(axes[0], others, strict=True):
        part = table[table.other == other]
        steps = sorted(part.budget.unique())
        for k, name in enumerate(names):
            own = part[part.fi == name].sort_values("budget")
            x = np.arange(len(steps)) + 0.12 * (k - (len(names) - 1) / 2)
            style = _look(name) | {"linewidth": 1.0}
            ax.plot(x, own.difference, **style)
            ax.vlines(x, own.low, own.high, color=style["color"], linewidth=1.2)
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(title=f"FI minus {other}", xlabel=xlabel)
        _steps(ax, steps, True)
    axes[0, 0].set_ylabel(f"difference of log P (nats, n = {int(table.n.max())})\nbelow 0: FI hurts more")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3)
    return figure


def damping_curves(table: pd.DataFrame) -> Figure:
    """log P after damped FI's dimensions minus after the Jacobian norm's, by damping; a panel a budget.

    table: from `lab.dampings`.
    """
    budgets = sorted(table.budget.unique())
    figure, axes = new_figure(1, len(budgets), size=(WIDTH, 3.0), sharey=True)
    for ax, budget in zip(axes[0], budgets, strict=True):
        part = table[table.budget == budget]
        colour = look("FI damped 0.0001")["color"]
        ax.plot(part.damping, part.difference, color=colour, marker=">")
        ax.vlines(part.damping, part.low, part.high, color=colour, linewidth=1.2)
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(xscale="log", xlabel="damping $\\lambda$", title=f"budget {100 * budget:g} %")
    n = int(table.n.max())
    axes[0, 0].set_ylabel(f"log P less Jacobian norm's\n(nats, n = {n})\nbelow 0: FI hurts more")
    return figure


def direction_curves(tables: Mapping[str, pd.DataFrame], names: Sequence[str], xlabel: str) -> Figure:
    """log P of the right answer by budget for several directions of the same dimensions, a panel a measure.

    tables: from `lab.curves`, by what the direction is called.
    """
    figure, axes = new_figure(1, len(names), size=(WIDTH, 3.4), sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        for (told, table), line in zip(tables.items(), ("-", ":"), strict=True):
            part = table[table.measure == name].sort_values("budget")
            style = _look(name) | {"linestyle": line, "label": told}
            ax.plot(range(len(part)), part.log_prob, **style)
        ax.set_title(name, fontsize=10)
        _steps(ax, sorted(part.budget.unique()), True)
        ax.tick_params("x", rotation=60)
    n = int(next(iter(tables.values())).n.max())
    axes[0, 0].set_ylabel(f"log P of the right answer\n(nats, n = {n})")
    axes[0, 0].legend(loc="lower left")
    figure.supxlabel(xlabel, fontsize=10)
    return figure


def carried_dots(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """log P less that of random dimensions, by measure and by where the dimensions were chosen; a panel each.

    table: from `lab.carried_table`; titles: of the places carried.
    """
    figure, axes = new_figure(1, len(titles), size=(WIDTH, 4.6), sharey=True)
    flat = table.reset_index()
    names = [m for m in dict.fromkeys(flat.measure) if m != RANDOM]
    for ax, (place, title) in zip(axes[0], titles.items(), strict=True):
        for i, name in enumerate(names):
            for k, row in enumerate(flat[(flat.place == place) & (flat.measure == name)].itertuples()):
                y = i + 0.18 * (k - 1.5)
                colour = look(name)["color"]
                ax.plot([row.low, row.high], [y, y], color=colour, linewidth=1.3)
                ax.plot([row.less_random], [y], color=colour, marker=SOURCE_MARKS[row.source], linestyle="")
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(f"log P less that of random ones\n(nats, n = {int(table.n.max())})")
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    for source, mark in SOURCE_MARKS.items():
        axes[0, 0].plot([], [], color=GREY, marker=mark, linestyle="", label=source)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, title="chosen on")
    return figure


def share_map(table: pd.DataFrame, title: str) -> Figure:
    """Shares (0 to 1) as a heat map with numbers: a row a measure, a column a kind of token."""
    figure, axes = new_figure(size=(WIDTH, 0.8 + 0.28 * len(table)))
    ax = axes[0, 0]
    sns.heatmap(table, ax=ax, cmap=SEQUENTIAL, vmin=0, vmax=1, annot=True, fmt=".2f", annot_kws={"size": 9})
    _plain(ax, title)
    return figure


def level_map(table: pd.DataFrame, title: str) -> Figure:
    """Levels around 1 (the average token) as a heat map with numbers: a row a setting, a column a kind."""
    figure, axes = new_figure(size=(WIDTH, 1.0 + 0.32 * len(table)))
    ax = axes[0, 0]
    octaves = np.log2(table.clip(lower=2**-4).astype(float))
    most = max(1.0, float(np.nanmax(np.abs(octaves.to_numpy()))))
    sns.heatmap(
        octaves, ax=ax, cmap=DIVERGING, vmin=-most, vmax=most, annot=table, fmt=".2f", cbar=False,
        annot_kws={"size": 9},
    )  # fmt: skip
    _plain(ax, title)
    return figure


def token_frames(case: Case) -> tuple[list[Figure], list[str], list[str]]:
    """Frames of a flipbook, their labels and their descriptions: one question, coloured by every setting."""
    frames, labels, alt = [], [], []
    for name, values in case.scores.items():
        level = (values.double() / values.double().mean().clamp(min=1e-300)).numpy()
        figure, axes = new_figure(size=(WIDTH, 3.6))
        _coloured(axes[0, 0], case.texts, level)
        axes[0, 0].set_title(name, fontsize=10)
        best = case.texts[int(values.argmax())].strip() or "a line break"
        frames.append(figure)
        labels.append(name)
        alt.append(f"The tokens by {name}: the highest, {best}, has {level.max():.1f} times the mean.")
    return frames, labels, alt


def case_bars(case: Case) -> Figure:
    """P of the options of one question, untouched and after each attack."""
    figure, axes = new_figure(1, len(case.probs), size=(WIDTH, 2.4), sharex=True)
    letters = [f"{'ABCDEFGHIJ'[i]}. {option}" for i, option in enumerate(case.example.options)]
    for ax, (name, probs) in zip(axes[0], case.probs.items(), strict=True):
        right = [i == case.example.answer for i in range(len(probs))]
        colours = ["#2F6DB5" if r else "#C9C9C9" for r in right]
        ax.barh(range(len(probs)), probs.tolist(), color=colours)
        ax.set_title("untouched" if name == INTACT else fill(name, NARROW), fontsize=9)
        ax.set(xlim=(0, 1), xlabel="P")
        ax.set_yticks(range(len(probs)), letters if ax is axes[0, 0] else [""] * len(probs))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    return figure


def _look(name: str) -> dict[str, object]:
    """FI on the likeliest tokens looks like the same filter on letters; it has panels of its own."""
    return look(name.removesuffix(ON_TOP)) | {"label": name}


def _steps(ax: Axes, steps: Sequence[float], percent: bool) -> None:
    told = [f"{step * 100:g} %" if percent else f"{step:g}" for step in steps]
    ax.set_xticks(range(len(steps)), told, rotation=45, ha="right", rotation_mode="anchor")


def _plain(ax: Axes, title: str) -> None:
    ax.set(title=title, xlabel="", ylabel="")
    ax.tick_params("x", rotation=0)
    ax.tick_params("y", rotation=0)


def _coloured(ax: Axes, texts: Sequence[str], level: np.ndarray) -> None:
    """Write tokens in lines, each on a ground that tells its level from 0 to three times the mean."""
    colours = sns.color_palette(SEQUENTIAL, as_cmap=True)
    scale = Normalize(0, 3)
    column = row = 0
    for text, value in zip(texts, level, strict=True):
        shown = text.replace("\n", BREAK)
        if column + len(shown) > LINE:
            column, row = 0, row + 1
        ground = colours(scale(value))
        ink = "black" if sum(ground[:3]) > 1.5 else "white"
        corner = (column, row - 0.45)
        ax.add_patch(Rectangle(corner, len(shown), 0.9, facecolor=ground, edgecolor="white", linewidth=0.8))
        ax.text(column + len(shown) / 2, row, shown, family="monospace", fontsize=9, ha="center", va="center",
                color=ink)  # fmt: skip
        column += len(shown)
        if text.endswith("\n"):
            column, row = 0, row + 1
    ax.set(xlim=(-0.5, LINE + 0.5), ylim=(max(row, 8) + 0.7, -0.7))
    ax.axis("off")
    shades = ScalarMappable(scale, SEQUENTIAL)
    bar = ax.figure.colorbar(shades, ax=ax, orientation="horizontal", fraction=0.05, aspect=40, pad=0.02)
    bar.set_label("score over the mean of the question's tokens", fontsize=9)
