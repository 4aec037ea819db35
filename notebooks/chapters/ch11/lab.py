"""Chapter 11: FI among its relatives, on one model and one damage test, and what reviewers asked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fichapters.ch04.digits import Digits
from fichapters.ch11 import components as lab
from fichapters.ch11.components import COAR, Component, Coordinates, Settings
from fichapters.claims import RECORDS, of_run
from fihelpers.answers import Answers, Groups, groups, letters
from fihelpers.evaluate.questions import Evaluator, Outcome
from fihelpers.evaluate.stats import spearman
from fihelpers.influence import SaturationWarning, fi, fi_of_moments, moments_of_others
from fihelpers.measures import MEASURES, Random, find_measure
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.quantize import Scheme, pack_model, quantized, select_channels
from fihelpers.perturb.sparsify import linear_names, select, zeroed
from fihelpers.scores.channels import channel_scores
from fihelpers.scores.hooks import class_grad_blocks, frozen, missed_by_hooks, named_parameters
from fihelpers.scores.store import TURNED, Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example, Task, load_task
from fihelpers.trials import Kept, Labels, Trials, Values, collect

RESAMPLES = 400
UNMOVED = 1e-3  # relative; what a score may differ by and still count as unchanged
EXACT, DAMPED, RANDOM, LENGTH = "FI exact", "FI damped 0.0001", "random", "information length"
ABLATION = "zeroing itself"
DAMAGE, CHANGE = "damage", "change"

ROWS = {  # of the chapter's table: what a relative divides by, what it costs, and what it cannot see
    EXACT: ("the Fisher metric of one weight", "1 + (K-1)", "how large the gradient is"),
    DAMPED: ("the same, plus a constant", "1 + (K-1)", "in which unit a weight is written"),
    "Jacobian norm": (
        "the weight's own unit (saliency maps, FGSM)",
        "1 + 1",
        "the other answers, and the unit",
    ),
    "saliency": ("the weight's unit, twice", "1 + (K-1)", "gradients whose signs do not fit"),
    "Fisher diagonal": ("nothing (Fisher merging)", "1 + (K-1)", "how far a weight will be moved"),
    lab.SQUARED: ("nothing (SqueezeLLM)", "1 + 1", "the other answers, how far a weight is moved"),
    LENGTH: ("nothing; times the removed weight (Fisher pruning)", "1 + (K-1)", "weights that act together"),
    "SNIP": ("nothing; times the weight", "1 + 1", "the other answers, weights that act together"),
    "Taylor": ("nothing; times the weight", "1 + 1", "the same, for the right answer's loss"),
    "Wanda": ("nothing; weight times input", "1 + 0", "what the answer makes of the output"),
    "magnitude": ("nothing", "0 + 0", "the data"),
    lab.INPUTS: ("nothing (AWQ)", "1 + 0", "the weights, and the answer"),
    lab.JOINT: ("the Fisher metric of all its weights", "1 + (K-1)", "anything: it is the odds"),
    lab.JOINT_DAMPED: ("the same, plus a constant", "1 + (K-1)", "what is small beside the constant"),
    lab.GATE_FI: ("the Fisher metric of its gate", "1 + (K-1)", "how much the component does"),
    lab.GATE_CHANGE: ("nothing; times the removal", "1 + 1", "what bends on the way to removal"),
    lab.GATE_LENGTH: ("nothing; times the removal", "1 + (K-1)", "the direction of the change"),
    lab.COOK: ("the length in the gate's own unit", "2C + 0", "the slope"),
    lab.SAM: ("the Euclidean length of the step", "1 + C, and 1", "the unit of the weights"),
    COAR: ("nothing: it removes", "ablations + 0", "parts that act only together"),
    ABLATION: ("nothing: it removes", "C + 0", "parts that stand in for each other"),
    RANDOM: ("nothing", "0 + 0", "everything"),
}
FAMILIES = {  # for the figures
    "FI": (EXACT, DAMPED, lab.JOINT, lab.JOINT_DAMPED, lab.GATE_FI),
    "gradient": ("Jacobian norm", "saliency", "Fisher diagonal", lab.SQUARED, lab.SAM, lab.COOK),
    "gradient and size": (LENGTH, "SNIP", "Taylor", lab.GATE_CHANGE, lab.GATE_LENGTH),
    "no gradient": ("Wanda", "magnitude", lab.INPUTS, RANDOM),
    "removal": (COAR, ABLATION),
}
SHORT = {  # what the names of records are made of
    EXACT: "exact",
    DAMPED: "damped",
    "Jacobian norm": "jacobian",
    "saliency": "saliency",
    "Fisher diagonal": "fisher",
    lab.SQUARED: "squared",
    LENGTH: "length",
    "SNIP": "snip",
    "Taylor": "taylor",
    "Wanda": "wanda",
    "magnitude": "magnitude",
    lab.INPUTS: "inputs",
    lab.JOINT: "joint",
    lab.JOINT_DAMPED: "joint_damped",
    lab.GATE_FI: "gate",
    lab.GATE_CHANGE: "gate_change",
    lab.GATE_LENGTH: "gate_length",
    lab.COOK: "cook",
    lab.SAM: "sam",
    COAR: "coar",
    ABLATION: "ablation",
    RANDOM: "random",
}
PAIRS = [  # of the reviewers' questions: the first relative should agree better with the damage
    *product((EXACT, DAMPED), ("Jacobian norm", "saliency", "SNIP", "Taylor", "Wanda", LENGTH, lab.SAM)),
    *product((EXACT, DAMPED, lab.JOINT_DAMPED, lab.GATE_FI), (RANDOM, COAR)),
]
DIGIT_PAIRS = [*product((EXACT, DAMPED, lab.GATE_FI), [RANDOM]), *product((DAMPED, lab.GATE_FI), [LENGTH])]


def _record(chapter: str, name: str) -> dict[str, Any]:
    return {"chapter": chapter, "table": RECORDS, "name": name}


def _pair(first: str, minus: str) -> dict[str, Any]:
    """What zeroing one percent by one measure does beyond another, in chapter 07."""
    return {"chapter": "07_sparsification", "table": "pairs", "first": first, "minus": minus, "rate": 0.01}


def _gain(measure: str) -> dict[str, Any]:
    """What masking by a measure does beyond random masks, along the deletion curve of chapter 04."""
    return {"chapter": "04_fragile_pixels", "table": "gains", "measure": measure}


QUOTED = {  # numbers of other chapters that answer a reviewer, by the end of their names here
    "path_jacobian": _record("06_embedding_attacks", "ch06_lag_exact"),
    "path_damped": _record("06_embedding_attacks", "ch06_lag_damped"),
    "exact_random": _pair(EXACT, RANDOM),
    "damped_random": _pair(DAMPED, RANDOM),
    "length_snip": _pair(LENGTH, "SNIP"),
    "merged_better": _record("09_merging", "ch09_beat_random"),
    "cam": _gain("Grad-CAM"),
    "cam_exact": _gain(EXACT),
    "cam_damped": _gain(DAMPED),
    "paths": _gain("integrated gradients"),
    "close": _record("05_prompts_and_pixels", "ch05_close_all"),
}
DIRECTIONS = ("natural gradient", "gradient", "its signs", "removal", "random")
COLUMNS = {"Fisher length": "fisher", "Euclidean length": "euclid", "measured": "real"}  # that are recorded
LENGTHS = ("Fisher length", "Euclidean length", "largest entry")


def short(name: str) -> str:
    """What the names of a relative's records are made of."""
    return SHORT.get(name) or re.sub(r"[^\w.-]+", "_", name)


def interleaved(tasks: Sequence[Task]) -> list[Example]:
    """The tasks' examples in turn, so that the first few are of all subjects."""
    return [e for together in zip(*(task.examples for task in tasks), strict=True) for e in together]


def scored(
    model: LanguageModel, examples: Sequence[Example], parts: Sequence[Component], settings: Settings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`components.score_components`, with zeroing itself on the same examples as a last column."""
    table, fit = lab.score_components(model, examples, parts, settings)
    return table.assign(**{ABLATION: lab.damage(model, examples, parts).mean(1)}), fit


def rank_agreement(scores: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Rank correlation of each column of scores (parts, m) with damage (parts,); 0 where one is constant.

    Scores that differ by less than a millionth of the largest are tied: rounding is no ranking.
    """
    scale = np.abs(scores).max(0, keepdims=True)
    rounded = np.round(scores / np.where(scale > 0, scale, 1), 6)
    return np.nan_to_num(spearman(rounded.T, damage))


@dataclass(frozen=True, eq=False)
class Agreement:
    """Rank agreement of m scores with a damage: `value` (m,) and `draws` (resamples, m) of the bootstrap.

    Components and questions are resampled together, so that intervals cover the choice of both.
    """

    names: tuple[str, ...]
    value: np.ndarray
    draws: np.ndarray

    def of(self, name: str) -> tuple[float, float, float]:
        i = self.names.index(name)
        return _interval(self.value[i], self.draws[:, i])

    def minus(self, a: str, b: str) -> tuple[float, float, float]:
        i, j = self.names.index(a), self.names.index(b)
        return _interval(self.value[i] - self.value[j], self.draws[:, i] - self.draws[:, j])

    def table(self) -> pd.DataFrame:
        rows = [(name, *self.of(name)) for name in self.names]
        return pd.DataFrame(rows, columns=["relative", "agreement", "low", "high"]).set_index("relative")


def agreement(scores: pd.DataFrame, falls: np.ndarray, seed: int) -> Agreement:
    """How scores (parts, m) rank the mean of falls (parts, questions): Spearman's rank correlation."""
    values = scores.to_numpy(dtype=float)
    rng = np.random.default_rng(seed)
    parts, n = falls.shape
    draws = []
    for _ in range(RESAMPLES):
        c, q = rng.integers(parts, size=parts), rng.integers(n, size=n)
        draws.append(rank_agreement(values[c], falls[c][:, q].mean(1)))
    return Agreement(tuple(scores.columns), rank_agreement(values, falls.mean(1)), np.array(draws))


def _interval(value: float, draws: np.ndarray) -> tuple[float, float, float]:
    """A percentile interval, widened to its value where the bootstrap's ties have moved it away."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(value), float(min(low, value)), float(max(high, value))


def moved(
    model: LanguageModel, examples: Sequence[Example], parts: Sequence[Component], settings: Settings
) -> pd.DataFrame:
    """What two changes that leave the model as it is do to every relative's scores of the components.

    "rescaled": MLP neurons by powers of two (`components.rescaled`); "rewritten": weights as
    theta = unit sinh(phi), unit being their median magnitude, and gates as exp(2 b). Returns for each
    relative the largest change of a component's score, relative to the score, and the rank correlation of
    before and after. In the gate's new coordinate removal is infinitely far away, so what multiplies by it is
    not defined (NaN).
    """
    before, _ = lab.score_components(model, examples, parts, settings)
    theta = torch.cat([model.network.get_parameter(n).detach().flatten() for n in {c.weight for c in parts}])
    unit = float(theta.abs().median())
    after = {
        "rescaled": lab.score_components(lab.rescaled(model, settings.seed), examples, parts, settings)[0],
        "rewritten": lab.score_components(model, examples, parts, settings, Coordinates(unit))[0],
    }
    rows = {}
    for name in before.columns.drop(RANDOM):
        line: dict[str, float] = {}
        for how, table in after.items():
            old, new = before[name].to_numpy(), table[name].to_numpy()
            apart = np.abs(new - old) / np.maximum(np.abs(old), 1e-12 * np.abs(old).max())
            line[f"{how}: moved"] = float(apart.max())
            line[f"{how}: order"] = float(rank_agreement(new[:, None], _rounded(old))[0])
        rows[name] = line
    made = pd.DataFrame.from_dict(rows, orient="index")
    made.loc[[lab.GATE_CHANGE, lab.GATE_LENGTH], ["rewritten: moved", "rewritten: order"]] = np.nan
    return made


def _rounded(values: np.ndarray) -> np.ndarray:
    """Values rounded to a millionth of the largest, so that rounding is no order."""
    return np.round(values / max(float(np.abs(values).max()), 1e-300), 6)


def overview(moves: pd.DataFrame, ranks: pd.DataFrame) -> pd.DataFrame:
    """The chapter's one table: words of `ROWS` beside what `moved` and `agreement` measured."""
    words = pd.DataFrame.from_dict(ROWS, orient="index", columns=["divides by", "passes", "cannot see"])
    joined = words.join(moves).join(ranks)
    return joined.rename_axis("relative")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The overview as text: whether a change of units moved a score (and how much of the order was left)."""

    def told(row: pd.Series, how: str) -> str:
        if np.isnan(row[f"{how}: moved"]):
            return "not defined" if row.name in (lab.GATE_CHANGE, lab.GATE_LENGTH) else "no units"
        kept = row[f"{how}: moved"] < UNMOVED
        return "unchanged" if kept else f"moved, order {row[f'{how}: order']:+.2f}"

    made = table[["divides by", "passes", "cannot see"]]
    made = made.rename(columns={"passes": "forward + backward passes"})
    for how in ("rescaled", "rewritten"):
        made.insert(len(made.columns) - 1, how, [told(row, how) for _, row in table.iterrows()])
    ends = zip(table.agreement, table.low, table.high, strict=True)
    text = [f"{v:+.2f} [{a:+.2f}, {b:+.2f}]" for v, a, b in ends]
    return made.assign(**{"rank correlation with the damage [95 %]": text})


def directions(
    model: LanguageModel,
    examples: Sequence[Example],
    length: float,
    seed: int,
    matrices: Sequence[str] = ("",),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All linear weights as one perturbation omega: what five directions change per length, by question.

    model: in float64. length: the Fisher length of the steps that are really taken. matrices: the ends of
    the names of the matrices that omega moves. Returns a row for each question and direction: the squared
    change of -log P(y_hat), to first order, per square of each of three lengths, as a share of the most
    possible, and "measured", the squared change per squared Fisher-Rao distance of the answers after the
    step, as a share of FI; and a row for each question with FI, its ceiling, and the largest distance of the
    classes' leverages from 1 - P.
    """
    linear = linear_names(model.network)
    names = [n for n in linear if n.split(".")[-2].endswith(tuple(matrices))]
    if not names:
        known = ", ".join(dict.fromkeys(n.split(".")[-2] for n in linear))
        raise ValueError(f"The model has no matrix whose name ends in any of {matrices!r}; known: {known}.")
    parameters = [model.network.get_parameter(name) for name in names]
    classes = letters(model.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    rows, checks = [], []
    for example in tqdm(examples, desc="directions", leave=False, delay=3):
        grads, p = _class_grads(model, example, classes, parameters)
        y, theta = int(p.argmax()), torch.cat([q.detach().flatten() for q in parameters])
        metric = _metric(grads, p)
        noise = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        tried = (metric.natural(y), grads[y], grads[y].sign(), -theta, noise)
        value = float(metric.leverage[y] / p[y])
        checks.append(
            (example.id, value, float((1 - p[y]) / p[y]), float((metric.leverage - (1 - p)).abs().max()))
        )
        best = (value**0.5, float(grads[y].norm()), float(grads[y].abs().sum()))
        for name, way in zip(DIRECTIONS, tried, strict=True):
            fisher = float((p * (grads @ way) ** 2).sum().sqrt())
            change = abs(float(grads[y] @ way))
            shares = [
                change / d / b for d, b in zip((fisher, way.norm(), way.abs().max()), best, strict=True)
            ]
            step = way * (length / fisher)
            measured = _squared_slope(model, example, classes, parameters, step, p, y) / value
            rows.append((example.id, name, *(float(s) ** 2 for s in shares), measured))
    columns = ["id", "direction", *LENGTHS, "measured"]
    checked = pd.DataFrame(checks, columns=["id", "fi", "ceiling", "leverage_error"])
    return pd.DataFrame(rows, columns=columns), checked


@dataclass(frozen=True, eq=False)
class _Metric:
    """G = J^T D J through its K x K partner M: leverage (K,) of each class, and the natural gradient."""

    rows: Tensor  # D^(1/2) J, (K, p)
    inverse: Tensor  # pseudo-inverse of M
    probs: Tensor
    leverage: Tensor

    def natural(self, y: int) -> Tensor:
        """G^+ grad log P(y), the direction of most change per Fisher length."""
        return self.rows.T @ self.inverse[:, y] / self.probs[y].sqrt()


def _metric(grads: Tensor, p: Tensor) -> _Metric:
    """The square root of P is taken out first: the class gradients' mean is zero but for rounding."""
    centred = grads - p @ grads
    rows = p.sqrt()[:, None] * centred
    m = rows @ rows.T
    inverse = torch.linalg.pinv(m, rtol=1e-9, hermitian=True)
    return _Metric(rows, inverse, p, (m @ inverse).diagonal())


def _class_grads(
    model: LanguageModel, example: Example, classes: Answers, parameters: Sequence[torch.nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """All K class gradients (K, p) of one question, and P (K,)."""
    (batch,) = model.batches([example.prompt], 1)
    with frozen(model.network):
        for q in parameters:
            q.requires_grad_(True)
        log_p = classes.log_probs(model.last_logits(batch))[0]
        rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in log_p]
    grads = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return grads, log_p.detach().exp()


def _squared_slope(
    model: LanguageModel,
    example: Example,
    classes: Answers,
    parameters: Sequence[torch.nn.Parameter],
    step: Tensor,
    p: Tensor,
    y: int,
) -> float:
    """Squared change of log P(y) over the squared Fisher-Rao distance of the answers, after a real step."""
    (batch,) = model.batches([example.prompt], 1)
    before = [q.data.clone() for q in parameters]
    with torch.no_grad():
        for q, part in zip(parameters, step.split([q.numel() for q in parameters]), strict=True):
            q.data += part.view(q.shape)
        after = classes.log_probs(model.last_logits(batch))[0]
        for q, old in zip(parameters, before, strict=True):
            q.data.copy_(old)
    distance = 2 * torch.acos((p.sqrt() * after.exp().sqrt()).sum().clamp(max=1))
    return float((after[y] - p[y].log()) ** 2 / distance**2)


def shares_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over questions of each share, a row a direction."""
    return rows.groupby("direction", sort=False)[[*LENGTHS, "measured"]].mean()


def merged_letters(model: LanguageModel) -> Groups:
    """Two classes made of four letters: A or B, C or D."""
    four = letters(model.tokenizer)
    a, b, c, d = four.tokens
    return Groups(("A or B", "C or D"), ((*a, *b), (*c, *d)))


def word_groups(model: LanguageModel, harmful: Sequence[str], harmless: Sequence[str]) -> Groups:
    """Two classes of words, as a score for harmful text would set them against each other."""
    return groups(
        model.tokenizer, {"harmful": [f" {w}" for w in harmful], "harmless": [f" {w}" for w in harmless]}
    )


def as_text(examples: Sequence[Example]) -> list[Example]:
    """The questions as plain text to be continued: no options, no answer."""
    return [replace(e, prompt=e.question, options=(), answer=None) for e in examples]


def saturation(model: LanguageModel, examples: Sequence[Example], classes: Answers) -> pd.DataFrame:
    """Exact FI of every linear weight, question by question, beside its ceiling, the odds against y_hat.

    Columns: id, weights (of non-zero gradient), at_ceiling (share of these within one part in a thousand),
    spread (largest over smallest FI of these), odds, and gradient_spread (largest over median |s|).
    """
    names = linear_names(model.network)
    parameters = named_parameters(model.network, names)
    rows = []
    with frozen(model.network):
        batches = model.batches([e.prompt for e in examples], 1)
        missed = missed_by_hooks(model, batches, classes, parameters)
        for batch in batches:
            found, scores = [], []
            for block in class_grad_blocks(model, batch, classes, parameters, missed):
                m = moments_of_others(block.grads.double(), block.others.double(), block.chosen.double())
                alive = m.metric > 0
                found.append(fi_of_moments(m)[alive])
                scores.append(m.score.abs()[alive])
                odds = float(m.ceiling.flatten()[0])
            values, slopes = torch.cat(found), torch.cat(scores)
            near = ((values - odds).abs() <= 1e-3 * odds).double().mean()
            spread = float(values.max() / values.min().clamp(min=1e-300))
            place = examples[int(batch.index[0])].id
            steep = float(slopes.max() / slopes.median())
            rows.append((place, len(values), float(near), spread, odds, steep))
    columns = ["id", "weights", "at_ceiling", "spread", "odds", "gradient_spread"]
    return pd.DataFrame(rows, columns=columns)


def readable_saturation(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Medians over the questions of what `saturation` measured, as text: a row for each set of classes."""
    lines = []
    for classes, rows in tables.items():
        m = rows.drop(columns="id").median()
        numbers = (f"{m.weights:,.0f}", f"{m.at_ceiling:.2%}", f"{m.odds:.3f}", f"{m.spread:.3g}")
        lines.append((classes, *numbers, f"{m.gradient_spread:.0f}", len(rows)))
    spreads = ["largest / smallest FI", "largest / median gradient"]
    columns = ["classes", "weights", "at the ceiling", "ceiling", *spreads, "questions"]
    return pd.DataFrame(lines, columns=columns)


def warned(model: LanguageModel, examples: Sequence[Example], classes: Answers) -> bool:
    """Whether the suite warns of saturation when it scores all linear weights with these classes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score_weights(model, examples, [EXACT], answers=classes, only=linear_names(model.network))
    return any(issubclass(w.category, SaturationWarning) for w in caught)


REAL, OTHER, SHUFFLED, TOKENS = "real questions", "other real questions", "shuffled words", "random tokens"
SOURCES = (REAL, OTHER, SHUFFLED, TOKENS)
CUE = "\nAnswer:"


def nonsense_measures(p: SimpleNamespace) -> tuple[str, ...]:
    """The measures that the text speaks of, and those that the settings NONSENSE have beside them."""
    given = (EXACT, DAMPED, LENGTH, *p.NONSENSE["measures"])
    return tuple(dict.fromkeys(find_measure(measure).name for measure in given))


def check_nonsense(p: SimpleNamespace) -> None:
    """Draw once whatever claim R5 will draw, so that a bad setting is refused before long work.

    Raises ValueError for an unknown measure or number of bits, and what `load_task` raises.
    """
    nonsense_measures(p)
    Scheme(p.NONSENSE["bits"])
    _drawn(p, "val", 2 * p.NONSENSE["n"] // len(p.SUBJECTS), p.SEED)
    _drawn(p, "test", p.NONSENSE["n_test"], p.SEED)


def _drawn(p: SimpleNamespace, split: str, n: int, seed: int) -> list[Sequence[Example]]:
    """n questions of each subject."""
    return [load_task(p.TASK, subject, split, n, seed).examples for subject in p.SUBJECTS]


def nonsense(examples: Sequence[Example], source: str, model: LanguageModel, seed: int) -> list[Example]:
    """The same questions without sense: words in another order, or tokens drawn from the whole vocabulary.

    The cue for an answer stays at the end, so that the answers' classes still mean something.
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
            text = str(
                model.tokenizer.decode(rng.integers(1, model.network.config.vocab_size, size=size).tolist())
            )
        made.append(replace(e, prompt=text + CUE))
    return made


def calibration_sets(model: LanguageModel, p: SimpleNamespace, k: int) -> dict[str, list[Example]]:
    """Set number k of each source; "other real questions" shares none with the "real questions"."""
    each = _drawn(p, "val", 2 * p.NONSENSE["n"] // len(p.SUBJECTS), p.SEED + k)
    first = [e for examples in each for e in examples[: len(examples) // 2]]
    second = [e for examples in each for e in examples[len(examples) // 2 :]]
    made = {source: nonsense(first, source, model, p.SEED + k) for source in (SHUFFLED, TOKENS)}
    return {REAL: first, OTHER: second, **made}


def calibrate_on_nonsense(model: LanguageModel, p: SimpleNamespace, kept: Kept) -> Trials:
    """Zero, and protect, the weights of highest score by calibration on sense and on nonsense (claim R5).

    NONSENSE has the numbers of questions (n, n_test) and of calibration sets (seeds), of which some are tried
    (tried), since that takes far longer than choosing; the shares that are zeroed; and the share of output
    rows that keep 16 bits (kept) while all other linear weights are cut to few (bits). Labels: test ("zero",
    "protect", or "overlap": with the choice by real questions, one value), share, measure, and source, which
    may be random, the same for every measure.
    """
    names, measures = linear_names(model.network), nonsense_measures(p)
    tested = [e for examples in _drawn(p, "test", p.NONSENSE["n_test"], p.SEED) for e in examples]
    ask = Evaluator(model, tested, letters(model.tokenizer))

    def tries(k: int) -> Iterator[tuple[Labels, Outcome | Values]]:
        real: dict[tuple[str, float], Tensor] = {}
        for source, examples in calibration_sets(model, p, k).items():
            found = score_weights(model, examples, measures, only=names)
            for measure, share in product(measures, p.NONSENSE["shares"]):
                chosen = _mask(found[measure], share)
                common = real.setdefault((measure, share), chosen)
                labels = {"test": "overlap", "share": share, "measure": measure, "source": source}
                yield labels, {"overlap": chosen[common].double().mean(0, keepdim=True).numpy()}
            for measure in measures if k < p.NONSENSE["tried"] else ():
                for test, outcome in _tests(model, p, ask, found[measure], k):
                    yield {**test, "measure": measure, "source": source}, outcome
        if k < p.NONSENSE["tried"]:
            random, weight = Random(p.SEED + k), model.network.get_parameter
            drawn = Scores({name: random.of_value(weight(name), i) for i, name in enumerate(names)})
            for test, outcome in _tests(model, p, ask, drawn, k):
                yield from (({**test, "measure": m, "source": RANDOM}, outcome) for m in measures)

    return collect(ask, tries, sets=p.NONSENSE["seeds"], kept=kept)


def _tests(
    model: LanguageModel, p: SimpleNamespace, ask: Evaluator, scores: Scores, k: int
) -> Iterator[tuple[dict[str, object], Outcome]]:
    """What the choice by these scores does, zeroed and protected."""
    for share in p.NONSENSE["shares"]:
        with zeroed(model.network, select(scores, share, seed=k)):
            yield {"test": "zero", "share": share}, ask()
    about = {key: value for key, value in scores.metadata.items() if key == TURNED}
    by_row = channel_scores(Scores(scores.values, about), "mean", "rows")
    rows = select_channels(by_row, p.NONSENSE["kept"], seed=k)
    with quantized(model.network, pack_model(model, list(scores.values), Scheme(p.NONSENSE["bits"]), rows)):
        yield {"test": "protect", "share": p.NONSENSE["kept"]}, ask()


def _mask(scores: Scores, share: float) -> Tensor:
    flat = torch.cat([v.flatten() for v in scores.values.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[select({"all": flat}, share)["all"]] = True
    return mask


def against_real(trials: Trials, p: SimpleNamespace, value: str) -> pd.DataFrame:
    """Each source minus random weights, and minus the real questions, with intervals over sets and questions.

    value: "accuracy" or "log_prob". Columns test, share, measure, source, minus, n (questions), difference,
    low, high and value (the source's own mean).
    """
    pairs = [pair for pair in product(SOURCES, (RANDOM, REAL)) if pair != (REAL, REAL)]
    tests = [*product(["zero"], p.NONSENSE["shares"]), ("protect", p.NONSENSE["kept"])]
    lines = []
    for (test, share), measure in product(tests, nonsense_measures(p)):
        here = trials.where(test=test, share=share, measure=measure)
        found = here.compare(pairs, label="source", value=value, seed=p.SEED, resamples=4000)
        own = here.table("source", value=value).set_index("source")[value].loc[found["first"]].to_numpy()
        lines.append(found.assign(test=test, share=share, measure=measure, value=own))
    columns = ["test", "share", "measure", "source", "minus", "n", "difference", "low", "high", "value"]
    return pd.concat(lines, ignore_index=True).rename(columns={"first": "source"})[columns]


def digit_scores(digits: Digits, n: int, settings: Settings) -> tuple[pd.DataFrame, np.ndarray, float]:
    """The same comparison on a network that is no language model: the hidden units of a digit classifier.

    n: digits that scores are computed on; the rest are tested. Returns the scores (units, relatives), the
    falls of log P of the right digit when a unit is zeroed (units, tested digits), and the mean R2 of COAR.
    """
    first, act, last = digits.network.children()
    hidden = act(first(digits.x.flatten(1))).double()
    weight, bias = (q.double() for q in last.parameters())

    def log_p(h: Tensor) -> Tensor:
        return (h @ weight.T + bias).log_softmax(-1)

    units = hidden.shape[1]
    h, y = hidden[:n], digits.y[:n]
    p = log_p(h).exp()
    slopes = weight[None] - (p @ weight)[:, None]  # (n, K, units)
    gates = (slopes * h[:, None]).transpose(0, 1)
    onto = torch.eye(len(weight), dtype=torch.float64)[:, None] - p[None]  # d log P(y) / d logits, (K, n, K)
    grads = onto[..., None] * h[None, :, None]  # of the outgoing weights, (K, n, K, units)
    made = {}
    for name in (EXACT, DAMPED, "Jacobian norm", "Fisher diagonal", LENGTH, "SNIP", "magnitude"):
        given = weight.expand(n, -1, -1)
        made[name] = MEASURES[name](grads, p.T, value=given).sum(1).mean(0).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        made[lab.JOINT] = fi(grads, p.T, over=1).mean(0).numpy()
    table = pd.DataFrame(made).join(lab.gate_moments(gates, p.T))
    coefficients, r2 = _digit_attribution(log_p, h, y, settings)
    falls = _falls(log_p, hidden, digits.y)
    random = torch.rand(units, generator=torch.Generator().manual_seed(settings.seed)).numpy()
    table = table.assign(**{COAR: coefficients, ABLATION: falls[:, :n].mean(1), RANDOM: random})
    return table, falls[:, n:], r2


def _falls(log_p: Callable[[Tensor], Tensor], hidden: Tensor, y: Tensor) -> np.ndarray:
    place = torch.arange(len(y))
    intact = log_p(hidden)[place, y]
    falls = []
    for unit in range(hidden.shape[1]):
        without = hidden.clone()
        without[:, unit] = 0
        falls.append(intact - log_p(without)[place, y])
    return torch.stack(falls).numpy()


def _digit_attribution(
    log_p: Callable[[Tensor], Tensor], h: Tensor, y: Tensor, settings: Settings
) -> tuple[np.ndarray, float]:
    rng = np.random.default_rng(settings.seed)
    m, units = settings.ablations + settings.held, h.shape[1]
    gone = np.argsort(rng.random((m, units)), axis=1) < max(1, round(settings.ablated * units))
    kept = torch.tensor(~gone, dtype=torch.float64)
    found = [
        lab.linear_fit(gone, log_p(kept * one)[:, right].numpy(), settings.held)
        for one, right in zip(h, y.tolist(), strict=True)
    ]
    return -np.mean([slopes for slopes, _ in found], axis=0), float(np.mean([fit["r2"] for _, fit in found]))


def duels(found: Agreement, pairs: Iterable[tuple[str, str]], among: str, n: int) -> pd.DataFrame:
    """Differences in rank agreement among n components or units: above zero the first relative is ahead.

    Columns among, first, minus, n, difference, low, high.
    """
    lines = [(among, a, b, n, *found.minus(a, b)) for a, b in pairs]
    return pd.DataFrame(lines, columns=["among", "first", "minus", "n", "difference", "low", "high"])


def overlaps(trials: Trials) -> pd.DataFrame:
    """Overlap with the choice by real questions: columns seed, source, measure, share, overlap."""
    rows = trials.where(test="overlap").rows().rename(columns={"set": "seed"})
    return rows[["seed", "source", "measure", "share", "overlap"]]


def overlap_gaps(trials: Trials, p: SimpleNamespace) -> pd.DataFrame:
    """How many more of the top weights other real questions share with the first ones than nonsense does.

    Paired by calibration set, with t intervals, for the first share. Columns measure, source, share, n
    (sets), difference, low, high.
    """
    pairs, first = [(OTHER, SHUFFLED), (OTHER, TOKENS)], p.NONSENSE["shares"][0]
    here = trials.where(test="overlap", share=first)
    found = [
        here.where(measure=m).compare(pairs, "measure", label="source", value="overlap", over_sets=True)
        for m in nonsense_measures(p)
    ]
    made = pd.concat(found, ignore_index=True).drop(columns="first").rename(columns={"minus": "source"})
    made = made.assign(share=first, n=p.NONSENSE["seeds"])
    return made[["measure", "source", "share", "n", "difference", "low", "high"]]


def against_grad_cam(quoted: Mapping[str, Quoted]) -> pd.DataFrame:
    """Grad-CAM's gain over random pixels minus FI's, from chapter 04: intervals of their own, no pairing.

    Above zero FI's pixels hurt more. Columns measure, n, difference, low, high.
    """
    cam, lines = quoted["cam"], []
    for name, key in ((EXACT, "cam_exact"), (DAMPED, "cam_damped")):
        own = quoted[key]
        if None in (own.low, own.high, cam.low, cam.high):
            raise ValueError("Chapter 04's gains have lost their intervals; run that chapter again.")
        low, high = cam.low - own.high, cam.high - own.low  # type: ignore[operator]
        lines.append((name, own.n, cam.value - own.value, low, high))
    return pd.DataFrame(lines, columns=["measure", "n", "difference", "low", "high"])


@dataclass(frozen=True)
class Quoted:
    """A number of another chapter, with its interval where it has one."""

    value: float
    low: float | None
    high: float | None
    n: int


def from_book(chapter: str, table: str, **where: object) -> Quoted:
    """The number of another chapter in the one row of a kept table with these values, as the book shows it.

    table: its name, with a column difference, or "records". Raises KeyError that says which is missing.
    """
    rows = of_run()(chapter, table)
    found = rows[(rows[list(where)] == pd.Series(where)).all(axis=1)] if len(rows) else rows
    if len(found) != 1:
        place = ", ".join(f"{name} {value!r}" for name, value in where.items())
        told = f"{len(found)} numbers of {chapter}, {table}, {place}"
        raise KeyError(f"The book has {told}; run that chapter and keep its results.")
    row = found.rename(columns={"difference": "value"}).iloc[0]
    low, high = (None if pd.isna(end) else float(end) for end in (row.low, row.high))
    return Quoted(float(row.value), low, high, int(row.n))
