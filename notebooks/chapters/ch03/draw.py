"""Figures of chapter 03. They take the tables of `fichapters.ch03.lab` and return figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fichapters.style import GREY, INK, PALETTE, SEQUENTIAL, legend_outside, new_figure

FIRST_WAY, SECOND_WAY = "#D55E00", "#08306B"


def draw_ceilings(table: pd.DataFrame) -> Figure:
    """FI of single weights and of whole matrices against P(y_hat), below the curve of the ceiling."""
    figure, axes = new_figure(size=(7.5, 4.2))
    ax = axes[0, 0]
    p = np.linspace(min(0.25, table["confidence"].min()), table["confidence"].max() * 0.5 + 0.5, 300)[:-1]
    ax.plot(p, (1 - p) / p, color=INK, label="ceiling, (1 − P(ŷ)) / P(ŷ)")
    ax.plot(
        table["confidence"], table["matrix_low"], "o", mfc="none", color=FIRST_WAY, label="a whole matrix"
    )
    ax.plot(
        table["confidence"], table["largest"], "v", color=PALETTE["FI exact"], label="largest single weight"
    )
    ax.plot(table["confidence"], table["median"], ".", color=GREY, label="median single weight")
    ax.set(yscale="log", xlabel="confidence P(ŷ)", ylabel="exact FI")
    ax.set_title(f"No FI above the ceiling (n = {len(table)} questions)")
    legend_outside(ax)
    return figure


def draw_saturation(table: pd.DataFrame) -> Figure:
    """Heat maps of the share of groups at the ceiling, classes by group size, for each kind of matrix."""
    kinds = sorted(table["part"].unique())
    figure, axes = new_figure(1, len(kinds), size=(3.1 * len(kinds) + 2.4, 2.9), sharey=True)
    for ax, kind in zip(axes[0], kinds, strict=True):
        part = table[table["part"] == kind]
        grid = part.pivot(index="classes", columns="size", values="share")
        grid = grid.loc[part["classes"].unique(), part["size"].unique()]
        _share_map(grid, ax, "groups at the ceiling", bar=ax is axes[0, -1])
        ax.set(xlabel="weights in a group, p", ylabel="")
        ax.set_title(kind.capitalize())
    return figure


def _share_map(grid: pd.DataFrame, ax: Axes, label: str, bar: bool = True) -> None:
    scale = {"label": label, "format": PercentFormatter(1)}
    sns.heatmap(
        grid,
        ax=ax,
        vmin=0,
        vmax=1,
        cmap=SEQUENTIAL,
        annot=True,
        fmt=".0%",
        linewidths=1,
        cbar=bar,
        cbar_kws=scale,
    )
    ax.tick_params(axis="y", rotation=0)


def draw_sweep(ranks: pd.DataFrame, damage: pd.DataFrame, metric: Sequence[float]) -> Figure:
    """Rank correlations, accuracy and log-probability after zeroing, against the filter's scale.

    metric: the 5th, 50th and 95th percentile of G, the mu of a single weight.
    """
    figure, axes = new_figure(3, 1, size=(8.6, 9.0), sharex=True)
    correlations, accuracy, log_prob = axes[:, 0]
    means = ranks.groupby("ranking", sort=False).mean(numeric_only=True).reset_index()
    table = damage.merge(means[["ranking", "with_exact", "with_jacobian"]], how="left", on="ranking")
    for column, colour, name in (
        ("with_exact", PALETTE["FI exact"], "with exact FI"),
        ("with_jacobian", PALETTE["Jacobian norm"], "with the squared Jacobian norm"),
    ):
        _by_kind(correlations, table, column, colour, name)
    correlations.set(ylabel="rank correlation", ylim=(-0.05, 1.05))
    _damage_panel(accuracy, table, "accuracy", "low", "high")
    accuracy.set(ylabel="accuracy after zeroing")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _damage_panel(log_prob, table, "log_prob", "log_prob_low", "log_prob_high")
    log_prob.set(ylabel="log P(right answer), nats")
    log_prob.set(xlabel="scale of the filter on μ:  λ of damping, atol² of a cut")
    for ax in axes[:, 0]:
        ax.axvspan(metric[0], metric[2], color="#EFEFEF", zorder=0, label="5 to 95 % of all G")
        ax.set_xscale("log")
    legend_outside(correlations)
    legend_outside(accuracy)
    n, seeds = int(damage["n"].max()), int(damage["seeds"].max())
    correlations.set_title(
        f"From exact FI to the Jacobian norm ({seeds} calibration sets, {n} test questions)"
    )
    return figure


def _by_kind(ax: Axes, table: pd.DataFrame, column: str, colour: str, name: str) -> None:
    styles = {"damped": ("o", "-", "damping"), "cut": ("^", ":", "cut")}
    for kind, (marker, line, word) in styles.items():
        part = table[table["kind"] == kind].sort_values("scale")
        ax.plot(
            part["scale"], part[column], marker=marker, linestyle=line, color=colour, label=f"{word}, {name}"
        )


def _damage_panel(ax: Axes, table: pd.DataFrame, value: str, low: str, high: str) -> None:
    looks = {
        "damped": ("o", "-", "FI, damping λ", PALETTE["FI damped 0.0001"]),
        "cut": ("^", ":", "FI, cut at √λ", PALETTE["FI cut 0.001"]),
    }
    for kind, (marker, line, name, colour) in looks.items():
        part = table[table["kind"] == kind].sort_values("scale")
        errors = [part[value] - part[low], part[high] - part[value]]
        ax.errorbar(
            part["scale"],
            part[value],
            errors,
            fmt=marker,
            linestyle=line,
            color=colour,
            capsize=3,
            label=name,
        )
    ends = {
        "intact": ("intact", INK, "-"),
        "FI exact": ("FI exact", PALETTE["FI exact"], "-"),
        "random": ("random", GREY, "--"),
        "squared Jacobian norm": ("squared Jacobian norm", PALETTE["Jacobian norm"], "-"),
    }
    for ranking, (name, colour, line) in ends.items():
        row = table[table["ranking"] == ranking].iloc[0]
        ax.axhline(row[value], color=colour, linestyle=line, linewidth=1.3, label=name)
        if ranking not in ("intact", "FI exact"):
            ax.axhspan(row[low], row[high], color=colour, alpha=0.10, linewidth=0)


def draw_correlations(weights: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Rank correlation of each measure with the change that zeroing really makes, with its interval."""
    figure, axes = new_figure(1, 2, size=(9.6, 4.4))
    for ax, table, what in ((axes[0, 0], weights, "single weights"), (axes[0, 1], rows, "whole rows")):
        ordered = table.sort_values("correlation").reset_index(drop=True)
        for i, row in ordered.iterrows():
            colour = PALETTE.get(row["measure"], GREY if row["measure"] == "random" else PALETTE["FI exact"])
            colour = PALETTE["SNIP"] if row["measure"] == "predicted change" else colour
            ax.plot(
                [row["low"], row["high"]], [i, i], color=colour, linewidth=3, alpha=0.5, solid_capstyle="butt"
            )
            ax.plot(row["correlation"], i, "o", color=colour)
        ax.set_yticks(range(len(ordered)), ordered["measure"])
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.set(
            xlabel="rank correlation with |change of log P(ŷ)|",
            xlim=(min(-0.2, ordered["low"].min() - 0.05), 1.02),
        )
        ax.set_title(f"{what.capitalize()} (n = {ordered['n'][0]})")
        ax.grid(axis="y", visible=False)
    return figure


def draw_constant_rows(table: pd.DataFrame) -> Figure:
    """Heat map of the share of rows with one constant score, block by matrix."""
    grid = table.pivot(index="layer", columns="matrix", values="share")[table["matrix"].unique()]
    figure, axes = new_figure(size=(7.6, 0.5 * len(grid) + 1.6))
    ax = axes[0, 0]
    _share_map(grid, ax, "rows of constant FI")
    ax.set(xlabel="weight matrix", ylabel="block")
    ax.set_title("Rows along which exact FI does not change")
    return figure


def draw_contributions(table: pd.DataFrame, measures: Sequence[str]) -> Figure:
    """Each question's share of an average against its confidence, one panel a measure (method 1b.6)."""
    figure, axes = new_figure(1, len(measures), size=(3.3 * len(measures), 3.5), sharey=True)
    n = table["question"].nunique()
    for ax, measure in zip(axes[0], measures, strict=True):
        part = table[table["measure"] == measure]
        ax.plot(part["confidence"], part["share"], "o", color=PALETTE[measure], alpha=0.7)
        ax.axhline(1 / n, color=INK, linewidth=1, linestyle="--", label=f"equal shares, n = {n}")
        ax.set(xlabel="confidence P(ŷ)", ylabel="share of the sum" if ax is axes[0, 0] else "")
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_title(measure)
    axes[0, 0].legend(loc="upper right")
    return figure


def draw_own_scores(table: pd.DataFrame) -> Figure:
    """Error of s_y_hat, and FI over its ceiling, as P(y_hat) nears 1, for the two ways to get s_y_hat."""
    figure, axes = new_figure(1, 2, size=(9.4, 3.8))
    looks = {"own backward pass": (FIRST_WAY, "s"), "from the other classes": (SECOND_WAY, "o")}
    for way, (colour, marker) in looks.items():
        part = table[table["way"] == way]
        for ax, column in zip(axes[0], ("error", "excess"), strict=True):
            ax.plot(part["doubt"], part[column], marker, color=colour, alpha=0.6, label=way)
    for ax in axes[0]:
        ax.set(xscale="log", xlabel="doubt 1 − P(ŷ)")
        ax.invert_xaxis()
    axes[0, 0].set(yscale="log", ylabel="relative error of s_ŷ in float32")
    axes[0, 0].set_title(f"Error (n = {table['question'].nunique()} questions)")
    axes[0, 0].legend(loc="upper left")
    axes[0, 1].set(ylabel="largest FI of three weights / ceiling")
    axes[0, 1].axhline(1, color=INK, linewidth=1)
    axes[0, 1].set_title("FI that follows from it")
    return figure


def draw_rounding(weights: pd.DataFrame, n: int) -> Figure:
    """Relative difference of FI between float32 and float64 against the size of the class gradients."""
    figure, axes = new_figure(size=(7.2, 3.9))
    ax = axes[0, 0]
    shown = weights[(weights["difference"] > 0) & (weights["size"] > 0)]
    grid = ax.hexbin(
        shown["size"], shown["difference"], xscale="log", yscale="log", gridsize=60, mincnt=1, bins="log",
        cmap=SEQUENTIAL, linewidths=0,
    )  # fmt: skip
    ax.axhline(1e-5, color=FIRST_WAY, linewidth=1.2, linestyle="--")
    ax.set(xlabel="size of the weight's class gradients, √G / largest √G", ylabel="relative difference of FI")
    ax.set_title(f"float32 against float64 ({len(shown):,} of {n:,} weights)")
    figure.colorbar(grid, label="weights (log scale)")
    return figure
