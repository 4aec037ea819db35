"""How far scores of a model held in bfloat16 agree with those in float32, layer by layer (method 1b.8)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pandas as pd

from fihelpers.experiments.limits import draw, overlap, ranks_of, spearman, top
from fihelpers.influence import SaturationWarning, Spectral
from fihelpers.models import open_model
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores import Scores, score_weights
from fihelpers.tasks import Example

SHARE = 0.01  # of a layer's weights, the top of each ranking


def precision_agreement(
    model_name: str,
    revision: str | None,
    task: str,
    subjects: Sequence[str],
    n: int,
    seed: int,
    spectral: Spectral,
) -> pd.DataFrame:
    """FI of every linear weight with bfloat16 weights beside that with float32 weights.

    Products of class gradients and the sums over samples are float32 in both; what bfloat16 rounds are the
    weights, the activations and the gradients of the layers' outputs. n: calibration questions, divided
    among the subjects. Of tied weights at the border of the top, each side draws its own (method 1b.5).

    Returns a row a linear layer: layer, weights, overlap (share of its top 1 % in common) and spearman (rank
    correlation over all its weights; NaN where one side is constant).
    """
    examples = draw(task, subjects, "val", n, seed)
    rough, fine = (
        _scores(model_name, revision, dtype, examples, spectral) for dtype in ("bfloat16", "float32")
    )
    lines = [
        (
            name.removesuffix(".weight"),
            truth.numel(),
            overlap(top({name: rough[name]}, SHARE, seed), top({name: truth}, SHARE, seed)),
            spearman(ranks_of(rough[name]), ranks_of(truth)),
        )
        for name, truth in fine.values.items()
    ]
    return pd.DataFrame(lines, columns=["layer", "weights", "overlap", "spearman"])


def _scores(
    name: str, revision: str | None, dtype: str, examples: Sequence[Example], spectral: Spectral
) -> Scores:
    """The model is opened for this alone, so that no more than one is in memory."""
    model = open_model(name, revision, dtype=dtype)
    names = linear_names(model.network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)  # no one reads these maps
        found = score_weights(model, examples, ["FI"], spectral, only=names, displaced=False)
    return found[f"FI {spectral}"]
