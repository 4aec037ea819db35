"""Chapter 06: move the embedding dimensions that a measure points at; what becomes of the answer (4.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import product
from operator import add
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fichapters import tables
from fichapters.ch06.regions import question_region
from fichapters.tables import compare, measures_of
from fihelpers.answers import Top
from fihelpers.evaluate.stats import paired_difference, wilson
from fihelpers.filters import Damped
from fihelpers.influence import SaturationWarning, ceiling, saturated
from fihelpers.measures import MEASURES as REGISTERED
from fihelpers.measures import Influence, Measure, Random
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.perturb.embeddings import Direction, Norm, attack, top_dimensions
from fihelpers.scores.inputs import EmbeddingBatch, embedding_batches
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Kept, Labels, Trials, Tries, Values, collect

CLASSES = 8  # likeliest tokens that are classes of their own beside the rest
RANDOM = "random"
INTACT = "intact"
JACOBIAN = "Jacobian norm"
FI_LETTERS = tuple(name for name in REGISTERED if name.startswith("FI"))
ON_TOP = f", top {CLASSES}"  # what a measure of FI is called where the likeliest tokens are the classes
FI_TOP = tuple(name + ON_TOP for name in FI_LETTERS)
FI_SETTINGS = (*FI_LETTERS, *FI_TOP)
OTHERS = (
    JACOBIAN,
    "saliency",
    "SNIP",
    "Fisher diagonal",
    "information length",
    "magnitude",
    RANDOM,
)
MEASURES = (*FI_SETTINGS, *OTHERS)
PAPER = (JACOBIAN, "saliency", "SNIP", RANDOM)  # what the paper's second table sets FI against
SOME = (
    "FI exact",
    "FI cut 0.01",
    "FI damped 1e-06",
    "FI damped 0.0001",
    JACOBIAN,
    "SNIP",
    "information length",
    RANDOM,
)
CONTROLLED = ("FI exact", "FI damped 0.0001", JACOBIAN, RANDOM)  # also moved in random directions
ITERATED = (*CONTROLLED[:-1], "SNIP", RANDOM)  # also attacked in several steps
OPPONENTS = (JACOBIAN, "SNIP", RANDOM)  # of the paper's, where not every measure is run
DAMPED = tuple(Influence(Damped(lam)) for lam in (1e-5, 1e-3, 1e-2, 0.1, 1.0))  # beside the registered ones
WITH_DAMPING = "FI damped "
DRAWS = 2  # of the random measure
KEYS = {  # how the measures are called in the names of records
    "FI exact": "exact",
    "FI cut 0.001": "finecut",
    "FI cut 0.01": "cut",
    "FI damped 1e-06": "light",
    "FI damped 0.0001": "damped",
    JACOBIAN: "jacobian",
    "saliency": "saliency",
    "SNIP": "snip",
    "Fisher diagonal": "fisher",
    "information length": "length",
    "magnitude": "magnitude",
    RANDOM: "random",
}
KEYS |= {name + ON_TOP: f"top_{KEYS[name]}" for name in FI_LETTERS}
SOURCE_KEYS = {"own": "own", "same subject": "same", "other subject": "other", "all others": "all"}
KIND_KEYS = {
    "instruction": "instruction",
    "question": "question",
    "option letters": "letters",
    "options": "options",
    "line breaks": "breaks",
    "Answer:": "cue",
}
TOKEN_SETTINGS = {  # how tokens are scored: a measure, and how it is called in the names of records
    "FI exact": "exact",
    f"FI exact{ON_TOP}": "top",
    "FI exact summed": "summed",
    "FI damped 0.0001": "damped",
    JACOBIAN: "jacobian",
    "SNIP": "snip",
    RANDOM: "random",
}
KINDS = tuple(KIND_KEYS)
SOURCES = tuple(SOURCE_KEYS)
PLACES = ("places", "hidden")  # what is carried
ROWS = 256  # prompts that are asked at once

VALUES = ("dims", "tokens", "correct", "log_prob", "predicted", "attacked", "promised")  # of each question

Region = Literal["prompt", "question"]


@dataclass(frozen=True)
class Move:
    """One attack: the top `share` of the dimensions of a `region` is moved.

    budget: with "l2" the length of the displacement over that of the whole prompt's embeddings, with "linf"
    the largest change of one dimension over the root mean square of the prompt's embeddings. steps: 1, or
    projected gradient steps within the budget. direction: against the gradient of log P(ŷ), or at random.
    """

    budget: float
    share: float = 0.001
    norm: Norm = "l2"
    steps: int = 1
    direction: Direction = "gradient"
    region: Region = "prompt"


@dataclass(frozen=True, eq=False)
class Scored:
    """Questions of similar length whose class gradients are made once for all measures and filters."""

    letters: EmbeddingBatch

    def identity(self) -> list[object]:
        """What its answers depend on; see :mod:`fihelpers.identity`."""
        return [self.letters.model, self.examples]

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.letters.examples

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each prompt."""
        width = self.letters.embeddings.shape[1]
        return tuple(width - padding for padding in self.letters.padding)

    @cached_property
    def top(self) -> EmbeddingBatch:
        """The same questions under the likeliest tokens and the rest as classes."""
        model, examples = self.letters.model, self.examples
        (batch,) = embedding_batches(model, examples, Top(CLASSES), len(examples))
        return batch

    @cached_property
    def regions(self) -> list[Tensor]:
        """For each question, which of its tokens (T,) belong to the question and its options."""
        return [question_region(self.letters.model, example) for example in self.examples]

    @cached_property
    def _chosen(self) -> dict[object, list[Tensor]]:
        return {}

    def scores(
        self, measure: str | Measure, over: Literal["dimension", "token"] = "dimension"
    ) -> list[Tensor]:
        """One tensor a question, (T, hidden), or (T,) for tokens; nothing warns that FI ranks nothing."""
        batch, used = self.letters, measure
        if isinstance(measure, str) and measure.endswith(ON_TOP):
            batch, used = self.top, measure.removesuffix(ON_TOP)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SaturationWarning)
            (found,) = batch.scores([used], over).values()
        made = dict(zip(batch.index, found, strict=True)) if batch is self.top else dict(enumerate(found))
        return [made[i].cpu() for i in range(len(self.examples))]

    def positions(self, measure: str | Measure, move: Move, draw: int, seed: int) -> list[Tensor]:
        """The flat positions (in T x hidden) that a measure chooses in each question."""
        key = (measure, draw, move.share, move.region, seed)
        if key not in self._chosen:
            used = Random(seed + draw) if measure == RANDOM else measure
            regions = self.regions if move.region == "question" else [None] * len(self.examples)
            self._chosen[key] = [
                top_dimensions(values, move.share, region=region, seed=seed)
                for values, region in zip(self.scores(used), regions, strict=True)
            ]
        return self._chosen[key]

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of log P(ŷ) with respect to the embeddings, (B, T, hidden)."""
        grads = self.letters.grads
        rows = grads.predicted.reshape(1, -1, 1, 1).expand(1, *grads.value.shape)
        return grads.class_grads.gather(0, rows)[0]

    def moved(self, positions: Sequence[Tensor], move: Move, seed: int) -> Tensor:
        """The embeddings (B, T, hidden) after a move of these positions."""
        return attack(
            self.letters,
            positions,
            move.budget,
            norm=move.norm,
            steps=move.steps,
            direction=move.direction,
            seed=seed,
        )

    def ask(self, embeddings: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """Answers to changed embeddings, each (B, T, hidden).

        correct, log_prob (of the right answer), predicted and attacked (log P of the intact answer), each
        (changes, B).
        """
        size = len(self.examples)
        whole = torch.cat(list(embeddings))
        parts = whole.split(max(1, ROWS // size) * size)
        log_p = torch.cat([self._log_probs(part) for part in parts])
        right = torch.tensor([e.answer for e in self.examples] * len(embeddings), device=log_p.device)
        intact = self.letters.grads.predicted.repeat(len(embeddings))
        predicted = log_p.argmax(1)
        found = {
            "correct": predicted == right,
            "log_prob": log_p.gather(1, right[:, None])[:, 0],
            "predicted": predicted,
            "attacked": log_p.gather(1, intact[:, None])[:, 0],
        }
        return {name: v.double().reshape(len(embeddings), size).cpu().numpy() for name, v in found.items()}

    def untouched(self) -> Values:
        """The answers to the embeddings as they are: see `outcomes`."""
        nothing = [torch.empty(0, dtype=torch.long)] * len(self.examples)
        return self._told([nothing], [self.letters.embeddings])[0]

    def outcomes(self, chosen: Sequence[Sequence[Tensor]], moves: Sequence[Move], seed: int) -> list[Values]:
        """What comes of each move of the positions chosen for it: id, subject, and `VALUES` of each question.

        dims: dimensions moved, tokens: that they lie in, log_prob: of the right answer, attacked: log P of
        the intact answer, which is attacked, promised: its change to first order; all in nats.
        """
        moved = [self.moved(positions, move, seed) for positions, move in zip(chosen, moves, strict=True)]
        return self._told(chosen, moved)

    def _told(self, chosen: Sequence[Sequence[Tensor]], moved: Sequence[Tensor]) -> list[Values]:
        names = {"id": [e.id for e in self.examples], "subject": [e.subject for e in self.examples]}
        hidden, found = self.letters.embeddings.shape[2], self.ask(moved)
        lines: list[Values] = []
        for i, (positions, changed) in enumerate(zip(chosen, moved, strict=True)):
            change = self.gradient * (changed - self.letters.embeddings)
            made = {
                "dims": [len(of) for of in positions],
                "tokens": [len((of // hidden).unique()) for of in positions],
                "promised": change.flatten(1).sum(1).tolist(),
                **{name: values[i] for name, values in found.items()},
            }
            lines.append({name: np.array(values) for name, values in {**names, **made}.items()})
        return lines

    def _log_probs(self, embeddings: Tensor) -> Tensor:
        """Log-probabilities of the letters for embeddings (n * B, T, hidden) of these questions, n times."""
        batch, times = self.letters.batch, len(embeddings) // len(self.examples)
        again = Batch(
            batch.index.repeat(times),
            batch.input_ids.repeat(times, 1),
            batch.attention_mask.repeat(times, 1),
            batch.position_ids.repeat(times, 1),
        )
        with torch.no_grad():
            logits = self.letters.model.last_logits(again, embeddings=embeddings)
        return self.letters.answers.log_probs(logits)


def load_questions(task: str, subjects: Sequence[str], n: int | None, seed: int) -> list[Example]:
    """Test questions of every subject (n of each, None takes all).

    Raises ValueError for a task without lettered options and right answers.
    """
    examples = [e for subject in subjects for e in load_task(task, subject, "test", n, seed)]
    for example in examples:
        if not example.options or example.answer is None or example.image is not None:
            raise ValueError(f"{example.id!r} is no question with lettered options; take another task.")
    return examples


def scored(model: LanguageModel, examples: Sequence[Example], batch_size: int) -> list[Scored]:
    """The questions in batches of similar length, which keep their class gradients."""
    return [Scored(batch) for batch in embedding_batches(model, examples, None, batch_size)]


def attacked(
    batches: Sequence[Scored],
    measures: Sequence[str | Measure],
    moves: Sequence[Move],
    seed: int,
    kept: Kept,
    draws: int = 1,
) -> Trials:
    """Make every move with the dimensions that each measure chooses, and ask again.

    Labels: measure ("intact" for the untouched question) and the fields of the move; values as in
    `Scored.outcomes`, the mean over `draws` of the random measure. Raises ValueError for an unknown measure
    or no questions.
    """

    def tries(batch: Scored) -> Iterator[tuple[Labels, Values]]:
        for measure in (INTACT, *measures):
            name = measure if isinstance(measure, str) else measure.name
            for move, values in zip(moves, _outcomes(batch, measure, moves, seed, draws), strict=True):
                yield {"measure": name, **vars(move)}, values

    if not batches:
        raise ValueError("there are no questions to attack; give at least one.")
    moves = list(dict.fromkeys(moves))
    return collect(Scored.untouched, tries, sets=batches, kept=kept)


def _outcomes(
    batch: Scored, measure: str | Measure, moves: Sequence[Move], seed: int, draws: int
) -> list[Values]:
    if measure == INTACT:
        return [batch.untouched()] * len(moves)
    made = []
    for draw in range(draws if measure == RANDOM else 1):
        chosen = [batch.positions(measure, move, draw, seed) for move in moves]
        made.append(batch.outcomes(chosen, moves, seed + draw))
    return [
        {name: np.mean([of[name] for of in each], 0) if name in VALUES else each[0][name] for name in each[0]}
        for each in zip(*made, strict=True)
    ]


# --- tables of the attacks


def wide(trials: Trials, move: Move, value: str) -> pd.DataFrame:
    """One value for each question (row) and measure (column) after one move; the first column is "intact".

    The index has levels id and subject. Raises ValueError where that move was not made.
    """
    here = trials.where(**vars(move)).rows()
    table = here.pivot(index=["id", "subject"], columns="measure", values=value)
    return table[list(dict.fromkeys(here.measure))]


def by_subject(trials: Trials, move: Move, value: str = "correct") -> pd.DataFrame:
    """Mean over the questions of each subject: a row a measure, a column a subject, and all together."""
    table = wide(trials, move, value)
    means = table.groupby(level="subject").mean().T
    return means.assign(all=table.mean()).rename_axis("measure")


def against(trials: Trials, move: Move, reference: str, seed: int) -> pd.DataFrame:
    """Every measure minus `reference`, question by question, after one move: see `tables.against`."""
    return tables.against(trials.where(**vars(move)), reference, seed)


def duels(trials: Trials, moves: Iterable[Move], others: Sequence[str], seed: int) -> pd.DataFrame:
    """Every setting of FI that was run minus each other measure after each move.

    The difference is of the mean log P of the right answer: below zero FI does more damage. accuracy: the
    same difference of the accuracy. Columns: fi, other, norm, steps, budget, n, difference, low, high,
    accuracy.
    """
    lines = []
    for move, other in product(moves, others):
        found = against(trials, move, other, seed)
        found = found.loc[[name for name in FI_SETTINGS if name in found.index]].reset_index(names="fi")
        lines.append(found.assign(other=other, norm=move.norm, steps=move.steps, budget=move.budget))
    names = {"log_prob": "difference", "log_prob_low": "low", "log_prob_high": "high"}
    columns = ["fi", "other", "norm", "steps", "budget", "n", *names.values(), "accuracy"]
    return pd.concat(lines, ignore_index=True).rename(columns=names)[columns]


def outcomes(trials: Trials, moves: Mapping[str, Move], guided: Sequence[str], seed: int) -> pd.DataFrame:
    """Claim 10: random dimensions against the untouched question, and guided ones against random ones.

    Columns: attack (the name of the move), first, second, n, difference of the accuracy, low, high.
    """
    pairs = [(RANDOM, INTACT), *((name, RANDOM) for name in guided)]
    found = {
        name: compare(trials.where(**vars(move)), pairs, seed=seed, value="accuracy")
        for name, move in moves.items()
    }
    made = pd.concat(found, names=["attack"]).reset_index("attack").rename(columns={"minus": "second"})
    return made[["attack", "first", "second", "n", "difference", "low", "high"]].reset_index(drop=True)


def dampings(trials: Trials, seed: int) -> pd.DataFrame:
    """log P after the dimensions of every damping of FI that was run minus after the Jacobian norm's.

    Columns: budget, damping, n, difference, low, high (bootstrap over the questions).
    """
    names = [m for m in measures_of(trials) if m.startswith(WITH_DAMPING) and not m.endswith(ON_TOP)]
    found = compare(trials, [(name, JACOBIAN) for name in names], "budget", seed=seed)
    found["damping"] = found["first"].str.removeprefix(WITH_DAMPING).astype(float)
    columns = ["budget", "damping", "n", "difference", "low", "high"]
    return found.sort_values(["budget", "damping"], ignore_index=True)[columns]


def curves(trials: Trials, along: str) -> pd.DataFrame:
    """Mean accuracy and log P for every measure along "budget" or "share".

    Columns: measure, the name of `along`, accuracy, log_prob, attacked, promised, tokens, n.
    """
    values = ("accuracy", "log_prob", "attacked", "promised", "tokens")
    found = {value: trials.table("measure", along, value=value) for value in values}
    made = found["accuracy"][["measure", along]]
    made = made.assign(**{value: table[value] for value, table in found.items()}, n=found["accuracy"].n)
    made = made[made.measure != INTACT]
    if along != "budget":
        return made.reset_index(drop=True)
    start = pd.DataFrame({"measure": made.measure.unique()}).assign(
        budget=0.0, **{value: trials.start(value).mean() for value in values}, n=len(trials.start())
    )
    return pd.concat([start, made], ignore_index=True)


def promises(curve: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """What the first order promises for log P of the attacked answer, and what came, by measure and budget.

    curve: from `curves` along "budget". Columns: measure, budget, promised, came, kept (their quotient).
    """
    start = curve[curve.budget == 0].set_index("measure").attacked
    part = curve[(curve.budget > 0) & curve.measure.isin(names)]
    came = part.attacked - start.reindex(part.measure).to_numpy()
    made = part[["measure", "budget", "promised"]].assign(came=came)
    return made.assign(kept=made.came / made.promised)


def accuracies(trials: Trials) -> pd.DataFrame:
    """Accuracy on the untouched questions of each subject and of all, with Wilson intervals.

    Columns: subject, n, accuracy, low, high, log_prob (of the right answer), confidence (median P(ŷ)).
    """
    names = ("subject", "correct", "log_prob", "attacked")
    each = pd.DataFrame({name: trials.start(name) for name in names})
    lines = []
    for subject, part in [*each.groupby("subject"), ("all", each)]:
        ends = wilson(round(part.correct.sum()), len(part))
        sure = float(np.exp(part.attacked).median())
        lines.append((subject, len(part), part.correct.mean(), *ends, part.log_prob.mean(), sure))
    return pd.DataFrame(lines, columns=["subject", "n", "accuracy", "low", "high", "log_prob", "confidence"])


# --- dimensions that are carried from one question to another


def carried(batches: Sequence[Scored], measures: Sequence[str], move: Move, seed: int, kept: Kept) -> Trials:
    """Attack each question with dimensions that were chosen on others.

    Labels: measure, source: "own" (chosen on the question itself), one question of the "same subject" or of
    the "other subject" (the next one in the order of the examples), or "all others" (the sum over all other
    questions of their scores, each over its own total); and place: "places" carries (position counted from
    the end, hidden dimension) and moves the share of `move`; "hidden" carries the hidden dimension with the
    largest sum of scores over the tokens, and moves it at every token. Values as in `Scored.outcomes`, but
    for the ids: the questions stay in the order in which they are asked.
    Raises ValueError for a subject with a single question.
    """
    examples = [e for b in batches for e in b.examples]
    for subject in {e.subject for e in examples}:
        if sum(e.subject == subject for e in examples) < 2:
            raise ValueError(f"transfer needs two questions of {subject!r} or more; raise the number.")
    found = []
    for measure in measures:  # one after the other, since the maps of one fill enough memory
        maps = Maps(tuple(batches), measure, seed)
        found.append(collect(Scored.untouched, maps.attacks(move), sets=batches, kept=kept))
    return reduce(add, found)


def carried_table(trials: Trials, seed: int) -> pd.DataFrame:
    """Mean log P of the right answer by measure, place and source, less that of random dimensions.

    Index: place, measure, source. Columns: n, accuracy, log_prob, less_random, low, high (bootstrap over
    questions). The random dimensions are drawn for each question by itself.
    """
    chance = {place: trials.where(place=place, measure=RANDOM).answers("log_prob")[0] for place in PLACES}
    lines = {}
    table = trials.table("place", "measure", "source")
    order = table.place.map(PLACES.index).sort_values(kind="stable").index
    for row in table.loc[order].itertuples():
        own = trials.where(place=row.place, measure=row.measure, source=row.source).answers("log_prob")[0]
        found = paired_difference(own, chance[row.place], seed=seed, resamples=tables.RESAMPLES)
        lines[row.place, row.measure, row.source] = (row.n, row.accuracy, row.log_prob, *found)
    columns = ["n", "accuracy", "log_prob", "less_random", "low", "high"]
    made = pd.DataFrame.from_dict(lines, orient="index", columns=columns)
    made.index = pd.MultiIndex.from_tuples(made.index, names=["place", "measure", "source"])
    return made


@dataclass(frozen=True, eq=False)
class Maps:
    """The scores of every question by one measure, aligned at their last tokens, and their sum.

    Each map is divided by its total, so that no question outweighs the others.
    """

    batches: tuple[Scored, ...]
    measure: str
    seed: int

    @cached_property
    def order(self) -> list[Example]:
        """The questions in the order in which they were given."""
        index = {i: e for b in self.batches for i, e in zip(b.letters.index, b.examples, strict=True)}
        return [index[i] for i in sorted(index)]

    @cached_property
    def maps(self) -> dict[str, Tensor]:
        """The map (T, hidden) of each question, by its id."""
        used = Random(self.seed) if self.measure == RANDOM else self.measure
        return {
            example.id: values.double() / values.double().sum().clamp(min=torch.finfo().tiny)
            for batch in self.batches
            for example, values in zip(batch.examples, batch.scores(used), strict=True)
        }

    @cached_property
    def total(self) -> Tensor:
        longest = max(len(values) for values in self.maps.values())
        return torch.stack([_from_the_end(values, longest) for values in self.maps.values()]).sum(0)

    def attacks(self, move: Move) -> Tries:
        """The tries of `carried` with this measure, for a batch of questions."""

        def tries(batch: Scored) -> Iterator[tuple[Labels, Values]]:
            labels, chosen, moves = [], [], []
            for place, source in product(PLACES, SOURCES[:1] if self.measure == RANDOM else self.sources):
                scores, used = [self.seen_from(e, source) for e in batch.examples], move
                if place == "hidden":
                    scores = [s.sum(0, keepdim=True).expand_as(s) for s in scores]
                    used = replace(move, share=1 / scores[0].shape[1])
                chosen.append([top_dimensions(s, used.share, seed=self.seed) for s in scores])
                labels.append({"measure": self.measure, "place": place, "source": source})
                moves.append(used)
            for label, values in zip(labels, batch.outcomes(chosen, moves, self.seed), strict=True):
                yield label, {name: value for name, value in values.items() if name != "id"}

        return tries

    def seen_from(self, example: Example, source: str) -> Tensor:
        """The scores (T, hidden) of a source, laid over the question from its end; zero where it has none."""
        length = len(self.maps[example.id])
        if source == "own":
            return self.maps[example.id]
        if source == "all others":
            own = _from_the_end(self.maps[example.id], len(self.total))
            return _from_the_end((self.total - own).clamp(min=0), length)
        return _from_the_end(self.maps[self._donor(example, source == "same subject").id], length)

    @property
    def sources(self) -> tuple[str, ...]:
        """What dimensions can be carried from; with one subject there is no other one."""
        several = len({e.subject for e in self.order}) > 1
        return tuple(source for source in SOURCES if several or source != "other subject")

    def _donor(self, example: Example, same: bool) -> Example:
        """The next question of the same subject, or the one in the same place of the next subject."""
        by_subject: dict[str, list[Example]] = {}
        for e in self.order:
            by_subject.setdefault(e.subject, []).append(e)
        subjects, own = list(by_subject), by_subject[example.subject]
        place = [e.id for e in own].index(example.id)
        if same:
            return own[(place + 1) % len(own)]
        theirs = by_subject[subjects[(subjects.index(example.subject) + 1) % len(subjects)]]
        return theirs[place % len(theirs)]


def _from_the_end(values: Tensor, length: int) -> Tensor:
    """Cut (T, hidden) at the front, or fill it up with zeros, to `length` tokens."""
    kept = values[-length:]
    return torch.cat([kept.new_zeros(length - len(kept), kept.shape[1]), kept])


# --- tokens


def token_kinds(model: LanguageModel, example: Example) -> list[str]:
    """What each token of the prompt is part of, one of `KINDS`; it belongs where its last character stands.

    Raises ValueError where the prompt does not end with its question as the MMLU prompt writes it.
    """
    spans = _spans(example)
    encoded = model.tokenizer(example.prompt, return_offsets_mapping=True, verbose=False)
    kinds = []
    for start, end in encoded["offset_mapping"]:
        last = max(start, end - 1)
        kinds.append(next(kind for kind, stop in spans if last < stop))
    return kinds


def chosen_kinds(batches: Iterable[Scored], measures: Sequence[str], move: Move, seed: int) -> pd.DataFrame:
    """Share of the chosen dimensions that lies in tokens of each kind (column), by measure (row).

    Also `tokens`, the mean number of tokens that they lie in, and `dims`, the mean number of dimensions.
    """
    lines = []
    for batch in batches:
        kinds = [token_kinds(batch.letters.model, e) for e in batch.examples]
        hidden = batch.letters.embeddings.shape[2]
        for measure in measures:
            for of_tokens, chosen in zip(kinds, batch.positions(measure, move, 0, seed), strict=True):
                places = (chosen // hidden).tolist()
                counts = pd.Series([of_tokens[i] for i in places]).value_counts(normalize=True)
                lines.append(
                    {"measure": measure, "dims": len(places), "tokens": len(set(places))} | counts.to_dict()
                )
    table = pd.DataFrame(lines).fillna(0.0).groupby("measure", sort=False).mean()
    return table.reindex(columns=[*KINDS, "tokens", "dims"], fill_value=0.0)


def token_texts(model: LanguageModel, example: Example) -> list[str]:
    """The tokens of the prompt as they stand in it."""
    encoded = model.tokenizer(example.prompt, return_offsets_mapping=True, verbose=False)
    return [example.prompt[start:end] for start, end in encoded["offset_mapping"]]


def describe_tokens(batches: Iterable[Scored]) -> pd.DataFrame:
    """How every setting scores the tokens, one row for each question, setting and token.

    Columns: id, subject, setting, token (counted from the end, 1 is the last), kind, value, over_mean (of
    the question's tokens), first (1 for the highest token), over_ceiling (FI over its ceiling, joint
    FI only) and at_ceiling.
    """
    parts = []
    for batch in tqdm(batches, desc="tokens", unit="batch"):
        kinds = [token_kinds(batch.letters.model, e) for e in batch.examples]
        for name in TOKEN_SETTINGS:
            used = Random(0) if name == RANDOM else name
            grads = (batch.top if name.endswith(ON_TOP) else batch.letters).grads
            order = batch.top.index if name.endswith(ON_TOP) else range(len(kinds))
            place = {i: row for row, i in enumerate(order)}
            for i, values in enumerate(batch.scores(used, "token")):
                row = slice(place[i], place[i] + 1)
                probs, predicted = grads.probs[:, row].cpu(), grads.predicted[row].cpu()
                parts.append(
                    _token_rows(batch.examples[i], name, values.double(), kinds[i], probs, predicted)
                )
    return pd.concat(parts, ignore_index=True)


def _token_rows(
    example: Example, name: str, values: Tensor, kinds: Sequence[str], probs: Tensor, predicted: Tensor
) -> pd.DataFrame:
    joint = name.startswith("FI") and not name.endswith("summed")
    mean = float(values.mean())
    made = pd.DataFrame({"token": range(len(values), 0, -1), "kind": kinds, "value": values.numpy()})
    made["over_mean"] = made.value / mean if mean > 0 else 1.0
    made["first"] = (made.index == int(values.argmax())).astype(float)
    made["over_ceiling"] = made.value / float(ceiling(probs, predicted)) if joint else np.nan
    made["at_ceiling"] = saturated(values[None], probs, predicted)[0].double().numpy() if joint else np.nan
    return made.assign(id=example.id, subject=example.subject, setting=name)


def token_saturation(tokens: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Means over the questions of what `describe_tokens` says of each setting, a row a setting.

    Columns: n (questions), at_ceiling with its bootstrap interval (low, high), lowest and highest (5th and
    95th percentile of a question's tokens, over the mean of its tokens), held (share of the total that the
    highest token holds).
    """
    lines = {}
    for name, part in tokens.groupby("setting", sort=False):
        each = part.groupby("id", sort=False)
        line = {
            "n": each.ngroups,
            "lowest": each.over_mean.quantile(0.05).mean(),
            "highest": each.over_mean.quantile(0.95).mean(),
            "held": (each.value.max() / each.value.sum()).mean(),
        }
        if part.at_ceiling.notna().all():
            found = tables.average(each.at_ceiling.mean(), seed)
            line |= dict(zip(("at_ceiling", "low", "high"), found, strict=True))
        lines[str(name)] = line
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("setting")


def token_levels(tokens: pd.DataFrame) -> pd.DataFrame:
    """Mean score of each kind of token (column) by every setting (row), over that of all tokens.

    The row "share of tokens" says how many of all tokens are of that kind.
    """
    made = tokens.groupby(["setting", "kind"], sort=False).over_mean.mean().unstack()
    made = made.reindex(index=list(dict.fromkeys(tokens.setting)), columns=list(KINDS))
    one = tokens[tokens.setting == tokens.setting.iloc[0]]
    made.loc["share of tokens"] = one.kind.value_counts(normalize=True).reindex(KINDS, fill_value=0)
    return made


def token_attacks(batches: Sequence[Scored], budgets: Sequence[float], seed: int, kept: Kept) -> Trials:
    """Move the highest token of every question, all its dimensions: labels and values as in `attacked`."""
    moves = [Move(budget, share=0.0) for budget in budgets]

    def tries(batch: Scored) -> Iterator[tuple[Labels, Values]]:
        hidden = batch.letters.embeddings.shape[2]
        untouched = batch.untouched()
        yield from (({"measure": INTACT, **vars(move)}, untouched) for move in moves)
        for name in TOKEN_SETTINGS:
            values = batch.scores(Random(seed) if name == RANDOM else name, "token")
            places = [top_dimensions(v[:, None], 1e-9, seed=seed) for v in values]  # at least one is taken
            chosen = [place * hidden + torch.arange(hidden) for place in places]
            for move, made in zip(moves, batch.outcomes([chosen] * len(moves), moves, seed), strict=True):
                yield {"measure": name, **vars(move)}, made

    return collect(Scored.untouched, tries, sets=batches, kept=kept)


# --- one question


@dataclass(frozen=True, eq=False)
class Case:
    """One question: its tokens, their scores (T,) by every setting, their chosen dimensions by measure, and
    P of its options (K,), untouched and after each attack."""

    example: Example
    texts: list[str]
    kinds: list[str]
    scores: dict[str, Tensor]
    chosen: dict[str, Tensor]
    probs: dict[str, Tensor]


def typical(trials: Trials, measure: str, move: Move) -> str:
    """The id of the question of median confidence among those answered right until `measure` moves them.

    Where there are none, among all that are answered right; where there are none of these, among all.
    """
    table = wide(trials, move, "correct").droplevel("subject")
    right = table[INTACT] == 1
    flipped = right & (table[measure] == 0)
    chosen = next(index for index in (flipped, right, right | True) if index.any())
    sure = wide(trials, move, "attacked").droplevel("subject")[INTACT][chosen]
    return str(sure.sort_index().sort_values(kind="stable").index[len(sure) // 2])


def look_at(batches: Sequence[Scored], id: str, measures: Sequence[str], move: Move, seed: int) -> Case:
    """One question, attacked by each of the measures."""
    batch = next(b for b in batches if id in [e.id for e in b.examples])
    place = [e.id for e in batch.examples].index(id)
    example, model = batch.examples[place], batch.letters.model
    scores = {name: batch.scores(name, "token")[place] for name in TOKEN_SETTINGS if name != RANDOM}
    chosen = {name: batch.positions(name, move, 0, seed) for name in measures}
    shown = [batch.letters.embeddings, *(batch.moved(c, move, seed) for c in chosen.values())]
    probs = [batch._log_probs(x)[place].exp().cpu() for x in shown]
    return Case(
        example,
        token_texts(model, example),
        token_kinds(model, example),
        scores,
        {name: positions[place] for name, positions in chosen.items()},
        dict(zip((INTACT, *measures), probs, strict=True)),
    )


def _spans(example: Example) -> list[tuple[str, int]]:
    """The pieces of an MMLU prompt in order: their kind and where they end, in characters."""
    options = [f"\n{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", example.options, strict=False)]
    tail = example.question + "".join(options) + "\nAnswer:"
    if not example.prompt.endswith(tail):
        raise ValueError(
            f"the prompt of example {example.id!r} does not end with its question, its options and "
            "'Answer:'; give questions in the MMLU prompt."
        )
    pieces = [("instruction", len(example.prompt) - len(tail)), ("question", len(example.question))]
    for option in options:
        pieces += [("line breaks", 1), ("option letters", 2), ("options", len(option) - 3)]
    pieces += [("line breaks", 1), ("Answer:", len("Answer:"))]
    stops = np.cumsum([length for _, length in pieces])
    return [(kind, int(stop)) for (kind, _), stop in zip(pieces, stops, strict=True)]
