"""Figures of chapter 02: slopes of one weight, three measures of a matrix, and FI by direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fichapters import plots
from fichapters.style import INK, WIDTH, new_figure


def tangents(steps: Tensor, log_p: Tensor, slopes: Tensor, names: Sequence[str], model: str) -> Figure:
    """Change of log P of each class with the step of one weight, and the straight lines of its gradients.

    steps: (n,), with 0 in the middle, in the unit of the slopes (K,); log_p: (n, K). names: of the classes,
    "class 1" and so on where there are none. model: its name.
    """
    figure, ((axes,),) = new_figure(size=(WIDTH, 4.2))
    change = log_p - log_p[len(log_p) // 2]
    for k, colour in zip(range(change.shape[1]), (*plots.COLOURS, INK), strict=False):
        name = names[k] if names else f"class {k + 1}"
        axes.plot(steps, change[:, k], color=colour, label=name)
        axes.plot(steps, slopes[k] * steps, color=colour, linestyle=(0, (2, 2)), linewidth=1)
    axes.axvline(0, color=INK, linewidth=0.8)
    low, high = float(change.min()), float(change.max())
    room = 0.08 * (high - low)
    axes.set(ylim=(low - room, high + room), ylabel="change of log P(y)")
    axes.set_xlabel(
        f"step of the weight, in sizes of a typical weight\n({model}, n = 1 question; dashed: slope $s_y$)"
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def matrix(maps: Mapping[str, Tensor], shape: Sequence[int], about: str) -> Figure:
    """Heat maps of measures (n,) over one weight matrix of this shape, each up to its 99th percentile."""
    panels = []
    for title, values in maps.items():
        top = np.quantile(values.numpy(), 0.99)
        panels.append((f"{title}\n0 (dark) to {top:.2g} (light)", torch.atleast_2d(values.view(*shape)), ""))
    weights = f"n = {next(iter(maps.values())).numel():,} weights, one question"
    return plots.pictures([panels], label=f"{about}\n{weights}; down: outputs, across: inputs")


def directions(searches: Mapping[str, tuple[Tensor, float, Tensor, Tensor]]) -> Figure:
    """(grad f . v)^2 / v^T G v over half a turn of v, one panel a network.

    searches: by name the ratios (n,) of n directions, FI, the best direction (2,), and grad f (2,).
    """
    figure, axes = new_figure(1, len(searches), (WIDTH, 3.6))
    for panel, (name, (ratio, fi, best, steepest)) in zip(axes[0], searches.items(), strict=True):
        degrees = np.arange(len(ratio)) * 180 / len(ratio)
        panel.plot(degrees, ratio, color=plots.COLOURS[0], label="(∇f · v)² / vᵀGv")
        panel.axhline(fi, color=INK, linewidth=0.8, label="∇fᵀ G⁺ ∇f")
        panel.plot(_degrees(best), fi, "o", color=INK, label="v = G⁺ ∇f")
        at = _degrees(steepest)
        panel.plot(at, np.interp(at, degrees, ratio), "D", color=plots.COLOURS[1], label="v = ∇f")
        panel.set(xlim=(0, 180), ylim=(0, None), title=f"{name}, n = {len(ratio):,} directions")
        panel.set_xticks(range(0, 181, 45))
        panel.set_xlabel("direction of v (degrees)")
    axes[0, 0].set_ylabel("ratio")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _degrees(v: Tensor) -> float:
    """Direction of a vector (2,), in [0, 180): v and -v are alike."""
    return float(np.degrees(np.arctan2(float(v[1]), float(v[0]))) % 180)
