"""Chapter 07, pruning methods: does FI find the weights that a model can do without? (method 3 and 4.4)

Two questions are asked of one measure. Zero the top share: does it find what matters? Zero the bottom share:
does it find what does not, which is what pruning is for?
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from fichapters.ch07.lab import INTACT, RANDOM, calibration_set, check_sets, tested_set
from fihelpers.answers import usual_answers
from fihelpers.data import write_atomically
from fihelpers.evaluate.questions import Evaluator, Outcome
from fihelpers.evaluate.stats import crossed_difference, mean_interval
from fihelpers.measures import Measure, Random, find_measure
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import Scope, linear_names, select, zeroed
from fihelpers.scores.pruning import METHODS, score_pruning
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example

EXACT, DAMPED = "FI exact", "FI damped 0.0001"
WANDA, MAGNITUDE, LENGTH = "Wanda", "magnitude", "information length"
SHORT = {  # the measures, and what the names of their records are made of
    EXACT: "exact",
    DAMPED: "damped",
    "SNIP": "snip",
    LENGTH: "length",
    "Taylor": "taylor",
    WANDA: "wanda",
    "SparseGPT": "sparsegpt",
    MAGNITUDE: "magnitude",
    RANDOM: "random",
}

PANELS = {  # of the curves from the bottom
    "FI beside Wanda": (EXACT, DAMPED, WANDA, RANDOM),
    "Scores that know the weight's size": ("SNIP", LENGTH, "Taylor", WANDA, "SparseGPT", MAGNITUDE),
}
PAIRS = (  # whose common weights chapter 07 speaks of
    (EXACT, WANDA),
    (DAMPED, WANDA),
    (DAMPED, "SNIP"),
    ("SNIP", WANDA),
    ("SNIP", "Taylor"),
    ("SNIP", LENGTH),
    (WANDA, MAGNITUDE),
)


@dataclass(frozen=True)
class Cut:
    """One way to zero weights: a share from the top or the bottom of the model, each layer or each row."""

    which: Literal["top", "bottom"]
    scope: Scope
    rate: float

    def __str__(self) -> str:
        place = "all weights" if self.scope == "global" else f"each {self.scope}"
        return f"{self.which} {self.rate:g} of {place}"


@dataclass(frozen=True)
class Plan:
    """What is run: `seeds` calibration sets drawn from all subjects together, tested on all together.

    n_calibration and n_test: questions of each subject. cuts: what is zeroed by each of the measures.
    """

    task: str
    subjects: tuple[str, ...]
    seeds: int
    n_calibration: int
    n_test: int | None
    cuts: tuple[Cut, ...]
    measures: tuple[str, ...] = tuple(SHORT)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "measures", tuple(dict.fromkeys(map(_name, self.measures))))


def usual_cuts(top: Sequence[float], bottom: Sequence[float], both: float) -> tuple[Cut, ...]:
    """Top shares of all weights, the last of each layer too; bottom shares of each layer.

    The share `both` is also taken from the bottom of each row and of all weights.
    """
    return (
        *(Cut("top", "global", rate) for rate in top),
        *(Cut("top", "layer", rate) for rate in top[-1:]),
        *(Cut("bottom", "layer", rate) for rate in bottom),
        Cut("bottom", "row", both),
        Cut("bottom", "global", both),
    )


def run_pruning(model: LanguageModel, plan: Plan, cache: Path) -> pd.DataFrame:
    """Zero every cut by every measure, for each calibration set.

    Returns a row for each (seed, measure, which, scope, rate), with n, accuracy, log_prob (mean log P of the
    right answer, or of the intact model's choice) and `correct`, a 0 or 1 for each test question; the intact
    model comes first. Finished sets lie in `cache` and are not run again after an interruption. Raises
    ValueError for an unknown measure, a share outside (0, 1], or no calibration set.
    """
    check(plan)
    tested = [e for s in plan.subjects for e in tested_set(plan, s)]
    ask = Evaluator(model, tested, usual_answers(model.tokenizer, lettered=bool(tested[0].options)))
    parts = [pd.DataFrame([_row(0, INTACT, Cut("top", "global", 0.0), ask())])]
    key = _key(model, plan, tested)
    for k in tqdm(range(plan.seeds), desc="pruning", unit="calibration set"):
        path = cache / f"{key}.{k}.csv"
        if not path.is_file():
            # magnitude looks at no question: what it did to the first set's model holds for all
            names = [m for m in plan.measures if k == 0 or m != MAGNITUDE]
            write_atomically(path, _one_set(model, plan, ask, k, names).to_csv(index=False).encode())
        parts.append(pd.read_csv(io.BytesIO(path.read_bytes()), dtype={"correct": str}))
    same = parts[1][parts[1].measure == MAGNITUDE]
    return pd.concat([*parts, *(same.assign(seed=k) for k in range(1, plan.seeds))], ignore_index=True)


def rank(model: LanguageModel, plan: Plan, k: int, names: Sequence[str] | None = None) -> dict[str, Scores]:
    """Scores of the linear weights by each measure, or by those of `names`, on calibration set number k."""
    names = plan.measures if names is None else names
    examples = [e for s in plan.subjects for e in calibration_set(plan, s, plan.seed + k)]
    linear = linear_names(model.network)
    methods = [n for n in names if n in METHODS]
    measures: list[Measure] = [find_measure(n) for n in names if n not in METHODS]
    measures = [Random(plan.seed + k) if m.name == RANDOM else m for m in measures]
    found = score_weights(model, examples, measures, only=linear) if measures else {}
    found |= score_pruning(model, examples, methods, only=linear) if methods else {}
    return {name: found[name] for name in names}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy of each measure and cut, with a t interval over the calibration sets.

    Rate 0 is the intact model, the same for all. Columns: which, scope, measure, rate, accuracy, low, high,
    log_prob, seeds, n (test questions).
    """
    intact = rows[rows.measure == INTACT].iloc[0]
    lines = []
    keys = ["which", "scope", "measure", "rate"]
    for key, part in rows[rows.measure != INTACT].groupby(keys, sort=False):
        values = part.accuracy.to_numpy()
        low, high = mean_interval(values)[-2:] if len(values) > 1 else (np.nan, np.nan)
        lines.append((*key, values.mean(), low, high, part.log_prob.mean(), len(values), intact.n))
    table = pd.DataFrame(lines, columns=[*keys, "accuracy", "low", "high", "log_prob", "seeds", "n"])
    start = table.drop_duplicates(keys[:3]).assign(
        rate=0.0, accuracy=intact.accuracy, low=np.nan, high=np.nan, log_prob=intact.log_prob
    )
    return pd.concat([start, table], ignore_index=True)


def wide(table: pd.DataFrame, which: str) -> pd.DataFrame:
    """The summary as a table to read: a row for each measure, a column for each cut from one end."""
    part = table[(table.which == which) & (table.rate > 0)]
    text = part.apply(
        lambda r: f"{r.accuracy:.2f}" if np.isnan(r.low) else f"{r.accuracy:.2f} [{r.low:.2f}, {r.high:.2f}]",
        axis=1,
    )
    cuts = [str(Cut(which, scope, rate)) for scope, rate in zip(part.scope, part.rate, strict=True)]  # type: ignore[arg-type]
    laid = part.assign(text=text, cut=cuts).pivot(index="measure", columns="cut", values="text")
    return laid.loc[list(dict.fromkeys(part.measure)), list(dict.fromkeys(cuts))]


def answers_of(rows: pd.DataFrame, measure: str, cut: Cut) -> np.ndarray:
    """Right (1) or wrong (0), a row for each calibration set, a column for each question."""
    part = _of_cut(rows, measure, cut).sort_values("seed")
    return np.array([[float(c) for c in line] for line in part.correct])


def accuracy(table: pd.DataFrame, measure: str, cut: Cut) -> tuple[float, float, float]:
    """Accuracy after a cut by a measure and its interval, from the summary."""
    row = _of_cut(table, measure, cut).iloc[0]
    return row.accuracy, row.low, row.high


def difference(
    rows: pd.DataFrame, a: str, cut_a: Cut, b: str, cut_b: Cut, seed: int
) -> tuple[float, float, float]:
    """Accuracy after the cut a by measure a minus that after b by b, paired question by question.

    The interval is a 95 % bootstrap over calibration sets and questions.
    """
    return crossed_difference(answers_of(rows, a, cut_a), answers_of(rows, b, cut_b), seed=seed)


def against(rows: pd.DataFrame, cut: Cut, baselines: Sequence[str], seed: int) -> pd.DataFrame:
    """`difference` of each measure from each baseline after one cut.

    Columns difference, low and high; index minus (the baseline) and measure.
    """
    names = [m for m in dict.fromkeys(rows.measure) if m != INTACT]
    pairs = [(b, a) for b in baselines for a in names if a != b]
    return pd.DataFrame(
        [difference(rows, a, cut, b, cut, seed) for b, a in pairs],
        index=pd.MultiIndex.from_tuples(pairs, names=["minus", "measure"]),
        columns=["difference", "low", "high"],
    )


def overlaps(scores: dict[str, Scores], cut: Cut) -> pd.DataFrame:
    """Share of the weights chosen by one measure that another chooses too, a square table."""
    chosen = {name: _mask(s, cut) for name, s in scores.items()}
    count = max(1, int(next(iter(chosen.values())).sum()))
    return pd.DataFrame(
        {a: {b: int((x & y).sum()) / count for b, y in chosen.items()} for a, x in chosen.items()}
    )


def removed(scores: dict[str, Scores], cut: Cut) -> pd.DataFrame:
    """What each measure's cut takes away, as shares of the whole model's: a row for each measure.

    weights: of their number; size: of the sum of W^2; output: of the sum of W^2 ||x||^2, Wanda's score
    squared; information: of the information length of removal. Raises KeyError if one of these is missing.
    """
    flat = {name: torch.cat([v.flatten() for v in s.values.values()]).double() for name, s in scores.items()}
    sums = {"weights": torch.ones_like(flat[WANDA]), "size": flat[MAGNITUDE].square()}
    sums |= {"output": flat[WANDA].square(), "information": flat[LENGTH]}
    masks = {name: _mask(s, cut) for name, s in scores.items()}
    lines = {
        name: {of: float(v[mask].sum() / v.sum()) for of, v in sums.items()} for name, mask in masks.items()
    }
    return pd.DataFrame(lines).T


def _of_cut(table: pd.DataFrame, measure: str, cut: Cut) -> pd.DataFrame:
    same = (table.measure == measure) & (table.which == cut.which) & (table.scope == cut.scope)
    part = table[same & np.isclose(table.rate, cut.rate)]
    if part.empty:
        raise ValueError(f"There is no measure {measure!r} with the cut: {cut}.")
    return part


def _mask(scores: Scores, cut: Cut) -> torch.Tensor:
    """Whether each weight is chosen, over all tensors in their order."""
    positions = select(scores, cut.rate, cut.which, scope=cut.scope)
    masks = []
    for name, value in scores.values.items():
        mask = torch.zeros(value.numel(), dtype=torch.bool)
        mask[positions[name].cpu()] = True
        masks.append(mask)
    return torch.cat(masks)


def check(plan: Plan) -> None:
    """Raise ValueError for a plan that cannot be run; a chapter calls it before it opens a model."""
    bad = [c.rate for c in plan.cuts if not 0 < c.rate <= 1]
    if bad:
        raise ValueError(f"The share to zero must lie in (0, 1], not {bad[0]}.")
    if plan.seeds < 1:
        raise ValueError(f"The number of calibration sets must be at least 1, not {plan.seeds}.")
    check_sets(plan, plan.subjects)


def _name(measure: str) -> str:
    """The name under which results keep a measure or a pruning method."""
    if measure in METHODS:
        return measure
    try:
        return find_measure(measure).name
    except ValueError as error:
        methods = ", ".join(METHODS)
        raise ValueError(f"{str(error).removesuffix('.')}; of pruning methods {methods}.") from None


def _key(model: LanguageModel, plan: Plan, tested: Sequence[Example]) -> str:
    questions = [(e.prompt, e.answer) for e in tested]
    text = json.dumps([model.sha256, str(model.network.dtype), asdict(plan), questions], sort_keys=True)
    return "pruning." + hashlib.sha256(text.encode()).hexdigest()[:16]


def _one_set(model: LanguageModel, plan: Plan, ask: Evaluator, k: int, names: Sequence[str]) -> pd.DataFrame:
    rows = []
    for name, scores in rank(model, plan, k, names).items():
        for cut in plan.cuts:
            positions = select(scores, cut.rate, cut.which, scope=cut.scope, seed=plan.seed + k)
            with zeroed(model.network, positions):
                rows.append(_row(k, name, cut, ask()))
    return pd.DataFrame(rows)


def _row(seed: int, measure: str, cut: Cut, outcome: Outcome) -> dict[str, object]:
    correct = outcome.correct
    return {
        "seed": seed,
        "measure": measure,
        **asdict(cut),
        "n": len(correct),
        "accuracy": float(correct.double().mean()),
        "log_prob": float(outcome.log_prob.double().mean()),
        "correct": "".join("01"[int(c)] for c in correct),
    }
