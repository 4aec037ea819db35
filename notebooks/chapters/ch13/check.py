"""Checks of chapter 13: scores of three weights, an outlier on a ladder, a planted super weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fichapters.ch13.lab import ends_of_mlps
from fichapters.exercises import Wrong, choice, equal, exercise, tensor
from fihelpers.models.language import LanguageModel, open_model

PLANTED = 60.0  # times the largest weight of the matrix


@exercise
def first_by(
    by_fi: object, by_snip: object, s: Mapping[str, float], G: Mapping[str, float], theta: Mapping[str, float]
) -> str:
    """Which weight FI ranks first, and which SNIP; s: s_ŷ, G: the metric, theta: the value of each weight."""
    fi = {name: s[name] ** 2 / G[name] for name in s}
    snip = {name: abs(s[name] * theta[name]) for name in s}
    for answer, scores, kind in ((by_fi, fi, "FI"), (by_snip, snip, "SNIP")):
        hints = {
            "FI": "divide the squared score by the metric; the value of the weight plays no part.",
            "SNIP": "multiply the score by the value of the weight.",
        }
        best = max(scores, key=lambda name: scores[name])
        choice(answer, best, {name: f"For {kind}, {hints[kind]}" for name in scores if name != best})
    return "A large weight with a small gradient does a lot when it goes, and FI cannot see that."


@exercise
def finer_steps(answer: object, row: Sequence[float], bits: int) -> str:
    """How many times finer the steps of a row's ladder become when its largest weight is kept apart."""
    sizes = sorted((abs(weight) for weight in row), reverse=True)
    truth = sizes[0] / sizes[1]
    slips = {
        "That is how many steps the ladder has; both ladders have as many.": float(2**bits),
        "You divided the other way round.": 1 / truth,
    }
    hint = "A step is in proportion to the largest weight that the ladder must reach."
    equal(answer, truth, slips, hint=hint)
    return "One weight in a row decides how coarse all the others become."


def planted(seed: int = 0) -> LanguageModel:
    """The bundled model with one weight at the end of one MLP made far too large; `found` knows which."""
    model = open_model("mini-lm")
    name, place = _planted(model, seed)
    weight = model.network.get_parameter(name).data
    weight.view(-1)[place] = PLANTED * weight.abs().max()
    return replace(model, name=f"planted {seed}")


@exercise
def found(answer: object, model: LanguageModel) -> str:
    """Block, row and column of the planted weight, counted from 0."""
    block, row, column = (int(x) for x in tensor(answer, (3,)).tolist())
    name, place = _planted(model, int(model.name.rpartition(" ")[2]))
    ends = ends_of_mlps(model.network)
    truth = (list(ends).index(name), *divmod(place, ends[name].inputs))
    if (block, row, column) == truth:
        return "One forward pass, and no gradient: what is that large shows."
    if (block, column, row) == truth:
        raise Wrong("Row and column are the wrong way round: a row belongs to an output.")
    if block != truth[0]:
        raise Wrong("That is another block. Whose largest term is far above all others?")
    raise Wrong("The block is right. Which output is the largest, and which input makes it?")


def _planted(model: LanguageModel, seed: int) -> tuple[str, int]:
    """The name and the flat position of the planted weight."""
    generator = torch.Generator().manual_seed(seed)
    ends = list(ends_of_mlps(model.network))
    name = ends[int(torch.randint(len(ends), (), generator=generator))]
    count = model.network.get_parameter(name).numel()
    return name, int(torch.randint(count, (), generator=generator))
