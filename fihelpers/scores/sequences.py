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
from dataclasses import dataclass

import torch
from torch import Tensor

from fihelpers.answers import Answers, Top
from fihelpers.filters import EXACT, Spectral
from fihelpers.measures import MEASURES, Influence, Measure, find_measure
from fihelpers.models.generate import Response, prompt_ids, sample
from fihelpers.models.language import Batch, LanguageModel, left_padded
from fihelpers.scores.hooks import named_parameters
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_contexts
from fihelpers.tasks import Example

USUAL = Top(8)


@dataclass(frozen=True)
class Context:
    """A prompt and the start of a response, whose next token is a step to score.

    ``example`` is the prompt's place; ``share`` is the weight with which the step counts in its score.
    """

    example: int
    prompt: tuple[int, ...]
    written: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn and their steps weighted; see :func:`score_sequences`."""

    horizon: int
    samples: int
    discount: float | None
    seed: int

    def __post_init__(self) -> None:
        for name, value in (("horizon", self.horizon), ("number of samples", self.samples)):
            if value < 1:
                raise ValueError(f"the {name} must be at least 1, got {value}.")
        if self.discount is not None and not 0 < self.discount < 1:
            raise ValueError(f"the discount must lie between 0 and 1, got {self.discount}; None takes none.")

    def responses(self, model: LanguageModel, prompts: Sequence[str]) -> list[list[Response]]:
        """Sample as much of the responses as their first `horizon` steps need: a token less."""
        if self.horizon == 1:
            return [[Response((), False, "")] * self.samples for _ in prompts]
        return sample(model, prompts, self.samples, self.horizon - 1, self.seed)

    def contexts(
        self, ids: Sequence[tuple[int, ...]], responses: Sequence[Sequence[Response]]
    ) -> list[Context]:
        """The distinct contexts of all examples; their shares add up to 1 for each."""
        weights = [1.0 if self.discount is None else self.discount**step for step in range(self.horizon)]
        found: list[Context] = []
        for example, (prompt, drawn) in enumerate(zip(ids, responses, strict=True)):
            shares: dict[tuple[int, ...], float] = {}
            for response in drawn:
                steps = min(self.horizon, len(response.ids) + 1)
                for step in range(steps):
                    written = response.ids[:step]
                    shares[written] = shares.get(written, 0.0) + weights[step] / sum(weights[:steps])
            found += [Context(example, prompt, w, share / len(drawn)) for w, share in shares.items()]
        return found

    def about(self, responses: Sequence[Sequence[Response]], contexts: Sequence[Context]) -> dict[str, str]:
        """What the metadata say of the sampling."""
        drawn = [response for of_prompt in responses for response in of_prompt]
        ended = sum(response.ended for response in drawn) / len(drawn)
        entries: dict[str, object] = {
            "horizon": self.horizon,
            "samples": self.samples,
            "seed": self.seed,
            "ended": f"{ended:.6g}",
            "steps": sum(min(self.horizon, len(response.ids) + 1) for response in drawn),
            "contexts": len(contexts),
        }
        if self.discount is not None:
            # rounded up, so that the bound made of it holds
            left_out = math.ceil(1e9 * self.discount**self.horizon * (1 - ended)) / 1e9
            entries |= {"discount": self.discount, "left_out": left_out}
        return {name: str(value) for name, value in entries.items()}


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
    answers: the classes of every step, by default the 8 likeliest tokens and the rest.
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
    sampling = Sampling(horizon, samples, discount, seed)
    chosen = [find_measure(measure, spectral) for measure in measures or MEASURES]
    named_parameters(model.network, only)  # an unknown name is said before anything is sampled
    classes = answers or USUAL
    contexts, about = _sampled(model, examples, sampling)
    batches = list(_batches(model, contexts, batch_size))
    scores = score_contexts(model, batches, examples, chosen, spectral, classes, only)
    known = {m.name: _truncation(m, about, classes) for m in chosen}
    return {
        name: Scores(found.values, found.metadata | about | known.get(name, {}))
        for name, found in scores.items()
    }


def _sampled(
    model: LanguageModel, examples: Sequence[Example], sampling: Sampling
) -> tuple[list[Context], dict[str, str]]:
    if len(examples) == 0:
        raise ValueError("The calibration set is empty; choose n of at least 1.")
    prompts = [example.prompt for example in examples]
    ids = prompt_ids(model, prompts, sampling.horizon - 1)
    responses = sampling.responses(model, prompts)
    contexts = sampling.contexts(ids, responses)
    return contexts, sampling.about(responses, contexts)


def _batches(
    model: LanguageModel, contexts: Sequence[Context], batch_size: int
) -> Iterator[tuple[Batch, Tensor]]:
    """Contexts of similar length together: a batch that names their examples, and their shares."""
    ids = [context.prompt + context.written for context in contexts]
    for places in model.chunks(ids, batch_size):
        index = [contexts[place].example for place in places]
        shares = torch.tensor([contexts[place].share for place in places], dtype=torch.float64)
        yield left_padded(index, [ids[place] for place in places], model.device), shares


def _truncation(measure: Measure, about: dict[str, str], classes: Answers) -> dict[str, str]:
    if not isinstance(measure, Influence) or "left_out" not in about:
        return {}
    return {"truncation_error": str(float(about["left_out"]) * (classes.size - 1))}
