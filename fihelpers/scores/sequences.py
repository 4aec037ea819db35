"""FI of generated sequences: the scores of every step of responses that the model itself samples (method 2).

A response y to a prompt z has the steps l = 1, 2, ..., of which step l predicts its l-th token (the one that
ends it included) from the prompt and the l - 1 tokens before. With N sampled responses

    score(z) = 1/N sum_y [ sum_l w_l s(z, y_1 .. y_{l-1}) / sum_l w_l ],        l <= min(L, steps of y),

where s is a single step's score, w_l = 1 for FI_seq^L and gamma^(l-1) for the discounted form. A response
that ends early thus counts as much as any other, through the steps that it has. Where none ends before step
L this is (1/L) sum_l FI_l, and with a discount the sum (1 - gamma) sum_l gamma^(l-1) FI_l cut off after step
L, divided by the weight 1 - gamma^L of the steps that are left. For L = 1 it is the score of a single step.

Steps of several responses with the same tokens before them are one context, scored once with the sum of
their weights. The keys and values of a prompt are read once for its responses to be sampled; the gradients of
weights run through the whole context, so that scoring can reuse none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fihelpers.answers import Answers, Options, Top
from fihelpers.filters import EXACT, Spectral
from fihelpers.measures import MEASURES, Influence, Measure, find_measure
from fihelpers.models.generate import Response, prompt_ids, sample
from fihelpers.models.language import Batch, LanguageModel, left_padded
from fihelpers.scores.hooks import named_parameters
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_contexts
from fihelpers.tasks import Example

USUAL = Top(8)


class Context(NamedTuple):
    """A prompt and the start of a response, whose next token is a step to score.

    example: the prompt's place; ids: of all tokens; share: the weight with which the step counts in the
    prompt's score.
    """

    example: int
    ids: tuple[int, ...]
    share: float


def score_sequences(
    model: LanguageModel,
    examples: Sequence[Example],
    measures: Sequence[str | Measure] | None = None,
    spectral: Spectral = EXACT,
    *,
    horizon: int = 5,
    samples: int = 10,
    discount: float | None = None,
    seed: int = 0,
    answers: Answers | None = None,
    only: Collection[str] | None = None,
    batch_size: int = 16,
) -> dict[str, Scores]:
    """Mean over prompts of each measure of every weight, over the steps of sampled responses (method 2).

    horizon: L, the number of steps; samples: N, the responses to each prompt (the paper: 5 and 10).
    discount: gamma between 0 and 1 for the discounted form; None for FI_seq^L. See the module for both,
        and for how responses that end before step L count.
    answers: the classes of every step, by default the 8 likeliest tokens and the rest. `Options` are those of
        the first step alone.
    seed: as in `fihelpers.models.generate.sample`, which draws the responses; the rest as in
    `score_weights`.

    Returns what `score_weights` returns. The metadata also hold horizon, samples, seed, `ended` (the share of
    responses that came to their end within the horizon), and `contexts`, the number of distinct contexts
    scored in place of `steps` in all; with a discount also `discount`, `left_out` (gamma^L times the
    share of the responses that go on) and, for FI, `truncation_error`: the scores lie no further than
    left_out * (K - 1) from those for an endless horizon, since FI never exceeds K - 1 for the likeliest of
    K classes. Other measures have no such bound.

    Raises what `score_weights` and `sample` raise, and ValueError for a horizon or a number of samples below
    1 or a discount that does not lie between 0 and 1.
    """
    classes = answers or USUAL
    _check(len(examples), horizon, samples, discount, classes)
    chosen = [find_measure(measure, spectral) for measure in measures or MEASURES]
    named_parameters(model.network, only)  # an unknown name is said before anything is sampled
    prompts = [example.prompt for example in examples]
    ids = prompt_ids(model, prompts, horizon - 1)
    responses = [[Response((), False, "")] * samples for _ in prompts]
    if horizon > 1:  # as much as the steps need: a token less
        responses = sample(model, prompts, samples, horizon - 1, seed)
    contexts = contexts_of(ids, responses, horizon, discount)
    about = {"horizon": str(horizon), "samples": str(samples), "seed": str(seed)}
    about |= _about(responses, horizon, discount) | {"contexts": str(len(contexts))}
    batches = list(_batches(model, contexts, batch_size))
    scores = score_contexts(model, batches, examples, chosen, spectral, classes, only)
    made = {}
    for measure in chosen:
        found, told = scores[measure.name], about
        if isinstance(measure, Influence) and discount is not None:
            told = about | {"truncation_error": str(float(about["left_out"]) * (classes.size - 1))}
        made[measure.name] = Scores(found.values, found.metadata | told)
    return made


def _check(n: int, horizon: int, samples: int, discount: float | None, classes: Answers) -> None:
    for name, value in (("horizon", horizon), ("number of samples", samples)):
        if value < 1:
            raise ValueError(f"the {name} must be at least 1, got {value}.")
    if discount is not None and not 0 < discount < 1:
        raise ValueError(f"the discount must lie between 0 and 1, got {discount}; None takes none.")
    if n == 0:
        raise ValueError("The calibration set is empty; choose n of at least 1.")
    if isinstance(classes, Options) and horizon > 1:
        raise ValueError(
            f"the options' first tokens are the classes of a first step, not of {horizon}; set the horizon "
            "to 1, or leave answers out."
        )


def contexts_of(
    ids: Sequence[tuple[int, ...]],
    responses: Sequence[Sequence[Response]],
    horizon: int,
    discount: float | None,
) -> list[Context]:
    """The distinct contexts of all prompts, whose tokens are `ids`; their shares add up to 1 for each."""
    weights = [1.0 if discount is None else discount**step for step in range(horizon)]
    found: list[Context] = []
    for example, (prompt, drawn) in enumerate(zip(ids, responses, strict=True)):
        shares: dict[tuple[int, ...], float] = {}
        for response in drawn:
            steps = min(horizon, len(response.ids) + 1)
            for step in range(steps):
                written = response.ids[:step]
                shares[written] = shares.get(written, 0.0) + weights[step] / sum(weights[:steps])
        found += [Context(example, prompt + w, share / len(drawn)) for w, share in shares.items()]
    return found


def _about(responses: Sequence[Sequence[Response]], horizon: int, discount: float | None) -> dict[str, str]:
    """What the metadata say of the responses."""
    drawn = [response for of_prompt in responses for response in of_prompt]
    ended = sum(response.ended for response in drawn) / len(drawn)
    steps = sum(min(horizon, len(response.ids) + 1) for response in drawn)
    about = {"ended": f"{ended:.6g}", "steps": str(steps)}
    if discount is None:
        return about
    left_out = (
        math.ceil(1e9 * discount**horizon * (1 - ended)) / 1e9
    )  # up, so that the bound made of it holds
    return about | {"discount": str(discount), "left_out": str(left_out)}


def _batches(
    model: LanguageModel, contexts: Sequence[Context], batch_size: int
) -> Iterator[tuple[Batch, Tensor]]:
    """Contexts of similar length together: a batch that names their examples, and their shares."""
    ids = [context.ids for context in contexts]
    for places in model.chunks(ids, batch_size):
        index = [contexts[place].example for place in places]
        shares = torch.tensor([contexts[place].share for place in places], dtype=torch.float64)
        yield left_padded(index, [ids[place] for place in places], model.device), shares
