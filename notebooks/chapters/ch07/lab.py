"""Chapter 07: zero the weights that a measure calls fragile, and see what breaks (method 4.4)."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from fihelpers.answers import usual_answers
from fihelpers.data import write_atomically
from fihelpers.evaluate.questions import Evaluator, Outcome
from fihelpers.evaluate.stats import crossed_difference, mean_interval
from fihelpers.measures import MEASURES, Measure, Random, find_measure, names_of
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import Which, linear_names, select, zeroed
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example, load_task

INTACT = "intact"
RANDOM = "random"
MAGNITUDE = "magnitude"
SYMBOLS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a class a symbol, in the strings of answers
TEXT = dict.fromkeys(("correct", "said", "right"), str)  # columns that only look like numbers
# what chapter 07 compares question by question: the first measure's accuracy minus the second's
PAIRS = {
    "exact_random": ("FI exact", "random"),
    "damped_random": ("FI damped 0.0001", "random"),
    "damped_exact": ("FI damped 0.0001", "FI exact"),
    "damped_jacobian": ("FI damped 0.0001", "Jacobian norm"),
    "snip_damped": ("SNIP", "FI damped 0.0001"),
    "length_snip": ("information length", "SNIP"),
}


@dataclass(frozen=True)
class Plan:
    """What is run.

    rates: shares of the linear weights to zero, in (0, 1]. seeds: number of calibration sets. n_calibration
    and n_test: questions of each subject (n_test None takes all). low_of: FI measures for which "FI-low", a
    random draw from the lower half, is run as well. transfer_of, transfer_rate: the ranking that is also
    tried on the other subjects.
    """

    task: str
    subjects: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    n_calibration: int
    n_test: int | None
    measures: tuple[str, ...] = tuple(MEASURES)
    low_of: tuple[str, ...] = ("FI exact", "FI damped 0.0001")
    transfer_of: str = "FI damped 0.0001"
    transfer_rate: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("measures", "low_of"):
            object.__setattr__(self, name, names_of(getattr(self, name)))


class Draw(Protocol):
    """The part of a plan that says what is drawn from which task."""

    @property
    def task(self) -> str: ...
    @property
    def n_calibration(self) -> int: ...
    @property
    def n_test(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


def calibration_set(plan: Draw, subject: str | None, seed: int) -> Sequence[Example]:
    """Questions of the validation split, or contexts of the first half of a text file."""
    if not plan.task.endswith(".txt"):
        return load_task(plan.task, subject, "val", plan.n_calibration, seed).examples
    whole = load_task(plan.task).examples
    half = whole[: len(whole) // 2]
    if plan.n_calibration > len(half):
        raise ValueError(
            f"The first half of {plan.task} has {len(half)} contexts, "
            f"fewer than the {plan.n_calibration} asked for."
        )
    chosen = np.random.default_rng(seed).permutation(len(half))[: plan.n_calibration]
    return [half[i] for i in sorted(chosen)]


def tested_set(plan: Draw, subject: str | None) -> Sequence[Example]:
    """Questions of the test split, or contexts of the second half of a text file."""
    if not plan.task.endswith(".txt"):
        return load_task(plan.task, subject, "test", plan.n_test, plan.seed).examples
    whole = load_task(plan.task).examples
    return whole[len(whole) // 2 :][: plan.n_test]


def run_sweep(model: LanguageModel, plan: Plan, cache: Path) -> pd.DataFrame:
    """Zero the top share of all linear weights by every measure, for every subject and calibration set.

    Returns one row for each (subject, tested_on, seed, measure, rate), with n, accuracy, log_prob (mean log P
    of the right answer, or of the intact model's own choice where nothing is right) and three strings with
    one place for each test question: `correct` (0 or 1), `said` and `right` (the class, as in SYMBOLS).
    Magnitude looks at no question: what it does is run for the first set and holds for all. Finished pairs
    of subject and seed lie in `cache` and are not run again after an interruption. Raises ValueError for an
    unknown measure or a rate outside [0, 1].
    """
    check(plan)
    tested = {s: tested_set(plan, s) for s in plan.subjects}
    evaluators = {s: _evaluator(model, examples) for s, examples in tested.items()}
    key = _key(model, plan, tested)
    parts = [pd.DataFrame([_row(s, s, 0, INTACT, 0.0, e()) for s, e in evaluators.items()])]
    pairs = [(s, k) for s in plan.subjects for k in range(plan.seeds)]
    for subject, k in tqdm(pairs, desc="sparsification", unit="calibration set"):
        path = cache / f"{key}.{subject}.{k}.csv"
        if not path.is_file():
            found = pd.DataFrame(_one_calibration(model, plan, evaluators, subject, k))
            write_atomically(path, found.to_csv(index=False).encode())
        parts.append(pd.read_csv(io.BytesIO(path.read_bytes()), dtype=TEXT))
    rows = pd.concat(parts, ignore_index=True)
    same = rows[rows.measure == MAGNITUDE]
    return pd.concat([rows, *(same.assign(seed=k) for k in range(1, plan.seeds))], ignore_index=True)


def pooled_scores(model: LanguageModel, plan: Plan) -> dict[str, Scores]:
    """Scores of the linear weights over the first calibration sets of all subjects together."""
    examples = [e for s in plan.subjects for e in calibration_set(plan, s, plan.seed)]
    return score_weights(model, examples, plan.measures, only=linear_names(model.network))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy over subjects for each measure and rate, with a t interval over the calibration sets.

    Rate 0 is the intact model, the same for every measure. Columns: measure, rate, accuracy, low, high,
    log_prob, seeds, n (test questions).
    """
    own = rows[rows.subject == rows.tested_on]
    intact = own[own.measure == INTACT]
    lines = []
    for (measure, rate), part in own[own.measure != INTACT].groupby(["measure", "rate"], sort=False):
        by_seed = part.groupby("seed").accuracy.mean()
        low, high = mean_interval(by_seed.to_numpy())[-2:] if len(by_seed) > 1 else (np.nan, np.nan)
        lines.append(
            (measure, rate, by_seed.mean(), low, high, part.log_prob.mean(), len(by_seed), intact.n.sum())
        )
    table = pd.DataFrame(
        lines, columns=["measure", "rate", "accuracy", "low", "high", "log_prob", "seeds", "n"]
    )
    start = table.drop_duplicates("measure").assign(
        rate=0.0, accuracy=intact.accuracy.mean(), low=np.nan, high=np.nan, log_prob=intact.log_prob.mean()
    )
    return pd.concat([start, table], ignore_index=True)


def lost(row: pd.Series, intact: float) -> tuple[float, float, float]:
    """The share of the intact accuracy that is gone, with its interval; row: of `summary`."""
    value, low, high = ((intact - row[end]) / intact for end in ("accuracy", "high", "low"))
    return value, low, high


def with_interval(table: pd.DataFrame) -> pd.Series:
    """Accuracy and its interval as text, for a table to read."""
    return table.apply(
        lambda r: f"{r.accuracy:.2f}" if np.isnan(r.low) else f"{r.accuracy:.2f} [{r.low:.2f}, {r.high:.2f}]",
        axis=1,
    )


def own_and_other(carried: pd.DataFrame) -> tuple[float, float]:
    """Mean accuracy tested on the subject calibrated on, and on the others (the same for one subject)."""
    values = carried.to_numpy()
    same = np.eye(len(values), dtype=bool)
    return float(values[same].mean()), float(values[~same].mean() if len(values) > 1 else values.mean())


def answers_of(rows: pd.DataFrame, measure: str, rate: float) -> np.ndarray:
    """Right (1) or wrong (0), a row for each calibration set, a column for each question of all subjects."""
    lines = ["".join(part.correct) for _, part in _own(rows, measure, rate).groupby("seed")]
    return np.array([[float(c) for c in line] for line in lines])


def _own(rows: pd.DataFrame, measure: str, rate: float) -> pd.DataFrame:
    """The rows of one measure at one rate, each subject tested on itself."""
    own = rows[(rows.subject == rows.tested_on) & (rows.measure == measure) & np.isclose(rows.rate, rate)]
    if own.empty:
        raise ValueError(f"The sweep has no measure {measure!r} at rate {rate}.")
    return own


def difference(rows: pd.DataFrame, a: str, b: str, rate: float, seed: int) -> tuple[float, float, float]:
    """Accuracy after zeroing by a minus by b, with a bootstrap interval over sets and questions."""
    return crossed_difference(answers_of(rows, a, rate), answers_of(rows, b, rate), seed=seed)


def differences(rows: pd.DataFrame, a: str, b: str, rates: Sequence[float], seed: int) -> pd.DataFrame:
    """`difference` at every rate. Columns: rate, difference, low, high."""
    lines = [(rate, *difference(rows, a, b, rate, seed)) for rate in rates]
    return pd.DataFrame(lines, columns=["rate", "difference", "low", "high"])


def chance(plan: Plan) -> float | None:
    """The share of right answers that guessing gets, 1/K; None for a text file, where nothing is right."""
    options = tested_set(plan, plan.subjects[0])[0].options
    return 1 / len(options) if options else None


def one_letter(rows: pd.DataFrame, measure: str, rate: float) -> np.ndarray:
    """Right (1) or wrong (0) of always giving one answer: the one that the broken model gives most often.

    That answer is taken for each subject and calibration set by itself. Shape as in `answers_of`.
    """
    lines = []
    for _, part in _own(rows, measure, rate).groupby("seed"):
        always = [max(sorted(set(said)), key=said.count) for said in part.said]
        lines.append([c == a for right, a in zip(part.right, always, strict=True) for c in right])
    return np.array(lines, dtype=float)


def left_above_one_letter(
    rows: pd.DataFrame, measure: str, rate: float, seed: int
) -> tuple[float, float, float]:
    """Accuracy after zeroing minus that of `one_letter`, paired, with its interval as in `difference`."""
    return crossed_difference(answers_of(rows, measure, rate), one_letter(rows, measure, rate), seed=seed)


def overlaps(scores: dict[str, Scores], share: float) -> pd.DataFrame:
    """Share of the top weights that two measures have in common, a square table."""
    chosen = {}
    for name, s in scores.items():
        flat = torch.cat([v.flatten() for v in s.values.values()])
        chosen[name] = set(select({"all": flat}, share)["all"].tolist())
    count = max(1, len(next(iter(chosen.values()))))
    return pd.DataFrame({a: {b: len(chosen[a] & chosen[b]) / count for b in chosen} for a in chosen})


def locations(scores: Scores, share: float) -> pd.DataFrame:
    """Where the top weights sit: columns layer, matrix, weights, top, top_share (of the matrix)."""
    chosen = select(scores, share)
    lines = []
    for name, value in scores.values.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        matrix = name.split(".")[-2]
        lines.append((layer, matrix, value.numel(), len(chosen[name]), len(chosen[name]) / value.numel()))
    return pd.DataFrame(lines, columns=["layer", "matrix", "weights", "top", "top_share"])


def rows_holding_half(scores: Scores, share: float) -> tuple[int, int]:
    """Number of rows (output channels) that hold half of the top weights, and the number of all rows."""
    chosen = select(scores, share)
    counts = [torch.bincount(chosen[n] // v.shape[1], minlength=v.shape[0]) for n, v in scores.values.items()]
    ordered = torch.cat(counts).sort(descending=True).values.double()
    needed = int((ordered.cumsum(0) < ordered.sum() / 2).sum()) + 1
    return needed, len(ordered)


def concentration(scores: dict[str, Scores], points: int = 200) -> pd.DataFrame:
    """Share of the total score that the top share of the weights holds: columns measure, weights, total."""
    lines = []
    for name, s in scores.items():
        flat = torch.cat([v.flatten() for v in s.values.values()]).double().sort(descending=True).values
        total = flat.cumsum(0) / flat.sum()
        shares = np.geomspace(1 / len(flat), 1, points)
        index = np.clip((shares * len(flat)).round().astype(int) - 1, 0, len(flat) - 1)
        lines += [(name, w, float(total[i])) for w, i in zip(shares, index, strict=True)]
    return pd.DataFrame(lines, columns=["measure", "weights", "total"])


def transfer(rows: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Mean accuracy over calibration sets: rows are the subject calibrated on, columns the one tested."""
    part = rows[(rows.measure == plan.transfer_of) & np.isclose(rows.rate, plan.transfer_rate)]
    return part.pivot_table(index="subject", columns="tested_on", values="accuracy")


def check(plan: Plan) -> None:
    """Raise ValueError for a plan that cannot be run; a chapter calls it before it opens a model."""
    bad = [r for r in (*plan.rates, plan.transfer_rate) if not 0 <= r <= 1]
    if bad:
        raise ValueError(f"The share to zero must lie in [0, 1], not {bad[0]}.")
    if plan.seeds < 1:
        raise ValueError(f"The number of calibration sets must be at least 1, not {plan.seeds}.")
    check_sets(plan, plan.subjects)


def check_sets(plan: Draw, subjects: Iterable[str | None]) -> None:
    """Draw a calibration and a test set of every subject. Raises what `load_task` raises."""
    for subject in subjects:
        calibration_set(plan, subject, plan.seed)
        tested_set(plan, subject)


def _key(model: LanguageModel, plan: Plan, tested: dict[str, Sequence[Example]]) -> str:
    questions = [[(e.prompt, e.answer) for e in examples] for examples in tested.values()]
    text = json.dumps([model.sha256, str(model.network.dtype), asdict(plan), questions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _evaluator(model: LanguageModel, examples: Sequence[Example]) -> Evaluator:
    answers = usual_answers(model.tokenizer, lettered=bool(examples[0].options))
    evaluator = Evaluator(model, examples, answers)
    evaluator()  # the intact model: its choices are the reference where nothing is right or wrong
    return evaluator


def _one_calibration(
    model: LanguageModel, plan: Plan, evaluators: dict[str, Evaluator], subject: str, k: int
) -> list[dict]:
    examples = calibration_set(plan, subject, plan.seed + k)
    names = [m for m in plan.measures if k == 0 or m != MAGNITUDE]
    measures: list[Measure] = [find_measure(m) for m in dict.fromkeys((*names, *plan.low_of))]
    measures = [Random(plan.seed + k) if m.name == RANDOM else m for m in measures]
    scores = score_weights(model, examples, measures, only=linear_names(model.network))
    top: list[tuple[str, str, Which]] = [(m, m, "top") for m in names]
    low: list[tuple[str, str, Which]] = [(m, f"{m}, low half", "low half") for m in plan.low_of]
    rows = []
    for measure, label, which in top + low:
        for rate in plan.rates:
            moved = which == "top" and measure == plan.transfer_of and np.isclose(rate, plan.transfer_rate)
            positions = select(scores[measure], rate, which, seed=plan.seed + k)
            with zeroed(model.network, positions):
                rows += [
                    _row(subject, other, k, label, rate, ask())
                    for other, ask in evaluators.items()
                    if moved or other == subject
                ]
    return rows


def _row(subject: str, tested_on: str, seed: int, measure: str, rate: float, outcome: Outcome) -> dict:
    correct = outcome.correct
    return {
        "subject": subject,
        "tested_on": tested_on,
        "seed": seed,
        "measure": measure,
        "rate": rate,
        "n": len(correct),
        "accuracy": float(correct.double().mean()),
        "log_prob": float(outcome.log_prob.double().mean()),
        "correct": _as_symbols(correct),
        "said": _as_symbols(outcome.predicted),
        "right": _as_symbols(outcome.answer),
    }


def _as_symbols(classes: torch.Tensor) -> str:
    return "".join(SYMBOLS[int(c)] for c in classes)
