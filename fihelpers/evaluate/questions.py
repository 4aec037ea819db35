"""How well a model answers the questions of a task (method.md, section 4)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from fihelpers.answers import Answers, FixedTop, Groups, usual_answers
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.models.vision import VisionModel
from fihelpers.scores.pixels import image_of, option_letters
from fihelpers.tasks import Example

BATCH_SIZE = 32


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one model answered to N examples, on the CPU.

    ``log_probs`` (N, K) of the classes, ``predicted`` (N,) the class chosen (under ``Top`` that of the
    likeliest token), ``answer`` (N,) the right class, or the intact model's choice where nothing is right
    or wrong; ``classes`` are those they were judged on.
    """

    log_probs: Tensor
    predicted: Tensor
    answer: Tensor
    classes: Answers

    @property
    def correct(self) -> Tensor:
        """Whether each prediction (N,) is the answer."""
        return self.predicted == self.answer

    @property
    def log_prob(self) -> Tensor:
        """The log-probability (N,) of the answer."""
        return self.log_probs.gather(1, self.answer[:, None])[:, 0]

    @property
    def accuracy(self) -> float:
        return float(self.correct.double().mean())

    @property
    def confidence(self) -> float:
        """The median over examples of P(ŷ), the probability of the predicted class."""
        chosen = self.log_probs.gather(1, self.predicted[:, None])
        return float(chosen.exp().double().quantile(0.5))


class Evaluator:
    """Asks a model the same questions again and again, while its weights are perturbed in between.

    The first call belongs to the intact model: it fixes the classes of ``Top`` and, where an example has no
    right answer or the classes are not its options (``Top``), takes the model's choice as the answer.
    ``reference`` is an earlier outcome on the same examples that takes the place of this first call.
    ``answers`` are by default the letters of the options, for statements to finish the options' first tokens,
    and for text to continue the likeliest tokens.

    Prompts are tokenised once; those of a subject share what they begin with, which is read once a call.
    Raises ValueError for no examples, or one whose options do not fit the classes.
    """

    def __init__(
        self,
        model: LanguageModel,
        examples: Sequence[Example],
        answers: Answers | None = None,
        batch_size: int = BATCH_SIZE,
        reference: Outcome | None = None,
    ) -> None:
        self.model = model
        self.examples = tuple(examples)
        if not self.examples:
            raise ValueError("there are no examples to answer; give at least one.")
        _check_reference(reference, len(self.examples))
        self.reference = reference
        self._answers = answers or usual_answers(model.tokenizer, self.examples)
        self._right = self._answers.right(self.examples)
        self._groups = list(self._prompt_groups(batch_size))

    def identity(self) -> list[object]:
        """What its answers depend on; see :mod:`fihelpers.identity`."""
        return [self.model, self.examples, self._answers]

    def __call__(self) -> Outcome:
        """Answer every example with the model as it is now."""
        start = self._answers if self.reference is None else self.reference.classes
        outcome = _outcome(self._logits(), start, self._right, self.reference)
        self.reference = self.reference or outcome
        return outcome

    def _prompt_groups(self, batch_size: int) -> Iterator[tuple[Tensor, list[Batch]]]:
        """Yield the shared prefix and the batches of every subject, indexed within all examples."""
        members: dict[str, list[int]] = {}
        for position, example in enumerate(self.examples):
            members.setdefault(example.subject, []).append(position)
        for positions in members.values():
            prompts = [self.examples[position].prompt for position in positions]
            prefix, batches = self.model.prefixed_batches(prompts, batch_size)
            place = torch.tensor(positions)
            yield prefix, [replace(batch, index=place[batch.index]) for batch in batches]

    @torch.inference_mode()
    def _logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        bar = tqdm(total=len(self.examples), desc="answering", unit="prompt", delay=3, leave=False)
        with bar:
            for prefix, batches in self._groups:
                past = self.model.read(prefix)
                for batch in batches:
                    yield batch.index, self.model.last_logits(batch, past)
                    bar.update(len(batch.index))


def answer_all(
    model: LanguageModel,
    examples: Sequence[Example],
    answers: Answers | None = None,
    batch_size: int = BATCH_SIZE,
    reference: Outcome | None = None,
) -> Outcome:
    """Answer every example once. See :class:`Evaluator`, which is faster for many calls.

    ``reference`` is the intact model's outcome on the same examples, if ``model`` is a perturbed one.
    """
    return Evaluator(model, examples, answers, batch_size, reference)()


def answer_images(
    model: VisionModel,
    examples: Sequence[Example],
    *,
    images: Sequence[Tensor] | None = None,
    answers: Answers | None = None,
    batch_size: int = BATCH_SIZE,
    reference: Outcome | None = None,
) -> Outcome:
    """Answer every question about an image once.

    ``images`` (3, H, W), grey levels 0 to 255, take the place of the examples' own (masked ones, say).
    ``answers`` are by default the letters of each example's options; where these differ in number, the
    log-probabilities of letters that an example lacks are -inf. ``reference`` is the outcome on the intact
    images, which fixes the classes of ``Top`` and the answers that are not given (see :class:`Evaluator`).

    Raises ValueError for no examples, as many images as there are not, an example without an image, or
    one whose options do not fit the classes.
    """
    if not examples or (images is not None and len(images) != len(examples)):
        found = "no" if images is None else len(images)
        raise ValueError(f"there are {len(examples)} examples and {found} images; give one image an example.")
    _check_reference(reference, len(examples))
    start = reference.classes if reference is not None else answers or _letters_of(model, examples)

    def logits() -> Iterator[tuple[Tensor, Tensor]]:
        places = torch.arange(len(examples)).split(batch_size)
        for rows in tqdm(places, desc="answering", delay=3, leave=False):
            shown = [image_of(examples[i]) if images is None else images[i] for i in rows.tolist()]
            with torch.no_grad():
                found = model.last_logits(shown, [examples[i].prompt for i in rows.tolist()])
            yield rows, found

    return _outcome(logits(), start, start.right(examples), reference)


def _outcome(
    batches: Iterable[tuple[Tensor, Tensor]], start: Answers, right: Tensor, reference: Outcome | None
) -> Outcome:
    """What batches say, each the places (B,) of its examples and their logits (B, V)."""
    index, log_probs, predicted, fixed = [], [], [], []
    for rows, logits in batches:
        classes = start.rows(rows).fix(logits)
        index.append(rows)
        log_probs.append(classes.log_probs(logits).cpu())
        predicted.append(classes.choice(logits).cpu())
        fixed += [classes.ids.cpu()] if isinstance(classes, FixedTop) else []
    order = torch.cat(index).argsort()
    chosen = torch.cat(predicted)[order]
    answer = torch.where(right >= 0, right, chosen if reference is None else reference.answer)
    judged = FixedTop(torch.cat(fixed)[order]) if fixed else start
    return Outcome(torch.cat(log_probs)[order], chosen, answer, judged)


@dataclass(frozen=True, eq=False)
class Lettered(Groups):
    """Letters as answer classes of questions with different numbers of options: the first ``counts`` (N,)."""

    counts: Tensor

    def log_probs(self, logits: Tensor) -> Tensor:
        """Map logits (N, V) to log-probabilities (N, K), -inf for the letters that a question lacks."""
        log_p = super().log_probs(logits)
        absent = torch.arange(self.size) >= self.counts[:, None]
        return log_p.masked_fill(absent.to(log_p.device), -torch.inf).log_softmax(-1)

    def fits(self, example: Example) -> bool:
        """Whether an example has no more options than there are letters."""
        return len(example.options) <= self.size

    def rows(self, index: Tensor) -> "Lettered":
        """Return the classes of some questions only."""
        return Lettered(self.names, self.tokens, self.counts[index])


def _letters_of(model: VisionModel, examples: Sequence[Example]) -> Answers:
    """Letters, one an option; the usual classes where all examples have as many options."""
    counts = [len(example.options) for example in examples]
    fewest = option_letters(model.tokenizer, min(counts))
    if min(counts) == max(counts):
        return fewest
    most = option_letters(model.tokenizer, max(counts))
    return Lettered(most.names, most.tokens, torch.tensor(counts))


def _check_reference(reference: Outcome | None, n: int) -> None:
    if reference is not None and len(reference.answer) != n:
        raise ValueError(
            f"the reference has {len(reference.answer)} examples, not the {n} given; "
            "use one made from the same examples."
        )
