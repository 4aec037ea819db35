"""Figures of chapter 08: where the loss of quantization begins, and what protected channels win back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fichapters.style import GREY, INK, WIDTH, Look, look, new_figure

LOOKS = {  # what only this chapter keeps channels by
    "FI exact, low half": Look("#7FA3CC", (1, 1), "o"),
    "FI damped 0.0001, low half": Look("#C9B3E0", (1, 1), ">"),
    "mean input": Look("#111111", "", "x"),
    "mean output": Look("#111111", (4, 1.5), "x"),
    "Hessian diagonal": Look("#007C91", "", "+"),
    "Hessian and error": Look("#007C91", (4, 1.5), "+"),
    "error alone": Look("#8C6D1F", (3, 1, 1, 1), "P"),
    "predicted change": Look("#E0457B", (1.5, 1), "*"),
}
FAMILIES = {  # of scores, one panel each
    "FI, high and low": (
        "FI exact",
        "FI exact, low half",
        "FI damped 0.0001",
        "FI damped 0.0001, low half",
        "random",
    ),
    "other scores": (
        "FI damped 0.0001",
        "Jacobian norm",
        "information length",
        "predicted change",
        "Hessian and error",
        "error alone",
        "mean output",
        "magnitude",
    ),
}
MAPPINGS = {"symmetric": "#D55E00", "asymmetric": "#2F6DB5"}
DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))


def loss_sweep(table: pd.DataFrame, intact: float, chance: float | None) -> Figure:
    """Accuracy against stored bits a weight without protection, one panel for each set of matrices.

    table: from `lab.where_loss_begins`. intact: accuracy before
    quantization, drawn as a line, as is `chance`, that of guessing.
    """
    parts = list(table.groupby("matrices", sort=False))
    figure, axes = new_figure(1, len(parts), size=(WIDTH, 3.9), sharey=True)
    groups = list(dict.fromkeys(table.group))
    for ax, (name, part) in zip(axes[0], parts, strict=True):
        for (mapping, group), line in part.groupby(["mapping", "group"], sort=False):
            dash = DASHES[groups.index(group) % len(DASHES)]
            label = f"{mapping}, " + ("a row" if group == 0 else f"{group:.0f} weights")
            ax.plot(
                line.bits_per_weight, line.accuracy, color=MAPPINGS[mapping], linestyle=dash, marker="o",
                markersize=4, label=label,
            )  # fmt: skip
        _lines(ax, intact, chance)
        ax.set(title=_title(name), xlabel="bits a weight, scales included", ylim=(0, 1.03), xlim=(0, None))
    axes[0, 0].set_ylabel(f"accuracy ({int(table.n.max())} questions)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=2, title="mapping; what shares a scale")
    return figure


def protection_curves(
    table: pd.DataFrame, cases: Sequence[Any], intact: float, chance: float | None
) -> Figure:
    """Accuracy against the share of rows kept, a row of panels for each case, a column for each family.

    table: from `lab.summary`; its t intervals are drawn as bands.
    """
    figure, axes = new_figure(len(cases), 2, size=(WIDTH, 2.7 * len(cases) + 1.9), sharey=True, sharex=True)
    for line, case in zip(axes, cases, strict=True):
        same = (table.matrices == case.matrices) & (table.bits == case.bits) & (table.axis == "rows")
        for ax, (family, names) in zip(line, FAMILIES.items(), strict=True):
            for name in names:
                _curve(ax, table[same & (table.keep == name)].sort_values("share"), name)
            _lines(ax, intact, chance)
            ax.set(title=f"{_title(case.matrices)}, {case.bits} bit\n{family}", ylim=(0, 1.03))
            ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        line[0].set_ylabel(f"accuracy ({int(table.n.max())} questions)")
    for ax in axes[-1]:
        ax.set_xlabel("share of rows kept in 16 bits")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.26), ncol=1)
    return figure


def recovered_dots(tables: Mapping[str, Mapping[str, pd.DataFrame]], what: str) -> Figure:
    """The share of the loss that each score wins back, one panel a case (its title).

    tables: case, then "accuracy" and "log P", then from `lab.recovery`.
    what: which channels, and in which shares.
    """
    figure, axes = new_figure(1, len(tables), size=(WIDTH, 4.9), sharey=True)
    names = list(next(iter(next(iter(tables.values())).values())).keep)
    for ax, (title, scores) in zip(axes[0], tables.items(), strict=True):
        for shift, (score, table) in zip((-0.16, 0.16), scores.items(), strict=True):
            for row in table.itertuples():
                style = {**_look(row.keep), "linestyle": "", "markersize": 6, "label": None}
                style["markerfacecolor"] = style["color"] if score == "accuracy" else "white"
                y = names.index(row.keep) + shift
                ax.plot([row.low, row.high], [y, y], color=style["color"], linewidth=1.3)
                ax.plot([row.recovered], [y], **style)
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        ax.set(title=title, xlabel="share of the loss won back", xlim=(-0.45, 1.1))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    n, sets = int(table.n.max()), int(table.sets.max())
    figure.supxlabel(
        f"{what}; above by accuracy, below by log P;\n"
        f"bars: 95 % over {n} questions and {sets} calibration sets",
        fontsize=9,
    )
    return figure


def subject_curves(table: pd.DataFrame, cases: Sequence[Any], chance: float | None) -> Figure:
    """The earlier version's comparison, a row of panels for each case, a column for each subject.

    table: from `lab.by_subject`.
    """
    subjects = list(dict.fromkeys(table.subject))
    figure, axes = new_figure(
        len(cases), len(subjects), size=(WIDTH, 2.5 * len(cases) + 0.9), sharey=True, sharex=True
    )
    names = FAMILIES["FI, high and low"]
    for line, case in zip(axes, cases, strict=True):
        same = (table.matrices == case.matrices) & (table.bits == case.bits)
        for ax, subject in zip(line, subjects, strict=True):
            part = table[same & (table.subject == subject)]
            start = part[part.keep == "nothing"]
            for name in names:
                found = pd.concat([start, part[part.keep == name]]).sort_values("share")
                ax.plot(found.share, found.accuracy, **_look(name))
            _lines(ax, None, chance)
            ax.set(title=f"{subject}\n(n = {int(part.n.max())})", ylim=(0, 1.03))
            ax.title.set_fontsize(10)
            ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        line[0].set_ylabel(f"{_title(case.matrices)}, {case.bits} bit\naccuracy")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    for ax in axes[-1]:
        ax.set_xlabel("share kept")
    figure.legend(handles, labels, loc="outside lower center", ncol=3)
    return figure


def size_curves(
    table: pd.DataFrame, sized: pd.DataFrame, sweep: pd.DataFrame, cases: Sequence[Any],
    intact: float, chance: float | None,
) -> Figure:  # fmt: skip
    """Accuracy against stored bits a weight: protection beside finer quantization of everything.

    table: from `lab.summary`; sized: from `lab.sizes`; sweep: from `lab.where_loss_begins`.
    """
    figure, axes = new_figure(1, len(cases), size=(WIDTH, 4.1), sharey=True)
    for ax, case in zip(axes[0], cases, strict=True):
        plain = sweep[sweep.matrices == case.matrices]
        ax.plot(
            plain.bits_per_weight, plain.accuracy, linestyle="", marker="s", markersize=4, color=INK,
            label="nothing kept, other bits and groups",
        )  # fmt: skip
        at = sized[(sized.matrices == case.matrices) & (sized.bits == case.bits)].set_index("share")
        same = (table.matrices == case.matrices) & (table.bits == case.bits) & (table.axis == "rows")
        for name in ("information length", "FI damped 0.0001", "FI exact", "random"):
            part = table[same & (table.keep == name)].sort_values("share")
            label = "random rows kept" if name == "random" else f"rows kept by {name}"
            style = {**_look(name), "label": label}
            ax.plot(at.bits_per_weight.loc[part.share], part.accuracy, **style)
        _lines(ax, intact, chance)
        ax.set(
            title=f"{_title(case.matrices)},\nprotected at {case.bits} bit",
            xlabel="bits a weight, all included",
        )
        ax.set(ylim=(0, 1.03), xlim=(0, None))
    axes[0, 0].set_ylabel(f"accuracy ({int(table.n.max())} questions)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=2)
    return figure


def joint_strips(table: pd.DataFrame) -> Figure:
    """FI of every channel, matrix by matrix, one panel for each way to count it.

    table: from `lab.joint_influence`.
    """
    ways = list(table.groupby("way", sort=False))
    figure, axes = new_figure(1, len(ways), size=(WIDTH, 3.0), sharey=True)
    for ax, (way, part) in zip(axes[0], ways, strict=True):
        name = f"FI {way.partition(', ')[2]}"
        colour = look(name)["color"]
        sns.stripplot(data=part, x="matrix", y="value", ax=ax, size=2.2, color=colour, jitter=0.3, alpha=0.6)
        relative = "its ceiling" if way.startswith("joint") else "the largest"
        ax.set(title=way.replace(", ", ",\n"), xlabel="matrix, in order", ylabel="", ylim=(0, 1.08))
        ax.annotate(f"1 = {relative}", (0.04, 0.04), xycoords="axes fraction", fontsize=9)
    axes[0, 0].set_ylabel(f"FI of a channel\n({int((part.matrix == 0).sum())} rows a matrix)")
    return figure


def _curve(ax: Axes, part: pd.DataFrame, name: str) -> None:
    style = _look(name)
    ax.plot(part.share, part.accuracy, **style)
    ax.fill_between(part.share, part.low, part.high, color=style["color"], alpha=0.1, linewidth=0)


def _lines(ax: Axes, intact: float | None, chance: float | None) -> None:
    """The accuracy of the intact model and of guessing."""
    if intact is not None:
        ax.axhline(intact, color=GREY, linewidth=0.8)
    if chance is not None:
        ax.axhline(chance, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))


def _title(matrices: str) -> str:
    return "all linear matrices" if matrices == "all" else matrices


def _look(name: str) -> dict[str, Any]:
    if name not in LOOKS:
        return look(name)
    colour, dash, marker = LOOKS[name]
    return {
        "color": colour,
        "linestyle": "-" if isinstance(dash, str) else (0, dash),
        "marker": marker,
        "label": name,
    }
