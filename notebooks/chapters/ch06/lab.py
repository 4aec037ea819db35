"""What chapter 06 does not write out: its questions, other classes, readings of its trials (method 4.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fichapters.ch06.regions import question_region
from fichapters.tables import average, compare
from fihelpers.answers import Top
from fihelpers.influence import SaturationWarning, saturated
from fihelpers.measures import MEASURES as REGISTERED
from fihelpers.measures import Random
from fihelpers.models.language import LanguageModel
from fihelpers.scores.inputs import EmbeddingBatch, embedding_batches
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Trials

CLASSES = 8  # likeliest tokens that are classes of their own beside the rest
ON_TOP = f", top {CLASSES}"  # what a measure is called where these are the classes
RANDOM = "random"
INTACT = "intact"
ALL = "all"  # what moving every dimension is called, whatever the measure
EXACT, DAMPED, JACOBIAN = "FI exact", "FI damped 0.0001", "Jacobian norm"
FI = tuple(name for name in REGISTERED if name.startswith("FI"))
EVERY_FI = (*FI, *(name + ON_TOP for name in FI))
PAPER = (JACOBIAN, "saliency", "SNIP", RANDOM)  # what the paper's second table sets FI against
OPPONENTS = (JACOBIAN, "SNIP", RANDOM)  # of the paper's, where not every measure is run
# the measures whose few dimensions are set against all
EIGHT = (EXACT, "FI cut 0.01", "FI damped 1e-06", DAMPED, JACOBIAN, "SNIP", "information length", RANDOM)
GUIDED = (EXACT, DAMPED, JACOBIAN, "information length")  # that claim 10 is judged by
TOKEN_SETTINGS = (EXACT, EXACT + ON_TOP, "FI exact summed", DAMPED, JACOBIAN, "SNIP", RANDOM)
TEXTS = ("id", "subject")  # what an answer holds beside numbers, of the question itself

Answer = Mapping[str, Any]


def questions(p: SimpleNamespace, model: LanguageModel | None = None) -> list[Example]:
    """Test questions of each of the chapter's SUBJECTS (N_QUESTIONS of each, None takes all).

    Of statements to finish only those whose options the model tells apart by their first tokens. Raises
    ValueError for a task without options and right answers, or about images.
    """
    speaks = model.tokenizer if model else None
    draws = [load_task(p.TASK, s, "test", p.N_QUESTIONS, p.SEED, tokenizer=speaks) for s in p.SUBJECTS]
    found = [example for drawn in draws for example in drawn]
    for example in found:
        if not example.options or example.answer is None or example.image is not None:
            raise ValueError(f"{example.id!r} is no question as text with options; take another task.")
    return found


# --- which dimensions may be chosen, by what classes


def everywhere(batch: EmbeddingBatch) -> list[None]:
    """For each question: any of its tokens may be touched."""
    return [None] * len(batch.examples)


def question_only(batch: EmbeddingBatch) -> list[Tensor]:
    """For each question which of its tokens (T,) are the question's own words and its options'."""
    return [question_region(batch.model, example) for example in batch.examples]


class OnTop(EmbeddingBatch):
    """A batch whose scores take the likeliest tokens and the rest as classes.

    It is attacked and asked as ever: what is predicted is an option.
    """

    @cached_property
    def top(self) -> EmbeddingBatch:
        # sorted by length, as the examples of a batch are: their order stays
        (batch,) = embedding_batches(self.model, self.examples, Top(CLASSES), len(self.examples))
        return batch

    def scores(self, *args: Any, **settings: Any) -> dict[str, list[Tensor]]:
        return self.top.scores(*args, **settings)


def on_top(batches: Iterable[EmbeddingBatch]) -> list[OnTop]:
    """The same batches, scored by other classes: see `OnTop`."""
    return [OnTop(**{of.name: getattr(batch, of.name) for of in fields(batch)}) for batch in batches]


# --- answers


def names(batch: EmbeddingBatch) -> Answer:
    """The id of each question, by which answers are paired, and its subject."""
    return {text: [getattr(example, text) for example in batch.examples] for text in TEXTS}


def first_order(batch: EmbeddingBatch, embeddings: Tensor) -> Tensor:
    """What the gradient promises for log P(ŷ) of each question (B,), in nats.

    embeddings: (B, T, hidden), as they were changed.
    """
    said = batch.grads.predicted
    own = batch.grads.class_grads[said, torch.arange(len(said))]
    return (own * (embeddings - batch.embeddings)).flatten(1).sum(1).cpu()


def mean(answers: Sequence[Answer]) -> Answer:
    """The mean of several answers to the same questions, such as those after several random choices."""
    numbers = {
        name: np.mean([np.asarray(answer[name], float) for answer in answers], axis=0)
        for name in answers[0]
        if name not in TEXTS
    }
    return {**answers[0], **numbers}


def labelled(trials: Trials, **labels: Any) -> Trials:
    """The same trials under further or other labels."""
    return Trials(trials.intact, [replace(t, labels={**t.labels, **labels}) for t in trials.tried])


def with_intact(trials: Trials) -> Trials:
    """The trials of one move, and before them the untouched questions as a measure called "intact"."""
    labels = {**trials.tried[0].labels, "measure": INTACT}
    return labelled(Trials(trials.intact, trials.intact), **labels) + trials


def named_on_top(trials: Trials) -> Trials:
    """The trials of batches of `on_top`, under the measures' names there."""
    tried = [replace(t, labels={**t.labels, "measure": t.labels["measure"] + ON_TOP}) for t in trials.tried]
    return Trials(trials.intact, tried)


def directions(guided: Trials, astray: Trials, seed: int) -> pd.DataFrame:
    """log P after the gradient's direction minus after a random one, by measure and budget."""
    both = labelled(guided, direction="gradient") + astray
    return compare(both, [("gradient", "random")], "measure", "budget", seed=seed, label="direction")


def by_subject(trials: Trials) -> pd.DataFrame:
    """Accuracy of each measure (row) in each subject (column), in the order in which they were asked."""
    rows = trials.rows().astype({"correct": float})
    return rows.pivot_table("correct", "measure", "subject", sort=False)


def promises(trials: Trials, names: Sequence[str]) -> pd.DataFrame:
    """What came of the first order's promise for log P(ŷ), as a quotient: rows measures, columns budgets."""
    promised, after = (
        trials.table("measure", "budget", value=value).set_index(["measure", "budget"])[value]
        for value in ("promised", "attacked")
    )
    came = after - trials.start("attacked").mean()
    return (came / promised).unstack().loc[list(names)]


def duels(
    trials: Trials, others: Sequence[str], seed: int, *at: str, value: str = "log_prob"
) -> pd.DataFrame:
    """Every setting of FI that was run minus each other measure, for every combination of the labels `at`.

    The difference is of the mean of a value, by default log P of the right answer: below zero FI does more
    damage. accuracy: the same difference of the accuracy. Columns: fi, other, the labels, n, difference, low,
    high, accuracy.
    """
    run = {trial.labels["measure"] for trial in trials.tried}
    pairs = [(fi, other) for other in others for fi in EVERY_FI if fi in run]
    made = compare(trials, pairs, *at, seed=seed, value=value)
    made = made.rename(columns={"first": "fi", "minus": "other"})
    accuracy = compare(trials, pairs, *at, seed=seed, value="accuracy").difference
    made = made.assign(accuracy=accuracy)[["fi", "other", *at, "n", "difference", "low", "high", "accuracy"]]
    return made.sort_values(list(at), kind="stable", ignore_index=True) if at else made


def attack_duels(attacks: Mapping[str, Trials], seed: int) -> pd.DataFrame:
    """`duels` after every kind of attack, by its name in a column `attack`."""
    found = {name: duels(trials, OPPONENTS, seed) for name, trials in attacks.items()}
    return pd.concat(found, names=["attack"]).reset_index("attack").reset_index(drop=True)


def random_and_guided(trials: Trials, budgets: Mapping[str, float], seed: int) -> pd.DataFrame:
    """Random dimensions against the untouched question, and guided ones against random ones, by accuracy.

    budgets: by what they are called in the column `attack`. Other columns: first, second, n, difference,
    low, high.
    """
    pairs = [(RANDOM, INTACT), *((name, RANDOM) for name in GUIDED)]
    found = {
        name: compare(with_intact(trials.where(budget=budget)), pairs, seed=seed, value="accuracy")
        for name, budget in budgets.items()
    }
    made = pd.concat(found, names=["attack"]).reset_index("attack").rename(columns={"minus": "second"})
    return made[["attack", "first", "second", "n", "difference", "low", "high"]].reset_index(drop=True)


def few_against_all(trials: Trials, whole: Trials, measures: Sequence[str], seed: int) -> pd.DataFrame:
    """log P after a few dimensions minus after all of them. Columns: measure, n, value, low, high.

    trials: of one move; whole: the same move of every dimension.
    """
    both = trials + labelled(whole, measure=ALL)
    found = compare(both, [(name, ALL) for name in measures], seed=seed)
    found = found.rename(columns={"first": "measure", "difference": "value"})
    return found[["measure", "n", "value", "low", "high"]]


# --- whole tokens


def token_saturation(batches: Sequence[EmbeddingBatch], seed: int) -> pd.DataFrame:
    """How the scores of whole tokens spread, a row a setting.

    Columns: setting; n (questions); lowest and highest (5th and 95th percentile of a question's tokens, over
    the mean of its tokens), held (share of the total that the highest token holds); and of joint FI
    at_ceiling, the share of the tokens at the ceiling, with its bootstrap interval (low, high).
    """
    lines, tops = [], [batch.top for batch in on_top(batches)]
    for name in TOKEN_SETTINGS:
        of = tops if name.endswith(ON_TOP) else batches
        each = pd.DataFrame(line for batch in of for line in _token_lines(batch, name))
        line = {"setting": name, "n": len(each), **each.drop(columns="at_ceiling").mean()}
        if each.at_ceiling.notna().all():
            ends = average(each.at_ceiling, seed)
            line |= dict(zip(("at_ceiling", "low", "high"), ends, strict=True))
        lines.append(line)
    return pd.DataFrame(lines)


def _token_lines(batch: EmbeddingBatch, name: str) -> list[dict[str, float]]:
    """What `token_saturation` averages, of each question of a batch."""
    joint = name.startswith("FI") and not name.endswith("summed")
    measure = Random(0) if name == RANDOM else name.removesuffix(ON_TOP)
    # saturation is what is counted here
    with warnings.catch_warnings(action="ignore", category=SaturationWarning):
        (found,) = batch.scores([measure], "token").values()
    lines = []
    for i, values in enumerate(v.cpu().double() for v in found):
        over_mean = values / values.mean() if values.sum() > 0 else torch.ones_like(values)
        low, high = np.quantile(over_mean.numpy(), [0.05, 0.95])
        line = {"lowest": low, "highest": high, "held": float(values.max() / values.sum())}
        near = saturated(values[None], batch.grads.probs[:, [i]].cpu(), batch.grads.predicted[[i]].cpu())
        lines.append({**line, "at_ceiling": float(near.double().mean()) if joint else np.nan})
    return lines
