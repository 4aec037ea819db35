"""What chapter 11 does not write out: drawing questions, agreement of ranks, calibration without sense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fichapters.ch11 import components
from fichapters.claims import of_run
from fichapters.tables import with_ends
from fihelpers.evaluate.stats import spearman
from fihelpers.measures import MEASURES
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.quantize import Scheme
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Trials

RESAMPLES = 400
DIGITS = 400  # of handwritten digits, some for scores and the rest for the damage
EXACT, DAMPED, RANDOM, LENGTH = "FI exact", "FI damped 0.0001", "random", "information length"
ABLATION = "zeroing itself"
REAL, OTHER, SHUFFLED, TOKENS = "real questions", "other real questions", "shuffled words", "random tokens"
SOURCES = (REAL, OTHER, SHUFFLED, TOKENS)
CUE = "\nAnswer:"
DIGIT_PAIRS = [  # of the reviewers' question R6
    *product((EXACT, DAMPED, components.GATE_FI), [RANDOM]),
    *product((DAMPED, components.GATE_FI), [LENGTH]),
]


def questions(
    p: SimpleNamespace, split: str, n: int, seed: int, model: LanguageModel | None = None
) -> list[Example]:
    """n examples of each of the chapter's SUBJECTS, one subject after the other.

    Of statements to finish only those whose options the model tells apart by their first tokens.
    """
    speaks = model.tokenizer if model else None
    drawn = [load_task(p.TASK, s, split, n, seed, tokenizer=speaks) for s in p.SUBJECTS]
    return [e for task in drawn for e in task.examples]


def in_turn(examples: Sequence[Example], n: int) -> list[Example]:
    """Subjects of n examples each, in turn, so that the first few are of all subjects."""
    return [e for i in range(n) for e in examples[i::n]]


def check(p: SimpleNamespace) -> None:
    """Draw once whatever the chapter will draw, so that a bad parameter is refused before long work.

    Raises ValueError for a number of bits that is none, or where no digit is left to test, and what
    `load_task` raises.
    """
    Scheme(p.NONSENSE["bits"])
    if p.N_DIGITS >= DIGITS:
        raise ValueError(f"N_DIGITS is {p.N_DIGITS}, which leaves none of {DIGITS} digits to test; lower it.")
    for split, n in [
        ("val", p.N_CALIBRATION),
        ("test", p.N_TEST),
        ("val", 2 * p.NONSENSE["n"] // len(p.SUBJECTS)),
        ("test", p.NONSENSE["n_test"]),
    ]:
        questions(p, split, n, p.SEED)


# --- how scores rank the damage


def rank_agreement(scores: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Rank correlation of each column of scores (parts, m) with damage (parts,); 0 where one is constant.

    Scores that differ by less than a millionth of the largest are tied: rounding is no ranking.
    """
    scale = np.abs(scores).max(0, keepdims=True)
    rounded = np.round(scores / np.where(scale > 0, scale, 1), 6)
    return np.nan_to_num(spearman(rounded.T, damage))


@dataclass(frozen=True, eq=False)
class Agreement:
    """Rank agreement of scores with a damage: `ranks` (1 + resamples, scores), first whole, then resampled.

    Both components and questions are resampled, so that intervals cover the choice of both. n: components.
    """

    ranks: pd.DataFrame
    n: int

    def table(self) -> pd.DataFrame:
        """Columns relative, agreement, low, high, n."""
        lines = [(name, *with_ends(ranks), self.n) for name, ranks in self.ranks.items()]
        return pd.DataFrame(lines, columns=["relative", "agreement", "low", "high", "n"])

    def duels(self, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
        """Differences in agreement: above zero the first relative of a pair orders the damage better.

        Columns first, minus, n, difference, low, high.
        """
        lines = [(a, b, self.n, *with_ends(self.ranks[a] - self.ranks[b])) for a, b in pairs]
        return pd.DataFrame(lines, columns=["first", "minus", "n", "difference", "low", "high"])


def agreement(scores: pd.DataFrame, falls: np.ndarray, seed: int) -> Agreement:
    """How scores (parts, m) rank the mean of falls (parts, questions): Spearman's rank correlation."""
    values, (parts, n) = scores.to_numpy(dtype=float), falls.shape
    rng = np.random.default_rng(seed)
    ranks = [rank_agreement(values, falls.mean(1))]
    for _ in range(RESAMPLES):
        c, q = rng.integers(parts, size=parts), rng.integers(n, size=n)
        ranks.append(rank_agreement(values[c], falls[c][:, q].mean(1)))
    return Agreement(pd.DataFrame(ranks, columns=scores.columns), parts)


# --- a network that is no language model


Digits = tuple[nn.Sequential, Tensor, Tensor]  # a classifier, test digits (N, 64) and their classes (N,)


def train(n: int, seed: int, steps: int = 400) -> Digits:
    """Train a small network on the first 1300 of scikit-learn's 8 x 8 digits, in [0, 1]; test on the last n.

    n: at most 497.
    """
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    loss = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(network(x[:1300]), y[:1300]).backward()
        optimiser.step()
    return network.eval().requires_grad_(False), x[-n:], y[-n:]


def digit_scores(digits: Digits, n: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """The same comparison for the hidden units of a digit classifier, whose class gradients are formulas.

    n: digits that scores are computed on; the rest are tested. A unit's outgoing weights carry the scores of
    weights. Returns the scores (units, relatives) and the falls of log P of the right digit when a unit is
    zeroed (units, tested digits).
    """
    network, x, y = digits
    hidden = network[:-1](x).double()
    weight, bias = (q.double() for q in network[-1].parameters())

    def log_p(h: Tensor) -> Tensor:
        return (h @ weight.T + bias).log_softmax(-1)

    units, h = hidden.shape[1], hidden[:n]
    p = log_p(h).exp()
    slopes = weight[None] - (p @ weight)[:, None]  # d log P(y) / d hidden, (n, K, units)
    gates = (slopes * h[:, None]).transpose(0, 1)
    onto = torch.eye(len(weight), dtype=torch.float64)[:, None] - p[None]  # d log P(y) / d logits, (K, n, K)
    grads = onto[..., None] * h[None, :, None]  # of the outgoing weights, (K, n, K, units)
    made = {
        name: MEASURES[name](grads, p.T, value=weight.expand(n, -1, -1)).sum(1).mean(0)
        for name in (EXACT, DAMPED, "Jacobian norm", LENGTH, "SNIP", "magnitude")
    }
    place = torch.arange(len(y))
    intact = log_p(hidden)[place, y]
    without = [log_p(hidden * others)[place, y] for others in 1 - torch.eye(units)]
    falls = (intact - torch.stack(without)).numpy()
    random = torch.rand(units, generator=torch.Generator().manual_seed(seed))
    made |= {components.GATE_FI: MEASURES[EXACT](gates, p.T).mean(0), RANDOM: random}
    table = pd.DataFrame({name: scores.numpy() for name, scores in made.items()})
    return table.assign(**{ABLATION: falls[:, :n].mean(1)}), falls[:, n:]


# --- calibration on sense and on nonsense


def calibration_sets(model: LanguageModel, p: SimpleNamespace, k: int) -> dict[str, list[Example]]:
    """Set number k of each source; "other real questions" shares none with the "real questions"."""
    n = 2 * p.NONSENSE["n"] // len(p.SUBJECTS)
    drawn = questions(p, "val", n, p.SEED + k, model)
    first = [e for i, e in enumerate(drawn) if i % n < n // 2]
    second = [e for i, e in enumerate(drawn) if i % n >= n // 2]
    made = {source: nonsense(first, source, model, p.SEED + k) for source in (SHUFFLED, TOKENS)}
    return {REAL: first, OTHER: second, **made}


def nonsense(examples: Sequence[Example], source: str, model: LanguageModel, seed: int) -> list[Example]:
    """The same questions without sense: words in another order, or tokens drawn from the whole vocabulary.

    A cue for an answer stays at the end, so that the answers' classes still mean something.
    """
    rng = np.random.default_rng(seed)
    made = []
    for e in examples:
        body = e.prompt.removesuffix(CUE)
        if source == SHUFFLED:
            words = body.split()
            text = " ".join(words[i] for i in rng.permutation(len(words)))
        else:
            size = len(model.tokenizer(body)["input_ids"])
            drawn = rng.integers(1, model.network.config.vocab_size, size=size).tolist()
            text = str(model.tokenizer.decode(drawn))
        made.append(replace(e, prompt=text + e.prompt[len(body) :]))
    return made


def common(chosen: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Which share of the positions `real` was chosen, too: one value, "overlap"."""
    both = sum(int(torch.isin(places, chosen[name]).sum()) for name, places in real.items())
    return {"overlap": np.array([both / sum(map(len, real.values()))])}


def against(trials: Trials, p: SimpleNamespace, measures: Sequence[str]) -> pd.DataFrame:
    """log P after calibration on each source minus that by random weights, and by the real questions.

    Intervals are over sets and questions. Columns test, share, measure, source, minus, n (questions),
    difference, low, high and value (the source's own mean).
    """
    pairs = [pair for pair in product(SOURCES, (RANDOM, REAL)) if pair != (REAL, REAL)]
    tests = [*product(["zero"], p.NONSENSE["shares"]), ("protect", p.NONSENSE["kept"])]
    lines = []
    for (test, share), measure in product(tests, measures):
        here = trials.where(test=test, share=share, measure=measure)
        found = here.compare(pairs, label="source", value="log_prob", seed=p.SEED, resamples=4000)
        own = here.table("source", value="log_prob").set_index("source").log_prob
        value = own.loc[found["first"]].to_numpy()
        lines.append(found.assign(test=test, share=share, measure=measure, value=value))
    columns = ["test", "share", "measure", "source", "minus", "n", "difference", "low", "high", "value"]
    return pd.concat(lines, ignore_index=True).rename(columns={"first": "source"})[columns]


def overlap_gaps(trials: Trials, p: SimpleNamespace, measures: Sequence[str]) -> pd.DataFrame:
    """How many more of the top weights other real questions share with the first ones than nonsense does.

    Paired by calibration set, with t intervals, for the first share. Columns measure, source, share, n
    (sets), difference, low, high.
    """
    pairs, first = [(OTHER, SHUFFLED), (OTHER, TOKENS)], p.NONSENSE["shares"][0]
    here = trials.where(test="overlap", share=first)
    found = here.compare(pairs, "measure", label="source", value="overlap", over_sets=True)
    found = found.sort_values("measure", key=lambda names: names.map(measures.index), kind="stable")
    made = found.assign(source=found["minus"], share=first, n=p.NONSENSE["seeds"])
    return made[["measure", "source", "share", "n", "difference", "low", "high"]]


# --- what another chapter found


def against_grad_cam() -> pd.DataFrame:
    """Grad-CAM's gain over random pixels minus FI's, from chapter 04: intervals of their own, no pairing.

    Above zero FI's pixels hurt more. Columns measure, n, difference, low, high. Raises KeyError where
    chapter 04 has not kept its gains.
    """
    chapter, table = "04_fragile_pixels", "gains"
    gains = of_run()(chapter, table)
    missing = {"Grad-CAM", EXACT, DAMPED} - set(gains.measure if len(gains) else [])
    if missing:
        raise KeyError(f"{chapter} has no {table} of {min(missing)}; run that chapter and keep its results.")
    cam, *own = gains.set_index("measure").loc[["Grad-CAM", EXACT, DAMPED]].itertuples()
    lines = [
        (one.Index, one.n, cam.difference - one.difference, cam.low - one.high, cam.high - one.low)
        for one in own
    ]
    return pd.DataFrame(lines, columns=["measure", "n", "difference", "low", "high"])
