"""Scores of one measure after the other, where those of all at once would not fit into the memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from fihelpers.jobs.preflight import memory_free, scoring_of
from fihelpers.measures import Measure, find_measure
from fihelpers.models.language import LanguageModel
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example

FILLED = 0.8  # of the free memory; the rest is left to what else runs
WORKING = 2  # copies of the scores of one measure that `select` makes of them, and one that the caller holds


def score_in_turn(
    model: LanguageModel,
    examples: Sequence[Example],
    measures: Sequence[str | Measure],
    *,
    only: Collection[str] | None = None,
    batch_size: int = 16,
) -> Iterator[tuple[str, Scores]]:
    """`score_weights` measure by measure: (name, scores), in the order of the measures (method 1b.4 and 3).

    As many measures share a pass over the examples as fit, with their scores, into the memory that is free;
    each measure's scores are let go when the next one's are taken. Arguments and errors as there.
    """
    left = [*{m.name: m for m in map(find_measure, measures)}.values()]
    together, _ = fitting(model, examples, left, only, batch_size)
    while left:
        some, left = left[:together], left[together:]
        scores = score_weights(model, examples, some, only=only, batch_size=batch_size)
        for measure in some:
            yield measure.name, _apart(scores.pop(measure.name))


def _apart(scores: Scores) -> Scores:
    """The scores in storage of their own: those of a pass share one, which each of them would keep."""
    return replace(scores, values={name: value.clone() for name, value in scores.values.items()})


def fitting(
    model: LanguageModel,
    examples: Sequence[Example],
    measures: Sequence[Measure],
    only: Collection[str] | None = None,
    batch_size: int = 16,
) -> tuple[int, int]:
    """How many measures share a pass, and the bytes that scoring and choosing by the scores then take.

    All measures, or about as many in each of the fewest passes that fit into the memory that is free. The
    bytes are those beside the weights.
    """
    if not (examples and measures and (only is None or only)):
        return 1, 0  # and `score_weights` says what is missing
    parts = scoring_of(model, examples, measures[:1], only, batch_size).memory()
    one = parts.pop("scores at work")
    beside = sum(parts.values()) - parts["weights"] + WORKING * one
    free = sum(memory_free(device) for device in {str(p.device) for p in model.network.parameters()})
    passes = math.ceil(len(measures) / max(1, (FILLED * free - beside) // one))
    together = math.ceil(len(measures) / passes)
    return together, beside + together * one
