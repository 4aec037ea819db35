"""Chapter 08: quantize a model, keep the channels that a score names in 16 bits, and see what they save.

Method 4.5. A channel is a row (an output) or a column (an input) of a weight matrix; its score is the sum of
its weights' scores, or what the layer's inputs and outputs say of it.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fichapters.ch07.lab import draw_of
from fichapters.ch08.joint import score_channels
from fichapters.packed import packed_layers, quantize_model
from fichapters.papers import published
from fichapters.stored import open_quantized, save_quantized, size_report
from fichapters.tables import RESAMPLES, interval_text, with_verdict
from fihelpers.evaluate.questions import Evaluator, Outcome
from fihelpers.evaluate.stats import crossed_difference, resampled
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
    quantization_error,
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
)
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example
from fihelpers.trials import Kept, Labels, Trial, Trials, collect

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
OF_WEIGHTS = (EXACT, DAMPED, "Jacobian norm", "SNIP", SQUARED_SCORE.name, FISHER.name, MAGNITUDE)
DATA_FREE = (MAGNITUDE, ERROR)  # look at no question: the same for all calibration sets
KEYS = ("matrices", "bits", "axis", "keep", "share")  # the labels of a trial
VALUES = {"accuracy": "accuracy", "log P": "log_prob"}  # what is compared, as titles name it

# Qwen2-7B, the model of the paper's earlier version, from the config.json that its makers publish
QWEN2_7B_LAYERS, QWEN2_7B_HIDDEN = 28, 3584
QWEN2_7B_KEY_VALUE, QWEN2_7B_INTERMEDIATE = 512, 18944


Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    """What is quantized: matrices whose layer has this name ("all" for every linear layer), to `bits`."""

    matrices: str
    bits: int

    def __str__(self) -> str:
        return f"{self.matrices}, {self.bits} bit"


def cases(p: SimpleNamespace) -> list[Case]:
    """All that is quantized: every set of matrices to every number of bits."""
    return list(dict.fromkeys(Case(m, b) for m in p.MATRICES for b in p.BITS["tried"]))


def main_cases(p: SimpleNamespace) -> list[Case]:
    """The cases in which every score is compared, one for each set of matrices."""
    return [Case(m, b) for m, b in zip(p.MATRICES, p.BITS["full"], strict=True)]


def scheme_of(p: SimpleNamespace, case: Case) -> Scheme:
    """How the weights of a case are rounded; one bit is always symmetric."""
    given = p.ROUNDING
    return Scheme(case.bits, "symmetric" if case.bits == 1 else given["mapping"], given["group"])


def tried_in(p: SimpleNamespace, case: Case) -> Iterator[tuple[Axis, str, Sequence[float]]]:
    """What is tried in a case: which channels, kept by what, in which shares.

    Every score in the main cases, by rows at all shares and by columns at one; in the others the comparison
    of the paper's earlier version, at the smallest and the largest share.
    """
    shares = p.KEPT["rows"]
    if case not in main_cases(p):
        ends = list(dict.fromkeys((min(shares), max(shares))))
        yield from (("rows", keep, ends) for keep in EARLIER)
        return
    yield from (("rows", keep, shares) for keep in KEEP_BY["rows"])
    yield from (("columns", keep, [p.KEPT["columns"]]) for keep in KEEP_BY["columns"])


def check(p: SimpleNamespace) -> None:
    """Raise ValueError for settings that cannot be run; a chapter calls it before it opens a model.

    And what `load_task` raises.
    """
    tried, full = p.BITS["tried"], p.BITS["full"]
    if len(p.MATRICES) != 2 or len(full) != 2:
        raise ValueError("Name two sets of matrices (they may be the same) and for each its bits in full.")
    for bits in (*tried, *full, *p.ROUNDING["bits"]):
        scheme_of(p, Case(ALL, bits))
    missing = [b for b in full if b not in tried]
    if missing:
        raise ValueError(f"Every score is to be compared at {missing[0]} bits; add them to {tried}.")
    bad = [s for s in (*p.KEPT["rows"], p.KEPT["columns"]) if not 0 < s <= 0.5]
    if bad or not p.KEPT["rows"]:
        raise ValueError(
            f"The share of channels to keep must lie in (0, 0.5], since FI-low draws from half of them, "
            f"not {bad[0] if bad else 'nothing'}."
        )
    if p.SEEDS < 1:
        raise ValueError(f"The number of calibration sets must be at least 1, not {p.SEEDS}.")
    calibration_set(p, 0)
    tested_set(p)


def check_model(model: LanguageModel, p: SimpleNamespace) -> None:
    """Raise ValueError for matrices or groups of weights that the model does not have."""
    for matrices in p.MATRICES:
        for group in (p.ROUNDING["group"], *p.ROUNDING["groups"]):
            _check_group(model, names_of(model, matrices), group)


def names_of(model: LanguageModel, matrices: str) -> list[str]:
    """The weights of the linear layers of this name, such as "o_proj"; all of them for "all"."""
    linear = linear_names(model.network)
    names = [n for n in linear if matrices == ALL or n.split(".")[-2] == matrices]
    if not names:
        known = ", ".join(dict.fromkeys(n.split(".")[-2] for n in linear))
        raise ValueError(f"The model has no matrices {matrices!r}; known: {ALL}, {known}.")
    return names


def calibration_set(p: SimpleNamespace, k: int) -> list[Example]:
    """Set number k: questions of the validation split (of a text file contexts of its first half), pooled."""
    return [e for s in p.SUBJECTS for e in draw_of(p.TASK, s, "val", p.N_CALIBRATION, p.SEED + k)]


def tested_set(p: SimpleNamespace) -> list[Example]:
    """Questions of the test split, or contexts of the second half of a text file, of all subjects."""
    return [e for s in p.SUBJECTS for e in draw_of(p.TASK, s, "test", p.N_TEST, p.SEED)]


def chance(p: SimpleNamespace) -> float | None:
    """The share of right answers that guessing gets, 1/K; None where nothing is right."""
    options = tested_set(p)[0].options
    return 1 / len(options) if options else None


def protect(model: LanguageModel, p: SimpleNamespace, ask: Evaluator, kept: Kept | None = None) -> Trials:
    """Quantize in every case, keep channels by every score in every share, for each calibration set.

    Labels: KEYS. What keeps NOTHING (share 0) looks at no calibration set and stands in the first; what
    DATA_FREE scores keep is the same in all sets.
    """
    trials = collect(ask, partial(protections, model, p, ask), sets=p.SEEDS, kept=kept)
    same = [trial for trial in trials.tried if trial.labels["keep"] in DATA_FREE]
    again = [replace(trial, set=k) for k in range(1, p.SEEDS) for trial in same]
    return Trials(trials.intact, [*trials.tried, *again])


def protections(
    model: LanguageModel, p: SimpleNamespace, ask: Evaluator, k: int
) -> Iterator[tuple[Labels, Outcome]]:
    """What calibration set k is needed for: (labels, outcome) of every case, score and share."""
    if k == 0:
        yield from _nothing_kept(model, p, ask)
    ranking = Ranking(model, p, k)
    for case in cases(p):
        for axis, keep, shares in tried_in(p, case):
            if k and keep in DATA_FREE:
                continue
            scores, which = ranking.of(keep, case, axis)
            for share in shares:
                kept = select_channels(scores, share, which, seed=p.SEED + k)
                packed = pack_model(model, ranking.names[case.matrices], scheme_of(p, case), kept)
                with quantized(model.network, packed):
                    yield {**asdict(case), "axis": axis, "keep": keep, "share": share}, ask()


def _nothing_kept(
    model: LanguageModel, p: SimpleNamespace, ask: Evaluator
) -> Iterator[tuple[Labels, Outcome]]:
    for case in cases(p):
        packed = pack_model(model, names_of(model, case.matrices), scheme_of(p, case))
        with quantized(model.network, packed):
            yield {**asdict(case), "axis": "rows", "keep": NOTHING, "share": 0.0}, ask()


class Ranking:
    """Scores of channels on one calibration set."""

    def __init__(self, model: LanguageModel, p: SimpleNamespace, k: int) -> None:
        self.model, self.p = model, p
        self.examples = calibration_set(p, k)
        self.names = {m: names_of(model, m) for m in p.MATRICES}
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
            scheme, turned = scheme_of(self.p, case), turned_names(self.model.network)
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


def unprotected(
    model: LanguageModel, p: SimpleNamespace, ask: Evaluator, _: int
) -> Iterator[tuple[Labels, Outcome]]:
    """Quantize with nothing kept, in finer and coarser ways; group 0 is a whole row."""
    for matrices in dict.fromkeys(p.MATRICES):
        names = names_of(model, matrices)
        for scheme in schemes(p):
            packed = pack_model(model, names, scheme)
            about = {"matrices": matrices, "bits": scheme.bits, "mapping": scheme.mapping}
            about |= {"group": scheme.group or 0, "bits_per_weight": size_report(packed).bits_per_weight}
            with quantized(model.network, packed):
                yield about, ask()


def where_loss_begins(swept: Trials, seed: int) -> pd.DataFrame:
    """What was tried without protection (`unprotected`), a row for each way.

    Columns: its labels, n, accuracy, log_prob, `correct` as in `answer_table`, and loss with low and high:
    intact minus quantized accuracy, a 95 % bootstrap over the questions.
    """
    lines = []
    for trial in swept.tried:
        right = trial.values["correct"].astype(float)[None]
        ends = crossed_difference(swept.start()[None], right, seed=seed, resamples=RESAMPLES)
        found = _line(trial)
        correct = {"correct": found.pop("correct")}
        lines.append(found | dict(zip(("loss", "low", "high"), ends, strict=True)) | correct)
    return pd.DataFrame(lines).drop(columns="seed")


def schemes(p: SimpleNamespace) -> list[Scheme]:
    """The ways to round that are tried without protection, one step more than each main case among them."""
    groups = dict.fromkeys((*p.ROUNDING["groups"], p.ROUNDING["group"]))
    found = [Scheme(b, "symmetric", g) for b in p.ROUNDING["bits"] for g in groups]
    found += [Scheme(b, "asymmetric", g) for b in p.ROUNDING["bits"] for g in groups if b > 1]
    return list(dict.fromkeys([*found, *(_next(p, case) for case in main_cases(p))]))


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


def answer_table(trials: Trials) -> pd.DataFrame:
    """A row for every time that the questions were asked, of the intact model first.

    Columns: seed (of the calibration set), KEYS, n, accuracy, log_prob (mean log P of the right answer, or of
    the intact model's choice) and `correct`, a 0 or 1 for each question.
    """
    intact = dict(zip(KEYS, ("", 16, "rows", INTACT, 0.0), strict=True))
    start = [replace(trial, labels=intact) for trial in trials.intact]
    return pd.DataFrame([_line(trial) for trial in (*start, *trials.tried)])


def summary(trials: Trials) -> pd.DataFrame:
    """Mean accuracy and log P of what is kept by each score, with intervals over the calibration sets.

    Columns: KEYS, accuracy, low, high, log_prob, log_low, log_high, seeds, n. Share 0 keeps nothing, the same
    for all scores.
    """
    table, likely = (trials.table(*KEYS, value=value) for value in ("accuracy", "log_prob"))
    table = table.assign(log_low=likely.low, log_high=likely.high).rename(columns={"sets": "seeds"})
    ends = ["accuracy", "low", "high", "log_prob", "log_low", "log_high"]
    table = table[[*KEYS, *ends, "seeds", "n"]]
    start = table[table.keep == NOTHING].set_index(["matrices", "bits"])
    table = table[table.keep != NOTHING]
    plain = table.drop_duplicates(list(KEYS[:4])).assign(share=0.0, **dict.fromkeys(ends, np.nan))
    for name in ("accuracy", "log_prob"):
        plain[name] = [start.loc[(m, b), name] for m, b in zip(plain.matrices, plain.bits, strict=True)]
    return pd.concat([plain, table], ignore_index=True)


# --- what came out for each question in a case


def kept_by(
    trials: Trials, case: Case, keep: str, value: str, share: float | None = None, axis: Axis = "rows"
) -> np.ndarray:
    """The values (sets, questions) with channels kept by a score; the mean over all shares for None.

    Raises ValueError where the run has no such thing.
    """
    found = trials.where(**asdict(case), axis=axis, keep=keep)
    if share is not None:
        return _values(found.where(share=share), value)
    shares = dict.fromkeys(trial.labels["share"] for trial in found.tried)
    return np.mean([_values(found.where(share=s), value) for s in shares], 0)


def loss(trials: Trials, case: Case, value: str, seed: int) -> Interval:
    """What quantization costs, intact minus quantized, with a 95 % bootstrap over the questions."""
    start = _start(trials, value)[None]
    return crossed_difference(start, kept_by(trials, case, NOTHING, value), seed=seed, resamples=RESAMPLES)


def is_lost(trials: Trials, case: Case, value: str, seed: int) -> bool:
    """Whether quantization costs anything that can be told from nothing."""
    return loss(trials, case, value, seed)[1] > 0


def minus(
    trials: Trials, case: Case, pair: tuple[str, str], value: str, seed: int, axis: Axis = "rows"
) -> Interval:
    """Kept by the first of a pair minus kept by the second, over all shares.

    Paired, with a 95 % bootstrap over calibration sets and questions.
    """
    first, second = (kept_by(trials, case, keep, value, axis=axis) for keep in pair)
    return crossed_difference(first, second, seed=seed, resamples=RESAMPLES)


def recovered(
    trials: Trials, case: Case, keep: str, value: str, seed: int, share: float | None = None,
    axis: Axis = "rows",
) -> Interval:  # fmt: skip
    """The share of the loss that is won back, with a 95 % bootstrap over sets and questions.

    The loss is drawn anew with the questions. NaN where nothing is lost.
    """
    if not is_lost(trials, case, value, seed):
        return np.nan, np.nan, np.nan
    plain = kept_by(trials, case, NOTHING, value)[0]
    return recovered_share(
        _start(trials, value), plain, kept_by(trials, case, keep, value, share, axis), seed
    )


def recovered_share(intact: np.ndarray, plain: np.ndarray, kept: np.ndarray, seed: int) -> Interval:
    """(kept - plain) / (intact - plain), of the means, and its bootstrap interval.

    intact, plain (N,) by question, kept (S, N) by calibration set and question; both are drawn anew.
    """
    of_sets, of_questions = resampled(*kept.shape, seed, RESAMPLES)
    gain = ((of_sets @ (kept - plain)) * of_questions).sum(1)
    lost = of_questions @ (intact - plain)
    low, high = np.nanquantile(gain / np.where(lost == 0, np.nan, lost), [0.025, 0.975])
    return float((kept - plain).mean() / (intact - plain).mean()), float(low), float(high)


def _values(trials: Trials, value: str) -> np.ndarray:
    """The values (sets, questions) of trials: right (1) or wrong (0), or log P to four digits."""
    return trials.answers(value).round(4)


def _start(trials: Trials, value: str) -> np.ndarray:
    return trials.start(value).round(4)


def recovery(trials: Trials, case: Case, axis: Axis, value: str, seed: int) -> pd.DataFrame:
    """The share of the loss that each score wins back, the mean over all shares of channels.

    Columns: keep, recovered, low, high, sets, n.
    """
    lines = []
    for keep in KEEP_BY[axis]:
        ends = recovered(trials, case, keep, value, seed, axis=axis)
        lines.append((keep, *ends, *kept_by(trials, case, keep, value, axis=axis).shape))
    return pd.DataFrame(lines, columns=["keep", "recovered", "low", "high", "sets", "n"])


def sizes(model: LanguageModel, p: SimpleNamespace) -> pd.DataFrame:
    """Bytes of the quantized matrices in every case when a share of their rows is kept, whichever these are.

    Columns: matrices, bits, share, kilobytes, extra (kilobytes more than without protection),
    bits_per_weight, sixteen_bit (kilobytes in 16 bits).
    """
    turned, lines = turned_names(model.network), []
    for case in cases(p):
        names = names_of(model, case.matrices)
        sizes = {n: model.network.get_parameter(n).detach().abs() for n in names}
        rows = {n: as_rows(size, n in turned).sum(1) for n, size in sizes.items()}
        for share in (0.0, *p.KEPT["rows"]):
            kept = select_channels(Scores(rows, {"axis": "rows"}), share)
            report = size_report(pack_model(model, names, scheme_of(p, case), kept))
            bytes_ = (
                report.packed / 1e3,
                report.extra / 1e3,
                report.bits_per_weight,
                report.sixteen_bit / 1e3,
            )
            lines.append((case.matrices, case.bits, share, *bytes_))
    columns = ["matrices", "bits", "share", "kilobytes", "extra", "bits_per_weight", "sixteen_bit"]
    return pd.DataFrame(lines, columns=columns)


def per_megabyte(trials: Trials, sized: pd.DataFrame, case: Case, keep: str, seed: int) -> pd.DataFrame:
    """What a share of rows wins back and what it costs.

    Columns: share, extra (kilobytes), recovered with low and high (share of the lost accuracy),
    per_megabyte (recovered for each megabyte more).
    """
    part = sized[(sized.matrices == case.matrices) & (sized.bits == case.bits) & (sized.share > 0)]
    lines = [
        (r.share, r.extra, *recovered(trials, case, keep, "accuracy", seed, r.share))
        for r in part.itertuples()
    ]
    table = pd.DataFrame(lines, columns=["share", "extra", "recovered", "low", "high"])
    return table.assign(per_megabyte=1000 * table.recovered / table.extra)


def one_step_more(
    trials: Trials, swept: Trials, sized: pd.DataFrame, p: SimpleNamespace, case: Case, keep: str
) -> pd.DataFrame:
    """More bits for every weight instead of protected rows: is memory better spent so?

    swept: the trials of `unprotected`. Columns: share, protected (bits a weight with that share of rows
    kept), unprotected (with the next larger number of bits and nothing kept), difference with low and high
    (the accuracy of the second minus that of the first; 95 % bootstrap over sets and questions).
    """
    scheme = _next(p, case)
    at = {"bits": scheme.bits, "mapping": scheme.mapping, "group": scheme.group or 0}
    (other,) = swept.where(matrices=case.matrices, **at).tried
    part = sized[(sized.matrices == case.matrices) & (sized.bits == case.bits)].set_index("share")
    lines = []
    for share in p.KEPT["rows"]:
        kept = kept_by(trials, case, keep, "accuracy", share)
        finer = np.tile(other.values["correct"].astype(float), (len(kept), 1))
        ends = crossed_difference(finer, kept, seed=p.SEED, resamples=RESAMPLES)
        lines.append((share, part.bits_per_weight[share], other.labels["bits_per_weight"], *ends))
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
    model, p = ranking.model, ranking.p
    case = main_cases(p)[1]
    scores, which = ranking.of(LENGTH, case, "rows")
    kept = select_channels(scores, min(p.KEPT["rows"]), which, seed=p.SEED)
    stored = replace(model, network=copy.deepcopy(model.network))
    quantize_model(stored.network, pack_model(model, ranking.names[case.matrices], scheme_of(p, case), kept))
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
    names = ranking.names[ranking.p.MATRICES[0]]
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


def high_against_low(trials: Trials, p: SimpleNamespace, value: str) -> pd.DataFrame:
    """Claim 19 in every case, for both filters: rows of high FI kept minus rows of low FI kept.

    Columns: matrices, bits, filter, n (questions), loss (intact minus unprotected), lost (whether it can be
    told from zero), difference, low, high (over all shares run there).
    """
    lines = []
    n = len(trials.start())
    for case in cases(p):
        cost, lost = loss(trials, case, value, p.SEED)[0], is_lost(trials, case, value, p.SEED)
        for pair in ((EXACT, LOW_EXACT), (DAMPED, LOW_DAMPED)):
            about = (case.matrices, case.bits, pair[0].removeprefix("FI "), n, cost, lost)
            lines.append((*about, *minus(trials, case, pair, value, p.SEED)))
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


def duels(trials: Trials, p: SimpleNamespace, value: str) -> pd.DataFrame:
    """Paired differences in both main cases, over all shares: is the first of a pair better to keep by?

    Columns: matrices, bits, axis, first, second, lost, difference, low, high.
    """
    lines = []
    for case in main_cases(p):
        lost = is_lost(trials, case, value, p.SEED)
        for axis, *pair in DUELS:
            ends = minus(trials, case, tuple(pair), value, p.SEED, axis)  # type: ignore[arg-type]
            lines.append((case.matrices, case.bits, axis, *pair, lost, *ends))
    columns = ["matrices", "bits", "axis", "first", "second", "lost", "difference", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


def grid(tables: Mapping[str, pd.DataFrame], index: Sequence[str], column: str | None = None) -> pd.DataFrame:
    """Differences with their intervals and verdicts as text to read.

    tables: by title, each with the columns difference, low, high and lost; `index` names the columns that
    tell rows apart, `column` one whose values become columns, beside the titles.
    """
    parts = {}
    for title, table in tables.items():
        ends = interval_text(table, "difference", "low", "high")
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


def recovered_as_claimed(trials: Trials, p: SimpleNamespace) -> pd.DataFrame:
    """The share of the loss of accuracy that the share of rows nearest to the claimed one wins back.

    Columns: matrices, bits, keep, share, n (questions), lost (whether the loss can be told from zero),
    recovered, low, high; these are NaN where nothing is lost.
    """
    share = min(p.KEPT["rows"], key=lambda s: abs(s - claimed("share")))
    n = len(trials.start())
    lines = []
    for case in cases(p):
        lost = is_lost(trials, case, "accuracy", p.SEED)
        for keep in (EXACT, DAMPED):
            ends = recovered(trials, case, keep, "accuracy", p.SEED, share)
            lines.append((case.matrices, case.bits, keep, share, n, lost, *ends))
    columns = ["matrices", "bits", "keep", "share", "n", "lost", "recovered", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


def by_subject(trials: Trials, examples: Sequence[Example]) -> pd.DataFrame:
    """The rows of the earlier version's comparison, subject by subject.

    Columns: matrices, bits, subject, keep, share, accuracy (mean over the calibration sets) and n.
    """
    places: dict[str, list[int]] = {}
    for i, e in enumerate(examples):
        places.setdefault(e.subject, []).append(i)
    lines = []
    rows = trials.where(axis="rows")
    tried = rows.table("matrices", "bits", "keep", "share")
    for row in tried[tried.keep.isin((*EARLIER, NOTHING))].itertuples():
        case, about = {"matrices": row.matrices, "bits": row.bits}, {"keep": row.keep, "share": row.share}
        right = rows.answers(**case, **about)
        for subject, at in places.items():
            line = {**case, "subject": subject, **about}
            lines.append({**line, "accuracy": right[:, at].mean(), "n": len(at)})
    return pd.DataFrame(lines)


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


def _next(p: SimpleNamespace, case: Case) -> Scheme:
    """The scheme of a case with the next larger number of bits."""
    return scheme_of(p, Case(case.matrices, min((b for b in BITS if b > case.bits), default=case.bits)))


def _check_group(model: LanguageModel, names: Sequence[str], group: int | None) -> None:
    turned = turned_names(model.network)
    for name in names:
        width = model.network.get_parameter(name).shape[-2 if name in turned else -1]
        if group is not None and (group < 1 or width % group):
            raise ValueError(f"The rows of {name} have {width} weights, which no group of {group} divides.")


def _line(trial: Trial) -> dict[str, object]:
    """A trial as a line of a table: its set and labels, how many were right, and which (0 or 1 for each)."""
    correct, log_prob = trial.values["correct"], trial.values["log_prob"]
    return {
        "seed": trial.set,
        **trial.labels,
        "n": len(correct),
        "accuracy": float(correct.mean()),
        "log_prob": float(log_prob.astype(float).mean()),
        "correct": "".join("01"[int(c)] for c in correct),
    }
