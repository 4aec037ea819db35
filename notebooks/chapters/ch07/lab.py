"""What chapter 07 does not write out: drawing questions, controls, readings of its trials (method 4.4)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch

from fichapters.ch07.judges import (
    ApiJudge,
    LikelihoodJudge,
    length_controlled_win_rates,
    rouge1,
)
from fichapters.results import Chapter
from fihelpers.data import data_folder
from fihelpers.evaluate.stats import crossed_difference
from fihelpers.jobs.preflight import estimate_scores, prompt_lengths
from fihelpers.models.generate import Response, greedy
from fihelpers.models.language import LanguageModel, in_chat
from fihelpers.scores.store import Scores
from fihelpers.tasks import Example, load_task
from fihelpers.tasks.instructions import SUBJECT, instruction_prompt, load_instructions
from fihelpers.trials import Trials

# of written answers, and what the intact model's is of: its answers are as long as themselves
SCORES = {"rouge1": "rouge1", "win_rate": "win_rate", "length_controlled": "win_rate"}
SIDES = ("below", "above")


def questions(
    p: SimpleNamespace, split: str, n: int | None, seed: int, model: LanguageModel | None = None
) -> dict[str, Sequence[Example]]:
    """Examples of each of a chapter's SUBJECTS from its TASK, drawn with a seed (n each; all if None).

    Of statements to finish only those whose options the model tells apart by their first tokens.
    """
    return {subject: draw_of(p.TASK, subject, split, n, seed, model) for subject in p.SUBJECTS}


def draw_of(
    task: str, subject: str | None, split: str, n: int | None, seed: int, model: LanguageModel | None = None
) -> Sequence[Example]:
    """Examples of a task, as `load_task` draws them.

    Of a text file the first half is the val split, drawn with the seed, and the rest the test split, of which
    the first n are taken. Raises ValueError where there are fewer than n.
    """
    if not task.endswith(".txt"):
        speaks = model.tokenizer if model else None
        return load_task(task, subject, split, n, seed, tokenizer=speaks).examples
    whole = load_task(task).examples
    half = whole[: len(whole) // 2] if split == "val" else whole[len(whole) // 2 :]
    if n is not None and n > len(half):
        raise ValueError(
            f"The {split} half of {task} has {len(half)} contexts, fewer than the {n} asked for."
        )
    if split != "val":
        return half[:n]
    chosen = np.random.default_rng(seed).permutation(len(half))[:n]
    return [half[i] for i in sorted(chosen)]


def chance(tested: Mapping[str, Sequence[Example]]) -> float | None:
    """The share of right answers that guessing gets, 1/K; None where nothing is right."""
    options = next(iter(tested.values()))[0].options
    return 1 / len(options) if options else None


def check(p: SimpleNamespace, measures: Sequence[str]) -> None:
    """Draw once whatever the chapter will draw, so that a bad parameter is refused before long work.

    measures: held together. Raises what `load_task` raises, ValueError for a judge that cannot be asked,
    and MemoryError for a model that is too large.
    """
    drawn = questions(p, "val", p.N_CALIBRATION, p.SEED)
    check_room(p, [example for examples in drawn.values() for example in examples], measures)
    questions(p, "test", p.N_TEST, p.SEED)
    questions(p, "test", p.PRUNING["test"], p.SEED)
    for split, n in (("val", "n_calibration"), ("test", "n_test")):
        draw_of(p.TEXT["task"], None, split, p.TEXT[n], p.SEED)
    if p.TEXT["judge_url"]:
        ApiJudge(p.TEXT["judge_url"], p.TEXT["judge_model"])


def check_room(
    p: SimpleNamespace,
    examples: Sequence[Example],
    measures: Sequence[str],
    layers: Collection[str] | None = None,
) -> None:
    """Raise MemoryError where a model that is not open yet cannot be scored by these measures at once.

    layers: names of the linear layers, such as "o_proj"; all by default.
    """
    tokens = max(prompt_lengths(p.MODEL, [example.prompt for example in examples], p.REVISION))
    settings = {"revision": p.REVISION, "dtype": p.DTYPE, "device": p.DEVICE}
    estimate_scores(p.MODEL, measures=measures, layers=layers, tokens=tokens, **settings).check()


# --- what is left of an accuracy


def with_loss(table: pd.DataFrame, intact: float) -> pd.DataFrame:
    """The table with the share of the intact accuracy that is gone: lost, lost_low, lost_high.

    A model that gets nothing right has nothing to lose (NaN).
    """
    ends = {"lost": "accuracy", "lost_low": "high", "lost_high": "low"}
    gone = {name: (intact - table[end]) / (intact or np.nan) for name, end in ends.items()}
    return table.assign(**gone)


def above_one_letter(trials: Trials, measures: Sequence[str], rate: float, seed: int) -> pd.DataFrame:
    """Accuracy minus that of always saying one letter: the one that the broken model says most often.

    That letter is taken for each subject and calibration set by itself; bootstrap over both. Columns:
    measure, rate, letter (its accuracy), difference, low, high, n.
    """
    lines = []
    for measure in measures:
        broken = trials.where(measure=measure, rate=rate)
        subjects = list(dict.fromkeys(trial.labels["subject"] for trial in broken.tried))
        always = [_one_letter(broken.where(subject=subject)) for subject in subjects]
        letter = np.concatenate(always, axis=1)
        right = np.concatenate([broken.answers(subject=subject) for subject in subjects], axis=1)
        found = crossed_difference(right, letter, seed=seed)
        lines.append((measure, rate, letter.mean(), *found, letter.shape[1]))
    return pd.DataFrame(lines, columns=["measure", "rate", "letter", "difference", "low", "high", "n"])


def _one_letter(trials: Trials) -> np.ndarray:
    """Right (1) or wrong (0), (sets, questions), of each set's most frequent answer, given always."""
    said, right = (trials.answers(value).astype(int) for value in ("said", "right"))
    most = [np.bincount(line).argmax() for line in said]
    return (right == np.array(most)[:, None]).astype(float)


# --- what a score is made of


def concentration(scored: Iterable[tuple[str, Scores]], points: int = 200) -> pd.DataFrame:
    """Share of the total score that the top share of the weights holds: measure, weights, total, n."""
    lines = []
    for name, scores in scored:
        flat = torch.cat([v.flatten() for v in scores.values.values()]).cpu().numpy()
        flat.sort()  # in place: of a large model they are many gigabytes
        n = len(flat)
        shares = np.union1d(np.geomspace(1 / n, 1, points), [0.01])
        first = n - np.clip((shares * n).round().astype(int), 1, n)  # where each share's part begins
        starts, place = np.unique(first, return_inverse=True)
        held = np.add.reduceat(flat, starts, dtype=np.float64)[::-1].cumsum()[::-1]
        lines += [(name, *line, n) for line in zip(shares, held[place] / held[0], strict=True)]
    return pd.DataFrame(lines, columns=["measure", "weights", "total", "n"])


# --- text


def judge_of(model: LanguageModel, text: Mapping[str, Any], run: Chapter) -> LikelihoodJudge | ApiJudge:
    """The judge behind an API where TEXT has its address, else the likelihood under the intact model.

    An API's verdicts are kept, whatever becomes of the run.
    """
    if not text["judge_url"]:
        return LikelihoodJudge(model)
    return ApiJudge(text["judge_url"], text["judge_model"], run.kept("judge").folder / "verdicts.sqlite")


def framed(model: LanguageModel, example: Example) -> Example:
    """The example in the words that a chat model expects: its own template around the instruction.

    A model without template gets the prompt as it stands, as does a context to continue.
    """
    if not model.tokenizer.chat_template or example.question == example.prompt:
        return example
    return replace(example, prompt=in_chat(model.tokenizer, example.question, model.name))


def instructions(
    model: LanguageModel, text: Mapping[str, Any], split: str, n: int | None, seed: int
) -> list[Example]:
    """Instructions of a task, in the words that the model expects: see `framed`. text: the settings TEXT."""
    return [framed(model, example) for example in draw_of(text["task"], None, split, n, seed)]


def what_it_can(
    model: LanguageModel, asked: Sequence[Example], intact: Sequence[Response], length: int
) -> pd.Series:
    """ROUGE-1 of the intact model's answers: against references, after other words, and of unrelated ones.

    Names: "reference"; "asked in other words", of bundled instructions in a wording that the bundled model
    never saw; and "answer to another prompt", what two answers share anyway. Raises ValueError where the
    model ends an answer at once: there is nothing to compare with.
    """
    texts = [answer.text for answer in intact]
    for example, text in zip(asked, texts, strict=True):
        if not text.strip():
            raise ValueError(
                f"the intact model {model.name!r} ends its answer to {example.id!r} at once, so there is "
                "nothing to compare with; leave that prompt out."
            )
    entries = load_instructions(data_folder())[1::2][: len(asked)]
    unseen, first = (_answers_to(model, [e["wordings"][place] for e in entries], length) for place in (2, 0))
    pairs = {
        "reference": (texts, [example.reference for example in asked]),
        "asked in other words": (unseen, first),
        "answer to another prompt": (texts[1:] + texts[:1], texts),
    }
    return pd.Series({name: rouge1(*both).mean() for name, both in pairs.items()})


def _answers_to(model: LanguageModel, wordings: Sequence[str], length: int) -> list[str]:
    examples = [Example(w, SUBJECT, instruction_prompt(w), (), None, w) for w in wordings]
    prompts = [framed(model, example).prompt for example in examples]
    return [answer.text for answer in greedy(model, prompts, length)]


def at_equal_length(trials: Trials, intact: Sequence[Response]) -> tuple[Trials, str]:
    """The trials with `length_controlled`, fitted over all of them together, and how that was done.

    Every trial is a setting: a measure, a rate and a calibration set; the intact model is one more.
    """
    settings = [*trials.intact, *trials.tried]
    found = length_controlled_win_rates(
        [trial.values["win_rate"] for trial in settings],
        [trial.values["characters"] for trial in settings],
        [len(answer.text) for answer in intact],
    )
    start = len(trials.intact)
    return trials.with_values("length_controlled", found.win_rates[start:]), found.fit


def text_tables(trials: Trials) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every score of the answers with its interval, and each measure's difference from random zeroing.

    Both have a column score; the intervals of the differences are over calibration sets (t), since a
    bootstrap of a few sets would be too sure of itself.
    """
    tables, versus = {}, {}
    for score, start in SCORES.items():
        table = trials.table("measure", "rate", value=score)
        pairs = [(name, "random") for name in dict.fromkeys(table.measure) if name != "random"]
        tables[score] = table.rename(columns={score: "value"}).assign(intact=trials.start(start).mean())
        versus[score] = trials.compare(pairs, "rate", value=score, over_sets=True)
    joined = [pd.concat(found, names=["score"]).reset_index(0) for found in (tables, versus)]
    return joined[0].reset_index(drop=True), joined[1].reset_index(drop=True)


def widest(differences: pd.DataFrame) -> pd.DataFrame:
    """For each score and measure the rate at which it falls furthest below random, and how often it did.

    differences: of `text_tables`. Columns: score, first, minus, rate, difference, low, high, n, below, above
    (numbers of rates) and rates.
    """
    groups = differences.groupby(["score", "first"], sort=False)
    chosen = differences.loc[groups.difference.idxmin()].drop(columns="verdict")
    counts = {side: groups.verdict.agg(lambda v, side=side: int((v == side).sum())) for side in SIDES}
    found = pd.DataFrame({**counts, "rates": groups.size()}).reset_index()
    return chosen.merge(found, on=["score", "first"])
