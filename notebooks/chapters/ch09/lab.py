"""Chapter 09: merge two experts and keep the weights that scores call fragile (method 4.6).

Who may see which questions: some of the validation split calibrate the scores, the others choose the settings
(`Search`), and the test split is asked once, about a list of settings that is complete before any answer
is seen (`Final`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from weakref import finalize

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from fichapters.estimates import estimate_merge
from fichapters.parameters import nearest
from fichapters.tables import RESAMPLES, interval_text, with_verdict
from fihelpers.evaluate.questions import Evaluator
from fihelpers.evaluate.stats import LEVEL, crossed_difference, resampled
from fihelpers.jobs.preflight import Estimate, estimate_scores
from fihelpers.measures import FISHER, SQUARED_SCORE, Influence, Random, find_measure
from fihelpers.models.files import ModelWeights, open_weights
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.models.tensors import TensorDict
from fihelpers.perturb.merge import Merger, merge_models
from fihelpers.perturb.merge_methods import (
    AnyScores,
    Average,
    Dare,
    DareTies,
    Elect,
    FisherAverage,
    Method,
    Protection,
    Scope,
    Stages,
    TaskArithmetic,
    Ties,
    check_choice,
    check_share,
)
from fihelpers.perturb.sparsify import linear_names
from fihelpers.perturb.topshare import TopShare
from fihelpers.scores.store import Scores, provenance
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Kept, Labels, Trial, Trials, collect

IN_MEMORY = 2**30  # bytes of a model up to which its tensors are held rather than read again for each merge
GROUP_BYTES = 2**34  # of scores that are computed at a time

EXACT, DAMPED, RANDOM = "FI exact", "FI damped 0.0001", "random"
PREDICTED, LENGTH = "predicted change", "information length"
WEIGHT, STEP = "size of the weight", "size of the displacement"
FILTERS = {"exact": EXACT, "damped": DAMPED}
# what protection may go by: the score, and whether it is multiplied by the squared displacement (method
# 1b.4); beside these, FI with any other filter
CHOICES: dict[str, tuple[str, bool]] = {
    EXACT: (EXACT, False),
    DAMPED: (DAMPED, False),
    "Jacobian norm": ("Jacobian norm", False),
    "Fisher diagonal": (FISHER.name, False),
    "SNIP": ("SNIP", False),
    PREDICTED: (SQUARED_SCORE.name, True),
    LENGTH: (FISHER.name, True),
    WEIGHT: ("magnitude", False),
    STEP: (STEP, False),
    RANDOM: (RANDOM, False),
}
NO_QUESTION = (WEIGHT, STEP)  # these look at no calibration question
# rows of Table 3: what each protects, and the merge without protection that it is compared with
ROWS: dict[str, tuple[str, Mapping[str, object]]] = {
    "average": ("average", {}),
    "task arithmetic": ("task arithmetic", {}),
    "TIES I": ("TIES", {"stages": "I"}),
    "TIES II": ("TIES", {"stages": "II"}),
    "TIES II, trimmed": ("TIES", {"stages": "II", "whole": False}),
    "TIES I and II": ("TIES", {"stages": "I and II"}),
    "Fisher average": ("Fisher average", {}),
}
RECORDED = {  # names of records and rows of Table 3 (a and b: the domains)
    "base": "base",
    "expert_a": "{a} expert",
    "expert_b": "{b} expert",
    "average": "average",
    "task": "task arithmetic",
    "ties": "TIES",
    "fisher": "Fisher average",
    "dare": "DARE task",
    "dareties": "DARE TIES",
}
TOPICS = {  # of the differences on which the claims rest, by how the names of their records begin
    "c20": "protection helps",
    "c21": "TIES I is best",
    "c22": "rises",
    "c23": "beats random, follows the domain",
}
FALLS, DARE_BEHIND = "and falls", "DARE is behind"
CURVES = ("average", "task arithmetic", "TIES I")
ELSEWHERE = {
    "neither domain": {"task": "bundled", "subjects": ("business", "culture", "geography", "law")},
}
NEEDED = ("densities", "wide", "compared")  # of OPTIONS; the others and what stands for them:
USUAL = {"validation": None, "elect": "mean", "choices": tuple(CHOICES), "elsewhere": ELSEWHERE}
ALONE_SHARE = 0.1  # of A's weights that the earlier version of the paper keeps
OWN, OTHER = "its own domain", "the other domain"

Which = Literal["base", "a", "b"]
Answers = dict[str, np.ndarray]


# --- settings


def options(p: SimpleNamespace) -> dict[str, Any]:
    """The chapter's OPTIONS with what stands for those that are not given.

    densities: what TIES keeps, to search. wide: further shares for the curve. validation: questions of each
    domain to search with (None takes all). elect: TIES' election. choices: what to compare, see `score_of`,
    at the share `compared`. elsewhere: further questions to calibrate on, {name: {"task", "subjects"}}.
    """
    return {**USUAL, **p.OPTIONS}


def choices(p: SimpleNamespace) -> tuple[str, ...]:
    """What protection is compared by, by the names that results keep: "FI damped 1e-4" is 0.0001."""
    named = (by if by in CHOICES else score_of(by)[0] for by in options(p)["choices"])
    return tuple(dict.fromkeys(named))


def scored(p: SimpleNamespace) -> tuple[str, ...]:
    """The choices that anything of the chapter protects by."""
    return tuple(dict.fromkeys((*choices(p), *FILTERS.values(), RANDOM)))


def check(p: SimpleNamespace) -> None:
    """Raise ValueError for settings that cannot be run; a chapter calls it before it opens a model.

    And what `load_task` raises.
    """
    known = (*NEEDED, *USUAL)
    for name in p.OPTIONS:
        if name not in known:
            raise ValueError(f"OPTIONS has no {name!r}{nearest(name, known)}")
    for name in NEEDED:
        if name not in p.OPTIONS:
            raise ValueError(
                f"OPTIONS lacks {name!r}; give densities, wide and compared, as the chapter does."
            )
    given = options(p)
    for share in (*p.SHARES, *given["wide"], given["compared"]):
        check_share("A share", share, "k % is a hundredth of k")
    for density in given["densities"]:
        check_share("A density", density)
    check_choice("elect", given["elect"], Elect)
    choices(p)
    searched = {"SHARES": p.SHARES, "TASK_WEIGHTS": p.TASK_WEIGHTS, "densities": given["densities"]}
    for name, values in searched.items():
        if not values:
            raise ValueError(f"{name} is empty; give at least one value to search.")
    _check_questions(p)


def _check_questions(p: SimpleNamespace) -> None:
    """Raise ValueError where the questions are not there, or too few of them."""
    if len(p.DOMAINS) != 2:
        raise ValueError(f"Two domains are needed, A's and B's, not {len(p.DOMAINS)}.")
    if p.SEEDS < 1 or p.N_CALIBRATION < 1:
        raise ValueError(
            f"{p.SEEDS} calibration sets of {p.N_CALIBRATION} questions: both must be at least 1."
        )
    for domain, subjects in p.DOMAINS.items():
        if not isinstance(subjects, list | tuple) or not subjects:
            raise ValueError(f"the domain {domain!r} needs a list of subjects, not {subjects!r}.")
    for domain in p.DOMAINS:
        validation_set(p, domain)
        test_set(p, domain)
    for name in options(p)["elsewhere"]:
        if len(_elsewhere(p, name, p.SEEDS - 1)) < p.N_CALIBRATION:
            raise ValueError(
                f"Of {name!r} there are too few questions for {p.SEEDS} sets of {p.N_CALIBRATION}."
            )


def score_of(by: str) -> tuple[str, bool]:
    """The score that protection goes by, and whether it is multiplied by the squared displacement.

    by: one of CHOICES, or FI with any filter, such as "FI damped 0.01". Raises ValueError for another one.
    """
    if by in CHOICES:
        return CHOICES[by]
    try:
        measure = find_measure(by)
    except ValueError:
        measure = None
    if not isinstance(measure, Influence):
        raise ValueError(f"Nothing is protected by {by!r}{nearest(by, CHOICES)} FI may have another filter.")
    return measure.name, False


def needs(p: SimpleNamespace) -> tuple[Estimate, ...]:
    """What a run needs of memory and disk: to merge, and to score both experts on every calibration set."""
    place = tempfile.gettempdir()
    merge = estimate_merge(p.BASE, p.MODEL_A, p.MODEL_B, method="TIES", protected=False, out=place)
    own, other = (len(_wanted(p, where)) for where in (OWN, OTHER))
    files = p.SEEDS * (2 * own + (1 + len(options(p)["elsewhere"])) * other)
    settings = {"dtype": p.DTYPE, "device": p.DEVICE, "out": place, "at_a_time": GROUP_BYTES}
    experts = (p.MODEL_A, p.MODEL_B)
    return (merge, *(estimate_scores(expert, files=files // 2, **settings) for expert in experts))


# --- which models are asked


@dataclass(frozen=True)
class Alone:
    """A model as it is, unmerged."""

    which: Which


@dataclass(frozen=True)
class Setting:
    """A merge: its method and what is protected.

    by: see `score_of`, or "" for a merge without protection. share, stages, whole, scope: as in `Protection`.
    calibrated_on: OWN, OTHER or a name of the option `elsewhere`. only_a: B's weights are not protected.
    """

    method: Method = field(default_factory=Average)
    by: str = ""
    share: float = 0.0
    stages: Stages = "I"
    whole: bool = True
    scope: Scope = "global"
    calibrated_on: str = OWN
    only_a: bool = False

    @property
    def drawn(self) -> bool:
        """Whether it differs between calibration sets, or between draws of what DARE drops."""
        scored = self.by not in ("", *NO_QUESTION)
        return scored or isinstance(self.method, FisherAverage | Dare | DareTies)


Asked = Alone | Setting


def calibration_set(p: SimpleNamespace, domain: str, k: int) -> list[Example]:
    """The k-th calibration set of a domain: sets share no question with each other or with the search."""
    n = p.N_CALIBRATION
    return _shuffled(p, domain, "val")[k * n : (k + 1) * n]


def validation_set(p: SimpleNamespace, domain: str) -> list[Example]:
    """The validation questions that are in no calibration set. Raises ValueError if none is left."""
    found = _shuffled(p, domain, "val")
    used = p.SEEDS * p.N_CALIBRATION
    if used >= len(found):
        raise ValueError(
            f"{p.SEEDS} calibration sets of {p.N_CALIBRATION} questions leave none of the {len(found)} "
            f"validation questions of {domain} for the search; make them smaller."
        )
    return found[used:][: options(p)["validation"]]


def test_set(p: SimpleNamespace, domain: str) -> list[Example]:
    """Questions of the test split."""
    return _shuffled(p, domain, "test")[: p.N_TEST]


test_set.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test


class Experts:
    """The base and its two experts, and one network that takes the weights of one merge after another.

    They are the chapter's BASE, MODEL_A and MODEL_B (bundled name, folder or hub id). Scores that are too
    large to be held are files in the system's temporary folder (TMPDIR). Raises, before anything runs, what
    `Merger` raises for models that cannot be merged.
    """

    def __init__(self, p: SimpleNamespace) -> None:
        self.p = p
        self.model = open_model(p.BASE, None, p.DEVICE, p.DTYPE)
        opened = {"base": open_weights(p.BASE, self.model.revision)}
        opened |= {"a": open_weights(p.MODEL_A), "b": open_weights(p.MODEL_B)}
        self.weights = {which: _held(weights) for which, weights in opened.items()}
        self.merger(Setting(Ties()), 0)
        self.linear = linear_names(self.model.network)
        self._scores: dict[tuple[Which, int, str], dict[str, AnyScores]] = {}
        self._folder, self._numbers = Path(tempfile.mkdtemp()), count()
        finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def identity(self) -> list[object]:
        """What merges depend on; see :mod:`fihelpers.identity`. Not the weights that the network has now."""
        return [[w.sha256 for w in self.weights.values()], self.model.network.dtype, self.p]

    def merger(self, setting: Setting, k: int) -> Merger:
        """The merge of a setting with calibration set (or draw) number k."""
        method = setting.method
        fishers = None
        if isinstance(method, FisherAverage):
            fishers = (self.scores("a", k)[FISHER.name], self.scores("b", k)[FISHER.name])
        if isinstance(method, Dare | DareTies):
            method = replace(method, seed=self.p.SEED + k)
        w = self.weights
        return Merger(w["base"], w["a"], w["b"], method, self._protection(setting, k), fishers)

    def put(self, asked: Asked, k: int) -> None:
        """Give the network the weights of a model or of a merge."""
        weights = self.weights[asked.which if isinstance(asked, Alone) else "base"]
        read = weights.read if isinstance(asked, Alone) else self.merger(asked, k).tensor
        own = self.model.network.state_dict()
        with torch.no_grad():
            for name in filter(own.__contains__, weights.layouts):  # not what the network does without
                own[name].copy_(read(name))

    def scores(self, which: Which, k: int, calibrated_on: str = OWN) -> dict[str, AnyScores]:
        """Scores of one expert's linear weights, on calibration set number k; a large model's as files."""
        key = (which, k, calibrated_on)
        if key not in self._scores:
            self._scores[key] = {n: self._laid_down(s) for n, s in self._scored(which, k, calibrated_on)}
        return self._scores[key]

    def _scored(self, which: Which, k: int, calibrated_on: str) -> Iterator[tuple[str, Scores]]:
        """Scores by their names: of a small model all at once, of a large one in turn."""
        weights, base = self.weights[which], self.weights["base"]
        self.put(Alone(which), 0)
        model = LanguageModel(
            self.model.network, self.model.tokenizer, weights.label, weights.revision, weights.sha256
        )
        examples = self._calibration(which, k, calibrated_on)
        wanted = _wanted(self.p, calibrated_on)
        if STEP in wanted:
            steps = {name: (weights.read(name) - base.read(name)).abs() for name in self.linear}
            yield STEP, Scores(steps, provenance(model, examples) | {"measure": STEP})
        # with one seed for both experts they would draw the same weights, and none would be protected alone
        seed = 2 * (self.p.SEED + k) + "ab".index(which)
        names = [name for name in wanted if name != STEP]
        large = 4 * sum(weights.layouts[name].numel() for name in self.linear) > IN_MEMORY
        for part in [[name] for name in names] if large else [names]:
            yield from _in_groups(model, examples, part, self.linear, seed).items()

    def _laid_down(self, scores: Scores) -> AnyScores:
        if 4 * scores.numel() <= IN_MEMORY:
            return scores
        path = self._folder / f"{next(self._numbers)}.safetensors"
        scores.save(path)
        return path

    def _calibration(self, which: Which, k: int, calibrated_on: str) -> list[Example]:
        domains = list(self.p.DOMAINS)
        place = "ab".index(which)
        if calibrated_on == OWN:
            return calibration_set(self.p, domains[place], k)
        if calibrated_on == OTHER:
            return calibration_set(self.p, domains[1 - place], k)
        return _elsewhere(self.p, calibrated_on, k)

    def _protection(self, setting: Setting, k: int) -> Protection | None:
        if not setting.by:
            return None
        name, displaced = score_of(setting.by)
        a = self.scores("a", k, setting.calibrated_on)[name]
        b = None if setting.only_a else self.scores("b", k, setting.calibrated_on)[name]
        return Protection(
            setting.share, a, b, setting.scope, displaced, setting.stages, setting.whole, self.p.SEED + k
        )


class Exam:
    """Questions of both domains, asked of one model after another."""

    def __init__(self, experts: Experts, questions: Mapping[str, Sequence[Example]]) -> None:
        self.experts, self.counts = experts, {domain: len(found) for domain, found in questions.items()}
        everything = [e for found in questions.values() for e in found]
        if not all(e.options and e.answer is not None for e in everything):
            raise ValueError(
                "Merging is judged by questions with options and a right answer; give such a task."
            )
        self._ask = Evaluator(experts.model, everything)
        self._known: dict[tuple[Asked, int], Answers] = {}

    def identity(self) -> list[object]:
        """What the answers depend on; see :mod:`fihelpers.identity`."""
        return [self.experts, self._ask.examples, self.counts]

    def ask(self, asked: Asked, k: int) -> Answers:
        """One model's answers: `correct`, and log P of the right answer to four digits, domain by domain."""
        if (asked, k) not in self._known:
            self.experts.put(asked, k)
            outcome = self._ask()
            log_prob = outcome.log_prob.double().numpy().round(4)
            self._known[asked, k] = {"correct": outcome.correct.numpy(), "log_prob": log_prob}
        return self._known[asked, k]

    def base(self, *_: object) -> Answers:
        """The answers of the base."""
        return self.ask(Alone("base"), 0)

    def accuracies(self, answers: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The accuracy in each domain, and their mean."""
        found = {d: float(answers["correct"][at].mean()) for d, at in _by_domain(self.counts).items()}
        return {**found, "mean": float(np.mean(list(found.values())))}

    def trials(self, models: Mapping[str, Asked], kept: Kept | None = None) -> Trials:
        """Every model by its name, once for each calibration set that it depends on."""
        return collect(self.base, partial(self._tries, models), sets=self.experts.p.SEEDS, kept=kept)

    def _tries(self, models: Mapping[str, Asked], k: int) -> Iterator[tuple[Labels, Answers]]:
        for name, asked in tqdm(models.items(), desc="merged models", unit="model"):
            if k == 0 or (isinstance(asked, Setting) and asked.drawn):
                yield {"name": name, **_described(asked)}, self.ask(asked, k)

    def table(self, trials: Trials) -> pd.DataFrame:
        """A row for each name and calibration set, the sets of a name together.

        Columns: name, set, what describes the setting, the accuracy in each domain, their mean, n and
        `correct`, a 0 or 1 for each question, domain after domain.
        """
        places = {trial.labels["name"]: i for i, trial in reversed([*enumerate(trials.tried)])}
        ordered = sorted(trials.tried, key=lambda trial: places[trial.labels["name"]])
        return pd.DataFrame([self._line(trial) for trial in ordered])

    def _line(self, trial: Trial) -> dict[str, object]:
        right = trial.values["correct"]
        return {
            "name": trial.labels["name"],
            "set": trial.set,
            **trial.labels,
            **self.accuracies(trial.values),
            "n": len(right),
            "correct": "".join("01"[int(c)] for c in right),
        }


class Search:
    """Chooses settings by their mean accuracy over both domains. It holds validation questions only.

    A setting is tried with the first calibration set. Between equals the one that is named first wins.
    """

    def __init__(self, experts: Experts) -> None:
        self.p = experts.p
        self.exam = Exam(experts, {d: validation_set(self.p, d) for d in self.p.DOMAINS})
        self._tried: list[pd.DataFrame] = []

    def identity(self) -> list[object]:
        """What the choices depend on; see :mod:`fihelpers.identity`."""
        return [self.exam]

    def best(self, starts: Mapping[str, Setting], kept: Kept | None = None) -> dict[str, Setting]:
        """Try what can be chosen from each start, by name (see `_steps`), and return the best of each."""
        trials = collect(self.exam.base, self._tries, sets=list(starts.items()), kept=kept)
        self._tried.append(self.exam.table(trials))
        found = {}
        for name, start in starts.items():
            tried = trials.where(name=name).tried
            best = max(tried, key=lambda trial: self.exam.accuracies(trial.values)["mean"]).labels
            given = {k: best[k] for k in ("task_weight", "density") if hasattr(start.method, k)}
            found[name] = replace(start, share=best["share"], method=replace(start.method, **given))
        return found

    def _tries(self, start: tuple[str, Setting]) -> Iterator[tuple[Labels, Answers]]:
        name, best = start
        for step in (self._plain, self._shares, self._near) if best.by else (self._plain,):
            means = {}
            for setting in step(best):
                answers = self.exam.ask(setting, 0)
                means[setting] = self.exam.accuracies(answers)["mean"]
                yield {"name": name, **_described(setting)}, answers
            best = max(means, key=means.__getitem__, default=best)

    def _plain(self, setting: Setting) -> list[Setting]:
        """Without protection: every gamma, and for TIES every density with it."""
        method = setting.method
        if setting.by or not isinstance(method, TaskArithmetic | Ties):
            return []
        methods: list[TaskArithmetic | Ties] = [method]
        if isinstance(method, Ties):
            methods = [replace(method, density=density) for density in options(self.p)["densities"]]
        return [Setting(replace(m, task_weight=w)) for m in methods for w in self.p.TASK_WEIGHTS]

    def _shares(self, setting: Setting) -> list[Setting]:
        return [replace(setting, share=share) for share in self.p.SHARES]

    def _near(self, setting: Setting) -> list[Setting]:
        """With protection: gamma once more, and its neighbours."""
        method = setting.method
        if not isinstance(method, TaskArithmetic | Ties):
            return []
        grid = sorted(self.p.TASK_WEIGHTS)
        place = grid.index(method.task_weight)
        near = [method.task_weight, *grid[max(0, place - 1) : place], *grid[place + 1 : place + 2]]
        return [replace(setting, method=replace(method, task_weight=w)) for w in near]

    def curve(
        self, settings: Mapping[str, Setting], shares: Sequence[float], kept: Kept | None = None
    ) -> pd.DataFrame:
        """Validation accuracy of each setting at each share, with all calibration sets (Fig. 5)."""
        asked, of = {}, {}
        for name, setting in settings.items():
            for share in shares:
                at = f"{name}, {share:g}"
                of[at] = (name, setting.by, share)
                asked[at] = everything(setting) if share == 1 else replace(setting, share=share)
        rows = self.exam.table(self.exam.trials(asked, kept)).drop(columns="correct")
        rows[["curve", "by", "share"]] = [of[name] for name in rows.name]
        return rows

    def table(self) -> pd.DataFrame:
        """Everything that was tried, in its order."""
        return pd.concat(self._tried, ignore_index=True).drop(columns=["set", "correct"])


class Final:
    """The test split. It is asked once, about a list of settings that no test answer can have guided."""

    def __init__(self, experts: Experts) -> None:
        self.exam = Exam(experts, {d: test_set(experts.p, d) for d in experts.p.DOMAINS})
        self._asked = False

    def ask(self, models: Mapping[str, Asked], kept: Kept | None = None) -> Trials:
        """Ask about all models, by name, as in `Exam.trials`. Raises RuntimeError the second time."""
        if self._asked:
            raise RuntimeError(
                "The test questions have been asked already. Put every setting into one list, so that no "
                "test answer guides the next choice."
            )
        self._asked = True
        return self.exam.trials(models, kept)


# --- what the answers say


def accuracy(trials: Trials, name: str, counts: Mapping[str, int], seed: int) -> pd.DataFrame:
    """Accuracy in each domain and the mean of both, with bootstrap intervals over sets and questions.

    Columns value, low, high; index the domains and "mean".
    """
    answers = trials.answers(name=name)
    lines = {}
    for domain in (*counts, "mean"):
        values = _weighted(answers, counts, domain)
        lines[domain] = crossed_difference(values, np.zeros_like(values), seed=seed, resamples=RESAMPLES)
    return pd.DataFrame.from_dict(lines, orient="index", columns=["value", "low", "high"])


def difference(
    trials: Trials,
    pairs: Sequence[tuple[str, str]],
    counts: Mapping[str, int],
    seed: int,
    domain: str = "mean",
    value: str = "accuracy",
) -> tuple[float, float, float]:
    """Accuracy (or mean log P of the right answer, log_prob) of the first of a pair minus that of the second.

    Of several pairs, which share questions and calibration sets, the mean. domain: one of them, or "mean" for
    the mean of both. The interval is a 95 % bootstrap over sets and questions, paired.
    """
    both = [_paired(trials, pair, value) for pair in pairs]
    first, second = (_weighted(np.mean([pair[i] for pair in both], 0), counts, domain) for i in (0, 1))
    return _rounded(crossed_difference(first, second, seed=seed, resamples=RESAMPLES))


def differences(
    trials: Trials,
    pairs: Iterable[tuple[str, str]],
    counts: Mapping[str, int],
    seed: int,
    domain: str = "mean",
    value: str = "accuracy",
) -> pd.DataFrame:
    """`difference` for every pair: columns first, minus, difference, low, high."""
    lines = [(*pair, *difference(trials, [pair], counts, seed, domain, value)) for pair in pairs]
    return pd.DataFrame(lines, columns=["first", "minus", "difference", "low", "high"])


def _paired(trials: Trials, pair: tuple[str, str], value: str) -> list[np.ndarray]:
    """Values (sets, questions) of both; one that depends on no calibration set is the same in all."""
    return [*np.broadcast_arrays(*(trials.answers(value, name=name) for name in pair))]


def _weighted(values: np.ndarray, counts: Mapping[str, int], domain: str) -> np.ndarray:
    """The questions of one domain, or all of them so that their mean is that of the domains' means."""
    if domain != "mean":
        return values[:, _by_domain(counts)[domain]]
    total = sum(counts.values())
    return values * np.concatenate([np.full(n, total / (len(counts) * n)) for n in counts.values()])


def _rounded(found: tuple[float, float, float]) -> tuple[float, float, float]:
    """An end at zero is no rounding error above it."""
    value, low, high = (round(x, 9) + 0.0 for x in found)
    return value, low, high


def table3(
    trials: Trials, names: Iterable[str], counts: Mapping[str, int], seed: int
) -> dict[str, pd.DataFrame]:
    """`accuracy` for each name."""
    return {name: accuracy(trials, name, counts, seed) for name in names}


def as_text(found: Mapping[str, pd.DataFrame], trials: Trials) -> pd.DataFrame:
    """Table 3 to read: accuracies with their intervals, and the k, gamma and density that were chosen."""
    lines = {}
    for name, table in found.items():
        line = {i: f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for i, r in table.iterrows()}
        given = trials.where(name=name).tried[0].labels
        line["k"] = f"{100 * given['share']:g} %" if given["by"] else ""
        for column, title in {"task_weight": "γ", "density": "density"}.items():
            line[title] = "" if np.isnan(given[column]) else f"{given[column]:g}"
        lines[name] = line
    return pd.DataFrame.from_dict(lines, orient="index")


def as_lines(table: pd.DataFrame, *shown: str) -> pd.DataFrame:
    """Differences with their intervals and what these say of "above zero"; `shown` names further columns."""
    made = {"difference [95 %]": interval_text(table, "difference", "low", "high")}
    made["verdict"] = with_verdict(table, above=0).verdict
    made |= {name.replace("_", " "): table[name] for name in shown}
    return pd.DataFrame(made).set_index(table["first"].rename("")).round(3)


def price_text(price: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """`price_of` to read: what A's domain, B's and the mean of both gain, with intervals."""
    made = {
        f"{a} [95 %]": interval_text(price, a, "own_low", "own_high"),
        f"{b} [95 %]": interval_text(price, b, "low", "high"),
        "mean [95 %]": interval_text(price, "mean", "mean_low", "mean_high"),
        f"{a}, relative to random [95 %]": [
            f"{r.relative:+.0%} [{r.relative_low:+.0%}, {r.relative_high:+.0%}]" for r in price.itertuples()
        ],
    }
    return pd.DataFrame(made, index=price.index)


def paired(trials: Trials, p: SimpleNamespace, counts: Mapping[str, int]) -> pd.DataFrame:
    """The paired differences on which claims 20 to 23 rest.

    Columns topic, measure (what protects; "" for none), n, those of `differences`, and log_p and by_log_p:
    the difference of log P, and what its interval says of "above zero".
    """
    behind = [("task arithmetic", "DARE task"), ("TIES", "DARE TIES")]
    asked = [(by, *said) for by in FILTERS.values() for said in _claimed(p, by)]
    parts = []
    for by, topic, pairs, domain in [*asked, ("", DARE_BEHIND, behind, "mean")]:
        found = differences(trials, pairs, counts, p.SEED, domain)
        likely = with_verdict(differences(trials, pairs, counts, p.SEED, domain, "log_prob"), above=0)
        about = {"topic": topic, "measure": by, "n": counts.get(domain, sum(counts.values()))}
        found = found.assign(**about, log_p=likely.difference, by_log_p=likely.verdict)
        parts.append(found[[*about, *found.columns.drop(list(about))]])
    return pd.concat(parts, ignore_index=True).sort_values("topic", kind="stable", ignore_index=True)


def _claimed(p: SimpleNamespace, by: str) -> list[tuple[str, list[tuple[str, str]], str]]:
    """What claims 20 to 23 say of FI by one filter: topic, which rows should be above which, and where."""
    with_without = [(f"{row}, {by}", without) for row, (without, _) in ROWS.items()]
    rises = [(f"{row}, {by}, at the peak", ROWS[row][0]) for row in CURVES]
    falls = [(f"{row}, {by}, at the peak", f"{row}, all kept") for row in CURVES]
    others = [n for n in table_order(p.DOMAINS)[3:] if not n.startswith("TIES I,")]
    rest = [name for name in FILTERS.values() if name != by]
    best = [(f"TIES I, {by}", other) for other in others if not any(name in other for name in rest)]
    kept = f"A kept by {by}, "
    places = [(kept + OWN, f"A kept by {RANDOM}"), (kept + OWN, "average")]
    places += [(kept + OWN, kept + place) for place in (OTHER, *options(p)["elsewhere"])]
    return [
        (TOPICS["c20"], with_without, "mean"),
        (TOPICS["c21"], best, "mean"),
        (TOPICS["c22"], rises, "mean"),
        (FALLS, falls, "mean"),
        (TOPICS["c23"], places, next(iter(p.DOMAINS))),
    ]


def choose(search: Search, kept: Callable[[str], Kept | None] = lambda _: None) -> dict[str, Setting]:
    """The settings of Table 3: each method without protection, and each of ROWS with FI by each filter.

    kept: where what is tried is kept, by a name (`Chapter.kept`).
    """
    plain = Ties(elect=options(search.p)["elect"])
    starts = {"task arithmetic": Setting(TaskArithmetic()), "TIES": Setting(plain)}
    chosen = {"average": Setting(), "Fisher average": Setting(FisherAverage())}
    chosen |= search.best(starts, kept("search"))
    starts = {
        f"{row}, {by}": replace(chosen[without], by=by, **stages)  # type: ignore[arg-type]
        for row, (without, stages) in ROWS.items()
        for by in FILTERS.values()
    }
    chosen |= search.best(starts, kept("search_protected"))
    task, ties = chosen["task arithmetic"].method, chosen["TIES"].method
    assert isinstance(task, TaskArithmetic) and isinstance(ties, Ties)
    chosen["DARE task"] = Setting(Dare(task_weight=task.task_weight))
    chosen["DARE TIES"] = Setting(
        DareTies(task_weight=ties.task_weight, density=ties.density, elect=ties.elect)
    )
    return chosen


def table_order(domains: Iterable[str]) -> list[str]:
    """The rows of Table 3, from the base and the experts on."""
    names = ["base", *(f"{domain} expert" for domain in domains)]
    for row, (without, _) in ROWS.items():
        names += [] if without in names else [without]
        names += [f"{row}, {by}" for by in FILTERS.values()]
    return [*names, "DARE task", "DARE TIES"]


def models_alone(domains: Iterable[str]) -> dict[str, Asked]:
    """The base and the experts, unmerged."""
    a, b = domains
    return {"base": Alone("base"), f"{a} expert": Alone("a"), f"{b} expert": Alone("b")}


def curve_settings(chosen: Mapping[str, Setting]) -> dict[str, Setting]:
    """What the curve over k follows, at the plain merge's gamma: CURVES by FI, the first also by chance."""
    found = {}
    for row in CURVES:
        without, stages = ROWS[row]
        for by in (*FILTERS.values(), *([RANDOM] if row == CURVES[0] else [])):
            found[f"{row}, {by}"] = replace(chosen[without], by=by, **stages)  # type: ignore[arg-type]
    return found


def everything(setting: Setting) -> Setting:
    """The same merge as with all weights of both experts protected, which needs no scores.

    Nothing is protected by one alone: nothing is put back, no election is decided. Stage I trims nothing.
    """
    method = setting.method
    if isinstance(method, Ties) and "I" in setting.stages.split(" and "):
        method = replace(method, density=1.0)
    return Setting(method)


def peaks(curve: pd.DataFrame, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Each FI curve's best share below 1, and the curves' ends, to be asked of the test split."""
    found = {}
    for name, part in curve[(curve.by != RANDOM) & (curve.share < 1)].groupby("curve", sort=False):
        by_share = part.groupby("share")["mean"].mean()
        found[f"{name}, at the peak"] = replace(settings[str(name)], share=float(by_share.idxmax()))
    return found | {f"{row}, all kept": everything(settings[f"{row}, {EXACT}"]) for row in CURVES}


def compared(p: SimpleNamespace) -> dict[str, Setting]:
    """The average, protected by each choice at one size, and by FI layer by layer."""
    share = p.OPTIONS["compared"]
    found = {f"average by {by}": Setting(by=by, share=share) for by in scored(p)}
    layered = {
        f"average by {by}, per layer": Setting(by=by, share=share, scope="layer") for by in FILTERS.values()
    }
    return found | layered


def expert_alone(p: SimpleNamespace) -> dict[str, Setting]:
    """The earlier version's setting: only A is protected from the average, by scores from several domains."""
    kept = Setting(share=ALONE_SHARE, only_a=True)
    found = {
        f"A kept by {by}, {place}": replace(kept, by=by, calibrated_on=place)
        for by in FILTERS.values()
        for place in (OWN, OTHER, *options(p)["elsewhere"])
    }
    others = [by for by in ("Jacobian norm", "SNIP") if by in choices(p)]
    found |= {f"A kept by {by}, {OWN}": replace(kept, by=by) for by in others}
    unasked = [STEP] if STEP in choices(p) else []
    return found | {f"A kept by {by}": replace(kept, by=by) for by in (*unasked, RANDOM)}


def price_of(trials: Trials, names: Sequence[str], counts: Mapping[str, int], seed: int) -> pd.DataFrame:
    """What protecting A alone changes from the plain average: in A's domain, in B's, and in the mean of both.

    Columns: the domains and "mean"; low and high (of B's domain), own_low and own_high (of A's), mean_low and
    mean_high; relative: accuracy in A's domain over that with random protection, minus 1, with
    relative_low and relative_high. Index the names.
    """
    a, b = counts
    lines = {}
    for name in names:
        pair = (name, "average")
        own, other, both = (difference(trials, [pair], counts, seed, domain) for domain in (a, b, "mean"))
        gain, least, most = relative(trials, (name, f"A kept by {RANDOM}"), counts, seed, a)
        lines[name] = {
            a: own[0], "own_low": own[1], "own_high": own[2], b: other[0], "low": other[1], "high": other[2],
            "mean": both[0], "mean_low": both[1], "mean_high": both[2],
            "relative": gain, "relative_low": least, "relative_high": most,
        }  # fmt: skip
    return pd.DataFrame.from_dict(lines, orient="index")


def relative(
    trials: Trials, pair: tuple[str, str], counts: Mapping[str, int], seed: int, domain: str
) -> tuple[float, float, float]:
    """Accuracy of the first over that of the second in one domain, minus 1, with its bootstrap interval."""
    first, second = (_weighted(values, counts, domain) for values in _paired(trials, pair, "accuracy"))
    return _rounded(relative_gain(first, second, seed))


def relative_gain(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float, float]:
    """By what share the mean of a exceeds that of b, and its interval: (relative gain, low, high).

    a and b (sets, questions) hold right (1) and wrong (0), paired and resampled as in `crossed_difference`;
    both means come from the same draws. Where b has nothing right, half an answer stands for it.
    """
    least = 0.5 / a.size
    of_sets, of_questions = resampled(*a.shape, seed, RESAMPLES)
    above, below = (((of_sets @ values) * of_questions).sum(1) for values in (a, b))
    gains = above / np.maximum(below, least) - 1
    low, high = np.quantile(gains, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(a.mean() / max(b.mean(), least) - 1), float(low), float(high)


def conventions(chosen: Mapping[str, Setting]) -> dict[str, Setting]:
    """Conventions in which published programs differ, each changed alone, and each paper's own defaults."""
    ties, task = chosen["TIES"].method, chosen["DARE task"].method
    dare_ties = chosen["DARE TIES"].method
    assert isinstance(ties, Ties) and isinstance(task, Dare) and isinstance(dare_ties, DareTies)
    other = "larger" if ties.elect == "mean" else "mean"
    return {
        "task arithmetic, as advised": Setting(TaskArithmetic()),
        "TIES, as advised": Setting(Ties()),
        "TIES, trimmed by tensor": Setting(replace(ties, trim="tensor")),
        f"TIES, elect {other}": Setting(replace(ties, elect=other)),  # type: ignore[arg-type]
        "DARE task, not rescaled": Setting(replace(task, rescale=False)),
        "DARE task, half dropped": Setting(replace(task, density=0.5)),
        "DARE TIES, no trim": Setting(replace(dare_ties, density=1.0)),
    }


def overlap(experts: Experts, share: float) -> pd.DataFrame:
    """How much of what A and B protect is the same, and how much is put back, for each choice.

    Columns common (share of one's weights that the other has too), put back (share of the scored weights).
    """
    lines = {}
    for by in scored(experts.p):
        name, displaced = score_of(by)
        if displaced:
            continue
        a, b = (_top(experts.scores(which, 0)[name], share) for which in ("a", "b"))
        chosen = max(1, int(a.sum()))
        lines[by] = (int((a & b).sum()) / chosen, int((a ^ b).sum()) / len(a))
    return pd.DataFrame.from_dict(lines, orient="index", columns=["common", "put back"])


def displacements(experts: Experts) -> dict[str, float]:
    """What a merge has to reconcile, over the linear weights.

    Cosine of both displacements, share of equal signs, and the norm of each relative to the base's weights.
    """
    flat = {which: _flat(weights, experts.linear) for which, weights in experts.weights.items()}
    a, b = flat["a"] - flat["base"], flat["b"] - flat["base"]
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(a, b, 0)),
        "equal signs": float((a.sign() == b.sign()).double().mean()),
        "size of A": float(a.norm() / flat["base"].norm()),
        "size of B": float(b.norm() / flat["base"].norm()),
        "weights": a.numel(),
    }


def written(experts: Experts, setting: Setting) -> tuple[str, float]:
    """Write a merge to a temporary folder and open it again.

    Returns its model card, and the largest difference of the weights read back from those in memory.
    """
    w, protection = experts.weights, experts.merger(setting, 0).protection
    with tempfile.TemporaryDirectory() as folder:
        out = merge_models(w["base"], w["a"], w["b"], Path(folder) / "merged", setting.method, protection)
        opened = open_model(str(out), dtype="float32")
        card = (out / "README.md").read_text(encoding="utf-8")
    merger, own = experts.merger(setting, 0), opened.network.state_dict()
    return card, max(
        float((own[n].float() - merger.tensor(n).float()).abs().max())
        for n in own.keys() & merger.layouts.keys()
    )


def _wanted(p: SimpleNamespace, calibrated_on: str) -> list[str]:
    """The scores that are made of an expert; for other questions than its own domain's only FI."""
    by = scored(p) if calibrated_on == OWN else tuple(FILTERS.values())
    own = [FISHER.name] if calibrated_on == OWN else []
    return list(dict.fromkeys([*(score_of(choice)[0] for choice in by), *own]))


def _in_groups(
    model: LanguageModel, examples: Sequence[Example], names: Sequence[str], linear: Sequence[str], seed: int
) -> dict[str, Scores]:
    """`score_weights` for groups of tensors, so that the scores of one group fit beside a large model."""
    sizes = {name: p.numel() for name, p in model.network.named_parameters() if name in set(linear)}
    groups: list[list[str]] = [[]]
    filled = 0
    for name in linear:
        needed = 4 * sizes[name] * len(names)
        if groups[-1] and filled + needed > GROUP_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += needed
    values: dict[str, dict[str, torch.Tensor]] = {}
    metadata = {}
    for number, group in enumerate(groups):
        random = Random(seed + 1000 * number)
        measures = [random if name == RANDOM else find_measure(name) for name in names]
        for name, scores in score_weights(model, examples, measures, only=group).items():
            values.setdefault(name, {}).update({key: value.cpu() for key, value in scores.values.items()})
            metadata[name] = scores.metadata
    return {name: Scores(tensors, metadata[name]) for name, tensors in values.items()}


def _flat(weights: ModelWeights, names: Iterable[str]) -> torch.Tensor:
    return torch.cat([weights.read(name).flatten().double() for name in names])


def _top(given: AnyScores, share: float) -> torch.Tensor:
    """The mask of the top share of all scored weights together."""
    scores = given if isinstance(given, Scores) else Scores.load(Path(given))
    count = round(share * scores.numel())
    top = TopShare(scores.values, lambda name: iter([scores[name].flatten()]), count, torch.float32)
    return torch.cat([top.mask(name) for name in scores.values])


def _held(weights: ModelWeights) -> ModelWeights:
    """The tensors of a small model in memory."""
    if sum(layout.nbytes for layout in weights.layouts.values()) > IN_MEMORY:
        return weights
    return replace(weights, tensors=TensorDict({name: weights.read(name) for name in weights.layouts}))


def _shuffled(p: SimpleNamespace, domain: str, split: str) -> list[Example]:
    """All questions of a domain's subjects in one split, in a seeded order."""
    return _in_random_order(p.TASK, p.DOMAINS[domain], split, p.SEED)


def _elsewhere(p: SimpleNamespace, name: str, k: int) -> list[Example]:
    known = options(p)["elsewhere"]
    if name not in known:
        raise ValueError(f"There are no questions {name!r} to calibrate on; known: {', '.join(known)}.")
    found = _in_random_order(known[name]["task"], known[name]["subjects"], "val", p.SEED)
    return found[k * p.N_CALIBRATION : (k + 1) * p.N_CALIBRATION]


def _in_random_order(task: str, subjects: Sequence[str], split: str, seed: int) -> list[Example]:
    found = [e for subject in subjects for e in load_task(task, subject, split).examples]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def _by_domain(counts: Mapping[str, int]) -> dict[str, slice]:
    ends = np.cumsum([0, *counts.values()])
    return {domain: slice(ends[i], ends[i + 1]) for i, domain in enumerate(counts)}


def _described(asked: Asked) -> dict[str, object]:
    """The setting as columns of a table."""
    if isinstance(asked, Alone):
        return {"method": "", "task_weight": np.nan, "density": np.nan, "by": "", "share": 0.0}
    given = {name: getattr(asked.method, name, np.nan) for name in ("task_weight", "density")}
    return {"method": asked.method.name, **given, "by": asked.by, "share": asked.share}
