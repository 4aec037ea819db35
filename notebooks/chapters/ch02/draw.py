"""Figures of chapter 02: each takes a table of `fichapters.ch02.lab`."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fichapters.style import GREY, INK, SEQUENTIAL, legend_outside, look, new_figure

CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
CLASSES = ("A", "B", "C")
FIRST, SECOND, THIRD = "#0072B2", "#D55E00", "#009E73"  # readable without colour vision
PROBS = ["P_1", "P_2", "P_3"]


def _plane(probs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of three classes as points of the drawn triangle."""
    x, y = (probs[PROBS].to_numpy() @ CORNERS).T
    return x, y


def _triangle(axes: Axes) -> None:
    """The simplex, its corners, and the borders between the regions where each class is predicted."""
    axes.add_patch(plt.Polygon(CORNERS, closed=True, fill=False, edgecolor=INK, linewidth=1.2))
    centre = CORNERS.mean(0)
    for i in range(3):
        middle = (CORNERS[i] + CORNERS[(i + 1) % 3]) / 2
        axes.plot(*zip(centre, middle, strict=True), color=GREY, linestyle=(0, (4, 3)), linewidth=0.9)
    for (x, y), name, at in zip(CORNERS, CLASSES, ("right", "left", "center"), strict=True):
        axes.annotate(
            f"P({name}) = 1",
            (x, y),
            xytext=(0, 6 if y > 0 else -6),
            textcoords="offset points",
            ha={"right": "left", "left": "right"}.get(at, at),
            va="bottom" if y > 0 else "top",
        )
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.1, 0.96), aspect="equal")
    axes.axis("off")


def family(lines: pd.DataFrame) -> Figure:
    """A square grid of perturbations (`grid_lines`) and its image among distributions over three classes."""
    figure, ((left, right),) = new_figure(1, 2, (9.0, 4.2))
    for (held, _), line in lines.groupby(["held", "line"]):
        style = {"color": (FIRST, SECOND)[held - 1], "linewidth": 0.9}
        left.plot(line.omega_1, line.omega_2, **style)
        right.plot(*_plane(line), **style)
    start = lines.loc[[(lines.omega_1**2 + lines.omega_2**2).idxmin()]]
    left.plot(0, 0, "o", color=INK, markersize=7)
    right.plot(*_plane(start), "o", color=INK, markersize=7)
    left.set(xlabel="$\\omega_1$", ylabel="$\\omega_2$", title="perturbations ω", aspect="equal")
    _triangle(right)
    right.set_title("distributions P(y | ω)", pad=12)
    looks: list[dict[str, Any]] = [
        {"color": FIRST},
        {"color": SECOND},
        {"color": INK, "marker": "o", "linestyle": ""},
    ]
    looks.append({"color": GREY, "linestyle": "--"})
    handles = [plt.Line2D([], [], **style) for style in looks]
    names = ["ω₁ held", "ω₂ held", "ω = 0", "the prediction changes"]
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    return figure


def rings(table: pd.DataFrame) -> Figure:
    """Equal information length and equal length in omega (`rings`), in the plane and on the simplex."""
    figure, ((left, right),) = new_figure(1, 2, (9.0, 4.4))
    for (name, ring), colour, dash in zip(
        table.groupby("ring", sort=False), (FIRST, SECOND), ("-", (0, (4, 1.5))), strict=True
    ):
        left.plot(ring.omega_1, ring.omega_2, color=colour, linestyle=dash, label=name)
        right.plot(*_plane(ring), color=colour, linestyle=dash)
    left.plot(0, 0, "o", color=INK)
    reach = 1.1 * table[["omega_1", "omega_2"]].abs().max().max()
    left.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title="perturbations ω")
    left.set(xlabel="$\\omega_1$", ylabel="$\\omega_2$")
    _triangle(right)
    right.set_title("distributions P(y | ω)", pad=12)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def kl_ratios(table: pd.DataFrame) -> Figure:
    """KL over its quadratic form against the size of the step (`kl_ratios`), one line a direction."""
    figure, ((axes,),) = new_figure(size=(7.2, 3.6))
    directions = table.degrees.nunique()
    shown = table.assign(direction=[f"{d:.0f}°" for d in table.degrees])
    sns.lineplot(
        shown, x="step", y="ratio", hue="direction", style="direction", ax=axes, palette="colorblind",
        dashes=True,
    )  # fmt: skip
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="size of the step |ε|",
        ylabel="KL / (½ εᵀGε)",
        title=f"The metric is what KL becomes up close ({directions} directions)",
    )
    legend_outside(axes, title="direction of ε")
    return figure


def curve_ratios(table: pd.DataFrame, fi: float) -> Figure:
    """Ratio against length walked along several curves (`curve_ratios`), with FI as a line."""
    figure, ((axes,),) = new_figure(size=(8.0, 3.8))
    styles = zip(
        table.groupby("curve", sort=False), (FIRST, FIRST, THIRD, SECOND), ("-", "--", "-.", ":"), strict=True
    )
    for (name, curve), colour, dash in styles:
        axes.plot(curve.length, curve.ratio, color=colour, linestyle=dash, label=name)
    axes.axhline(fi, color=INK, linewidth=0.8, label="FI")
    axes.set(
        xscale="log",
        xlim=(table.length.min(), None),
        ylim=(0, None),
        xlabel="information length walked",
        ylabel="(change of f)² / length²",
        title="At the start only the direction counts",
    )
    legend_outside(axes, title="curve")
    return figure


def direction_search(tables: dict[str, pd.DataFrame], marks: dict[str, tuple[float, float, float]]) -> Figure:
    """Ratio over the direction (`direction_search`), one panel a family.

    marks: for each family FI, and the directions (degrees) of G^+ grad f and of grad f.
    """
    figure, axes = new_figure(1, len(tables), (9.0, 3.8))
    for panel, (name, table) in zip(axes[0], tables.items(), strict=True):
        fi, best, steepest = marks[name]
        panel.plot(table.degrees, table.ratio, color=FIRST, label="$(\\nabla f\\cdot v)^2\\,/\\,v^TGv$")
        panel.axhline(fi, color=INK, linewidth=0.8, label="$\\nabla f^TG^{+}\\nabla f$")
        panel.plot(best, fi, "o", color=INK, label="$v = G^{+}\\nabla f$")
        at = np.interp(steepest, table.degrees, table.ratio)
        panel.plot(steepest, at, "D", color=SECOND, label="$v = \\nabla f$")
        panel.set(xlim=(0, 180), ylim=(0, None), xlabel="direction of v (degrees)", title=name)
        panel.set_xticks(range(0, 181, 45))
    axes[0, 0].set_ylabel("ratio")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def filters(gains: pd.DataFrame, mu: np.ndarray) -> Figure:
    """h(mu) of each filter (`gains`), above marks at the eigenvalues mu of one case."""
    figure, ((axes,),) = new_figure(size=(7.6, 3.4))
    likes = {"exact": "FI exact", "cut": "FI cut 0.01", "damped": "FI damped 0.0001"}
    for (name, part), dash in zip(gains.groupby("filter", sort=False), ("-", "--", "-."), strict=True):
        colour = look(likes[name.split()[0]])["color"]  # of the kind of filter, whatever its number
        axes.plot(part["μ"], part.h, color=colour, linestyle=dash, label=name)
    marks = {"color": INK, "markersize": 12, "markeredgewidth": 1.6, "label": "μ of the table"}
    axes.plot(mu, np.full(len(mu), -0.08), "|", **marks)
    axes.set(
        xscale="log", ylim=(-0.15, 1.08), xlabel="eigenvalue μ of the metric (1 / ω²)", ylabel="h(μ)",
        title="What each filter lets pass",
    )  # fmt: skip
    legend_outside(axes, title="filter")
    return figure


def damping_frames(path: pd.DataFrame) -> list[Figure]:
    """One picture for each damping (`damping_path`): the elements' FI beside its two limits."""
    order = path.drop_duplicates("element").sort_values("exact", ascending=False).element.tolist()
    return [_damping_frame(part.set_index("element").loc[order]) for _, part in path.groupby("lam")]


def _damping_frame(part: pd.DataFrame) -> Figure:
    figure, ((axes,),) = new_figure(size=(7.2, 4.0))
    rows = np.arange(len(part))
    damped, jacobian = look("FI damped 0.0001")["color"], look("Jacobian norm")["color"]
    axes.barh(rows, part.value, color=damped, alpha=0.55, height=0.6, label="FI, damped")
    axes.plot(part.exact, rows, "o", color=look("FI exact")["color"], label="FI, exact")
    axes.plot(part.jacobian2, rows, "s", color=jacobian, label="squared Jacobian norm")
    axes.set(
        xlim=(0, 1.04), xlabel="relative to the largest of the eight", ylabel="perturbation", yticks=rows,
        yticklabels=part.index,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def ceiling(curve: pd.DataFrame, pairs: dict[str, tuple[float, float]]) -> Figure:
    """The ceiling over P(y_hat) (`ceiling_curve`), with marked points name -> (P, ceiling)."""
    figure, ((axes,),) = new_figure(size=(6.6, 3.6))
    axes.plot(curve.P, curve.ceiling, color=INK)
    for (name, (p, top)), marker, colour in zip(pairs.items(), "os", (FIRST, SECOND), strict=True):
        axes.plot(p, top, marker, color=colour, markersize=8, linestyle="", label=name)
    axes.set(
        yscale="log", xlabel="P(ŷ)", ylabel="ceiling (1 − P(ŷ)) / P(ŷ)", title="The most that FI can be",
    )  # fmt: skip
    axes.legend(title="the paper's pair", loc="lower left")
    return figure


def rounding(table: pd.DataFrame, tolerance: float) -> Figure:
    """How far FI lies above its ceiling against 1 - P(y_hat) (`rounding_cases`), one panel a way.

    Cases at or below the ceiling have no place on the logarithmic axis and are only counted.
    """
    ways = table.way.unique()
    figure, axes = new_figure(2, 2, (9.0, 6.2), sharex=True, sharey=True)
    for panel, way in zip(axes.flat, ways, strict=True):
        part = table[table.way == way]
        excess = part.over - 1
        for rows, colour in ((excess > tolerance, SECOND), ((excess > 0) & (excess <= tolerance), FIRST)):
            panel.scatter(part.unsure[rows], excess[rows], s=4, color=colour, linewidths=0, rasterized=True)
        panel.axhline(tolerance, color=INK, linewidth=0.8)
        panel.set(xscale="log", yscale="log", ylim=(1e-8, 1e5))
        panel.set_title(f"{way}: {(excess > tolerance).sum():,} of {len(part):,}", fontsize=10)
    figure.supxlabel("1 − P(ŷ)", fontsize=10)
    figure.supylabel("FI / ceiling − 1, where it is positive", fontsize=10)
    return figure


def matrix(maps: dict[str, np.ndarray], name: str) -> Figure:
    """Heat maps of several measures over one weight matrix, each on a scale up to its 99.5th percentile."""
    figure, axes = new_figure(1, len(maps), (9.4, 4.3))
    for panel, (title, values) in zip(axes[0], maps.items(), strict=True):
        image = panel.imshow(
            values, cmap=SEQUENTIAL, vmin=0, vmax=np.quantile(values, 0.995), interpolation="nearest",
            aspect="auto",
        )  # fmt: skip
        figure.colorbar(image, ax=panel, extend="max", shrink=0.85)
        panel.grid(visible=False)
        panel.set(title=title, xlabel="input dimension")
    axes[0, 0].set_ylabel("output dimension")
    figure.suptitle(f"{name}, n = {next(iter(maps.values())).size:,} weights, one question", fontsize=10)
    return figure
