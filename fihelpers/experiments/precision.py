"""How far scores of a model held in bfloat16 agree with those in float32, layer by layer (method 1b.8)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pandas as pd
from torch import Tensor

from fihelpers.experiments.limits import draw, overlap, ranks_of, spearman, top
from fihelpers.influence import SaturationWarning, Spectral
from fihelpers.models import open_model
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores import Scores, score_weights
from fihelpers.tasks import Example

SHARE = 0.01  # of a layer's weights, the top of each ranking
ROUNDED = "bfloat16, computed in float32"


def precision_agreement(
    model_name: str,
    revision: str | None,
    task: str,
    subjects: Sequence[str],
    n: int,
    seed: int,
    spectral: Spectral,
) -> pd.DataFrame:
    """FI of every linear weight of a model held in bfloat16 beside that in float32.

    Products of class gradients and the sums over samples are float32 in both; what bfloat16 rounds are the
    weights, the activations and the gradients of the layers' outputs. To tell the first of these from the
    others, the rounded weights are also scored with all arithmetic in float32. n: calibration questions,
    divided among the subjects. Of tied weights at the border of the top, each side draws its own
    (method 1b.5).

    Returns a row a linear layer: layer, weights, overlap (share of its top 1 % in common) and spearman (rank
    correlation over all its weights; NaN where one side is constant), of bfloat16 with float32, and
    overlap_rounded and spearman_rounded, of rounded weights alone with float32.
    """
    examples = draw(task, subjects, "val", n, seed)
    fine, rough, rounded = (
        _scores(model_name, revision, how, examples, spectral) for how in ("float32", "bfloat16", ROUNDED)
    )
    lines = [
        (
            name.removesuffix(".weight"),
            truth.numel(),
            *_agreement(name, rough[name], truth, seed),
            *_agreement(name, rounded[name], truth, seed),
        )
        for name, truth in fine.values.items()
    ]
    pairs = ["overlap", "spearman", "overlap_rounded", "spearman_rounded"]
    return pd.DataFrame(lines, columns=["layer", "weights", *pairs])


def _agreement(name: str, a: Tensor, b: Tensor, seed: int) -> tuple[float, float]:
    common = overlap(top({name: a}, SHARE, seed), top({name: b}, SHARE, seed))
    return common, spearman(ranks_of(a), ranks_of(b))


def _scores(
    name: str, revision: str | None, how: str, examples: Sequence[Example], spectral: Spectral
) -> Scores:
    """The model is opened for this alone, so that no more than one is in memory."""
    model = open_model(name, revision, dtype="bfloat16" if how == ROUNDED else how)
    if how == ROUNDED:
        model.network.float()
    names = linear_names(model.network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)  # no one reads these maps
        found = score_weights(model, examples, ["FI"], spectral, only=names, displaced=False)
    return found[f"FI {spectral}"]
