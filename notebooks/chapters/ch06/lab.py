"""Chapter 06: move the embedding dimensions that a measure points at; what becomes of the answer (4.3)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fichapters import tables
from fichapters.ch06.regions import question_region
from fihelpers.answers import Top
from fihelpers.data import write_atomically
from fihelpers.evaluate.stats import wilson
from fihelpers.filters import Damped
from fihelpers.influence import SaturationWarning, ceiling, saturated
from fihelpers.measures import MEASURES as REGISTERED
from fihelpers.measures import Influence, Measure, Random, find_measure
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.perturb.embeddings import Direction, Norm, attack, top_dimensions
from fihelpers.scores.inputs import EmbeddingBatch, embedding_batches
from fihelpers.tasks import Example, load_task

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
ROWS = 256  # prompts that are asked at once

MOVED = ("share", "budget", "norm", "steps", "direction", "region")  # the fields of a move
VALUES = ("dims", "tokens", "correct", "log_prob", "predicted", "attacked", "promised")  # what came of it

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


@dataclass(frozen=True)
class Plan:
    """What is done to every question: each of the moves with the dimensions chosen by each measure.

    `draws`: of the random measure."""

    measures: tuple[str | Measure, ...]
    moves: tuple[Move, ...]
    draws: int = 1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Scored:
    """Questions of similar length whose class gradients are made once for all measures and filters."""

    letters: EmbeddingBatch

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


def run_sweep(batches: Iterable[Scored], plan: Plan, cache: Path) -> pd.DataFrame:
    """Attack every question as the plan says and ask again.

    One row for each question, measure and move: id, subject, measure, draw, the fields of the move, dims
    (dimensions moved) and tokens (that they lie in), correct, log_prob (of the right answer), predicted,
    attacked (log P of the intact answer, the one attacked; all in nats), promised (its change to first
    order). The untouched question is the measure "intact", with a budget of 0. Finished batches lie in
    `cache`. Raises ValueError for an unknown measure or no questions.
    """
    for measure in plan.measures:
        find_measure(measure.removesuffix(ON_TOP) if isinstance(measure, str) else measure)
    made = [
        _kept(cache, "sweep", b, plan, partial(_sweep, b, plan))
        for b in tqdm(batches, desc="attacking", unit="batch")
    ]
    if not made:
        raise ValueError("there are no questions to attack; give at least one.")
    return pd.concat(made, ignore_index=True)


# --- tables of a sweep


def per_question(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a sweep with the draws of the random measure averaged."""
    by = [c for c in rows.columns if c not in {"draw", *VALUES}]
    return rows.groupby(by, sort=False)[list(VALUES)].mean().reset_index()


def only(rows: pd.DataFrame, move: Move) -> pd.DataFrame:
    """The rows of one move, and those of the untouched questions.

    Raises ValueError where the sweep does not hold that move.
    """
    here = np.ones(len(rows), dtype=bool)
    for name in MOVED:
        value = getattr(move, name)
        here &= np.isclose(rows[name], value) if isinstance(value, float) else rows[name] == value
    if not here.any():
        raise ValueError(f"the sweep holds no {move}; add it to the plan.")
    return rows[here | (rows.measure == INTACT)]


def wide(rows: pd.DataFrame, move: Move, value: str) -> pd.DataFrame:
    """One value for each question (row) and measure (column) after one move; the first column is "intact"."""
    per = only(rows, move).groupby(["id", "measure"], sort=False)[value].mean().reset_index()
    table = per.pivot(index="id", columns="measure", values=value)
    names = [name for name in dict.fromkeys(per.measure) if name != INTACT]
    return table[[INTACT, *names]]


def by_subject(rows: pd.DataFrame, move: Move, value: str = "correct") -> pd.DataFrame:
    """Mean over the questions of each subject: a row a measure, a column a subject, and all together."""
    table = wide(rows, move, value)
    subjects = rows.drop_duplicates("id").set_index("id").subject.reindex(table.index)
    means = table.groupby(subjects, sort=False).mean().T
    means = means[list(dict.fromkeys(rows.subject))]
    means["all"] = table.mean()
    return means.rename_axis("measure")


def against(rows: pd.DataFrame, move: Move, reference: str, seed: int) -> pd.DataFrame:
    """Every measure minus `reference`, question by question: accuracy and log_prob as in `tables.against`."""
    values = {"accuracy": "correct", "log_prob": "log_prob"}
    return tables.against({name: wide(rows, move, value) for name, value in values.items()}, reference, seed)


def duels(rows: pd.DataFrame, moves: Iterable[Move], others: Sequence[str], seed: int) -> pd.DataFrame:
    """Every setting of FI in the sweep minus each other measure after each move.

    The difference is of the mean log P of the right answer: below zero FI does more damage. accuracy: the
    same difference of the accuracy. Columns: fi, other, norm, steps, budget, n, difference, low, high,
    accuracy.
    """
    lines = []
    for move in moves:
        for other in others:
            table = against(rows, move, other, seed)
            for name in FI_SETTINGS:
                if name in table.index:
                    row = table.loc[name]
                    ends = (row.log_prob, row.log_prob_low, row.log_prob_high)
                    told = (name, other, move.norm, move.steps, move.budget, int(row.n))
                    lines.append((*told, *ends, row.accuracy))
    columns = ["fi", "other", "norm", "steps", "budget", "n", "difference", "low", "high", "accuracy"]
    return pd.DataFrame(lines, columns=columns)


def between(
    rows: pd.DataFrame, first: tuple[str, Move], second: tuple[str, Move], seed: int, value: str = "log_prob"
) -> tuple[float, float, float]:
    """Mean of a value after one measure's move minus after another's, with its bootstrap interval.

    Paired over the questions. Raises ValueError where the sweep does not hold one of the moves.
    """
    values = [wide(rows, move, value)[measure] for measure, move in (first, second)]
    return tables.difference(values[0], values[1].reindex(values[0].index), seed)


def outcomes(rows: pd.DataFrame, moves: Mapping[str, Move], guided: Sequence[str], seed: int) -> pd.DataFrame:
    """Claim 10: random dimensions against the untouched question, and guided ones against random ones.

    Columns: attack (the name of the move), first, second, n, difference of the accuracy, low, high.
    """
    lines = []
    for name, move in moves.items():
        table = wide(rows, move, "correct")
        for first, second in ({RANDOM: INTACT} | dict.fromkeys(guided, RANDOM)).items():
            found = tables.difference(table[first], table[second], seed)
            lines.append((name, first, second, len(table), *found))
    return pd.DataFrame(lines, columns=["attack", "first", "second", "n", "difference", "low", "high"])


def dampings(rows: pd.DataFrame, moves: Iterable[Move], seed: int) -> pd.DataFrame:
    """log P after the dimensions of every damping of FI swept minus after the Jacobian norm's, for each move.

    Columns: budget, damping, n, difference, low, high (bootstrap over the questions).
    """
    lines = []
    for move in moves:
        table = against(rows, move, JACOBIAN, seed)
        for name, row in table[table.index.str.startswith(WITH_DAMPING)].iterrows():
            if not str(name).endswith(ON_TOP):
                lam = float(str(name).removeprefix(WITH_DAMPING))
                lines.append((move.budget, lam, row.n, row.log_prob, row.log_prob_low, row.log_prob_high))
    made = pd.DataFrame(lines, columns=["budget", "damping", "n", "difference", "low", "high"])
    return made.sort_values(["budget", "damping"], ignore_index=True)


def few_against_all(rows: pd.DataFrame, measures: Sequence[str], move: Move, seed: int) -> pd.DataFrame:
    """log P after moving the top share of the dimensions minus after moving all, with the same budget.

    A row a measure, of the value with its bootstrap interval: n, value, low, high.
    """
    whole = replace(move, share=1.0)
    lines = {m: between(rows, (m, move), (m, whole), seed) for m in measures}
    table = pd.DataFrame.from_dict(lines, orient="index", columns=["value", "low", "high"])
    table.insert(0, "n", rows.id.nunique())
    return table.rename_axis("measure")


def curves(rows: pd.DataFrame, along: str, **fixed: object) -> pd.DataFrame:
    """Mean accuracy and log P for every measure along "budget" or "share", the other fields fixed.

    Columns: measure, the name of `along`, accuracy, log_prob, attacked, promised, tokens, n.
    """
    part = per_question(rows)
    intact = part[part.measure == INTACT]
    part = part[part.measure != INTACT]
    for name, value in fixed.items():
        part = part[np.isclose(part[name], value) if isinstance(value, float) else part[name] == value]
    means = part.groupby(["measure", along], sort=False).agg(
        accuracy=("correct", "mean"), log_prob=("log_prob", "mean"), attacked=("attacked", "mean"),
        promised=("promised", "mean"), tokens=("tokens", "mean"), n=("id", "size"),
    ).reset_index()  # fmt: skip
    if along != "budget":
        return means
    start = pd.DataFrame({"measure": part.measure.unique()}).assign(
        budget=0.0, accuracy=intact.correct.mean(), log_prob=intact.log_prob.mean(),
        attacked=intact.attacked.mean(), promised=0.0, tokens=0.0, n=len(intact),
    )  # fmt: skip
    return pd.concat([start, means], ignore_index=True)


def promises(curve: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """What the first order promises for log P of the attacked answer, and what came, by measure and budget.

    curve: from `curves` along "budget". Columns: measure, budget, promised, came, kept (their quotient).
    """
    start = curve[curve.budget == 0].set_index("measure").attacked
    part = curve[(curve.budget > 0) & curve.measure.isin(names)]
    came = part.attacked - start.reindex(part.measure).to_numpy()
    made = part[["measure", "budget", "promised"]].assign(came=came)
    return made.assign(kept=made.came / made.promised)


def accuracies(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on the untouched questions of each subject and of all, with Wilson intervals.

    Columns: subject, n, accuracy, low, high, log_prob (of the right answer), confidence (median P(ŷ)).
    """
    each = rows[rows.measure == INTACT]
    parts = [(s, each[each.subject == s]) for s in dict.fromkeys(each.subject)]
    lines = []
    for subject, part in [*parts, ("all", each)]:
        ends = wilson(round(part.correct.sum()), len(part))
        sure = float(np.exp(part.attacked).median())
        lines.append((subject, len(part), part.correct.mean(), *ends, part.log_prob.mean(), sure))
    return pd.DataFrame(lines, columns=["subject", "n", "accuracy", "low", "high", "log_prob", "confidence"])


# --- dimensions that are carried from one question to another


def carried(
    batches: Sequence[Scored], measures: Sequence[str], move: Move, seed: int, cache: Path
) -> pd.DataFrame:
    """Attack each question with dimensions that were chosen on others.

    Rows as in :func:`run_sweep`, with the column source: "own" (chosen on the question itself), one question
    of the "same subject" or of the "other subject" (the next one in the order of the examples), or "all
    others" (the sum over all other questions of their scores, each over its own total); and the column place:
    "places" carries (position counted from the end, hidden dimension) and moves the share of `move`; "hidden"
    carries the hidden dimension with the largest sum of scores over the tokens, and moves it at every token.
    Raises ValueError for a subject with a single question.
    """
    examples = [e for b in batches for e in b.examples]
    for subject in {e.subject for e in examples}:
        if sum(e.subject == subject for e in examples) < 2:
            raise ValueError(f"transfer needs two questions of {subject!r} or more; raise the number.")
    told = (tuple(measures), move, seed, [e.id for e in examples])
    made = []
    for measure in tqdm(measures, desc="transfer", unit="measure"):
        maps = _Maps.of(batches, measure, seed)
        for batch in batches:
            one = partial(_carried_rows, batch, measure, maps, move, seed)
            made.append(_kept(cache, "carried", batch, (measure, told), one))
    return pd.concat(made, ignore_index=True)


def carried_table(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean log P of the right answer by measure, place and source, less that of random dimensions.

    Index: place, measure, source. Columns: n, accuracy, log_prob, less_random, low, high (bootstrap over
    questions). The random dimensions are drawn for each question by itself.
    """
    lines = {}
    for place, part in rows.groupby("place", sort=False):
        drawn = part[(part.measure == RANDOM) & (part.source == "own")].set_index("id").log_prob
        for (measure, source), own in part.groupby(["measure", "source"], sort=False):
            if measure != RANDOM or source == "own":
                values = own.set_index("id").log_prob
                found = tables.difference(values, drawn.reindex(values.index), seed)
                lines[place, measure, source] = (len(own), own.correct.mean(), values.mean(), *found)
    columns = ["n", "accuracy", "log_prob", "less_random", "low", "high"]
    made = pd.DataFrame.from_dict(lines, orient="index", columns=columns)
    made.index = pd.MultiIndex.from_tuples(made.index, names=["place", "measure", "source"])
    return made


@dataclass(frozen=True, eq=False)
class _Maps:
    """The scores of every question by one measure, aligned at their last tokens, and their sum.

    Each map is divided by its total, so that no question outweighs the others.
    """

    order: tuple[Example, ...]
    maps: dict[str, Tensor]
    total: Tensor

    @classmethod
    def of(cls, batches: Sequence[Scored], measure: str, seed: int) -> _Maps:
        used = Random(seed) if measure == RANDOM else measure
        index: dict[int, Example] = {}
        maps: dict[str, Tensor] = {}
        for batch in batches:
            index |= dict(zip(batch.letters.index, batch.examples, strict=True))
            for example, values in zip(batch.examples, batch.scores(used), strict=True):
                maps[example.id] = values.double() / values.double().sum().clamp(min=torch.finfo().tiny)
        longest = max(len(values) for values in maps.values())
        total = torch.stack([_from_the_end(values, longest) for values in maps.values()]).sum(0)
        return cls(tuple(index[i] for i in sorted(index)), maps, total)

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


def _carried_rows(batch: Scored, measure: str, maps: _Maps, move: Move, seed: int) -> pd.DataFrame:
    labels: list[dict[str, object]] = []
    chosen: list[list[Tensor]] = []
    moves: list[Move] = []
    for place in ("places", "hidden"):
        for source in SOURCES[:1] if measure == RANDOM else maps.sources:
            scores = [maps.seen_from(e, source) for e in batch.examples]
            used = move
            if place == "hidden":
                scores = [s.sum(0, keepdim=True).expand_as(s) for s in scores]
                used = replace(move, share=1 / scores[0].shape[1])
            chosen.append([top_dimensions(s, used.share, seed=seed) for s in scores])
            labels.append({"measure": measure, "draw": 0, "source": source, "place": place})
            moves.append(used)
    return pd.DataFrame(_rows(batch, labels, chosen, moves, seed))


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
            share = each.at_ceiling.mean()
            found = tables.difference(share, share * 0, seed)
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


def token_sweep(batches: Iterable[Scored], budgets: Sequence[float], seed: int, cache: Path) -> pd.DataFrame:
    """Move the highest token of every question, all its dimensions; rows as in :func:`run_sweep`."""
    settings = (tuple(TOKEN_SETTINGS), tuple(budgets), seed)
    made = [
        _kept(cache, "tokens", b, settings, partial(_token_attacks, b, budgets, seed))
        for b in tqdm(batches, desc="tokens attacked", unit="batch")
    ]
    return pd.concat(made, ignore_index=True)


def _token_attacks(batch: Scored, budgets: Sequence[float], seed: int) -> pd.DataFrame:
    hidden = batch.letters.embeddings.shape[2]
    rows = _intact_rows(batch)
    for name in TOKEN_SETTINGS:
        values = batch.scores(Random(seed) if name == RANDOM else name, "token")
        places = [top_dimensions(v[:, None], 1e-9, seed=seed) for v in values]  # at least one is taken
        chosen = [place * hidden + torch.arange(hidden) for place in places]
        moves = [Move(budget, share=0.0) for budget in budgets]
        labels: list[dict[str, object]] = [{"measure": name, "draw": 0}] * len(moves)
        rows += _rows(batch, labels, [chosen] * len(moves), moves, seed)
    return pd.DataFrame(rows)


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


def typical(rows: pd.DataFrame, measure: str, move: Move) -> str:
    """The id of the question of median confidence among those answered right until `measure` moves them.

    Where there are none, among all that are answered right; where there are none of these, among all.
    """
    table = wide(rows, move, "correct")
    right = table[INTACT] == 1
    flipped = right & (table[measure] == 0)
    chosen = next(index for index in (flipped, right, right | True) if index.any())
    sure = wide(rows, move, "attacked")[INTACT][chosen]
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


# --- one batch


def _sweep(batch: Scored, plan: Plan) -> pd.DataFrame:
    rows = _intact_rows(batch)
    for measure in plan.measures:
        for draw in range(plan.draws if measure == RANDOM else 1):
            chosen = [batch.positions(measure, move, draw, plan.seed) for move in plan.moves]
            name = measure if isinstance(measure, str) else measure.name
            labels: list[dict[str, object]] = [{"measure": name, "draw": draw}] * len(plan.moves)
            rows += _rows(batch, labels, chosen, plan.moves, plan.seed + draw)
    return pd.DataFrame(rows)


def _intact_rows(batch: Scored) -> list[dict[str, object]]:
    label: dict[str, object] = {"measure": INTACT, "draw": 0}
    nothing = [torch.empty(0, dtype=torch.long)] * len(batch.examples)
    return _asked(batch, [label], [nothing], [Move(0.0, share=0.0)], [batch.letters.embeddings])


def _rows(
    batch: Scored,
    labels: Sequence[Mapping[str, object]],
    chosen: Sequence[Sequence[Tensor]],
    moves: Sequence[Move],
    seed: int,
) -> list[dict[str, object]]:
    moved = [batch.moved(positions, move, seed) for positions, move in zip(chosen, moves, strict=True)]
    return _asked(batch, labels, chosen, moves, moved)


def _asked(
    batch: Scored,
    labels: Sequence[Mapping[str, object]],
    chosen: Sequence[Sequence[Tensor]],
    moves: Sequence[Move],
    moved: Sequence[Tensor],
) -> list[dict[str, object]]:
    found = batch.ask(moved)
    intact, hidden = batch.letters.embeddings, batch.letters.embeddings.shape[2]
    rows = []
    for i, (label, positions, move, changed) in enumerate(zip(labels, chosen, moves, moved, strict=True)):
        promised = (batch.gradient * (changed - intact)).flatten(1).sum(1).double().cpu()
        for j, example in enumerate(batch.examples):
            row: dict[str, object] = {"id": example.id, "subject": example.subject, **label}
            row |= {name: getattr(move, name) for name in MOVED}
            row |= {"dims": len(positions[j]), "tokens": len((positions[j] // hidden).unique())}
            row |= {name: values[i, j] for name, values in found.items()}
            rows.append(row | {"promised": float(promised[j])})
    return rows


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


def _kept(
    cache: Path, what: str, batch: Scored, settings: object, make: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """What `make` gives, from the cache where it was made before."""
    model = batch.letters.model
    told = [(e.id, e.prompt, e.answer) for e in batch.examples]
    text = repr((what, model.sha256, model.network.dtype, settings, told))
    path = cache / f"embeddings.{what}.{hashlib.sha256(text.encode()).hexdigest()[:16]}.parquet"
    if not path.is_file():
        write_atomically(path, make().to_parquet(index=False))
    return pd.read_parquet(path)
