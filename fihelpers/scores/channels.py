"""Scores of whole channels of weight matrices W (out, in): output rows or input columns (method 1b.2, 1b.4).

The rows of fused experts are those of all experts, one after the other, and their columns are shared.

A channel's value is the sum or mean of its weights' scores, what a known displacement of its weights would
do, or what the layer's inputs say of it. All are `Scores` with one value a channel; their metadata `axis`
says "rows" or "columns".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fihelpers.measures import FISHER, INFORMATION_LENGTH, SQUARED_SCORE
from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, from_rows
from fihelpers.scores.store import Scores, provenance
from fihelpers.scores.watched import Watched, batch_size_for, layer_sums, linear_layers
from fihelpers.tasks import Example

Axis = Literal["rows", "columns"]

PREDICTED_CHANGE = "predicted change"
MEAN_INPUT = "mean input"
MEAN_OUTPUT = "mean output"
HESSIAN = "Hessian diagonal"
DISPLACED = {SQUARED_SCORE.name: PREDICTED_CHANGE, FISHER.name: INFORMATION_LENGTH.name}


def check_axis(axis: str) -> None:
    """Raise ValueError unless `axis` is "rows" or "columns"."""
    if axis not in ("rows", "columns"):
        raise ValueError(f"Channels are 'rows' (outputs) or 'columns' (inputs), not {axis!r}.")


def channel_scores(
    scores: Scores,
    how: Literal["sum", "mean"] = "sum",
    axis: Axis = "rows",
    *,
    names: Collection[str] | None = None,
) -> Scores:
    """The scores of a matrix's weights, summed or averaged over each channel.

    names: the matrices; all in `scores` by default, which leaves out what is no matrix.
    Returns one value a channel, (out,) for rows and (in,) for columns. Sums of matrices of other widths do
    not compare; means do. Raises ValueError for an unknown name, `how` or `axis`.
    """
    if how not in ("sum", "mean"):
        raise ValueError(f"how must be 'sum' or 'mean', not {how!r}.")
    along = along_of(axis)
    chosen = _matrices(scores, names)
    rows = {name: scores.rows(name) for name in chosen}
    values = {n: v.sum(along) if how == "sum" else v.mean(along) for n, v in rows.items()}
    return Scores(values, {**scores.metadata, "axis": axis, "how": how})


def displacement_scores(means: Scores, delta: Mapping[str, Tensor], axis: Axis = "rows") -> Scores:
    """What a known displacement of the weights does to each channel, to first order (method 1b.4).

    means: "squared score", the mean of s_y_hat^2, which gives the predicted change; "Fisher diagonal", the
        mean of G, which gives the squared information length; or "Hessian diagonal", which gives the change
        of the layer's own output as optimal brain compression sees it.
    delta: the displacement of each matrix to score, such as the quantization error.

    Returns the sum over each channel of mean * delta^2. Raises ValueError for a matrix without scores or of
    another shape, and FloatingPointError for a displacement that is NaN or infinite.
    """
    along = along_of(axis)
    chosen = _matrices(means, list(delta))
    values = {}
    for name, mean in chosen.items():
        if delta[name].shape != mean.shape:
            raise ValueError(
                f"The displacement of {name} is {tuple(delta[name].shape)}, its scores are "
                f"{tuple(mean.shape)}; they belong to different models."
            )
        if not torch.isfinite(delta[name]).all():
            raise FloatingPointError(f"The displacement of {name} holds NaN or infinite values.")
        moved = mean * delta[name].to(mean).square()
        values[name] = as_rows(moved, name in means.turned).sum(along)
    measure = means.metadata.get("measure", "")
    name = DISPLACED.get(measure, f"{measure} times displacement squared")
    return Scores(values, {**means.metadata, "measure": name, "axis": axis, "how": "sum"})


def score_activations(
    model: LanguageModel,
    examples: Sequence[Example],
    *,
    only: Collection[str] | None = None,
    batch_size: int = 16,
) -> dict[str, Scores]:
    """What linear layers W (out, in) read and write over a calibration set, the mean over all its tokens.

    "mean input": mean |x_j| of each input column j, AWQ's activation-aware score (Lin et al. 2024), axis
        "columns". "mean output": mean |y_i| of each output row i, the same idea for rows, which AWQ does not
        score. "Hessian diagonal": mean x_j^2, the diagonal of X X^T that GPTQ and optimal brain compression
        use, for every weight: all rows share it, so that it ranks columns by itself, and rows only together
        with a displacement (`displacement_scores`).

    only: names of weights; by default all linear layers'. Raises ValueError for an empty calibration set, an
    unknown name or a layer that is never called, FloatingPointError for NaN or infinite activations.
    """
    if len(examples) == 0:
        raise ValueError("The calibration set is empty; choose n of at least 1.")
    layers = linear_layers(model.network, only)
    batches = model.batches([e.prompt for e in examples], batch_size_for(layers, batch_size))
    sums, tokens = layer_sums(
        model, batches, layers, lambda x, out: [x.abs().sum(0), out.abs().sum(0), x.square().sum(0)]
    )
    means = {name: _activation_means(one, sums[name], tokens[name]) for name, one in layers.items()}
    about = provenance(model, examples)
    kinds: tuple[tuple[str, dict[str, str]], ...] = (
        (MEAN_INPUT, {"axis": "columns"}),
        (MEAN_OUTPUT, {"axis": "rows"}),
        (HESSIAN, {}),
    )
    return {
        kind: Scores({n: means[n][i] for n in layers}, {**about, "measure": kind, **extra})
        for i, (kind, extra) in enumerate(kinds)
    }


def along_of(axis: str) -> int:
    """The axis of W (out, in) that a channel runs along."""
    check_axis(axis)
    return 1 if axis == "rows" else 0


def _matrices(scores: Scores, names: Collection[str] | None) -> dict[str, Tensor]:
    chosen = {n: v for n, v in scores.values.items() if n in (scores.values if names is None else set(names))}
    missing = sorted(set(names or ()) - set(chosen))
    if missing:
        raise ValueError(f"There are no scores for {missing[0]}; score it first.")
    flat = [n for n, v in chosen.items() if not has_channels(v)]
    if names is not None and flat:
        raise ValueError(f"{flat[0]} is no matrix, so it has no channels; leave it out.")
    matrices = {n: v for n, v in chosen.items() if has_channels(v)}
    if not matrices:
        raise ValueError("There are scores of no matrix here; score the weights of linear layers.")
    return matrices


def has_channels(weight: Tensor) -> bool:
    """Whether it is a matrix, or one of each fused expert; kernels of convolutions are as narrow as one."""
    return weight.dim() == 2 or (weight.dim() == 3 and min(weight.shape) > 1)


def _activation_means(one: Watched, sums: Sequence[Tensor], tokens: Tensor) -> list[Tensor]:
    """Mean input (in,), mean output (rows,), the Hessian's diagonal of every weight; 0 where none was fed."""
    count = tokens.clamp(min=1).to(sums[0].device)[:, None]
    squares = (sums[2] / count)[:, None].expand(-1, len(one.rows) // one.experts, -1).flatten(0, 1)
    hessian = from_rows(squares, one.weight.shape, one.turned)
    return [sums[0].sum(0) / count.sum(), (sums[1] / count).flatten(), hessian]
