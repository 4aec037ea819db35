"""Chapter 08: quantize a model, keep the channels that a score names in 16 bits, and see what they save.

Method 4.5. A channel is a row (an output) or a column (an input) of a weight matrix; its score is the sum of
its weights' scores, or what the layer's inputs and outputs say of it.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fichapters.ch07.lab import draw_of
from fichapters.papers import published
from fichapters.stored import open_quantized, save_quantized, size_report
from fichapters.tables import RESAMPLES, with_verdict
from fihelpers.answers import usual_answers
from fihelpers.data import write_atomically
from fihelpers.evaluate.questions import Evaluator, Outcome
from fihelpers.evaluate.stats import crossed_difference, mean_interval
from fihelpers.filters import EXACT as EXACT_FILTER
from fihelpers.filters import Damped
from fihelpers.influence import SATURATED_RTOL, SATURATED_SHARE, SaturationWarning
from fihelpers.measures import FISHER, SQUARED_SCORE
from fihelpers.models.language import WEIGHTS, LanguageModel
from fihelpers.models.linear import as_rows, turned_names
from fihelpers.perturb.quantize import (
    BITS,
    Scheme,
    code_bytes,
    pack_model,
    packed_layers,
    quantization_error,
    quantize_model,
    quantized,
    select_channels,
)
from fihelpers.perturb.sparsify import Which, linear_names, select
from fihelpers.scores.channels import (
    HESSIAN,
    MEAN_INPUT,
    MEAN_OUTPUT,
    Axis,
    channel_scores,
    displacement_scores,
    score_activations,
    score_channels,
)
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example

INTACT = "intact"
RANDOM = "random"
ALL = "all"  # as the name of a set of matrices: every linear layer's
NOTHING = "nothing"  # kept: the quantized model without protection
EXACT, DAMPED = "FI exact", "FI damped 0.0001"
LOW_EXACT, LOW_DAMPED = f"{EXACT}, low half", f"{DAMPED}, low half"
HESSIAN_ERROR = "Hessian and error"
ERROR = "error alone"
CHANGE, LENGTH = "predicted change", "information length"
MAGNITUDE = "magnitude"

SHORT = {  # what channels are kept by, and what the names of their records are made of
    EXACT: "exact",
    LOW_EXACT: "low_exact",
    DAMPED: "damped",
    LOW_DAMPED: "low_damped",
    RANDOM: "random",
    MAGNITUDE: "magnitude",
    MEAN_INPUT: "awq",
    MEAN_OUTPUT: "output",
    "Fisher diagonal": "fisher",
    "Jacobian norm": "jacobian",
    "SNIP": "snip",
    HESSIAN: "hessian",
    HESSIAN_ERROR: "hessian_error",
    ERROR: "error",
    CHANGE: "change",
    LENGTH: "length",
}
EARLIER = (EXACT, LOW_EXACT, DAMPED, LOW_DAMPED, RANDOM)  # the comparison of the paper's earlier version
KEEP_BY: dict[Axis, tuple[str, ...]] = {  # mean input ranks columns only, and so does the Hessian alone
    "rows": tuple(k for k in SHORT if k not in (MEAN_INPUT, HESSIAN)),
    "columns": tuple(k for k in SHORT if k != MEAN_OUTPUT),
}
OF_WEIGHTS = (EXACT, DAMPED, "Jacobian norm", "SNIP", "Fisher diagonal", MAGNITUDE)
DATA_FREE = (MAGNITUDE, ERROR)  # look at no question: the same for all calibration sets

# Qwen2-7B, the model of the paper's earlier version, from the config.json that its makers publish
QWEN2_7B_LAYERS, QWEN2_7B_HIDDEN = 28, 3584
QWEN2_7B_KEY_VALUE, QWEN2_7B_INTERMEDIATE = 512, 18944


@dataclass(frozen=True)
class Case:
    """What is quantized: matrices whose layer has this name ("all" for every linear layer), to `bits`."""

    matrices: str
    bits: int

    def __str__(self) -> str:
        return f"{self.matrices}, {self.bits} bit"


@dataclass(frozen=True)
class Plan:
    """What is run: `seeds` calibration sets drawn from all subjects together, tested on all together.

    n_calibration and n_test: questions of each subject. matrices: two sets of matrices, which may be the
    same; full: for each of them the bits at which every score is compared, by rows at all shares and by
    columns at `column_share`. The other bits get the comparison of the earlier version, at the smallest and
    the largest share. mapping, group: see `Scheme` (1 bit is always symmetric); scales go by rows.
    swept_bits, swept_groups: what is tried without protection.
    """

    task: str
    subjects: tuple[str, ...]
    seeds: int
    n_calibration: int
    n_test: int | None
    matrices: tuple[str, ...]
    bits: tuple[int, ...]
    full: tuple[int, ...]
    shares: tuple[float, ...]
    column_share: float
    swept_bits: tuple[int, ...]
    swept_groups: tuple[int | None, ...]
    mapping: str = "symmetric"
    group: int | None = None
    seed: int = 0

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(dict.fromkeys(Case(m, b) for m in self.matrices for b in self.bits))

    @property
    def main(self) -> tuple[Case, ...]:
        """The cases in which every score is compared, one for each set of matrices."""
        return tuple(Case(m, b) for m, b in zip(self.matrices, self.full, strict=True))

    def scheme(self, case: Case) -> Scheme:
        mapping = "symmetric" if case.bits == 1 else self.mapping
        return Scheme(case.bits, mapping, self.group)  # type: ignore[arg-type]

    def tests(self, case: Case) -> Iterator[tuple[Axis, str, tuple[float, ...]]]:
        """What is tried in a case: which channels, kept by what, in which shares."""
        if case not in self.main:
            ends = tuple(dict.fromkeys((min(self.shares), max(self.shares))))
            yield from (("rows", keep, ends) for keep in EARLIER)
            return
        yield from (("rows", keep, self.shares) for keep in KEEP_BY["rows"])
        yield from (("columns", keep, (self.column_share,)) for keep in KEEP_BY["columns"])


def rounding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `Plan` from a chapter's settings `mapping`, `group`, `bits` and `groups`.

    Raises ValueError for a setting that is missing or unknown.
    """
    known = {"mapping": "mapping", "group": "group", "bits": "swept_bits", "groups": "swept_groups"}
    wrong = set(settings) ^ set(known)
    if wrong:
        raise ValueError(f"Rounding is set by {', '.join(known)}; {min(wrong)!r} is missing or unknown.")
    values = {known[k]: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return values


def check_plan(plan: Plan) -> None:
    """Raise ValueError for settings that cannot be run; a chapter calls it before it opens a model.

    And what `load_task` raises.
    """
    if len(plan.matrices) != 2 or len(plan.full) != 2:
        raise ValueError("Name two sets of matrices (they may be the same) and for each its bits in full.")
    for bits in (*plan.bits, *plan.full, *plan.swept_bits):
        Scheme(bits, "symmetric" if bits == 1 else plan.mapping, plan.group)  # type: ignore[arg-type]
    missing = [b for b in plan.full if b not in plan.bits]
    if missing:
        raise ValueError(f"Every score is to be compared at {missing[0]} bits; add them to {plan.bits}.")
    bad = [s for s in (*plan.shares, plan.column_share) if not 0 < s <= 0.5]
    if bad or not plan.shares:
        raise ValueError(
            f"The share of channels to keep must lie in (0, 0.5], since FI-low draws from half of them, "
            f"not {bad[0] if bad else 'nothing'}."
        )
    if plan.seeds < 1:
        raise ValueError(f"The number of calibration sets must be at least 1, not {plan.seeds}.")
    for subject in plan.subjects:
        calibration_set(plan, subject, plan.seed)
        tested_set(plan, subject)


def check(model: LanguageModel, plan: Plan) -> None:
    """Raise what `check_plan` raises, and ValueError for matrices or groups that the model does not have."""
    check_plan(plan)
    for matrices in plan.matrices:
        for group in (plan.group, *plan.swept_groups):
            _check_group(model, names_of(model, matrices), group)


def names_of(model: LanguageModel, matrices: str) -> list[str]:
    """The weights of the linear layers of this name, such as "o_proj"; all of them for "all"."""
    linear = linear_names(model.network)
    names = [n for n in linear if matrices == ALL or n.split(".")[-2] == matrices]
    if not names:
        known = ", ".join(dict.fromkeys(n.split(".")[-2] for n in linear))
        raise ValueError(f"The model has no matrices {matrices!r}; known: {ALL}, {known}.")
    return names


def evaluator(model: LanguageModel, plan: Plan) -> Evaluator:
    """The test questions of all subjects, asked of the intact model once."""
    tested = [e for s in plan.subjects for e in tested_set(plan, s)]
    ask = Evaluator(model, tested, usual_answers(model.tokenizer, lettered=bool(tested[0].options)))
    ask()
    return ask


def calibration_set(plan: Plan, subject: str, seed: int) -> Sequence[Example]:
    """Questions of the validation split, or contexts of the first half of a text file."""
    return draw_of(plan.task, subject, "val", plan.n_calibration, seed)


def tested_set(plan: Plan, subject: str) -> Sequence[Example]:
    """Questions of the test split, or contexts of the second half of a text file."""
    return draw_of(plan.task, subject, "test", plan.n_test, plan.seed)


def run_protection(model: LanguageModel, plan: Plan, ask: Evaluator, cache: Path) -> pd.DataFrame:
    """Quantize in every case, keep channels by every score in every share, for each calibration set.

    Returns a row for each (seed, matrices, bits, axis, keep, share), with n, accuracy, log_prob (mean log P
    of the right answer, or of the intact model's choice), `correct`, a 0 or 1 for each test question, and
    `log_probs`, of each question; the intact model and the cases without protection come first. Finished
    sets lie in `cache` and are not run again after an interruption. Raises what `check` raises.

    ask: from `evaluator`.
    """
    check(model, plan)
    parts = [pd.DataFrame(_unprotected(model, plan, ask))]
    key = _key(model, plan, ask.examples)
    for k in tqdm(range(plan.seeds), desc="protecting", unit="calibration set"):
        path = cache / f"{key}.{k}.csv"
        if not path.is_file():
            found = pd.DataFrame(_one_set(model, plan, ask, k))
            write_atomically(path, found.to_csv(index=False).encode())
        parts.append(pd.read_csv(io.BytesIO(path.read_bytes()), dtype={"correct": str, "log_probs": str}))
    same = parts[1][parts[1].keep.isin(DATA_FREE)]
    return pd.concat([*parts, *(same.assign(seed=k) for k in range(1, plan.seeds))], ignore_index=True)


class Ranking:
    """Scores of channels on one calibration set."""

    def __init__(self, model: LanguageModel, plan: Plan, k: int) -> None:
        self.model, self.plan = model, plan
        self.examples = [e for s in plan.subjects for e in calibration_set(plan, s, plan.seed + k)]
        self.names = {m: names_of(model, m) for m in plan.matrices}
        self._deltas: dict[Case, dict[str, Tensor]] = {}

    @cached_property
    def weights(self) -> dict[str, Scores]:
        """The scores of single weights."""
        return score_weights(self.model, self.examples, OF_WEIGHTS, only=self._wanted)

    @cached_property
    def activations(self) -> dict[str, Scores]:
        """What the layers read and write."""
        return score_activations(self.model, self.examples, only=self._wanted)

    def of(self, keep: str, case: Case, axis: Axis) -> tuple[Scores, Which]:
        """Channel scores of a case's matrices, and which end of them is kept."""
        names = self.names[case.matrices]
        if keep == RANDOM:
            return self.of(MAGNITUDE, case, axis)[0], "random"
        if keep in (LOW_EXACT, LOW_DAMPED):
            return self.of(keep.partition(",")[0], case, axis)[0], "low half"
        if keep in (MEAN_INPUT, MEAN_OUTPUT):
            scores = self.activations[keep]
            return Scores({n: scores[n] for n in names}, scores.metadata), "top"
        if keep == HESSIAN:
            return channel_scores(self.activations[HESSIAN], axis=axis, names=names), "top"
        if keep in (HESSIAN_ERROR, ERROR, CHANGE, LENGTH):
            return displacement_scores(self._means(keep), self.delta(case), axis), "top"
        return channel_scores(self.weights[keep], axis=axis, names=names), "top"

    def delta(self, case: Case) -> dict[str, Tensor]:
        """The quantization error of each matrix when nothing is kept."""
        if case not in self._deltas:
            scheme, turned = self.plan.scheme(case), turned_names(self.model.network)
            weights = {n: self.model.network.get_parameter(n) for n in self.names[case.matrices]}
            errors = {n: quantization_error(w, scheme, turned=n in turned) for n, w in weights.items()}
            self._deltas = {case: errors}
        return self._deltas[case]

    @property
    def _wanted(self) -> list[str]:
        return list(dict.fromkeys(n for names in self.names.values() for n in names))

    def _means(self, keep: str) -> Scores:
        """The means that a displacement is multiplied by; all 1 for the error alone."""
        if keep == ERROR:
            flat = self.weights[MAGNITUDE]
            ones = {n: torch.ones_like(v) for n, v in flat.values.items()}
            return Scores(ones, {**flat.metadata, "measure": "1"})
        if keep == HESSIAN_ERROR:
            return self.activations[HESSIAN]
        return self.weights[SQUARED_SCORE.name if keep == CHANGE else FISHER.name]


def where_loss_begins(model: LanguageModel, plan: Plan, ask: Evaluator) -> pd.DataFrame:
    """Quantize without protection, in the finer and coarser ways of the plan.

    Returns a row for each (matrices, bits, mapping, group; 0 is a whole row), with n, accuracy, log_prob,
    bits_per_weight, `correct` as in `run_protection`, and loss with low and high: intact minus quantized
    accuracy, a 95 % bootstrap over the questions.
    """
    intact = ask().correct.double().numpy()
    lines = []
    for matrices in dict.fromkeys(plan.matrices):
        names = names_of(model, matrices)
        for scheme in schemes(plan):
            packed = pack_model(model, names, scheme)
            with quantized(model.network, packed):
                found = _row(0, Case(matrices, scheme.bits), "rows", NOTHING, 0.0, ask())
            correct = np.array([float(c) for c in str(found["correct"])])
            loss, low, high = crossed_difference(
                intact[None], correct[None], seed=plan.seed, resamples=RESAMPLES
            )
            about = {"matrices": matrices, "bits": scheme.bits, "mapping": scheme.mapping}
            about |= {"group": scheme.group or 0, "bits_per_weight": size_report(packed).bits_per_weight}
            about |= {k: found[k] for k in ("n", "accuracy", "log_prob")}
            lines.append(about | {"loss": loss, "low": low, "high": high, "correct": found["correct"]})
    return pd.DataFrame(lines)


def schemes(plan: Plan) -> list[Scheme]:
    """The ways to round that are tried without protection, one step more than each full case among them."""
    groups = dict.fromkeys((*plan.swept_groups, plan.group))
    found = [Scheme(b, "symmetric", g) for b in plan.swept_bits for g in groups]
    found += [Scheme(b, "asymmetric", g) for b in plan.swept_bits for g in groups if b > 1]
    return list(dict.fromkeys([*found, *(_next(plan, case) for case in plan.main)]))


def loss_begins(sweep: pd.DataFrame, matrices: str) -> int:
    """The most bits whose loss of accuracy is told from nothing, with a symmetric scale a row; 0 for none."""
    same = (sweep.matrices == matrices) & (sweep.mapping == "symmetric") & (sweep.group == 0)
    return int(sweep.bits[same & (sweep.low > 0)].max()) if (same & (sweep.low > 0)).any() else 0


def sweep_grid(sweep: pd.DataFrame) -> pd.DataFrame:
    """What is tried without protection as text to read: accuracy, and in brackets the bits a weight."""
    text = [f"{a:.2f} ({b:.1f})" for a, b in zip(sweep.accuracy, sweep.bits_per_weight, strict=True)]
    shared = sweep.group.map({g: "a row" if g == 0 else f"{g} weights" for g in sweep.group})
    laid = sweep.assign(text=text, shared=shared).pivot(
        index=["matrices", "mapping", "shared"], columns="bits", values="text"
    )
    return laid.fillna("").sort_index(ascending=[False, False, False])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy and log P of what is kept by each score, with t intervals over the calibration sets.

    Columns: matrices, bits, axis, keep, share, accuracy, low, high, log_prob, log_low, log_high, seeds, n.
    Share 0 keeps nothing, the same for all scores.
    """
    keys = ["matrices", "bits", "axis", "keep", "share"]
    lines = []
    for key, part in rows[~rows.keep.isin((INTACT, NOTHING))].groupby(keys, sort=False):
        ends = [v for c in ("accuracy", "log_prob") for v in _interval(part[c].to_numpy())]
        lines.append((*key, *ends, len(part), part.n.iloc[0]))
    columns = [*keys, "accuracy", "low", "high", "log_prob", "log_low", "log_high", "seeds", "n"]
    table = pd.DataFrame(lines, columns=columns)
    start = rows[rows.keep == NOTHING].set_index(["matrices", "bits"])
    plain = table.drop_duplicates(keys[:4]).assign(share=0.0, low=np.nan, high=np.nan)
    plain = plain.assign(log_low=np.nan, log_high=np.nan)
    for name in ("accuracy", "log_prob"):
        plain[name] = [start.loc[(m, b), name] for m, b in zip(plain.matrices, plain.bits, strict=True)]
    return pd.concat([plain, table], ignore_index=True)


@dataclass(eq=False)
class Answers:
    """What came out for each question, by accuracy (0 or 1) or by log P.

    intact and plain (N,): the model as it was, and quantized with nothing kept.
    """

    rows: pd.DataFrame
    case: Case
    score: str
    seed: int

    @cached_property
    def intact(self) -> np.ndarray:
        return self._values(self.rows[self.rows.keep == INTACT])[0]

    @cached_property
    def plain(self) -> np.ndarray:
        return self._values(self._of(NOTHING, "rows"))[0]

    def kept(self, keep: str, share: float | None = None, axis: Axis = "rows") -> np.ndarray:
        """A row for each calibration set, a column for each question; the mean over all shares for None.

        Raises ValueError where the run has no such thing.
        """
        part = self._of(keep, axis)
        if share is not None:
            part = part[np.isclose(part.share, share)]
        if part.empty:
            raise ValueError(f"Nothing was run with {self.case}, {axis} kept by {keep!r}, share {share}.")
        return np.array([self._values(found).mean(0) for _, found in part.groupby("seed")])

    @cached_property
    def loss(self) -> tuple[float, float, float]:
        """What quantization costs, intact minus quantized, and its interval."""
        return crossed_difference(self.intact[None], self.plain[None], seed=self.seed, resamples=RESAMPLES)

    @property
    def lost(self) -> bool:
        """Whether quantization costs anything that can be told from nothing."""
        return self.loss[1] > 0

    def minus(
        self, a: str, b: str, share: float | None = None, axis: Axis = "rows"
    ) -> tuple[float, float, float]:
        """Kept by a minus kept by b, paired, with a 95 % bootstrap over calibration sets and questions."""
        return crossed_difference(
            self.kept(a, share, axis), self.kept(b, share, axis), seed=self.seed, resamples=RESAMPLES
        )

    def recovered(
        self, keep: str, share: float | None = None, axis: Axis = "rows"
    ) -> tuple[float, float, float]:
        """The share of the loss that is won back, with a 95 % bootstrap over sets and questions.

        The loss is drawn anew with the questions. NaN where nothing is lost.
        """
        if not self.lost:
            return np.nan, np.nan, np.nan
        return recovered_share(self.intact, self.plain, self.kept(keep, share, axis), self.seed)

    def _of(self, keep: str, axis: Axis) -> pd.DataFrame:
        rows = self.rows
        case = (rows.matrices == self.case.matrices) & (rows.bits == self.case.bits)
        return rows[case & (rows.keep == keep) & (rows.axis == axis)].sort_values("seed")

    def _values(self, part: pd.DataFrame) -> np.ndarray:
        if self.score == "accuracy":
            return np.array([[float(c) for c in line] for line in part.correct])
        return np.array([[float(v) for v in line.split()] for line in part.log_probs])


def recovered_share(
    intact: np.ndarray, plain: np.ndarray, kept: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """(kept - plain) / (intact - plain), of the means, and its bootstrap interval.

    intact, plain (N,) by question, kept (S, N) by calibration set and question; both are drawn anew.
    """
    sets, n = kept.shape
    rng = np.random.default_rng(seed)
    of_sets = rng.multinomial(sets, np.full(sets, 1 / sets), size=resamples) / sets
    of_questions = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    gain = ((of_sets @ (kept - plain)) * of_questions).sum(1)
    loss = of_questions @ (intact - plain)
    low, high = np.nanquantile(gain / np.where(loss == 0, np.nan, loss), [0.025, 0.975])
    return float((kept - plain).mean() / (intact - plain).mean()), float(low), float(high)


def recovery(rows: pd.DataFrame, case: Case, axis: Axis, score: str, seed: int) -> pd.DataFrame:
    """The share of the loss that each score wins back, the mean over all shares of channels.

    Columns: keep, recovered, low, high, sets, n.
    """
    found = Answers(rows, case, score, seed)
    keeps = [k for k in KEEP_BY[axis] if k in set(rows.keep)]
    lines = [(k, *found.recovered(k, None, axis), *found.kept(k, None, axis).shape) for k in keeps]
    return pd.DataFrame(lines, columns=["keep", "recovered", "low", "high", "sets", "n"])


def sizes(model: LanguageModel, plan: Plan) -> pd.DataFrame:
    """Bytes of the quantized matrices in every case when a share of their rows is kept, whichever these are.

    Columns: matrices, bits, share, kilobytes, extra (kilobytes more than without protection),
    bits_per_weight, sixteen_bit (kilobytes in 16 bits).
    """
    turned, lines = turned_names(model.network), []
    for case in plan.cases:
        names = names_of(model, case.matrices)
        sizes = {n: model.network.get_parameter(n).detach().abs() for n in names}
        rows = {n: as_rows(size, n in turned).sum(1) for n, size in sizes.items()}
        for share in (0.0, *plan.shares):
            kept = select_channels(Scores(rows, {"axis": "rows"}), share)
            report = size_report(pack_model(model, names, plan.scheme(case), kept))
            bytes_ = (
                report.packed / 1e3,
                report.extra / 1e3,
                report.bits_per_weight,
                report.sixteen_bit / 1e3,
            )
            lines.append((case.matrices, case.bits, share, *bytes_))
    columns = ["matrices", "bits", "share", "kilobytes", "extra", "bits_per_weight", "sixteen_bit"]
    return pd.DataFrame(lines, columns=columns)


def per_megabyte(rows: pd.DataFrame, sized: pd.DataFrame, case: Case, keep: str, seed: int) -> pd.DataFrame:
    """What a share of rows wins back and what it costs.

    Columns: share, extra (kilobytes), recovered with low and high (share of the lost accuracy),
    per_megabyte (recovered for each megabyte more).
    """
    found = Answers(rows, case, "accuracy", seed)
    part = sized[(sized.matrices == case.matrices) & (sized.bits == case.bits) & (sized.share > 0)]
    lines = [(r.share, r.extra, *found.recovered(keep, r.share)) for r in part.itertuples()]
    table = pd.DataFrame(lines, columns=["share", "extra", "recovered", "low", "high"])
    return table.assign(per_megabyte=1000 * table.recovered / table.extra)


def one_step_more(
    rows: pd.DataFrame, sweep: pd.DataFrame, sized: pd.DataFrame, plan: Plan, case: Case, keep: str
) -> pd.DataFrame:
    """More bits for every weight instead of protected rows: is memory better spent so?

    Columns: share, protected (bits a weight with that share of rows kept), unprotected (with the next larger
    number of bits and nothing kept), difference with low and high (the accuracy of the second minus that of
    the first; 95 % bootstrap over sets and questions).
    """
    scheme = _next(plan, case)
    same = (sweep.matrices == case.matrices) & (sweep.bits == scheme.bits) & (sweep.mapping == scheme.mapping)
    other = sweep[same & (sweep.group == (scheme.group or 0))].iloc[0]
    found = Answers(rows, case, "accuracy", plan.seed)
    part = sized[(sized.matrices == case.matrices) & (sized.bits == case.bits)].set_index("share")
    lines = []
    for share in plan.shares:
        kept = found.kept(keep, share)
        finer = np.tile([float(c) for c in other.correct], (len(kept), 1))
        ends = crossed_difference(finer, kept, seed=plan.seed, resamples=RESAMPLES)
        lines.append((share, part.bits_per_weight[share], other.bits_per_weight, *ends))
    columns = ["share", "protected", "unprotected", "difference", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


def extra_bytes(shape: tuple[int, int], bits: int, share: float) -> int:
    """What it costs to keep a share of the rows of a matrix (out, in) in 16 bits, with a scale a row.

    A kept row stores its weights in 16 bits and its position, instead of its codes and its scale.
    """
    rows = round(share * shape[0])
    spared = code_bytes(bits, shape[0] * shape[1]) - code_bytes(bits, (shape[0] - rows) * shape[1])
    return rows * (2 * shape[1] + 4 - 2) - spared


def claimed(key: str) -> float:
    """A figure of the earlier version's claim: "kept_" and this key in the data file; percent as shares."""
    figure = published(f"kept_{key}")
    return figure.value / 100 if figure.unit == "%" else figure.value


def published_sizes() -> pd.DataFrame:
    """The memory that protection costs on Qwen2-7B by arithmetic, in megabytes (10^6 bytes).

    Rows o_proj and all linear matrices; columns 4 and 1 bit, for the share that the earlier version names;
    `share` is the share of rows for which 4 bit would cost the memory that it names.
    """
    wide, inner, kv = QWEN2_7B_HIDDEN, QWEN2_7B_INTERMEDIATE, QWEN2_7B_KEY_VALUE
    shapes = {"o_proj": [(wide, wide)]}
    shapes[ALL] = [(wide, wide)] * 2 + [(kv, wide)] * 2 + [(inner, wide)] * 2 + [(wide, inner)]
    kept, lines = claimed("share"), []
    for name, matrices in shapes.items():
        extra = {b: QWEN2_7B_LAYERS * sum(extra_bytes(s, b, kept) for s in matrices) for b in (1, 4)}
        share = kept * claimed("memory") * 1e9 / extra[4]
        lines.append((name, extra[4] / 1e6, extra[1] / 1e6, share))
    return pd.DataFrame(lines, columns=["matrices", "megabytes_4", "megabytes_1", "share"])


def save_and_reopen(ranking: Ranking) -> dict[str, float]:
    """Quantize a copy of the model as in the second full case, save it and open it again.

    The smallest share of rows is kept, by information length. Returns `difference`, the largest between the
    saved and the opened model's logits on a batch of questions, and bytes: `packed`, of the quantized
    matrices, and `sixteen_bit`, of the same ones in 16 bits; `memory`, of all tensors of the model, and
    `memory_before`, with its matrices in 16 bits; `file`, of the weights on disk; `folder`, of all files.
    """
    model, plan = ranking.model, ranking.plan
    case = plan.main[1]
    scores, which = ranking.of(LENGTH, case, "rows")
    kept = select_channels(scores, min(plan.shares), which, seed=plan.seed)
    stored = replace(model, network=copy.deepcopy(model.network))
    quantize_model(stored.network, pack_model(model, ranking.names[case.matrices], plan.scheme(case), kept))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "protected"
        save_quantized(stored, folder)
        opened = open_quantized(folder, str(model.network.device))
        file = (folder / WEIGHTS).stat().st_size
        whole = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    batch = model.batches([e.prompt for e in ranking.examples[:8]])[0]
    with torch.inference_mode():
        before, after = (m.last_logits(batch) for m in (stored, opened))
    report, held = size_report(packed_layers(opened.network)), opened.network.get_memory_footprint()
    return {
        "difference": float((after - before).abs().max()),
        "packed": report.packed,
        "sixteen_bit": report.sixteen_bit,
        "memory": held,
        "memory_before": held - report.packed + report.sixteen_bit,
        "file": file,
        "folder": whole,
    }


def joint_influence(ranking: Ranking) -> tuple[pd.DataFrame, list[str]]:
    """FI of each row of the first set of matrices: all its weights at once, and its weights one by one.

    Returns a row for each channel and way, columns matrix (its number), way ("joint, exact", "joint, damped
    0.0001", "sum, exact") and value, relative to the ceiling (joint) or the matrix's largest (sum); and the
    warnings that came up, word by word.
    """
    names = ranking.names[ranking.plan.matrices[0]]
    found, said = {}, []
    for spectral in (EXACT_FILTER, Damped(1e-4)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SaturationWarning)
            joint = score_channels(ranking.model, ranking.examples, spectral, only=names)
        said += [str(w.message) for w in caught if issubclass(w.category, SaturationWarning)]
        top = float(joint.metadata["ceiling"])
        found[f"joint, {spectral}"] = {n: v / top for n, v in joint.values.items()}
    summed = channel_scores(ranking.weights[EXACT], names=names)
    found["sum, exact"] = {n: v / v.max() for n, v in summed.values.items()}
    lines = [
        (number, way, float(x))
        for way, values in found.items()
        for number, name in enumerate(names)
        for x in values[name]
    ]
    return pd.DataFrame(lines, columns=["matrix", "way", "value"]), said


def saturated_matrices(joint: pd.DataFrame, way: str) -> tuple[int, int]:
    """In how many matrices nearly all channels are at the ceiling, and how many matrices there are."""
    part = joint[joint.way == way]
    near = (part.value - 1).abs() <= SATURATED_RTOL
    shares = near.groupby(part.matrix).mean()
    return int((shares >= SATURATED_SHARE).sum()), len(shares)


def sum_against_mean(ranking: Ranking, case: Case, share: float) -> dict[str, float]:
    """The share of chosen rows that the sum and the mean of damped FI have in common, by scope.

    "layer": each matrix gives the same share; "global": the rows of all matrices compete.
    """
    names = ranking.names[case.matrices]
    chosen = {}
    for how in ("sum", "mean"):
        values = channel_scores(ranking.weights[DAMPED], how, names=names)
        for scope in ("layer", "global"):
            picked = select(values, share, scope=scope)
            chosen[how, scope] = {(n, int(i)) for n, index in picked.items() for i in index}
    return {
        scope: len(chosen["sum", scope] & chosen["mean", scope]) / max(1, len(chosen["sum", scope]))
        for scope in ("layer", "global")
    }


def high_against_low(rows: pd.DataFrame, plan: Plan, score: str) -> pd.DataFrame:
    """Claim 19 in every case, for both filters: rows of high FI kept minus rows of low FI kept.

    Columns: matrices, bits, filter, n (questions), loss (intact minus unprotected), lost (whether it can be
    told from zero), difference, low, high (over all shares run there).
    """
    lines = []
    n = int(rows.n.max())
    for case in plan.cases:
        found = Answers(rows, case, score, plan.seed)
        for high, low in ((EXACT, LOW_EXACT), (DAMPED, LOW_DAMPED)):
            ends = found.minus(high, low)
            about = (case.matrices, case.bits, high.removeprefix("FI "), n, found.loss[0], found.lost)
            lines.append((*about, *ends))
    columns = ["matrices", "bits", "filter", "n", "loss", "lost", "difference", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


NOTHING_LOST = "nothing to recover"  # where quantization loses nothing that can be told from zero
DUELS = (  # what chapter 08 asks: which channels, the first minus the second
    ("rows", EXACT, RANDOM),
    ("rows", DAMPED, RANDOM),
    ("rows", DAMPED, EXACT),
    ("rows", DAMPED, "Jacobian norm"),
    ("rows", MEAN_OUTPUT, DAMPED),
    ("rows", LENGTH, DAMPED),
    ("rows", CHANGE, DAMPED),
    ("rows", LENGTH, "Fisher diagonal"),
    ("rows", LENGTH, ERROR),
    ("rows", LENGTH, HESSIAN_ERROR),
    ("rows", CHANGE, LENGTH),
    ("columns", MEAN_INPUT, EXACT),
    ("columns", MEAN_INPUT, DAMPED),
    ("columns", LENGTH, MEAN_INPUT),
)


def duels(rows: pd.DataFrame, plan: Plan, score: str) -> pd.DataFrame:
    """Paired differences in both main cases, over all shares: is the first of a pair better to keep by?

    Columns: matrices, bits, axis, first, second, lost, difference, low, high.
    """
    lines = []
    for case in plan.main:
        found = Answers(rows, case, score, plan.seed)
        for axis, a, b in DUELS:
            ends = found.minus(a, b, None, axis)  # type: ignore[arg-type]
            lines.append((case.matrices, case.bits, axis, a, b, found.lost, *ends))
    columns = ["matrices", "bits", "axis", "first", "second", "lost", "difference", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


def grid(tables: Mapping[str, pd.DataFrame], index: Sequence[str], column: str | None = None) -> pd.DataFrame:
    """Differences with their intervals and verdicts as text to read.

    tables: by title, each with the columns difference, low, high and lost; `index` names the columns that
    tell rows apart, `column` one whose values become columns, beside the titles.
    """
    parts = {}
    for title, table in tables.items():
        ends = [f"{r.difference:+.3f} [{r.low:+.3f}, {r.high:+.3f}]" for r in table.itertuples()]
        said = with_verdict(table, above=0).verdict.where(table.lost, NOTHING_LOST)
        text = [f"{numbers} {word}" for numbers, word in zip(ends, said, strict=True)]
        told = table.assign(text=text).set_index([*index, *([column] if column else [])]).text
        parts[title] = told.unstack(column, sort=False) if column else told
    return pd.concat(parts, axis=1)


def spreads(ranking: Ranking, case: Case) -> pd.DataFrame:
    """How unequal the channels of a matrix are in what they are kept by: the largest over the median.

    The median over the matrices, without those whose median channel is 0. Rows: error, metric and activation;
    columns: rows and columns.
    """
    found: dict[str, dict[str, float]] = {}
    for axis in KEEP_BY:
        activation = MEAN_OUTPUT if axis == "rows" else MEAN_INPUT
        for name, keep in {"error": ERROR, "metric": FISHER.name, "activation": activation}.items():
            values = ranking.of(keep, case, axis)[0].values.values()
            ratios = [float(v.max() / v.median()) for v in values if v.median() > 0]
            found.setdefault(name, {})[axis] = float(np.median(ratios))
    return pd.DataFrame(found).T


def recovered_as_claimed(rows: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The share of the loss of accuracy that the share of rows nearest to the claimed one wins back.

    Columns: matrices, bits, keep, share, n (questions), lost (whether the loss can be told from zero),
    recovered, low, high; these are NaN where nothing is lost.
    """
    share = min(plan.shares, key=lambda s: abs(s - claimed("share")))
    n = int(rows.n.max())
    lines = []
    for case in plan.cases:
        found = Answers(rows, case, "accuracy", plan.seed)
        for keep in (EXACT, DAMPED):
            lines.append(
                (case.matrices, case.bits, keep, share, n, found.lost, *found.recovered(keep, share))
            )
    columns = ["matrices", "bits", "keep", "share", "n", "lost", "recovered", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


def by_subject(rows: pd.DataFrame, plan: Plan, examples: Sequence[Example]) -> pd.DataFrame:
    """The rows of the earlier version's comparison, subject by subject.

    Columns: matrices, bits, subject, keep, share, accuracy (mean over the calibration sets) and n.
    """
    places: dict[str, list[int]] = {}
    for i, e in enumerate(examples):
        places.setdefault(e.subject, []).append(i)
    lines = []
    part = rows[(rows.axis == "rows") & rows.keep.isin((*EARLIER, NOTHING))]
    keys = ["matrices", "bits", "keep", "share"]
    for (matrices, bits, keep, share), found in part.groupby(keys, sort=False):
        correct = np.array([[float(c) for c in line] for line in found.correct])
        for subject, index in places.items():
            lines.append((matrices, bits, subject, keep, share, correct[:, index].mean(), len(index)))
    columns = ["matrices", "bits", "subject", "keep", "share", "accuracy", "n"]
    return pd.DataFrame(lines, columns=columns)


def of_subject(table: pd.DataFrame, case: Case, subject: str) -> dict[str, pd.Series]:
    """From `by_subject` one subject at the largest share, by the short name of what is kept, and nothing."""
    part = table[(table.matrices == case.matrices) & (table.bits == case.bits) & (table.subject == subject)]
    most = part[(part.share == part.share.max()) | (part.keep == NOTHING)]
    return {SHORT.get(row.keep, row.keep): row for _, row in most.iterrows()}


def wide(table: pd.DataFrame, case: Case, axis: Axis = "rows") -> pd.DataFrame:
    """Accuracy as text to read: a row for each score, a column for each share, with the t interval."""
    same = (table.matrices == case.matrices) & (table.bits == case.bits) & (table.axis == axis)
    part = table[same & (table.share > 0)]
    text = part.apply(
        lambda r: f"{r.accuracy:.2f}" if np.isnan(r.low) else f"{r.accuracy:.2f} [{r.low:.2f}, {r.high:.2f}]",
        axis=1,
    )
    laid = part.assign(text=text).pivot(index="keep", columns="share", values="text")
    return laid.loc[list(dict.fromkeys(part.keep))]


def _next(plan: Plan, case: Case) -> Scheme:
    """The scheme of a case with the next larger number of bits."""
    return plan.scheme(Case(case.matrices, min((b for b in BITS if b > case.bits), default=case.bits)))


def _check_group(model: LanguageModel, names: Sequence[str], group: int | None) -> None:
    turned = turned_names(model.network)
    for name in names:
        width = model.network.get_parameter(name).shape[-2 if name in turned else -1]
        if group is not None and (group < 1 or width % group):
            raise ValueError(f"The rows of {name} have {width} weights, which no group of {group} divides.")


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    return mean_interval(values) if len(values) > 1 else (float(values.mean()), np.nan, np.nan)


def _key(model: LanguageModel, plan: Plan, tested: Sequence[Example]) -> str:
    questions = [(e.prompt, e.answer) for e in tested]
    text = json.dumps([model.sha256, str(model.network.dtype), asdict(plan), questions], sort_keys=True)
    return "quantization." + hashlib.sha256(text.encode()).hexdigest()[:16]


def _unprotected(model: LanguageModel, plan: Plan, ask: Evaluator) -> Iterator[dict[str, object]]:
    assert ask.reference is not None
    yield _row(0, Case("", 16), "rows", INTACT, 0.0, ask.reference)
    for case in plan.cases:
        packed = pack_model(model, names_of(model, case.matrices), plan.scheme(case))
        with quantized(model.network, packed):
            yield _row(0, case, "rows", NOTHING, 0.0, ask())


def _one_set(model: LanguageModel, plan: Plan, ask: Evaluator, k: int) -> Iterator[dict[str, object]]:
    ranking = Ranking(model, plan, k)
    for case in plan.cases:
        for axis, keep, shares in plan.tests(case):
            if k and keep in DATA_FREE:
                continue
            scores, which = ranking.of(keep, case, axis)
            for share in shares:
                kept = select_channels(scores, share, which, seed=plan.seed + k)
                packed = pack_model(model, ranking.names[case.matrices], plan.scheme(case), kept)
                with quantized(model.network, packed):
                    yield _row(k, case, axis, keep, share, ask())


def _row(seed: int, case: Case, axis: Axis, keep: str, share: float, outcome: Outcome) -> dict[str, object]:
    correct, log_probs = outcome.correct, outcome.log_prob.double()
    return {
        "seed": seed,
        **asdict(case),
        "axis": axis,
        "keep": keep,
        "share": share,
        "n": len(correct),
        "accuracy": float(correct.double().mean()),
        "log_prob": float(log_probs.mean()),
        "correct": "".join("01"[int(c)] for c in correct),
        "log_probs": " ".join(f"{v:.4f}" for v in log_probs),
    }
