"""How far scores of a model held in bfloat16 agree with those in float32, layer by layer (method 1b.8)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from fichapters.ch03.lab import draw, overlap, top
from fihelpers.answers import usual_answers
from fihelpers.evaluate.stats import spearman
from fihelpers.filters import Spectral
from fihelpers.influence import SaturationWarning
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
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
    hows = ("float32", "bfloat16", ROUNDED)
    return _table([_scores(model_name, revision, how, examples, spectral).values for how in hows], seed)


def agreement_by_answer(
    model_name: str,
    revision: str | None,
    task: str,
    subjects: Sequence[str],
    n: int,
    seed: int,
    spectral: Spectral,
) -> pd.DataFrame:
    """`precision_agreement`, over all questions and over those of one answer in every precision.

    Where rounding moves the likeliest answer of a question, FI of another answer is compared; such questions
    are close calls, with the highest ceilings, and weigh most in a mean (method 1b.6). A row for each layer
    and set of questions: asked ("all", "same answer"), questions (how many), and the columns of
    `precision_agreement`.

    Raises ValueError where no question is left.
    """
    examples = draw(task, subjects, "val", n, seed)
    hows = ("float32", "bfloat16", ROUNDED)
    answers = torch.stack([_answers(model_name, revision, how, examples) for how in hows])
    same = (answers == answers[0]).all(0).tolist()
    kept = [e for e, stays in zip(examples, same, strict=True) if stays]
    moved = [e for e, stays in zip(examples, same, strict=True) if not stays]
    if not kept:
        raise ValueError(f"all {len(examples)} questions have another answer in bfloat16; ask more of them.")
    found = [_scores(model_name, revision, how, kept, spectral).values for how in hows]
    both = found
    if moved:
        more = [_scores(model_name, revision, how, moved, spectral).values for how in hows]
        both = [_mean(a, b, len(kept), len(moved)) for a, b in zip(found, more, strict=True)]
    tables = [
        _table(values, seed).assign(asked=asked, questions=count)
        for asked, values, count in (("all", both, len(examples)), ("same answer", found, len(kept)))
    ]
    return pd.concat(tables, ignore_index=True)


def _answers(name: str, revision: str | None, how: str, examples: Sequence[Example]) -> Tensor:
    """The likeliest answer of every question."""
    model = _opened(name, revision, how)
    classes = usual_answers(model.tokenizer, examples)
    chosen = torch.zeros(len(examples), dtype=torch.long)
    with torch.no_grad():
        for batch in model.batches([example.prompt for example in examples]):
            chosen[batch.index.long()] = classes.log_probs(model.last_logits(batch)).argmax(-1)
    return chosen


def _mean(a: Mapping[str, Tensor], b: Mapping[str, Tensor], n: int, m: int) -> dict[str, Tensor]:
    """The mean over n + m questions from those over n and over m."""
    return {name: (n * a[name] + m * b[name]) / (n + m) for name in a}


def _table(scores: Sequence[Mapping[str, Tensor]], seed: int) -> pd.DataFrame:
    """Agreement with the first of the scores, by layer; from float32, bfloat16 and rounded weights alone."""
    truth, rough, rounded = scores
    lines = [
        (
            name.removesuffix(".weight"),
            values.numel(),
            *_agreement(name, rough[name], values, seed),
            *_agreement(name, rounded[name], values, seed),
        )
        for name, values in truth.items()
    ]
    pairs = ["overlap", "spearman", "overlap_rounded", "spearman_rounded"]
    return pd.DataFrame(lines, columns=["layer", "weights", *pairs])


def _agreement(name: str, a: Tensor, b: Tensor, seed: int) -> tuple[float, float]:
    common = overlap(top({name: a}, SHARE, seed), top({name: b}, SHARE, seed))
    return common, float(spearman(*(values.flatten().double().cpu().numpy() for values in (a, b))))


def _scores(
    name: str, revision: str | None, how: str, examples: Sequence[Example], spectral: Spectral
) -> Scores:
    """The model is opened for this alone, so that no more than one is in memory."""
    model = _opened(name, revision, how)
    names = linear_names(model.network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)  # no one reads these maps
        found = score_weights(model, examples, ["FI"], spectral, only=names)
    return found[f"FI {spectral}"]


def _opened(name: str, revision: str | None, how: str) -> LanguageModel:
    model = open_model(name, revision, dtype="bfloat16" if how == ROUNDED else how)
    if how == ROUNDED:
        model.network.float()
    return model
