"""Scores of the parts of an input: any tensor's entries, or the embeddings of a language model's tokens.

:func:`score_inputs` takes any differentiable function from inputs to the log-probabilities of K classes;
:func:`score_embeddings` does the same for a language model's embeddings. K - 1 backward passes give all class
gradients (method 1b.7), which serve every measure, filter and grouping.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from fihelpers.answers import Answers, Top, usual_answers
from fihelpers.filters import EXACT, Spectral
from fihelpers.influence import (
    SaturationWarning,
    axes_of,
    ceiling,
    fi_of_moments,
    is_finite,
    warn_if_saturated,
)
from fihelpers.measures import ByMeasure, Elementwise, Influence, Measure, Random, find_measure
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.tasks import Example

LogProbs = Callable[[Tensor], Tensor]
EmbeddingGrouping = Literal["dimension", "token"]

SUMMED = " summed"  # after FI: the sum of the single entries' FI in place of their joint FI
FI_SUMMED = "FI" + SUMMED
AT_ONCE = 16  # inputs x classes in one backward pass; larger batches keep a processor busy by themselves


@dataclass(frozen=True, eq=False)
class InputGrads:
    """Class gradients of N inputs, made once for every measure, filter and grouping.

    `class_grads` (K, N, *shape), `probs` (K, N) and `predicted` (N,) as in `fihelpers.influence.fi`; `value`
    (N, *shape) are the inputs themselves; `salts` separate the random scores of the inputs.
    """

    class_grads: Tensor
    probs: Tensor
    predicted: Tensor
    value: Tensor
    salts: tuple[int, ...]

    def scores(
        self,
        measures: Sequence[str | Measure] = ("FI",),
        over: int | Sequence[int] = (),
        spectral: Spectral = EXACT,
    ) -> dict[str, Tensor]:
        """The measures of every perturbation, {measure name: (N, *rest)}; see :func:`score_inputs`."""
        axes = axes_of(over, self.value.dim() - 1)
        found = {}
        for measure in (_find(m, spectral) for m in measures):
            if isinstance(measure, Random):
                found[measure.name] = self._random(measure, axes)
                continue
            found[measure.name] = measure(
                self.class_grads,
                self.probs,
                over=[axis + 1 for axis in axes],
                predicted=self.predicted,
                value=self.value,
            )
        return found

    def row(self, n: int, part: slice = slice(None)) -> InputGrads:
        """One of the inputs, or a part of it along its first axis, as a batch of one."""
        one = slice(n, n + 1)
        return InputGrads(
            self.class_grads[:, one, part],
            self.probs[:, one],
            self.predicted[one],
            self.value[one, part],
            self.salts[one],
        )

    def _random(self, measure: Random, axes: tuple[int, ...]) -> Tensor:
        """Seeded for each input by itself, so that its scores do not depend on the batch it came in."""
        rest = [n for axis, n in enumerate(self.value.shape[1:]) if axis not in axes]
        one = self.value.new_empty(rest)
        return torch.stack([measure.of_value(one, salt) for salt in self.salts])


@dataclass(frozen=True, eq=False)
class EmbeddingBatch:
    """Prompts of similar length as embeddings, whose class gradients are made when first asked for.

    `index` are their places in the list of examples; `embeddings` (B, T, hidden) are those of `batch`, padded
    on the left; `answers` are fixed, so that the classes stay while the embeddings are perturbed.
    """

    model: LanguageModel
    index: tuple[int, ...]
    examples: tuple[Example, ...]
    batch: Batch
    embeddings: Tensor
    answers: Answers

    @cached_property
    def grads(self) -> InputGrads:
        """Class gradients (K, B, T, hidden) with respect to the embeddings; those of padding are zero."""
        made = class_grads_of_inputs(self.log_probs, self.embeddings)
        salts = tuple(zlib.crc32(example.id.encode()) for example in self.examples)
        return InputGrads(*made, self.embeddings, salts)

    @property
    def padding(self) -> tuple[int, ...]:
        """The number of tokens of padding before each prompt (B)."""
        return tuple((self.batch.attention_mask == 0).sum(1).tolist())

    def log_probs(self, embeddings: Tensor) -> Tensor:
        """Log-probabilities (B, K) of the answers for embeddings (B, T, hidden) of these prompts."""
        return self.answers.log_probs(self.model.last_logits(self.batch, embeddings=embeddings))

    def scores(
        self,
        measures: Sequence[str | Measure],
        over: EmbeddingGrouping = "dimension",
        spectral: Spectral = EXACT,
    ) -> dict[str, list[Tensor]]:
        """The measures of each prompt of this batch, without its padding; see :func:`score_embeddings`."""
        if over not in get_args(EmbeddingGrouping):
            raise ValueError(f"over must be one of {', '.join(get_args(EmbeddingGrouping))}, not {over!r}.")
        found: dict[str, list[Tensor]] = {}
        for row, start in enumerate(self.padding):
            one = self.grads.row(row, slice(start, None))
            for name, values in one.scores(measures, 1 if over == "token" else (), spectral).items():
                found.setdefault(name, []).append(values[0])
        return found


def class_grads_of_inputs(log_probs: LogProbs, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class gradients of N inputs at once: (class_grads (K, N, *shape), probs (K, N), predicted (N,)).

    log_probs: any differentiable function from x (N, *shape) to log-probabilities (N, K) in which no input of
    the batch depends on another; they are renormalised, so logits serve as well. One forward pass and K - 1
    backward passes, those of few inputs together (:data:`AT_ONCE`): each input skips its predicted class,
    whose row is s_y_hat = -sum_{y != y_hat} P(y) s_y / P(y_hat) (method 1a).
    Float32 or better. Raises FloatingPointError for NaN or infinite probabilities or gradients, and
    ValueError for a function that does not depend on x or returns another shape.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        log_p = _checked(log_probs(x), x).log_softmax(-1)
        probs = log_p.detach().exp()
        predicted = probs.argmax(-1)
        passes = torch.arange(probs.shape[1] - 1, device=probs.device)
        others = passes + (passes >= predicted[:, None])  # (N, K-1)
        targets = log_p.gather(1, others)
    return _in_order(_backward(targets, x), probs, predicted, others), probs.T.contiguous(), predicted


def score_inputs(
    log_probs: LogProbs,
    x: Tensor,
    *,
    over: int | Sequence[int] = (),
    measures: Sequence[str | Measure] = ("FI",),
    spectral: Spectral = EXACT,
) -> dict[str, Tensor]:
    """Score the parts of any input under any differentiable function (method 1, 3): {name: (N, *rest)}.

    log_probs and x as in :func:`class_grads_of_inputs`.
    over: the axes of one input's shape that together form one perturbation, () for every entry by itself.
    measures: names of the registry or Measure objects, where "FI" and "FI summed" (the sum of the entries'
        own FI, method 1b.2) take the filter `spectral`. The perturbed value that SNIP and its like need is x
        as it is; the displacement is its removal, -x.
    Warns `SaturationWarning` where FI ranks nothing; raises what :func:`class_grads_of_inputs` raises.
    """
    grads = InputGrads(*class_grads_of_inputs(log_probs, x), x.detach(), tuple(range(len(x))))
    return grads.scores(measures, over, spectral)


def score_embeddings(
    model: LanguageModel,
    examples: Example | Sequence[Example],
    measures: Sequence[str | Measure] = ("FI",),
    spectral: Spectral = EXACT,
    *,
    answers: Answers | None = None,
    over: EmbeddingGrouping = "dimension",
    batch_size: int = 16,
) -> dict[str, list[Tensor]]:
    """Score every example's token embeddings: {measure name: one tensor an example} (method 1, 3 and 4.3).

    measures: as in :func:`score_inputs`.
    answers: the classes, by default letters, or the 8 likeliest tokens and the rest for plain text; ``Top``
        is fixed on the intact embeddings.
    over: "dimension", each entry of each token's embedding by itself, (tokens, hidden); or "token", each
        token's embedding as one perturbation, (tokens,).

    Tokens are those of the tokenizer, in order, with its special ones. For several groupings or filters of
    one pass see :func:`embedding_batches`. Warns `SaturationWarning` once a measure where FI ranks nothing
    (method 1b.2). Raises ValueError for no examples, an empty prompt or one longer than the model's context,
    or an unknown name, and FloatingPointError for NaN or infinite logits or gradients.
    """
    chosen = [examples] if isinstance(examples, Example) else examples
    batches = embedding_batches(model, chosen, answers, batch_size)
    return gathered(batches, lambda batch: batch.scores(measures, over, spectral), measures, spectral)


def embedding_batches(
    model: LanguageModel, examples: Sequence[Example], answers: Answers | None = None, batch_size: int = 16
) -> Iterator[EmbeddingBatch]:
    """Put the prompts of similar length together; arguments as in :func:`score_embeddings`.

    ``batches = list(embedding_batches(...))`` keeps the class gradients, K * tokens * hidden floats an
    example, so that their `scores` can be asked for again and again with other measures, filters and
    groupings.
    """
    if not examples:
        raise ValueError("there are no examples to score; give at least one.")
    classes = answers or usual_answers(model.tokenizer, examples)
    batches = model.batches([example.prompt for example in examples], batch_size)
    with tqdm(total=len(examples), desc="scoring", unit="prompt", delay=3, leave=False) as bar:
        for batch in batches:
            with torch.no_grad():
                embeddings = model.embed(batch)
                fixed = classes.rows(batch.index)
                if isinstance(fixed, Top):
                    fixed = fixed.fix(model.last_logits(batch))
            index = tuple(batch.index.tolist())
            yield EmbeddingBatch(model, index, tuple(examples[i] for i in index), batch, embeddings, fixed)
            bar.update(len(index))


def gathered(
    batches: Iterable[Any],
    score: Callable[[Any], Mapping[str, Iterable[Tensor]]],
    measures: Sequence[str | Measure],
    spectral: Spectral,
) -> dict[str, list[Tensor]]:
    """Score batches and put the values in the order of their examples: {measure name: one tensor an example}.

    batches: with the places of their examples, `index`, and their class gradients, `grads`. score: gives the
    tensors of a batch's inputs, in their order. Warns `SaturationWarning` at most once for
    each FI among the measures, judged over all the inputs together.
    """
    influences = {m.name for m in (_find(m, spectral) for m in measures) if isinstance(m, Influence)}
    found: dict[str, dict[int, Tensor]] = {}
    tops: dict[int, Tensor] = {}
    for batch in batches:
        with warnings.catch_warnings():
            # judged below for all the inputs together, and said once
            warnings.simplefilter("ignore", SaturationWarning)
            scored = score(batch)
        for name, values in scored.items():
            of_inputs = (one.cpu() for one in values)
            found.setdefault(name, {}).update(zip(batch.index, of_inputs, strict=True))
        if influences:
            top = ceiling(batch.grads.probs, batch.grads.predicted)
            tops.update(zip(batch.index, top.cpu(), strict=True))
    for name in influences:
        flat = torch.cat([values.flatten() for values in found[name].values()])
        warn_if_saturated(flat, torch.cat([tops[i].expand(v.numel()) for i, v in found[name].items()]))
    return ByMeasure((name, [of[i] for i in sorted(of)]) for name, of in found.items())


def _checked(log_p: Tensor, x: Tensor) -> Tensor:
    if log_p.dim() != 2 or len(log_p) != len(x) or log_p.shape[1] < 2:
        raise ValueError(
            f"the function gives shape {tuple(log_p.shape)} for {len(x)} inputs; it must give one row for "
            "each, with two or more classes."
        )
    if not log_p.requires_grad:
        raise ValueError("the function's values have no gradient; compute them from x within torch.")
    if not torch.isfinite(log_p).all():
        raise FloatingPointError("The log-probabilities are NaN or infinite; check the model and the inputs.")
    return log_p if log_p.dtype == torch.float64 else log_p.float()


def _backward(targets: Tensor, x: Tensor) -> list[Tensor]:
    """The gradients (K-1 times (N, *shape)) of targets (N, K-1) with respect to x (N, *shape)."""
    count = max(1, AT_ONCE // len(x))
    sums = targets.sum(0)
    if count > 1 and len(sums) > 1:
        ways = torch.eye(len(sums), dtype=sums.dtype, device=sums.device).split(count)
        try:
            made = [
                torch.autograd.grad(sums, x, way, retain_graph=True, is_grads_batched=True)[0] for way in ways
            ]
        except RuntimeError:  # an operation of this model cannot be batched, or memory is short
            pass
        else:
            return [grad for together in made for grad in together]
    last = len(sums) - 1
    return [torch.autograd.grad(one, x, retain_graph=i < last)[0] for i, one in enumerate(sums)]


def _in_order(made: list[Tensor], probs: Tensor, predicted: Tensor, others: Tensor) -> Tensor:
    """Put the gradients of the other classes in the order of the classes, and make that of the predicted one.

    made: K-1 times (N, *shape). Raises FloatingPointError for NaN or infinite gradients.
    """
    rows = torch.arange(len(predicted), device=predicted.device)
    chosen = probs[rows, predicted]
    full = made[0].new_empty(len(made) + 1, *made[0].shape, dtype=probs.dtype)
    own = torch.zeros_like(full[0])
    for i, grad in enumerate(made):
        if not is_finite(grad):
            raise FloatingPointError(
                "The inputs' gradients are NaN or infinite; check the model and the inputs."
            )
        share = probs[rows, others[:, i]] / chosen
        own.addcmul_(share.reshape(-1, *[1] * (grad.dim() - 1)), grad.to(own.dtype), value=-1)
        full[others[:, i], rows] = grad.to(full.dtype)
    full[predicted, rows] = own
    return full


def _find(measure: str | Measure, spectral: Spectral) -> Measure:
    if isinstance(measure, str) and measure.endswith(SUMMED):
        one = find_measure(measure.removesuffix(SUMMED), spectral)
        if isinstance(one, Influence):
            return _summed(one)
    return find_measure(measure, spectral)


def _summed(one: Influence) -> Measure:
    return Elementwise(one.name + SUMMED, lambda m, _: fi_of_moments(m, one.spectral), reduce="sum")
