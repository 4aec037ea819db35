"""What chapter 08 does not write out: weights as matrices, readings of its trials, sizes (method 4.5).

A channel is a row (an output) or a column (an input) of a weight matrix W (out, in). A trial of protection
has the labels case (its name, such as "o_proj, 1 bit"), axis, keep (what channels are kept by), share and
stored (bits a weight); one without protection has matrices, bits, group (0 for a whole row) and stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fichapters.ch07.lab import check_room, draw_of
from fichapters.papers import published
from fichapters.tables import RESAMPLES
from fihelpers.answers import usual_answers
from fihelpers.evaluate.stats import crossed_difference, resampled
from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, from_rows, linear_names, turned_names
from fihelpers.perturb.quantize import Packed, Scheme, code_bytes
from fihelpers.perturb.sparsify import Which, changed
from fihelpers.scores.class_gradients import class_gradients
from fihelpers.tasks import Example
from fihelpers.trials import Trial, Trials

ALL = "all"  # as the name of a set of matrices: every linear layer's
FILTERS = ("FI exact", "FI damped 0.0001")
LOW = tuple(f"{measure}, low half" for measure in FILTERS)
RANDOM = "random"
LENGTH, HESSIAN = "information length", "Hessian diagonal"
EARLIER = (*FILTERS, *LOW, RANDOM)  # the comparison of the paper's earlier version
LABELS = ("case", "axis", "keep")  # of trials whose shares are averaged
VALUES = {"accuracy": "accuracy", "log P": "log_prob"}  # what is compared, by what tables call it
SIXTEEN, POSITION = 2, 4  # bytes of a scale or a kept weight, and of the place of a kept channel

# Qwen2-7B, the model of the paper's earlier version, from the config.json that its makers publish
QWEN2_7B_LAYERS, QWEN2_7B_HIDDEN = 28, 3584
QWEN2_7B_KEY_VALUE, QWEN2_7B_INTERMEDIATE = 512, 18944

Interval = tuple[float, float, float]
Cases = Mapping[str, tuple[str, int]]  # the name of a case -> its set of matrices, and the bits


# --- before anything runs


def check(p: SimpleNamespace, measures: Sequence[str]) -> None:
    """Refuse settings that cannot be run, before a model is opened or downloaded.

    Raises ValueError, what `load_task` raises, and what `Estimate.check` raises where memory is short.
    """
    _check_bits(p.BITS)
    bad = [s for s in (*p.KEPT["rows"], p.KEPT["columns"]) if not 0 < s <= 0.5]
    if bad or not p.KEPT["rows"]:
        raise ValueError(
            f"The share of channels to keep must lie in (0, 0.5], since FI-low draws from half of them, "
            f"not {bad[0] if bad else 'nothing'}."
        )
    drawn(p, "test", p.N_TEST, p.SEED)
    layers = None if ALL in p.MATRICES else p.MATRICES
    check_room(p, drawn(p, "val", p.N_CALIBRATION, p.SEED), measures, layers)  # more than packed weights take


def _check_bits(bits: Mapping[str, Sequence[int]]) -> None:
    """Every number is a scheme's, and without protection everything is swept, and one step more."""
    for count in (*bits["swept"], *bits["tried"], *bits["full"]):
        Scheme(count)
    for count in bits["full"]:
        if count not in bits["tried"]:
            raise ValueError(f"Every score is to be compared at {count} bits; add them to BITS.tried.")
    missing = [count for count in bits["tried"] if count not in bits["swept"]]
    if missing or max(bits["full"]) >= max(bits["swept"]):
        needed = missing[0] if missing else f"more than {max(bits['full'])}"
        raise ValueError(
            f"Without protection {needed} bits are asked for as well; add them to BITS.swept, "
            f"which holds {bits['swept']}."
        )


def drawn(
    p: SimpleNamespace, split: str, n: int, seed: int, model: LanguageModel | None = None
) -> list[Example]:
    """Examples of a split, n of each of the chapter's SUBJECTS, one subject after the other."""
    return [e for s in p.SUBJECTS for e in draw_of(p.TASK, s, split, n, seed, model)]


def names_of(model: LanguageModel, matrices: str) -> list[str]:
    """The weights of the linear layers of this name, such as "o_proj"; all of them for "all".

    Raises ValueError for a name that the model does not have.
    """
    linear = linear_names(model.network)
    names = [n for n in linear if matrices == ALL or n.split(".")[-2] == matrices]
    if not names:
        known = ", ".join(dict.fromkeys(n.split(".")[-2] for n in linear))
        raise ValueError(f"The model has no matrices {matrices!r}; known: {ALL}, {known}.")
    return names


# --- what is tried


def cases(p: SimpleNamespace, bits: Sequence[int]) -> dict[str, tuple[str, int]]:
    """Every set of matrices cut to each number of bits: the name of a case -> its set and its bits."""
    return {_name(m, b): (m, b) for m in p.MATRICES for b in bits}


def main_cases(p: SimpleNamespace) -> dict[str, tuple[str, int]]:
    """The cases in which every score is compared, one for each set of matrices."""
    return {_name(m, b): (m, b) for m, b in zip(p.MATRICES, p.BITS["full"], strict=True)}


def plan(
    p: SimpleNamespace, case: str, axis: str, ranked: Iterable[str]
) -> Iterator[tuple[str, str, Which, float]]:
    """What is tried in a case: (what is kept by, the score that ranks, which end of it, the share kept).

    In the main cases rows by every score at all shares, and columns at one; in the others the rows of the
    earlier version's comparison, at the smallest and the largest share. FI-low is a random draw from the
    lower half by score; a random draw takes no notice of the score beside it.
    """
    full, shares = case in main_cases(p), p.KEPT["rows"]
    constant = {"squared score"} if axis == "columns" else {"squared score", HESSIAN}  # alike in all rows
    names = [*EARLIER, *(s for s in ranked if s not in (*FILTERS, *constant))] if full else EARLIER
    if axis == "columns":
        shares = [p.KEPT["columns"]] if full else []
    elif not full:
        shares = list(dict.fromkeys([min(shares), max(shares)]))
    for keep, share in product(names, shares):
        score = keep.removesuffix(", low half")
        which: Which = "top" if score == keep else "low half"
        yield (keep, "magnitude", "random", share) if keep == RANDOM else (keep, score, which, share)


def _name(matrices: str, bits: int) -> str:
    return f"{matrices}, {bits} bit"


# --- one matrix


def matrix(model: LanguageModel, name: str) -> Tensor:
    """A weight as W (out, in), however the model keeps it; that of fused experts has the rows of all."""
    return as_rows(model.network.get_parameter(name).detach(), name in turned_names(model.network))


def replaced(model: LanguageModel, name: str, values: Tensor) -> AbstractContextManager[nn.Module]:
    """The model with other values (out, in) in the place of one weight; on leaving it is as before."""
    shape = tuple(model.network.get_parameter(name).shape)
    flat = from_rows(values, shape, name in turned_names(model.network)).flatten()
    return changed(model, {name: torch.arange(flat.numel(), device=flat.device)}, lambda _: flat)


def gradients(model: LanguageModel, question: Example, name: str) -> tuple[Tensor, Tensor]:
    """The class gradients (K, out, in) of one weight on one question, and the probabilities (K,); float64."""
    classes = usual_answers(model.tokenizer, [question])
    weight = model.network.get_parameter(name)
    learns = weight.requires_grad
    weight.requires_grad_()
    log_p = classes.log_probs(model.last_logits(model.batches([question.prompt])[0]))[0]
    grads = class_gradients(log_p, weight)
    weight.requires_grad_(learns)
    turned = name in turned_names(model.network)
    rows = torch.stack([as_rows(grad, turned) for grad in grads])
    return rows.double(), log_p.detach().double().exp()


# --- readings of the trials


def over_shares(trials: Trials) -> Trials:
    """One trial for each case, axis, score and set: the mean of its answers over all shares of channels.

    log P counts to four digits.
    """
    groups: dict[tuple[int, tuple[str, ...]], list[Trial]] = {}
    for trial in trials.tried:
        names = tuple(trial.labels[name] for name in LABELS)
        groups.setdefault((trial.set, names), []).append(trial)
    tried = []
    for (k, names), group in groups.items():
        means = {v: np.mean([_digits(t.values[v]) for t in group], 0) for v in ("correct", "log_prob")}
        tried.append(Trial(k, dict(zip(LABELS, names, strict=True)), means))
    return Trials(trials.intact, tried)


def compare(
    mean: Trials, pairs: Sequence[tuple[str, str]], cases: Iterable[str], seed: int, axis: str = "rows"
) -> pd.DataFrame:
    """Channels kept by the first of a pair minus those kept by the second, in each of the cases.

    mean: of `over_shares`. Columns: score ("accuracy" or "log P"), and those of `Trials.compare`.
    """
    found = mean.where(axis=axis)
    tables = {
        name: found.compare(pairs, "case", label="keep", value=value, seed=seed, resamples=RESAMPLES)
        for name, value in VALUES.items()
    }
    table = pd.concat(tables, names=["score"]).reset_index("score")
    return table[table.case.isin(list(cases))].reset_index(drop=True)


def against_random(mean: Trials, cases: Iterable[str], seed: int) -> pd.DataFrame:
    """`compare` of every score of rows, and of columns, with random ones; a column axis says which."""
    tables = {}
    for axis in ("rows", "columns"):
        some = mean.where(axis=axis, case=next(iter(cases)))
        keeps = dict.fromkeys(trial.labels["keep"] for trial in some.tried)
        pairs = [(keep, RANDOM) for keep in keeps if keep != RANDOM]
        tables[axis] = compare(mean, pairs, cases, seed, axis)
    return pd.concat(tables, names=["axis"]).reset_index("axis").reset_index(drop=True)


def high_against_low(mean: Trials, swept: Trials, cases: Cases, seed: int) -> pd.DataFrame:
    """`compare` of rows of high FI with rows of low FI, beside what quantization costs in each case.

    Columns: score, matrices, bits, filter, n, loss (intact minus unprotected), lost (whether it can be told
    from zero), difference, low, high.
    """
    found = compare(mean, list(zip(FILTERS, LOW, strict=True)), cases, seed)
    lines = []
    for row in found.to_dict("records"):
        matrices, bits = cases[row["case"]]
        cost, least, _ = loss(swept, matrices, bits, VALUES[row["score"]], seed)
        about = {"score": row["score"], "matrices": matrices, "bits": bits}
        about |= {"filter": row["first"].removeprefix("FI "), "n": row["n"], "loss": cost, "lost": least > 0}
        lines.append(about | {name: row[name] for name in ("difference", "low", "high")})
    return pd.DataFrame(lines)


def loss(swept: Trials, matrices: str, bits: int, value: str, seed: int) -> Interval:
    """What quantization costs, intact minus quantized, with a 95 % bootstrap over the questions."""
    plain = _plain(swept, matrices, bits)
    intact, cut = _digits(plain.start(value)), _digits(plain.answers(value))
    return crossed_difference(intact[None], cut, seed=seed, resamples=RESAMPLES)


def won_back(trials: Trials, swept: Trials, cases: Cases, p: SimpleNamespace) -> pd.DataFrame:
    """The share of the loss of accuracy that FI wins back, of the share of rows nearest to the claimed one.

    Columns: matrices, bits, keep, share, n (questions), lost (whether the loss can be told from zero),
    recovered, low, high; these are NaN where nothing is lost.
    """
    share = min(p.KEPT["rows"], key=lambda s: abs(s - claimed("share")))
    lines = []
    for case, (matrices, bits) in cases.items():
        plain = _plain(swept, matrices, bits)
        lost = loss(swept, matrices, bits, "accuracy", p.SEED)[1] > 0
        for keep in FILTERS:
            kept = trials.answers(case=case, axis="rows", keep=keep, share=share)
            ends = (np.nan,) * 3
            if lost:
                ends = recovered_share(plain.start(), plain.answers()[0], kept, p.SEED)
            lines.append((matrices, bits, keep, share, kept.shape[1], lost, *ends))
    columns = ["matrices", "bits", "keep", "share", "n", "lost", "recovered", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


def recovered_share(intact: np.ndarray, plain: np.ndarray, kept: np.ndarray, seed: int) -> Interval:
    """(kept - plain) / (intact - plain), of the means, and its bootstrap interval.

    intact, plain (N,) by question, kept (S, N) by calibration set and question; both are drawn anew.
    """
    of_sets, of_questions = resampled(*kept.shape, seed, RESAMPLES)
    gain = ((of_sets @ (kept - plain)) * of_questions).sum(1)
    lost = of_questions @ (intact - plain)
    low, high = np.nanquantile(gain / np.where(lost == 0, np.nan, lost), [0.025, 0.975])
    return float((kept - plain).mean() / (intact - plain).mean()), float(low), float(high)


def one_step_more(trials: Trials, swept: Trials, cases: Cases, p: SimpleNamespace) -> pd.DataFrame:
    """Accuracy with the next larger number of bits and nothing kept, minus that of each share protected.

    Rows are kept by information length.

    Columns: case, share, protected and unprotected (stored bits a weight), difference, low, high, n.
    """
    lines = []
    for case, (matrices, bits) in cases.items():
        more = min(trial.labels["bits"] for trial in swept.tried if trial.labels["bits"] > bits)
        other = _plain(swept, matrices, more)
        for share in p.KEPT["rows"]:
            found = trials.where(case=case, axis="rows", keep=LENGTH, share=share)
            kept = found.answers()
            finer = np.tile(other.answers(), (len(kept), 1))
            ends = crossed_difference(finer, kept, seed=p.SEED, resamples=RESAMPLES)
            stored = (found.tried[0].labels["stored"], other.tried[0].labels["stored"])
            lines.append((case, share, *stored, *ends, kept.shape[1]))
    columns = ["case", "share", "protected", "unprotected", "difference", "low", "high", "n"]
    return pd.DataFrame(lines, columns=columns)


def _plain(swept: Trials, matrices: str, bits: int) -> Trials:
    """What was answered with nothing protected, and one scale a row."""
    return swept.where(matrices=matrices, bits=bits, group=0)


def _digits(values: np.ndarray) -> np.ndarray:
    """Right (1) or wrong (0), or log P to the four digits that statistics see."""
    return values.astype(float).round(4)


# --- what it weighs


def bits_per_weight(packed: Mapping[str, Packed]) -> float:
    """The stored bits of quantized matrices, such as those of `pack_model`, for each of their weights."""
    if not packed:
        raise ValueError("There are no quantized layers to measure; name at least one.")
    weights = sum(rows * columns for rows, columns in (one.shape for one in packed.values()))
    return 8 * sum(one.nbytes for one in packed.values()) / weights


def claimed(key: str) -> float:
    """A figure of the earlier version's claim: "kept_" and this key in the data file; percent as shares."""
    figure = published(f"kept_{key}")
    return figure.value / 100 if figure.unit == "%" else figure.value


def extra_bytes(shape: tuple[int, int], bits: int, share: float) -> int:
    """What it costs to keep a share of the rows of a matrix (out, in) in 16 bits, with a scale a row."""
    rows, columns = shape
    kept = round(share * rows)
    codes = code_bytes(bits, rows * columns) - code_bytes(bits, (rows - kept) * columns)
    return kept * (SIXTEEN * columns + POSITION - SIXTEEN) - codes


def published_sizes() -> pd.DataFrame:
    """The memory that protection costs on Qwen2-7B by arithmetic, in megabytes (10^6 bytes).

    Rows o_proj and all linear matrices; columns 4 and 1 bit, for the share that the earlier version names;
    `share` is the share of rows for which 4 bit would cost the memory that it names; n is 1, a calculation.
    """
    wide, inner, kv = QWEN2_7B_HIDDEN, QWEN2_7B_INTERMEDIATE, QWEN2_7B_KEY_VALUE
    shapes = {"o_proj": [(wide, wide)]}
    shapes[ALL] = [(wide, wide)] * 2 + [(kv, wide)] * 2 + [(inner, wide)] * 2 + [(wide, inner)]
    kept, lines = claimed("share"), []
    for name, matrices in shapes.items():
        one, four = (QWEN2_7B_LAYERS * sum(extra_bytes(s, b, kept) for s in matrices) for b in (1, 4))
        lines.append((name, four / 1e6, one / 1e6, kept * claimed("memory") * 1e9 / four, 1))
    return pd.DataFrame(lines, columns=["matrices", "megabytes_4", "megabytes_1", "share", "n"])
