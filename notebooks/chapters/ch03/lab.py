"""What chapter 03 does not write out: class gradients question by question, controls, samples (method 1b)."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from fichapters.papers import published
from fichapters.tables import measures_of, with_ends
from fihelpers.answers import Answers, Top, usual_answers
from fihelpers.evaluate.questions import Outcome, answer_all
from fihelpers.evaluate.stats import mean_interval, spearman
from fihelpers.filters import Spectral
from fihelpers.influence import SaturationWarning, fi, moments, saturated
from fihelpers.measures import JACOBIAN, MEASURES, RANDOM, Over, find_measure
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import linear_names, select
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Trial, Trials

EARLIER = "earlier blocks"
LAST_KV = "last block, k and v"
LAST_REST = "last block, the others"
PLACE = ["classes", "k", "part", "size"]
ROWS = 8  # of each matrix, where groups are counted
FIRST_ORDER = "first-order change"


# --- questions and weights to look at


def draw(
    task: str, subjects: Sequence[str], split: str, n: int, seed: int, model: LanguageModel | None = None
) -> list[Example]:
    """n questions of a split, equally many of each subject (the remainder goes to the first ones).

    Of statements to finish only those whose options the model tells apart by their first tokens.
    """
    speaks = model.tokenizer if model else None
    each = [n // len(subjects) + (i < n % len(subjects)) for i in range(len(subjects))]
    pairs = [(s, k) for s, k in zip(subjects, each, strict=True) if k]
    return [e for s, k in pairs for e in load_task(task, s, split, k, seed, tokenizer=speaks)]


def check(p: SimpleNamespace) -> None:
    """Draw whatever the chapter will draw, so that a bad parameter is refused before a model is opened."""
    for split, n in (("val", p.N_CALIBRATION), ("test", p.N_TEST)):
        draw(p.TASK, p.SUBJECTS, split, n, p.SEED)


def look_at(network: PreTrainedModel, blocks: Sequence[int] | None = None) -> list[str]:
    """Names of the linear weights without lm_head, of all blocks or of some (-1 is the last).

    Raises ValueError for a block that the network does not have, and where the last block is not among them,
    or no earlier one: `parts_of` needs both.
    """
    names = linear_names(network)
    depth = max(map(layer_of, names)) + 1
    wanted = range(depth) if blocks is None else blocks
    missing = [b for b in wanted if not -depth <= b < depth]
    if missing:
        raise ValueError(
            f"there is no block {missing[0]}: the network's {depth} blocks are 0 to {depth - 1}."
        )
    kept = {b % depth for b in wanted}
    if depth - 1 not in kept or len(kept) < 2:
        shown = ", ".join(map(str, sorted(kept)))
        raise ValueError(
            f"the last block ({depth - 1}) and an earlier one have to be looked at, not only block {shown}; "
            "set LAYERS to [0, -1], or take a model with more blocks."
        )
    return [n for n in names if layer_of(n) in kept]


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


# --- class gradients


@dataclass(frozen=True, eq=False)
class Question:
    """One question with its class gradients, all K of them: grads {weight: (K, *shape)} and probs (K,)."""

    example: Example
    grads: dict[str, Tensor]
    probs: Tensor

    def flat(self) -> Tensor:
        """The class gradients of all weights in one row a class, (K, weights)."""
        return torch.cat([g.flatten(1) for g in self.grads.values()], 1)


def questions(
    model: LanguageModel, examples: Sequence[Example], names: Sequence[str], answers: Answers | None = None
) -> Iterator[Question]:
    """Class gradients of some weights, question by question, by K plain backward passes."""
    classes = answers or usual_answers(model.tokenizer, examples)
    weights = [model.network.get_parameter(n) for n in names]
    for i, example in enumerate(tqdm(examples, desc="questions", delay=3, leave=False)):
        log_p = log_probs(model, [example], classes.rows(torch.tensor([i])))[0]
        passes = [torch.autograd.grad(one, weights, retain_graph=True) for one in log_p]
        grads = {n: torch.stack(g) for n, g in zip(names, zip(*passes, strict=True), strict=True)}
        yield Question(example, grads, log_p.detach().exp())


def log_probs(model: LanguageModel, examples: Sequence[Example], answers: Answers | None = None) -> Tensor:
    """Log-probabilities (N, K) of the classes of N questions, with the graph that leads to the weights."""
    classes = answers or usual_answers(model.tokenizer, examples)
    batches = model.batches([e.prompt for e in examples], len(examples))
    found = [classes.rows(batch.index).log_probs(model.last_logits(batch)) for batch in batches]
    return torch.cat(found)[torch.cat([batch.index for batch in batches]).argsort()]


def in_dtype(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """A copy of the model whose weights are held and multiplied in another precision."""
    return replace(model, network=copy.deepcopy(model.network).to(dtype))  # type: ignore[arg-type]


# saturation is what the chapter counts, so it does not have itself warned of it
unwarned = partial(warnings.catch_warnings, action="ignore", category=SaturationWarning)


# --- saturation


@dataclass(frozen=True)
class Halves(Answers):
    """Two classes: the first half of other classes together, and the rest of them."""

    of: Answers

    @property
    def size(self) -> int:
        return 2

    def log_probs(self, logits: Tensor) -> Tensor:
        log_p, half = self.of.log_probs(logits), self.of.size // 2
        return torch.stack([log_p[..., :half].logsumexp(-1), log_p[..., half:].logsumexp(-1)], -1)

    def rows(self, index: Tensor) -> Halves:
        return Halves(self.of.rows(index))


def class_sets(model: LanguageModel, examples: Sequence[Example]) -> dict[str, Answers]:
    """Three ways to form classes: options in two halves, options, the 8 likeliest tokens and the rest."""
    usual = usual_answers(model.tokenizer, examples)
    found = {"two halves": Halves(usual), "the options": usual, "top 8 and rest": Top(8)}
    return {f"{name} (K = {classes.size})": classes for name, classes in found.items()}


def saturation(
    at_ceiling: Callable[[Tensor, Tensor, int], tuple[int, int]],
    model: LanguageModel,
    examples: Sequence[Example],
    names: Sequence[str],
    sizes: Sequence[int | str],
    seed: int,
) -> pd.DataFrame:
    """Share of groups of neighbouring weights whose exact FI is at the ceiling (method 1b.2).

    at_ceiling: counts those groups, and all, from class gradients (K, rows, inputs), probabilities (K,) and
    the weights in a group. sizes: of groups, "row" for a whole one. `ROWS` rows of each matrix are looked at.
    Columns: classes, k, part, size, share (mean over questions), low, high (t), n (questions) and groups.
    """
    generator = torch.Generator().manual_seed(seed)
    heights = {name: len(model.network.get_parameter(name)) for name in names}
    rows = {name: torch.randperm(height, generator=generator)[:ROWS] for name, height in heights.items()}
    parts, lines = parts_of(names), []
    for label, classes in class_sets(model, examples).items():
        for q in questions(model, examples, names, classes):
            for (name, grads), size in product(q.grads.items(), sizes):
                width = grads.shape[-1] if size == "row" else int(size)
                with unwarned():
                    found = at_ceiling(grads[:, rows[name]], q.probs, width)
                lines.append((label, len(q.probs), parts[name], str(size), q.example.id, *found))
    return _mean_shares(pd.DataFrame(lines, columns=[*PLACE, "question", "at", "groups"]))


def _mean_shares(counts: pd.DataFrame) -> pd.DataFrame:
    each = counts.groupby([*PLACE, "question"], sort=False)[["at", "groups"]].sum()
    each["share"] = each["at"] / each["groups"].clip(lower=1)
    lines = []
    for key, part in each.groupby(PLACE, sort=False):
        shares = part["share"].to_numpy()
        mean, low, high = mean_interval(shares) if len(shares) > 1 else (shares.mean(),) * 3
        lines.append((*key, mean, max(low, 0.0), min(high, 1.0), len(part), int(part["groups"].sum())))
    return pd.DataFrame(lines, columns=[*PLACE, "share", "low", "high", "n", "groups"])


def row_spread(
    model: LanguageModel, examples: Sequence[Example], names: Sequence[str], spectral: Spectral
) -> pd.DataFrame:
    """How far a score tells rows of the earlier blocks apart.

    A row is one perturbation, but for "FI exact, mean", the mean of its single weights' FI. Columns: score;
    at_ceiling, the share of the rows; spread, the 90th over the 10th percentile of the rows' scores, a
    geometric mean over questions; n.
    """
    ways = {
        "FI exact": lambda grads, probs: fi(grads, probs, over=-1),
        "FI exact, mean": lambda grads, probs: fi(grads, probs).mean(-1),
        f"FI {spectral}": lambda grads, probs: fi(grads, probs, over=-1, spectral=spectral),
        "Jacobian norm": lambda grads, probs: JACOBIAN(grads, probs, over=-1),
    }
    lines = []
    earlier = [name for name, part in parts_of(names).items() if part == EARLIER]
    for q in questions(model, examples, earlier):
        for name, way in ways.items():
            with unwarned():
                values = torch.cat([way(grads, q.probs) for grads in q.grads.values()])
            low, high = np.quantile(values.double().cpu().numpy(), [0.1, 0.9])
            lines.append((name, float(saturated(values, q.probs).double().mean()), float(np.log(high / low))))
    frame = pd.DataFrame(lines, columns=["score", "at_ceiling", "spread"])
    means = frame.groupby("score", sort=False).mean().reset_index()
    return means.assign(spread=np.exp(means["spread"]), n=len(examples))


# --- the filter sweep


def flatten(values: Mapping[str, Tensor]) -> Tensor:
    """All values as one vector, in the order of the mapping."""
    return torch.cat([v.flatten() for v in values.values()])


def alike(scores: Mapping[str, Scores], other: str) -> dict[str, float]:
    """Rank correlation of every score with the score `other`, over all weights; 0 for a constant one."""
    flat = np.stack([flatten(s.values).double().cpu().numpy() for s in scores.values()])
    found = np.nan_to_num(spearman(flat, flat[list(scores).index(other)]))
    return dict(zip(scores, found.tolist(), strict=True))


def noted(outcome: Outcome, likeness: float) -> dict[str, Tensor]:
    """What was answered, with the likeness of the ranking beside it, the same for each question."""
    of_each = torch.full_like(outcome.log_prob, likeness, dtype=torch.float64)
    return {"correct": outcome.correct, "log_prob": outcome.log_prob, "alike": of_each}


def paired(sweep: Trials, pairs: Iterable[tuple[str, str]], seed: int) -> pd.DataFrame:
    """`Trials.compare` of each question's mean over the calibration sets, which are taken as given.

    Columns as there, and "of": log P of the right answer, or accuracy.
    """
    one = []
    for m in measures_of(sweep):
        means = {value: sweep.answers(value, measure=m).mean(0) for value in ("correct", "log_prob")}
        one.append(Trial(0, {"measure": m}, means))
    of = {"log P of the right answer": "log_prob", "accuracy": "accuracy"}
    pairs = list(pairs)
    found = [Trials([], one).compare(pairs, value=v, seed=seed).assign(of=name) for name, v in of.items()]
    return pd.concat(found, ignore_index=True)


# --- what a change of coordinates does to the measures


def rescaled(model: LanguageModel, seed: int, reach: int = 4) -> tuple[LanguageModel, list[str]]:
    """A copy with rows of up_proj times k, columns of down_proj divided by k: the same function.

    k is a random power of two between 2^-reach and 2^reach for each hidden unit, so nothing is rounded. Also
    the names of those weights. Raises ValueError for a network without gated feed-forward layers.
    """
    other = in_dtype(model, model.network.dtype)
    generator = torch.Generator().manual_seed(seed)
    names = []
    for name, module in other.network.named_modules():
        if hasattr(module, "up_proj") and hasattr(module, "down_proj"):
            up, down = module.up_proj.weight.data, module.down_proj.weight.data
            power = torch.randint(-reach, reach + 1, (len(up),), generator=generator)
            k = (2.0**power).to(up)
            up.mul_(k[:, None])
            down.div_(k)
            names += [f"{name}.up_proj.weight", f"{name}.down_proj.weight"]
    if not names:
        raise ValueError(
            "The network has no up_proj and down_proj to rescale; take a gated model, as Qwen2 is."
        )
    return other, names


def invariance(model: LanguageModel, examples: Sequence[Example], share: float, seed: int) -> pd.DataFrame:
    """Every measure of the up and down weights in other coordinates (method 1, Theorem A.1).

    Columns: measure; change, the norm of the difference relative to the norm before; kept, the share of the
    top weights that is still on top; log_prob, the largest change of any class's log-probability; n.
    """
    other, names = rescaled(model, seed)
    measures = [m for m in MEASURES if m != RANDOM.name]
    before, after = (score_weights(m, examples, measures, only=names) for m in (model, other))
    first, second = (answer_all(m, examples).log_probs for m in (model, other))
    moved, lines = float((second - first).abs().max()), []
    for m in measures:
        old, new = (flatten(found[m].values).double() for found in (before, after))
        tops = [select(found[m], share, seed=seed) for found in (before, after)]
        both = [np.intersect1d(tops[0][n].numpy(), tops[1][n].numpy()) for n in names]
        kept = sum(map(len, both)) / max(1, sum(map(len, tops[0].values())))
        lines.append((m, float((new - old).norm() / old.norm()), kept, moved))
    return pd.DataFrame(lines, columns=["measure", "change", "kept", "log_prob"]).assign(n=len(examples))


# --- ties, averages, and a printed value


def by_place(values: Mapping[str, float]) -> pd.DataFrame:
    """A number for each weight matrix as a map, block by matrix."""
    lines = [(layer_of(name), matrix_of(name), value) for name, value in values.items()]
    table = pd.DataFrame(lines, columns=["block", "matrix", "value"])
    return table.pivot(index="block", columns="matrix", values="value")[table.matrix.unique()]


def by_question(scores: Scores) -> np.ndarray:
    """The mean of a score over all weights, of each calibration question by itself."""
    return np.array(json.loads(scores.metadata["per_example"]))


def above_ceiling() -> pd.DataFrame:
    """The earlier version's largest FI of a pixel, one of four choices, beside the ceiling (method 1b.9).

    Columns: P (of the answer), FI, times (FI over the ceiling), n (classes).
    """
    p, printed = published("pixel_p").value, published("pixel_fi").value
    return pd.DataFrame({"P": [p], "FI": [printed], "times": [printed / ((1 - p) / p)], "n": [4]})


# --- weights and rows that are zeroed one at a time


def some_weights(
    model: LanguageModel, names: Sequence[str], count: int, seed: int
) -> list[dict[str, Tensor]]:
    """A seeded sample of single weights: for each its matrix and its flat position there."""
    sizes = [model.network.get_parameter(n).numel() for n in names]
    places = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    starts = np.cumsum([0, *sizes[:-1]])
    owners = np.searchsorted(starts, places.numpy(), side="right") - 1
    return [{names[o]: places[[i]] - int(starts[o])} for i, o in enumerate(owners)]


def some_rows(model: LanguageModel, names: Sequence[str], count: int, seed: int) -> list[dict[str, Tensor]]:
    """A seeded sample of whole output rows: for each its matrix and the flat positions of its weights."""
    rows = [(n, row) for n in names for row in range(len(model.network.get_parameter(n)))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    widths = {n: model.network.get_parameter(n).shape[1] for n in names}
    chosen = [rows[i] for i in order.tolist()]
    return [{n: torch.arange(row * widths[n], (row + 1) * widths[n])} for n, row in chosen]


def pick(tensors: Mapping[str, Tensor], items: Sequence[Mapping[str, Tensor]], start: int = 0) -> Tensor:
    """The values at the positions of all items, side by side; the axes before `start` are kept."""
    return torch.cat([tensors[n].flatten(start)[..., at] for item in items for n, at in item.items()], -1)


def first_order_change(grads: Tensor, probs: Tensor, over: Over = (), *, value: Tensor) -> Tensor:
    """What removing values changes log P(y_hat) by, |s_y_hat . value|; called as a measure, over () or 0."""
    along = grads * value
    return moments(along.sum(1) if over == 0 else along, probs).score.abs()


def guesses(
    model: LanguageModel,
    examples: Sequence[Example],
    names: Sequence[str],
    items: Sequence[Mapping[str, Tensor]],
    measures: Sequence[str],
) -> dict[str, Tensor]:
    """What measures say of items, each one perturbation, on each question: {measure: (questions, items)}.

    items: positions by weight, as `changed` takes them, each of one weight matrix. measures: names that
    `find_measure` knows, or `FIRST_ORDER`.
    """
    weights = dict(model.network.named_parameters())
    single = all(len(at) == 1 for item in items for at in item.values())
    parts = [items] if single else [[item] for item in items]
    values = [pick(weights, part).detach() for part in parts]
    found: dict[str, list[Tensor]] = {name: [] for name in measures}
    for q in questions(model, examples, names):
        grads = [pick(q.grads, part, 1) for part in parts]
        for name in measures:
            measure = first_order_change if name == FIRST_ORDER else find_measure(name)
            call = partial(measure, probs=q.probs, over=() if single else 0)
            with unwarned():
                said = [call(s, value=v) for s, v in zip(grads, values, strict=True)]
            found[name].append(torch.stack(said).flatten())
    made = {name: torch.stack(each) for name, each in found.items()}
    if RANDOM.name in made:  # the same for each question, and not for each row
        made[RANDOM.name] = RANDOM.of_value(torch.empty(len(items))).expand(len(examples), -1)
    return made


def rank_correlations(
    guesses: Mapping[str, Tensor], change: Tensor, seed: int, resamples: int = 500
) -> pd.DataFrame:
    """Rank correlation of every measure with the true change: mean over questions, of items within one.

    guesses: {measure: (questions, items)}; change: (questions, items). The interval is a bootstrap over the
    items, the same draw for all questions and measures. Columns: measure, correlation, low, high, n (items),
    questions, and exact_high, the upper end of exact FI's interval.
    """
    rows, count = change.shape
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    index = np.vstack([np.arange(count), drawn])
    truth = change.cpu().numpy()[:, index].swapaxes(0, 1)  # (draws, questions, items)
    lines = []
    for name, values in guesses.items():
        guessed = values.cpu().numpy()[:, index].swapaxes(0, 1)
        each = np.nan_to_num(spearman(guessed, truth)).mean(1)  # a constant ranks nothing
        lines.append((name, *with_ends(each), count, rows))
    table = pd.DataFrame(lines, columns=["measure", "correlation", "low", "high", "n", "questions"])
    return table.assign(exact_high=table.set_index("measure").high.get("FI exact", np.nan))
