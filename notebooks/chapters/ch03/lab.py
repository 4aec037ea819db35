"""Chapter 03: what FI can and cannot say: each point of method 1b, and its invariance, measured."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from fihelpers.answers import Answers, Groups, Top, letters, usual_answers
from fihelpers.evaluate.questions import Evaluator, answer_all
from fihelpers.evaluate.stats import mean_interval, spearman, wilson
from fihelpers.filters import Cut, Damped, Exact, Spectral
from fihelpers.influence import (
    SaturationWarning,
    ceiling,
    decompose,
    fi,
    fi_of_moments,
    moments,
    moments_of_others,
    saturated,
)
from fihelpers.measures import JACOBIAN, MAGNITUDE, MEASURES, RANDOM, SNIP, Influence, Random
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import linear_names, select, zeroed
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example, load_task
from fihelpers.trials import RIGHT, Kept, Labels, Trial, Trials, Values, collect

EARLIER = "earlier blocks"
LAST_KV = "last block, k and v"
LAST_REST = "last block, the others"
JACOBIAN2 = "squared Jacobian norm"
SQUARED_SCORE = "squared score"  # the mean of s_y_hat^2

KEYS = {  # short names, for the names of records
    "intact": "intact",
    "random": "random",
    "FI exact": "exact",
    "FI exact, mean": "mean",
    "FI cut 0.001": "cut",
    "FI damped 0.0001": "damped",
    "Jacobian norm": "jacobian",
    JACOBIAN2: "jacobian",
    "SNIP": "snip",
    "predicted change": "change",
    "Fisher diagonal": "fisher",
    "information length": "length",
    "magnitude": "magnitude",
    EARLIER: "early",
    LAST_KV: "kv",
    LAST_REST: "rest",
}


@dataclass(frozen=True, eq=False)
class Question:
    """One question with its class gradients, all K of them: grads {weight: (K, *shape)} and probs (K,)."""

    example: Example
    grads: dict[str, Tensor]
    probs: Tensor

    def flat(self) -> Tensor:
        """The class gradients of all weights in one row a class, (K, weights)."""
        return torch.cat([g.flatten(1) for g in self.grads.values()], 1)


def draw(task: str, subjects: Sequence[str], split: str, n: int, seed: int) -> list[Example]:
    """n questions of a split, equally many of each subject (the remainder goes to the first ones)."""
    each = [n // len(subjects) + (i < n % len(subjects)) for i in range(len(subjects))]
    pairs = [(s, k) for s, k in zip(subjects, each, strict=True) if k]
    return [e for s, k in pairs for e in load_task(task, s, split, k, seed)]


def look_at(network: PreTrainedModel, blocks: Sequence[int] | None = None) -> list[str]:
    """Names of the linear weights without lm_head, of all blocks or of some (-1 is the last).

    Raises ValueError for a block that the network does not have.
    """
    names = linear_names(network)
    if blocks is None:
        return names
    depth = max(map(layer_of, names)) + 1
    missing = [b for b in blocks if not -depth <= b < depth]
    if missing:
        raise ValueError(
            f"there is no block {missing[0]}: the network's {depth} blocks are 0 to {depth - 1}."
        )
    wanted = {b % depth for b in blocks}
    return [n for n in names if layer_of(n) in wanted]


def check_parts(network: PreTrainedModel, names: Sequence[str]) -> None:
    """Raise ValueError where the last block is not among these weights, or no earlier one.

    They are told apart by `parts_of`, which needs both.
    """
    blocks, last = set(map(layer_of, names)), max(map(layer_of, linear_names(network)))
    if last not in blocks or len(blocks) < 2:
        shown = ", ".join(map(str, sorted(blocks)))
        raise ValueError(
            f"the last block ({last}) and an earlier one have to be looked at, not only block {shown}; "
            "set LAYERS to [0, -1], or take a model with more blocks."
        )


def layer_of(name: str) -> int:
    """The block that a weight belongs to, by the first number in its name; -1 for none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def matrix_of(name: str) -> str:
    """The matrix that a parameter belongs to, such as o_proj."""
    return name.split(".")[-2]


def parts_of(names: Sequence[str]) -> dict[str, str]:
    """The part of the model that each weight lies in, as far as the rank of its gradient goes (method 1b.5).

    Behind the last block's attention only the last position counts, so one position alone feeds a weight's
    gradient there. The last block's keys and values still serve every position: k's gradient is as general as
    an earlier block's, while v's has, for each output, one term for each query head that shares it.
    """
    last = max(map(layer_of, names))
    serving = re.compile(r"(k_proj|v_proj|query_key_value)\.weight$")
    return {n: EARLIER if layer_of(n) < last else LAST_KV if serving.search(n) else LAST_REST for n in names}


def questions(
    model: LanguageModel, examples: Sequence[Example], names: Sequence[str], answers: Answers | None = None
) -> Iterator[Question]:
    """Class gradients of some weights, question by question, by K plain backward passes."""
    classes = answers or usual_answers(model.tokenizer, lettered=bool(examples[0].options))
    weights = [model.network.get_parameter(n) for n in names]
    for example in tqdm(examples, desc="questions", delay=3, leave=False):
        log_p = classes.log_probs(model.last_logits(model.batches([example.prompt])[0]))[0]
        passes = [torch.autograd.grad(one, weights, retain_graph=True) for one in log_p]
        grads = {n: torch.stack(g) for n, g in zip(names, zip(*passes, strict=True), strict=True)}
        yield Question(example, grads, log_p.detach().exp())


def in_dtype(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """A copy of the model whose weights are held and multiplied in another precision."""
    return replace(model, network=copy.deepcopy(model.network).to(dtype))  # type: ignore[arg-type]


def flatten(values: Mapping[str, Tensor]) -> Tensor:
    """All values as one vector, in the order of the mapping."""
    return torch.cat([v.flatten() for v in values.values()])


def keyed(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows whose `column` has a short name in `KEYS`, by that name."""
    known = table[table[column].isin(KEYS)]
    return known.set_index(known[column].map(KEYS).rename("key"))


@contextmanager
def _unwarned() -> Iterator[None]:
    """Saturation is what these experiments count, so they do not warn of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        yield


# --- the invariance of method 1 ---------------------------------------------------------------------


def gated_pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of the weights (up_proj, down_proj) of every gated feed-forward layer.

    Raises ValueError for a network without one: rescaling them is what leaves its function unchanged.
    """
    found = [
        (f"{name}.up_proj.weight", f"{name}.down_proj.weight")
        for name, m in network.named_modules()
        if hasattr(m, "up_proj") and hasattr(m, "down_proj")
    ]
    if not found:
        raise ValueError(
            "The network has no up_proj and down_proj to rescale; take a gated model, as Qwen2 is."
        )
    return found


@contextmanager
def rescaled(network: nn.Module, seed: int, reach: int = 4) -> Iterator[nn.Module]:
    """Rows of up_proj times k, columns of down_proj divided by k: the same function in other coordinates.

    k is a random power of two between 2^-reach and 2^reach for each hidden unit, so nothing is rounded.
    On leaving the weights are as before, bit for bit.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = dict(network.named_parameters())
    kept = {}
    try:
        for up, down in gated_pairs(network):
            kept[up], kept[down] = weights[up].data.clone(), weights[down].data.clone()
            power = torch.randint(-reach, reach + 1, (len(weights[up]),), generator=generator)
            k = (2.0**power).to(weights[up].data)
            weights[up].data.mul_(k[:, None])
            weights[down].data.div_(k)
        yield network
    finally:
        for name, value in kept.items():
            weights[name].data.copy_(value)


def invariance(model: LanguageModel, examples: Sequence[Example], share: float, seed: int) -> pd.DataFrame:
    """Every measure of the up and down weights before and after `rescaled` (method 1, Theorem A.1).

    Columns: measure; change, the norm of the difference relative to the norm before; kept, the share of the
    top weights that is still on top; log_prob, the largest change of any class's log-probability.
    """
    names = [n for pair in gated_pairs(model.network) for n in pair]
    measures = [m for m in MEASURES.values() if m is not RANDOM]
    classes = usual_answers(model.tokenizer, lettered=bool(examples[0].options))
    ask = Evaluator(model, examples, classes)
    before, log_p = score_weights(model, examples, measures, only=names), ask().log_probs
    with rescaled(model.network, seed):
        after, moved = score_weights(model, examples, measures, only=names), ask().log_probs - log_p
    rows = []
    for m in measures:
        old, new = flatten(before[m.name].values).double(), flatten(after[m.name].values).double()
        kept = overlap(top(before[m.name], share, seed), top(after[m.name], share, seed))
        rows.append((m.name, float((new - old).norm() / old.norm()), kept, float(moved.abs().max())))
    return pd.DataFrame(rows, columns=["measure", "change", "kept", "log_prob"]).assign(n=len(examples))


def top(scores: Scores | Mapping[str, Tensor], share: float, seed: int = 0) -> set[int]:
    """Places of the top weights in `flatten`'s order."""
    values = scores.values if isinstance(scores, Scores) else scores
    return set(select({"all": flatten(values)}, share, seed=seed)["all"].tolist())


def overlap(a: set[int], b: set[int]) -> float:
    """Share of one set of weights that is also in the other; the sets have one size."""
    return len(a & b) / max(1, len(a))


# --- 1, 2: ceiling and saturation -------------------------------------------------------------------


def ceilings(model: LanguageModel, examples: Sequence[Example], names: Sequence[str]) -> pd.DataFrame:
    """Exact FI of every single weight and of every whole matrix, beside the ceiling (method 1b.1).

    One row a question: question, text, confidence P(y_hat), doubt 1 - P(y_hat), ceiling; largest and median
    over single weights; matrix_low and matrix_high over whole matrices, each one perturbation.
    """
    rows = []
    with _unwarned():
        for q in questions(model, examples, names):
            single = fi(q.flat(), q.probs)
            whole = torch.stack([fi(g, q.probs, over=(0, 1)) for g in q.grads.values()])
            rows.append(
                {
                    "question": q.example.id,
                    "text": q.example.question,
                    "confidence": float(q.probs.max()),
                    "doubt": float(q.probs.sum() - q.probs.max()),
                    "ceiling": float(ceiling(q.probs)),
                    "largest": float(single.max()),
                    "median": float(single.median()),
                    "matrix_low": float(whole.min()),
                    "matrix_high": float(whole.max()),
                }
            )
    return pd.DataFrame(rows)


def answer_sets(model: LanguageModel) -> dict[str, Answers]:
    """Three sets of classes: two groups of letters, the four letters, the top 8 tokens and the rest."""
    four = letters(model.tokenizer)
    a, b, c, d = four.tokens
    return {
        "A or B, C or D (K = 2)": Groups(("A or B", "C or D"), (a + b, c + d)),
        "four letters (K = 4)": four,
        "top 8 + rest (K = 9)": Top(8),
    }


def mass_of(model: LanguageModel, examples: Sequence[Example], classes: Groups) -> float:
    """Share of the next token's whole probability that falls on the classes' tokens, mean over questions."""
    tokens = [t for ids in classes.tokens for t in ids]
    shares = []
    with torch.inference_mode():
        for batch in model.batches([e.prompt for e in examples]):
            log_p = model.last_logits(batch).log_softmax(-1)
            shares.append(log_p[:, tokens].exp().sum(-1))
    return float(torch.cat(shares).mean())


def saturation(
    model: LanguageModel,
    examples: Sequence[Example],
    names: Sequence[str],
    sizes: Sequence[int],
    rows: int,
    seed: int,
) -> pd.DataFrame:
    """Share of groups whose exact FI is at the ceiling (method 1b.2): mean over questions, t interval.

    A group is `size` neighbours in a row of a weight matrix, "row" the whole row; `rows` random rows of each
    matrix are looked at. Columns: classes, k, part, size, share, low, high, n (questions), groups, and key,
    the short name k_part_size.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: model.network.get_parameter(n).shape for n in names}
    chosen = {n: torch.randperm(s[0], generator=generator)[:rows] for n, s in shapes.items()}
    parts = parts_of(names)
    lines = []
    for label, classes in answer_sets(model).items():
        for q in questions(model, examples, names, classes):
            for n in names:
                grads = q.grads[n][:, chosen[n]]
                for size in (*sizes, grads.shape[-1]):
                    at, live = _at_ceiling(grads, q.probs, size)
                    name = "row" if size == grads.shape[-1] else str(size)
                    lines.append((label, len(q.probs), parts[n], name, q.example.id, at, live))
    columns = ["classes", "k", "part", "size", "question", "at", "groups"]
    return _mean_shares(pd.DataFrame(lines, columns=columns))


def _at_ceiling(grads: Tensor, probs: Tensor, size: int) -> tuple[int, int]:
    """How many groups of `size` neighbours are at the ceiling, and how many have any gradient."""
    whole = grads.shape[-1] // size * size
    groups = grads[..., :whole].unflatten(-1, (-1, size))
    with _unwarned():
        values = fi(groups, probs, over=-1)
    return int(saturated(values, probs).sum()), int((values > 0).sum())


def _mean_shares(counts: pd.DataFrame) -> pd.DataFrame:
    by = ["classes", "k", "part", "size"]
    each = counts.groupby([*by, "question"], sort=False)[["at", "groups"]].sum()
    each["share"] = each["at"] / each["groups"].clip(lower=1)
    lines = []
    for key, part in each.groupby(by, sort=False):
        mean, low, high = interval_of(part["share"])
        lines.append((*key, mean, max(low, 0.0), min(high, 1.0), len(part), int(part["groups"].sum())))
    table = pd.DataFrame(lines, columns=[*by, "share", "low", "high", "n", "groups"])
    return table.assign(key=[f"{t.k}_{KEYS[t.part]}_{t.size}" for t in table.itertuples()])


def interval_of(values: ArrayLike) -> tuple[float, float, float]:
    """Mean and t interval; one value has no spread, so it is its own interval."""
    numbers = np.asarray(values, dtype=float)
    return mean_interval(numbers) if len(numbers) > 1 else (float(numbers.mean()),) * 3


def row_scores(q: Question, spectral: Spectral) -> dict[str, Tensor]:
    """Four ways to score the output rows of all matrices for one question (method 1b.2).

    A row is one perturbation, but for "FI exact, mean", which is the mean of its single weights' FI.
    """
    with _unwarned():
        joint = [fi(g, q.probs, over=-1) for g in q.grads.values()]
        single = [fi(g, q.probs).mean(-1) for g in q.grads.values()]
        damped = [fi(g, q.probs, over=-1, spectral=spectral) for g in q.grads.values()]
    jacobian = [JACOBIAN(g, q.probs, over=-1) for g in q.grads.values()]
    return {
        "FI exact": torch.cat(joint),
        "FI exact, mean": torch.cat(single),
        f"FI {spectral}": torch.cat(damped),
        "Jacobian norm": torch.cat(jacobian),
    }


def row_spread(
    model: LanguageModel, examples: Sequence[Example], names: Sequence[str], spectral: Spectral
) -> pd.DataFrame:
    """How far a score tells rows apart: columns score, at_ceiling (share of rows), spread, n.

    spread is the 90th over the 10th percentile of the rows' scores, a geometric mean over questions.
    """
    lines = []
    for q in questions(model, examples, names):
        for name, values in row_scores(q, spectral).items():
            low, high = np.quantile(values.double().cpu().numpy(), [0.1, 0.9])
            share = saturated(values, q.probs).double().mean()
            lines.append((name, float(share), float(np.log(high / low))))
    frame = pd.DataFrame(lines, columns=["score", "at_ceiling", "spread"])
    means = frame.groupby("score", sort=False).mean().reset_index()
    return means.assign(spread=np.exp(means["spread"]), n=len(examples))


# --- 3: scale blindness and the filter sweep --------------------------------------------------------


def filters(dampings: Sequence[float], cuts: Sequence[float]) -> list[Spectral]:
    """Exact FI, then damped by each of the dampings, then cut at each of the cuts."""
    return [Exact(), *map(Damped, dampings), *map(Cut, cuts)]


def rankings(
    model: LanguageModel,
    examples: Sequence[Example],
    names: Sequence[str],
    tried: Sequence[Spectral],
    seed: int,
) -> dict[str, Scores]:
    """Scores of the weights by FI under every filter, by the squared Jacobian norm, and at random.

    The last two are the ends to compare with.
    """
    found = score_weights(model, examples, [*map(Influence, tried), SQUARED_SCORE, Random(seed)], only=names)
    by_filter = {Influence(f).name: found[Influence(f).name] for f in tried}
    return by_filter | {JACOBIAN2: found[SQUARED_SCORE], "random": found["random"]}


def filter_sweep(
    model: LanguageModel,
    calibration: Sequence[Sequence[Example]],
    test: Sequence[Example],
    names: Sequence[str],
    tried: Sequence[Spectral],
    share: float,
    kept: Kept | None = None,
) -> Trials:
    """Rank all linear weights by FI under every filter, zero the top share, and ask again (method 1b.3).

    calibration: sets of questions that the scores are means over. Labels: ranking. Beside right and wrong and
    log P of the right answer, the values hold with_exact and with_jacobian, the rank correlation over all
    linear weights, the same for each question.
    """
    ask = Evaluator(model, test, usual_answers(model.tokenizer, lettered=bool(test[0].options)))
    ends = {"with_exact": Influence(Exact()).name, "with_jacobian": JACOBIAN2}

    def tries(k: int) -> Iterator[tuple[Labels, Values]]:
        found = rankings(model, calibration[k], names, tried, k)
        flat = np.stack([flatten(s.values).double().cpu().numpy() for s in found.values()])
        like = {of: spearman(flat, flat[list(found).index(end)]) for of, end in ends.items()}
        for row, (name, scores) in enumerate(found.items()):
            with zeroed(model.network, select(scores, share, names=names, seed=k)):
                outcome = ask()
            values = {of: np.full(len(test), correlations[row]) for of, correlations in like.items()}
            values |= {of: getattr(outcome, of).cpu().numpy() for of in ("correct", "log_prob")}
            yield {"ranking": name}, values

    return collect(ask, tries, sets=len(calibration), kept=kept)


def likeness(sweep: Trials, tried: Sequence[Spectral]) -> pd.DataFrame:
    """How like the two ends every ranking is, a row for each calibration set and ranking.

    Columns: seed, ranking, kind, scale (lambda, or atol^2 of a cut: both act on mu), with_exact and
    with_jacobian.
    """
    rows = sweep.rows().drop_duplicates(["set", "ranking"]).rename(columns={"set": "seed"})
    known = _kinds(tried).reindex(rows.ranking)
    kinds = known.kind.fillna(pd.Series(known.index, known.index)).to_numpy()
    rows = rows.assign(kind=kinds, scale=known.scale.to_numpy())
    return rows[["seed", "ranking", "kind", "scale", "with_exact", "with_jacobian"]].reset_index(drop=True)


def _kinds(tried: Sequence[Spectral]) -> pd.DataFrame:
    lines = {Influence(f).name: (_kind(f), _scale(f)) for f in tried}
    return pd.DataFrame.from_dict(lines, orient="index", columns=["kind", "scale"])


def _kind(spectral: Spectral) -> str:
    return type(spectral).__name__.lower()


def _scale(spectral: Spectral) -> float:
    """Where on the axis of mu a filter begins to let pass: a cut acts on the root of mu."""
    if isinstance(spectral, Damped):
        return spectral.lam
    return spectral.atol**2 if isinstance(spectral, Cut) else 0.0


def damage(sweep: Trials, ranks: pd.DataFrame) -> pd.DataFrame:
    """What is left after zeroing, one row a ranking; the first is the intact model. ranks: see `likeness`.

    Columns: ranking, kind, scale; accuracy, low, high; log_prob, log_prob_low, log_prob_high; n, seeds.
    Accuracy is the mean over calibration sets; its Wilson interval is that of n questions, since all sets
    are tried on the same ones. The interval of the log-probability is a t interval over calibration sets.
    """
    known = ranks.drop_duplicates("ranking").set_index("ranking")[["kind", "scale"]]
    lines = [{"ranking": "intact", **_left(sweep.start()[None], sweep.start("log_prob")[None])}]
    for ranking in known.index:
        values = (sweep.answers(of, ranking=ranking) for of in ("accuracy", "log_prob"))
        lines.append({"ranking": ranking, **_left(*values)})
    return pd.DataFrame(lines).join(known, on="ranking")


def _left(right: np.ndarray, log_p: np.ndarray) -> dict[str, float]:
    n, accuracy = right.shape[1], float(right.mean())
    low, high = wilson(round(accuracy * n), n)
    # the mean over sets need not be a whole number of questions, so the interval is widened to hold it
    line = {"accuracy": accuracy, "low": min(low, accuracy), "high": max(high, accuracy)}
    line |= dict(zip(("log_prob", "log_prob_low", "log_prob_high"), interval_of(log_p.mean(1)), strict=True))
    return {**line, "n": n, "seeds": len(right)}


def minus(sweep: Trials, pairs: Iterable[tuple[str, str]], value: str, seed: int) -> pd.DataFrame:
    """What is left after zeroing by the first ranking of each pair minus that by the second.

    value: "accuracy" or "log_prob". Each question's value is its mean over the calibration sets; the
    bootstrap interval is over the questions, which both rankings share, and takes the calibration sets as
    given. Columns as in `Trials.compare`.
    """
    means = {(t := trial.labels["ranking"]): sweep.answers(value, ranking=t).mean(0) for trial in sweep.tried}
    name = RIGHT.get(value, value)
    one = Trials([], [Trial(0, {"ranking": t}, {name: values}) for t, values in means.items()])
    return one.compare(pairs, label="ranking", value=value, seed=seed)


def stripes(scores: Scores, names: Sequence[str]) -> tuple[float, float]:
    """Share of the variance of a score's ranks within a matrix between its rows, and between its columns.

    A mean over the named matrices; 1 / (number of columns) and 1 / (number of rows) would be chance.
    """
    shares = []
    for name in names:
        ranks = rankdata(scores[name].cpu(), axis=None).reshape(scores[name].shape)
        shares.append([ranks.mean(axis).var() / ranks.var() for axis in (1, 0)])
    rows, columns = np.mean(shares, axis=0)
    return float(rows), float(columns)


def metric_quantiles(
    model: LanguageModel, examples: Sequence[Example], names: Sequence[str], quantiles: Sequence[float]
) -> np.ndarray:
    """Quantiles over weights and questions of the Fisher metric G of a single weight (its only mu)."""
    metrics = [moments(q.flat(), q.probs).metric.double() for q in questions(model, examples, names)]
    return np.quantile(torch.cat(metrics).cpu().numpy(), quantiles)


# --- 4: decomposition and prediction ----------------------------------------------------------------


def decomposition_errors(
    model: LanguageModel, examples: Sequence[Example], names: Sequence[str]
) -> pd.DataFrame:
    """SNIP^2 = FI x squared information length, per sample (method 1b.4): question, error, weights.

    error is the largest relative difference of the two sides over all weights that have a gradient, in
    float64.
    """
    theta = flatten({n: model.network.get_parameter(n).detach() for n in names}).double()
    rows = []
    for q in questions(model, examples, names):
        d = decompose(q.flat().double(), q.probs.double(), -theta)
        live = d.change2 > 0
        error = ((d.fi * d.length2 - d.change2).abs() / d.change2)[live]
        rows.append((q.example.id, float(error.max()), int(live.sum())))
    return pd.DataFrame(rows, columns=["question", "error", "weights"])


def between_averages(scores: Mapping[str, Scores]) -> Tensor:
    """Mean change^2 over (mean FI x mean squared length) for each weight; 1 would be equality.

    The displacement is the same for all samples and cancels, so this is E[s^2] / (E[FI] E[G]).
    """
    change, exact, metric = (
        flatten(scores[m].values).double() for m in (SQUARED_SCORE, "FI exact", "Fisher diagonal")
    )
    live = (exact > 0) & (metric > 0)
    return change[live] / (exact[live] * metric[live])


def row_inequality(model: LanguageModel, examples: Sequence[Example], names: Sequence[str]) -> Tensor:
    """(s_y_hat . delta)^2 over FI x delta^T G delta for whole rows, delta = -theta (method 1b.4, p > 1)."""
    exact = in_dtype(model, torch.float64)
    ratios = []
    for q in questions(exact, examples, names):
        for n, g in q.grads.items():
            along = moments((g * exact.network.get_parameter(n).detach()).sum(-1), q.probs)
            with _unwarned():
                bound = fi(g, q.probs, over=-1) * along.metric
            ratios.append((along.score.square() / bound)[bound > 0])
    return torch.cat(ratios)


def zero_weights(
    model: LanguageModel, examples: Sequence[Example], names: Sequence[str], count: int, seed: int
) -> pd.DataFrame:
    """Really zero a seeded sample of single weights, one at a time, in float64 (method 1b.4).

    One row for each question and weight: question, item, change (of log P(y_hat), absolute) and a column for
    each measure of that weight on that question alone.
    """
    exact = in_dtype(model, torch.float64)
    sizes = [exact.network.get_parameter(n).numel() for n in names]
    places = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    theta = flatten({n: exact.network.get_parameter(n).detach() for n in names})[places]
    parts = []
    for q in questions(exact, examples, names):
        grads = q.flat()[:, places]
        values = {m.name: m(grads, q.probs, value=theta).cpu().numpy() for m in MEASURES.values()}
        parts.append(pd.DataFrame({"question": q.example.id, "item": range(len(places)), **values}))
    starts = np.cumsum([0, *sizes[:-1]])
    owners = np.searchsorted(starts, places.numpy(), side="right") - 1
    items = [{names[o]: places[[i]] - int(starts[o])} for i, o in enumerate(owners)]
    return _with_changes(pd.concat(parts, ignore_index=True), exact, examples, items)


def zero_rows(
    model: LanguageModel,
    examples: Sequence[Example],
    names: Sequence[str],
    count: int,
    seed: int,
    spectral: Spectral,
) -> pd.DataFrame:
    """Really zero a seeded sample of whole output rows, one at a time; columns as in `zero_weights`.

    A row is one perturbation: its FI is the joint one, "FI exact, mean" the mean of its weights' FI,
    "predicted change" (s_y_hat . theta)^2, and the rest is the norm over the row.
    """
    exact = in_dtype(model, torch.float64)
    rows = [(n, r) for n in names for r in range(len(exact.network.get_parameter(n)))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    chosen = [rows[i] for i in order.tolist()]
    parts = []
    for q in questions(exact, examples, names):
        values = [
            _row_measures(q, n, r, exact.network.get_parameter(n)[r].detach(), spectral) for n, r in chosen
        ]
        frame = pd.DataFrame(values).assign(random=RANDOM.of_value(torch.empty(len(chosen))).numpy())
        parts.append(frame.assign(question=q.example.id, item=range(len(chosen))))
    wide = [(n, r, exact.network.get_parameter(n).shape[1]) for n, r in chosen]
    items = [{n: torch.arange(r * width, (r + 1) * width)} for n, r, width in wide]
    return _with_changes(pd.concat(parts, ignore_index=True), exact, examples, items)


def _row_measures(q: Question, name: str, row: int, theta: Tensor, spectral: Spectral) -> dict[str, float]:
    grads = q.grads[name][:, row]
    along = moments((grads * theta).sum(-1), q.probs)
    return {
        "FI exact": float(fi(grads, q.probs, over=0)),
        "FI exact, mean": float(fi_of_moments(moments(grads, q.probs)).mean()),
        f"FI {spectral}": float(fi(grads, q.probs, over=0, spectral=spectral)),
        "Jacobian norm": float(JACOBIAN(grads, q.probs, over=0)),
        "SNIP": float(SNIP(grads, q.probs, over=0, value=theta)),
        "predicted change": float(along.score.square()),
        "information length": float(along.metric),
        "magnitude": float(MAGNITUDE(grads, q.probs, over=0, value=theta)),
    }


def _with_changes(
    frame: pd.DataFrame,
    model: LanguageModel,
    examples: Sequence[Example],
    items: Sequence[Mapping[str, Tensor]],
) -> pd.DataFrame:
    """Add the column `change`: zero each item in turn and ask all questions again."""
    answers = usual_answers(model.tokenizer, lettered=bool(examples[0].options))
    batch = model.batches([e.prompt for e in examples], len(examples))[0]
    order = batch.index.argsort()
    changes = []
    with torch.inference_mode():
        before = answers.log_probs(model.last_logits(batch))
        chosen = before.argmax(-1, keepdim=True)
        for item in tqdm(items, desc="zeroing", delay=3, leave=False):
            with zeroed(model.network, item):
                after = answers.log_probs(model.last_logits(batch))
            changes.append((after - before).gather(1, chosen)[order, 0].abs())
    return frame.assign(change=torch.stack(changes, 1).flatten().cpu().numpy())


def rank_correlations(frame: pd.DataFrame, seed: int, resamples: int = 500) -> pd.DataFrame:
    """Rank correlation of every measure with the true change: mean over questions, of weights within one.

    The interval is a bootstrap over the zeroed items, the same draw for all questions and measures.
    Columns: measure, correlation, low, high, n (items), questions.
    """
    measures = [c for c in frame.columns if c not in ("question", "item", "change")]
    tables = {
        c: frame.pivot(index="question", columns="item", values=c).to_numpy() for c in (*measures, "change")
    }
    count = tables["change"].shape[1]
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    index = np.vstack([np.arange(count), drawn])
    resampled = {c: values[:, index].swapaxes(0, 1) for c, values in tables.items()}  # (draws, questions, n)
    rows = []
    for m in measures:
        each = np.nan_to_num(spearman(resampled[m], resampled["change"])).mean(1)  # a constant ranks nothing
        low, high = np.quantile(each[1:], [0.025, 0.975])
        rows.append((m, each[0], min(low, each[0]), max(high, each[0]), count, len(tables["change"])))
    return pd.DataFrame(rows, columns=["measure", "correlation", "low", "high", "n", "questions"])


# --- 5, 6: ties and unconfident samples -------------------------------------------------------------


def constant_rows(scores: Scores, rtol: float = 1e-3) -> pd.DataFrame:
    """Share of each matrix's rows on which a score is constant but for rounding (method 1b.5).

    Columns: layer, matrix, part, rows, constant (rows whose largest and least value agree to rtol), share.
    """
    parts = parts_of(list(scores.values))
    lines = []
    for name, value in scores.values.items():
        high, low = value.amax(1), value.amin(1)
        constant = int((high - low <= rtol * high).sum())
        place = (layer_of(name), matrix_of(name), parts[name])
        lines.append((*place, len(value), constant, constant / len(value)))
    return pd.DataFrame(lines, columns=["layer", "matrix", "part", "rows", "constant", "share"])


def constant_by_part(table: pd.DataFrame) -> pd.DataFrame:
    """`constant_rows` summed over the parts of the model: columns part, rows, constant, share."""
    sums = table.groupby("part", sort=False)[["rows", "constant"]].sum().reset_index()
    return sums.assign(share=sums["constant"] / sums["rows"])


def rounded(scores: Scores, digits: int = 4) -> dict[str, Tensor]:
    """Scores rounded to significant decimal digits, so that ties which only rounding broke are ties again."""
    found = {}
    for name, value in scores.values.items():
        wide = value.double()
        unit = 10.0 ** (wide.clamp_min(1e-300).log10().floor() - digits + 1)
        found[name] = (wide / unit).round() * unit
    return found


def picks(scores: Scores, share: float, seeds: Sequence[int], digits: int = 4) -> pd.DataFrame:
    """What a top share takes with different tie seeds: columns ties, agree, last_rest, whole_rows.

    ties: whether values count as tied if equal bit for bit, or to `digits`. agree: mean share that two seeds
    have in common. last_rest: share of the picks in that part of the model. whole_rows: share of
    the picks in rows that were taken whole.
    """
    lines = []
    for label, values in {
        "bit for bit": scores.values,
        f"to {digits} digits": rounded(scores, digits),
    }.items():
        sets = [top(values, share, s) for s in seeds]
        pairs = [overlap(a, b) for i, a in enumerate(sets) for b in sets[:i]]
        one, whole = _where(values, share, seeds[0])
        lines.append((label, float(np.mean(pairs)) if pairs else 1.0, one, whole))
    return pd.DataFrame(lines, columns=["ties", "agree", "last_rest", "whole_rows"]).assign(seeds=len(seeds))


def _where(values: Mapping[str, Tensor], share: float, seed: int) -> tuple[float, float]:
    chosen = select(values, share, seed=seed)
    parts = parts_of(list(values))
    total = max(1, sum(map(len, chosen.values())))
    one = sum(len(p) for n, p in chosen.items() if parts[n] == LAST_REST)
    whole = 0
    for name, places in chosen.items():
        rows, width = values[name].shape
        taken = torch.bincount(places // width, minlength=rows)
        whole += int((taken == width).sum()) * width
    return one / total, whole / total


def contributions(scores: Mapping[str, Scores]) -> pd.DataFrame:
    """What each question adds to each measure's average (method 1b.6): columns measure, question, share."""
    parts = []
    for measure, s in scores.items():
        each = np.array(json.loads(s.metadata["per_example"]))
        frame = pd.DataFrame({"question": json.loads(s.metadata["examples"]), "share": each / each.sum()})
        parts.append(frame.assign(measure=measure))
    return pd.concat(parts, ignore_index=True)


def effective_sizes(shares: pd.DataFrame) -> pd.DataFrame:
    """Effective sample size (sum of FI)^2 / sum of FI^2: columns measure, n, effective, largest (share)."""
    groups = shares.groupby("measure", sort=False)["share"]
    effective = groups.agg(n="size", effective=lambda s: 1 / float((s**2).sum()), largest="max")
    return effective.reset_index()


# --- 7, 8: the null direction and rounding ----------------------------------------------------------


def own_score_errors(
    model: LanguageModel, examples: Sequence[Example], name: str, sharpness: Sequence[float]
) -> pd.DataFrame:
    """The predicted class's gradient by its own backward pass, and from the other classes (method 1b.7).

    The logits are multiplied by a sharpness, so that P(y_hat) nears 1; truth is the same in float64. One row
    for each question, sharpness and way ("own backward pass", "from the other classes"): doubt 1 - P(y_hat),
    error (norm of the difference relative to the norm), excess (largest FI of a group of three weights over
    the ceiling: by the formula grad^T pinv(G) grad as it stands, or in the form of method 1a).
    """
    models = [in_dtype(model, dtype) for dtype in (torch.float32, torch.float64)]
    weights = [m.network.get_parameter(name) for m in models]
    answers = usual_answers(model.tokenizer, lettered=bool(examples[0].options))
    rows = []
    for example in tqdm(examples, desc="sharpening", delay=3, leave=False):
        batch = model.batches([example.prompt])[0]
        both = [answers.log_probs(m.last_logits(batch))[0] for m in models]
        for factor in sharpness:
            found = [_sharp_grads(log_p, w, factor) for log_p, w in zip(both, weights, strict=True)]
            rows += [{"question": example.id, "sharpness": factor, **r} for r in _two_ways(*found)]
    return pd.DataFrame(rows)


def _sharp_grads(log_p: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Class gradients (K, *shape) and log P (K,), the predicted class first."""
    sharp = (factor * log_p).log_softmax(-1)
    order = sharp.detach().argsort(descending=True)
    grads = [torch.autograd.grad(sharp[k], weight, retain_graph=True)[0] for k in order]
    return torch.stack(grads), sharp.detach()[order]


def _two_ways(
    single: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]
) -> Iterator[dict[str, float | str]]:
    others = exact[1][1:].exp()
    truth = moments_of_others(exact[0][1:], others, exact[1][0].exp()).score
    grads, p = single[0], single[1].exp()
    ours = moments_of_others(grads[1:], p[1:], p[0])
    triples = grads[..., : grads.shape[-1] // 3 * 3].unflatten(-1, (-1, 3))
    with _unwarned():
        bounded = fi(triples, p, over=-1, predicted=0)
    ways = {
        "own backward pass": (grads[0], as_it_stands(triples, p)),
        "from the other classes": (ours.score, bounded),
    }
    for way, (score, values) in ways.items():
        error = float((score.double() - truth).norm() / truth.norm())
        yield {
            "way": way,
            "doubt": float(others.sum()),
            "error": error,
            "excess": float(values.max() / ours.ceiling.max()),
        }


def as_it_stands(grads: Tensor, probs: Tensor) -> Tensor:
    """FI by the formula as it stands, grad^T pinv(G) grad with all K gradients; y_hat is the first class.

    grads: (K, ..., p). This is what method 1a warns of: nothing keeps it below the ceiling.
    """
    metric = torch.einsum("k,k...i,k...j->...ij", probs, grads, grads)
    inverse = torch.linalg.pinv(metric, hermitian=True)
    return torch.einsum("...i,...ij,...j->...", grads[0], inverse, grads[0])


def null_residual(model: LanguageModel, examples: Sequence[Example], names: Sequence[str]) -> pd.DataFrame:
    """|sum_y P(y) s_y| over sum_y P(y) |s_y|, in norm over all weights: columns question, residual."""
    rows = []
    for q in questions(model, examples, names):
        weighted = q.probs[:, None] * q.flat()
        rows.append((q.example.id, float(weighted.sum(0).norm() / weighted.abs().sum(0).norm())))
    return pd.DataFrame(rows, columns=["question", "residual"])


def precisions(
    model: LanguageModel, examples: Sequence[Example], names: Sequence[str], measures: Sequence[str]
) -> dict[str, dict[str, Scores]]:
    """Scores of the weights with the model held and run in three precisions: {dtype: {measure: Scores}}.

    The library computes root mean square norms in float32 whatever the model's precision, so "float64" is
    float64 but for those.
    """
    found = {}
    for name in ("float64", "float32", "bfloat16"):
        rough = in_dtype(model, getattr(torch, name))
        scores = score_weights(rough, examples, measures, only=names)
        found[name] = {m: scores[m] for m in measures}
    return found


def rounding(found: Mapping[str, Mapping[str, Scores]], share: float) -> pd.DataFrame:
    """Compare `precisions` with float64 (method 1b.8).

    Columns: questions, measure, dtype; differing, the share of weights that differ by more than 1e-5 of
    themselves; worst, the largest ratio either way; largest, the largest difference over the largest score;
    kept, the share of the top weights in common; n (weights).
    """
    rows = []
    for measure, truth in found["float64"].items():
        for dtype in (d for d in found if d != "float64"):
            scores = found[dtype][measure]
            row = {"questions": int(scores.metadata["n"]), "measure": measure, "dtype": dtype}
            rows.append(
                {**row, **_compared(scores, truth), "kept": overlap(top(scores, share), top(truth, share))}
            )
    return pd.DataFrame(rows)


def _compared(low: Scores, high: Scores) -> dict[str, float]:
    a, b = flatten(low.values).double(), flatten(high.values)
    live = (a > 0) & (b > 0)
    difference, ratio = (a - b).abs(), a[live] / b[live]
    return {
        "n": len(a),
        "differing": float((difference > 1e-5 * b).double().mean()),
        "worst": float(torch.maximum(ratio, 1 / ratio).max()),
        "largest": float(difference.max() / b.max()),
    }


def changed_answers(model: LanguageModel, examples: Sequence[Example], dtype: torch.dtype) -> list[Example]:
    """The questions whose predicted class is another one with the model in another precision."""
    classes = usual_answers(model.tokenizer, lettered=bool(examples[0].options))
    here, there = (answer_all(m, examples, classes).predicted for m in (model, in_dtype(model, dtype)))
    return [e for e, changed in zip(examples, (here != there).tolist(), strict=True) if changed]


def differences(found: Mapping[str, Mapping[str, Scores]], dtype: str, shown: int = 20_000) -> pd.DataFrame:
    """Relative difference of exact FI from float64, for evenly spaced weights: columns size, difference.

    size is the root of the weight's Fisher metric, the size of its class gradients, over the largest one.
    """
    a, b = (flatten(found[d]["FI exact"].values).double().cpu() for d in (dtype, "float64"))
    size = flatten(found["float64"]["Fisher diagonal"].values).sqrt().cpu()
    step = max(1, len(b) // shown)
    difference = (a - b).abs() / b.clamp_min(1e-300)
    return pd.DataFrame({"size": (size / size.max())[::step], "difference": difference[::step]})
