"""What chapter 09 does not write out: whose questions, one network for many merges, settings, differences.

Who may see which questions (method 4.6): some of the validation split calibrate the scores, the others choose
settings, and the test split is asked about a list of settings that is complete before any answer is seen.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import finalize

import numpy as np
import pandas as pd
import torch

from fichapters.ch09.tune import place as made
from fichapters.parameters import nearest
from fichapters.tables import RESAMPLES, with_verdict
from fihelpers.evaluate.stats import crossed_difference, wilson
from fihelpers.jobs.preflight import Estimate, estimate_of, estimate_scores, prompt_lengths, source_of
from fihelpers.measures import FISHER, SQUARED_SCORE, Influence, Random, find_measure
from fihelpers.models.files import ModelWeights, open_weights
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.models.tensors import TensorDict
from fihelpers.perturb.merge import Merger
from fihelpers.perturb.merge_methods import (
    AnyScores,
    Average,
    Dare,
    DareTies,
    Elect,
    FisherAverage,
    Method,
    Stages,
    TaskArithmetic,
    Ties,
    check_choice,
)
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores.store import Scores, provenance
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import CLOZE, Example, load_task
from fihelpers.trials import Trials

IN_MEMORY = 2**30  # bytes of a model up to which its tensors are held rather than read again for each merge
SCORES_IN_MEMORY = 2**28  # of one score of all its weights; a chapter has dozens of them

EXACT, DAMPED, RANDOM = "FI exact", "FI damped 0.0001", "random"
FILTERS = (EXACT, DAMPED)
STEP = "size of the displacement"
# what protection may go by, and the score that it takes; beside these, FI with any other filter
CHOICES = {
    EXACT: EXACT,
    DAMPED: DAMPED,
    "Jacobian norm": "Jacobian norm",
    "Fisher diagonal": FISHER.name,
    "SNIP": "SNIP",
    "predicted change": SQUARED_SCORE.name,
    "information length": FISHER.name,
    "size of the weight": "magnitude",
    STEP: STEP,
    RANDOM: RANDOM,
}
DISPLACED = ("predicted change", "information length")  # times the squared displacement (method 1b.4)
NO_QUESTION = ("size of the weight", STEP)  # these look at no calibration question
# rows of Table 3: the merge without protection, and how each protects
ROWS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "average": ("average", {}),
    "task arithmetic": ("task arithmetic", {}),
    "TIES I": ("TIES", {"stages": "I"}),
    "TIES II": ("TIES", {"stages": "II"}),
    "TIES II, trimmed": ("TIES", {"stages": "II", "whole": False}),
    "TIES I and II": ("TIES", {"stages": "I and II"}),
    "Fisher average": ("Fisher average", {}),
}
CURVES = ("average", "task arithmetic", "TIES I")
HELPS, BEST, BEHIND = "protection helps", "TIES I is best", "DARE is behind"  # topics of `Results.paired`
RISES, FALLS, DOMAIN = "rises", "and falls", "beats random, follows the domain"
OWN, OTHER, NEITHER = "its own domain", "the other domain", "neither domain"  # whose questions calibrate
PLACES = (OWN, OTHER, NEITHER)
ELSEWHERE = ("bundled", ("business", "culture", "geography", "law"))  # task and subjects of neither domain
NEEDED = ("densities", "wide", "compared")  # of OPTIONS; the others and what stands for them:
USUAL = {"validation": None, "elect": "mean", "choices": tuple(CHOICES)}
ALONE_SHARE = 0.1  # of A's weights that the earlier version of the paper keeps

Questions = Mapping[str, Sequence[Example]]  # by domain
Read = Callable[[str], torch.Tensor]  # from a tensor's name to its values


# --- settings


def options(p: SimpleNamespace) -> dict[str, Any]:
    """The chapter's OPTIONS with what stands for those that are not given.

    densities: what TIES keeps, to search. wide: further shares for the curve. validation: questions of each
    domain to search with (None takes all). elect: TIES' election. choices: what to compare, names of CHOICES
    or FI with any filter, at the share `compared`.
    """
    return {**USUAL, **p.OPTIONS}


def score_of(by: str) -> str:
    """The name of the score that a choice takes. Raises ValueError for an unknown choice."""
    if by in CHOICES:
        return CHOICES[by]
    try:
        measure = find_measure(by)
    except ValueError:
        measure = None
    if not isinstance(measure, Influence):
        raise ValueError(f"Nothing is protected by {by!r}{nearest(by, CHOICES)} FI may have another filter.")
    return measure.name


def choices(p: SimpleNamespace) -> tuple[str, ...]:
    """All that weights are protected by, by the names that results keep: "FI damped 1e-4" is 0.0001."""
    named = (by if by in CHOICES else score_of(by) for by in options(p)["choices"])
    return tuple(dict.fromkeys((*named, *FILTERS, RANDOM)))


def wanted(p: SimpleNamespace, place: str = OWN) -> tuple[str, ...]:
    """The choices that an expert is scored for; on other questions than its own domain's only FI."""
    return tuple(dict.fromkeys((*choices(p), "Fisher diagonal"))) if place == OWN else FILTERS


def check(p: SimpleNamespace) -> None:
    """Raise, before a model is opened, what makes a run impossible.

    ValueError for settings, what `load_task` raises for questions, and what `Estimate.check` raises where
    more memory or disk is needed than is free.
    """
    known = (*NEEDED, *USUAL)
    for name in p.OPTIONS:
        if name not in known:
            raise ValueError(f"OPTIONS has no {name!r}{nearest(name, known)}")
    for name in NEEDED:
        if name not in p.OPTIONS:
            raise ValueError(f"OPTIONS lacks {name!r}; give {', '.join(NEEDED)}, as the chapter does.")
    check_choice("elect", options(p)["elect"], Elect)
    choices(p)
    if len(p.DOMAINS) != 2:
        raise ValueError(f"Two domains are needed, A's and B's, not {len(p.DOMAINS)}.")
    for domain, subjects in p.DOMAINS.items():
        if not isinstance(subjects, list | tuple) or not subjects:
            raise ValueError(f"the domain {domain!r} needs a list of subjects, not {subjects!r}.")
    questions(p, "val")
    questions(p, "test")
    calibration(p, "a", p.SEEDS - 1, NEITHER)
    for needed in needs(p):
        needed.check()


def needs(p: SimpleNamespace) -> tuple[Estimate, ...]:
    """What a run needs of memory and disk: room for three models, and to score both experts on every set."""
    experts = experts_of(p)
    sources = [source_of(name, None) for name in (p.BASE, *experts)]
    opened = estimate_of("opening the three models", sources, {}, {}, p.DEVICE, None, {})
    own, other = (len({score_of(by) for by in wanted(p, where)}) for where in (OWN, OTHER))
    files = p.SEEDS * (own + other)
    prompts = [e.prompt for k in range(p.SEEDS) for which in "ab" for e in calibration(p, which, k)]
    tokens = max(prompt_lengths(p.BASE, prompts))
    settings = {"dtype": p.DTYPE, "device": p.DEVICE, "out": tempfile.gettempdir(), "tokens": tokens}
    return (opened, *(estimate_scores(expert, files=files, **settings) for expert in experts))


# --- questions


def calibration(
    p: SimpleNamespace, which: str, k: int, place: str = OWN, model: LanguageModel | None = None
) -> list[Example]:
    """Calibration set k of an expert, "a" or "b": sets share no question with each other or with the search.

    place: one of PLACES. Raises ValueError for too few questions.
    """
    own = "ab".index(which)
    domains = list(p.DOMAINS.values())
    elsewhere = (CLOZE, ELSEWHERE[1]) if p.TASK.startswith(CLOZE) else ELSEWHERE
    of = {OWN: (p.TASK, domains[own]), OTHER: (p.TASK, domains[1 - own]), NEITHER: elsewhere}
    chosen = _drawn(p, *of[place], "val", model)[k * p.N_CALIBRATION : (k + 1) * p.N_CALIBRATION]
    if len(chosen) < p.N_CALIBRATION:
        raise ValueError(f"Of {place!r} there are too few questions for {p.SEEDS} sets of {p.N_CALIBRATION}.")
    return chosen


def questions(p: SimpleNamespace, split: str, model: LanguageModel | None = None) -> Questions:
    """The questions of each domain that are asked: of the split val those in no calibration set, or of test.

    Raises ValueError where none is left, or one has no options and right answer.
    """
    found = {domain: _drawn(p, p.TASK, subjects, split, model) for domain, subjects in p.DOMAINS.items()}
    used, most = (0, p.N_TEST) if split == "test" else (p.SEEDS * p.N_CALIBRATION, options(p)["validation"])
    for domain, examples in found.items():
        if used >= len(examples):
            raise ValueError(
                f"{p.SEEDS} calibration sets of {p.N_CALIBRATION} questions leave none of the "
                f"{len(examples)} validation questions of {domain} for the search; make them smaller."
            )
        if not all(e.options and e.answer is not None for e in examples):
            raise ValueError(
                "Merging is judged by questions with options and a right answer; give such a task."
            )
    return {domain: examples[used:][:most] for domain, examples in found.items()}


def _drawn(
    p: SimpleNamespace, task: str, subjects: Sequence[str], split: str, model: LanguageModel | None
) -> list[Example]:
    """All questions of some subjects in one split that the model can tell apart, in a seeded order."""
    speaks = model.tokenizer if model else None
    found = [e for subject in subjects for e in load_task(task, subject, split, tokenizer=speaks).examples]
    return [found[i] for i in np.random.default_rng(p.SEED).permutation(len(found))]


# --- models


def experts_of(p: SimpleNamespace) -> list[str]:
    """The names of both experts; those that a run makes by itself ("tuned:math") are made where need be."""
    return [made(name, p.BASE) for name in (p.MODEL_A, p.MODEL_B)]


class Experts:
    """The base and its two experts, and one network, which has the base's weights unless it holds others.

    weights: of "base", "a" and "b". linear: names of the weights of linear layers. Scores that are too large
    to be held are files in the system's temporary folder (TMPDIR). Raises what `Merger` raises for models
    that cannot be merged.
    """

    def __init__(self, p: SimpleNamespace) -> None:
        self.model = open_model(p.BASE, None, p.DEVICE, p.DTYPE)
        opened = {"base": open_weights(p.BASE, self.model.revision)}
        opened |= dict(zip("ab", map(open_weights, experts_of(p)), strict=True))
        self.weights = {which: _held(weights) for which, weights in opened.items()}
        Merger(self.weights["base"], self.weights["a"], self.weights["b"], Ties())
        self.linear = linear_names(self.model.network)
        self._large = 4 * sum(self.weights["base"].layouts[n].numel() for n in self.linear) > SCORES_IN_MEMORY
        self._known: dict[Any, dict[str, AnyScores]] = {}
        self._folder = Path(tempfile.mkdtemp())
        finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def identity(self) -> list[object]:
        """What merges depend on; see :mod:`fihelpers.identity`."""
        return [[w.sha256 for w in self.weights.values()], self.model]

    @contextmanager
    def holding(self, what: str | Read) -> Iterator[LanguageModel]:
        """The model with other weights: those of "a" or "b", or what `what` returns for a tensor's name.

        Afterwards it has the base's weights again.
        """
        base = self.weights["base"]
        own, read = (self.weights[what], self.weights[what].read) if isinstance(what, str) else (base, what)
        try:
            self._put(read, own)
            yield LanguageModel(self.model.network, self.model.tokenizer, own.label, own.revision, own.sha256)
        finally:
            self._put(base.read, base)

    def _put(self, read: Read, weights: ModelWeights) -> None:
        own = self.model.network.state_dict()
        with torch.no_grad():
            for name in filter(own.__contains__, weights.layouts):  # not what the network does without
                own[name].copy_(read(name))

    def scores_of(
        self, which: str, examples: Sequence[Example], by: Sequence[str], seed: int
    ) -> dict[str, AnyScores]:
        """Scores of an expert's linear weights by some choices, as `score_weights` returns them.

        seed: of random scores. What was asked before is remembered; the scores of a large model are computed
        one after the other, and are files.
        """
        key = (which, tuple(examples), tuple(by), seed)
        if key not in self._known:
            names = dict.fromkeys(map(score_of, by))
            with self.holding(which) as model:
                scored = self._scored(which, model, examples, names, seed)
                found = {name: self._laid_down(scores) for name, scores in scored}
            self._known[key] = {choice: found[score_of(choice)] for choice in by}
        return self._known[key]

    def _scored(
        self, which: str, model: LanguageModel, examples: Sequence[Example], names: Iterable[str], seed: int
    ) -> Iterator[tuple[str, Scores]]:
        if STEP in names:
            own, base = (self.weights[of].read for of in (which, "base"))
            steps = {name: (own(name) - base(name)).abs() for name in self.linear}
            yield STEP, Scores(steps, provenance(model, examples) | {"measure": STEP})
        measures = [Random(seed) if name == RANDOM else find_measure(name) for name in names if name != STEP]
        for part in [[measure] for measure in measures] if self._large else [measures]:
            yield from score_weights(model, examples, part, only=self.linear).items()

    def _laid_down(self, scores: Scores) -> AnyScores:
        if not self._large:
            return replace(scores, values={name: value.cpu() for name, value in scores.values.items()})
        path = self._folder / f"{len(list(self._folder.iterdir()))}.safetensors"
        scores.save(path)
        return path


def _held(weights: ModelWeights) -> ModelWeights:
    """The tensors of a small model in memory."""
    if sum(layout.nbytes for layout in weights.layouts.values()) > IN_MEMORY:
        return weights
    return replace(weights, tensors=TensorDict({name: weights.read(name) for name in weights.layouts}))


def displacements(experts: Experts) -> pd.Series:
    """What a merge has to reconcile, over the linear weights.

    The size of each displacement over that of the base's weights, the cosine of both, and the share of
    weights whose two displacements have one sign.
    """
    sums, total = torch.zeros(5, dtype=torch.float64), 0
    for name in experts.linear:
        base, a, b = (weights.read(name).double() for weights in experts.weights.values())
        a, b = a - base, b - base
        pairs = [(base, base), (a, a), (b, b), (a, b)]
        sums += torch.stack([*((x * y).sum() for x, y in pairs), (a.sign() == b.sign()).sum()])
        total += base.numel()
    sizes = sums[1:3].sqrt() / sums[0].sqrt()
    cosine = sums[3] / (sums[1] * sums[2]).sqrt()
    names = ["size of A's displacement", "size of B's displacement", "cosine", "equal signs"]
    return pd.Series([*sizes.tolist(), float(cosine), float(sums[4]) / total], names)


# --- what is asked


@dataclass(frozen=True)
class Setting:
    """A merge: its method, what is protected by which score, and how.

    by: a choice, or "" for a merge without protection. share, stages, whole: as in `Protection`. place: whose
    questions calibrate. protects: "ab", or "a" where B's weights are not protected.
    """

    method: Method = field(default_factory=Average)
    by: str = ""
    share: float = 0.0
    stages: Stages = "I"
    whole: bool = True
    place: str = OWN
    protects: str = "ab"

    @property
    def how(self) -> dict[str, Any]:
        """Further arguments of `Protection`."""
        return {"displaced": self.by in DISPLACED, "stages": self.stages, "whole": self.whole}


Asked = Setting | str  # or one of the three models, unmerged
Pairs = list[tuple[str, Any]]  # names, each with what is asked under it


def of_set(asked: Pairs, k: int) -> Pairs:
    """What is asked in set k: all in the first, and then what differs between sets or draws of DARE."""

    def varies(s: Asked) -> bool:
        return not isinstance(s, str) and (
            s.by not in ("", *NO_QUESTION) or isinstance(s.method, FisherAverage | Dare | DareTies)
        )

    return [(name, s) for name, s in asked if k == 0 or varies(s)]


def seeded(method: Method, seed: int) -> Method:
    """The method; DARE with this seed of what it drops."""
    return replace(method, seed=seed) if isinstance(method, Dare | DareTies) else method


def labels(name: str, asked: Asked) -> dict[str, Any]:
    """The name and the setting as columns of a table."""
    if isinstance(asked, str):
        return {"name": name, "method": "", "task_weight": np.nan, "density": np.nan, "by": "", "share": 0.0}
    given = {key: getattr(asked.method, key, np.nan) for key in ("task_weight", "density")}
    return {"name": name, "method": asked.method.name, **given, "by": asked.by, "share": asked.share}


def to_protect(p: SimpleNamespace, chosen: Mapping[str, Setting]) -> Pairs:
    """Each of ROWS with FI by each filter, at every share; chosen: the merges without protection."""
    return [
        (f"{row}, {by}", replace(chosen[without], by=by, share=share, **how))
        for row, (without, how) in ROWS.items()
        for by in FILTERS
        for share in p.SHARES
    ]


def nearby(p: SimpleNamespace, chosen: Mapping[str, Setting]) -> Pairs:
    """Each protected setting that has a gamma, with it and with its neighbours in the grid."""
    grid, found = sorted(p.TASK_WEIGHTS), []
    for name, setting in chosen.items():
        method = setting.method
        if setting.by and isinstance(method, TaskArithmetic | Ties):
            i = grid.index(method.task_weight)
            near = [grid[i], *grid[max(0, i - 1) : i], *grid[i + 1 : i + 2]]
            found += [(name, replace(setting, method=replace(method, task_weight=w))) for w in near]
    return found


def dropped(chosen: Mapping[str, Setting]) -> dict[str, Setting]:
    """DARE, with the gamma and density of the method that it is put before."""
    task, ties = (vars(chosen[row].method) for row in ("task arithmetic", "TIES"))
    return {"DARE task": Setting(Dare(**task)), "DARE TIES": Setting(DareTies(**ties))}


def curves_of(chosen: Mapping[str, Setting]) -> dict[str, Setting]:
    """What the curve over k follows, at the plain merge's gamma: CURVES by FI, the first also by chance."""
    found = {}
    for row in CURVES:
        without, how = ROWS[row]
        for by in (*FILTERS, *([RANDOM] if row == CURVES[0] else [])):
            found[f"{row}, {by}"] = replace(chosen[without], by=by, **how)
    return found


def along(p: SimpleNamespace, curves: Mapping[str, Setting]) -> Pairs:
    """Every curve at every share, from 0, no protection, on."""
    return [
        (f"{name}, {share:g}", everything(setting) if share == 1 else replace(setting, share=share))
        for name, plain in curves.items()
        for share in (0.0, *sorted({*p.SHARES, *options(p)["wide"]}))
        for setting in [plain if share else Setting(plain.method)]
    ]


def everything(setting: Setting) -> Setting:
    """The same merge as with all weights of both experts protected, which needs no scores.

    Nothing is protected by one alone: nothing is put back, no election is decided. Stage I trims nothing.
    """
    method = setting.method
    if isinstance(method, Ties) and "I" in setting.stages.split(" and "):
        method = replace(method, density=1.0)
    return Setting(method)


def to_test(p: SimpleNamespace, chosen: Mapping[str, Setting], peaks: Mapping[str, Setting]) -> Pairs:
    """All that the test questions are asked about: the models, what was chosen, and three side questions.

    The curves' peaks and ends; the average, protected by each choice at one size; and the earlier version's
    setting, only A protected from the average, by scores from several domains.
    """
    compared = [(f"average by {by}", Setting(by=by, share=p.OPTIONS["compared"])) for by in choices(p)]
    kept = Setting(share=ALONE_SHARE, protects="a")
    alone = [
        (f"A kept by {by}, {place}", replace(kept, by=by, place=place)) for by in FILTERS for place in PLACES
    ]
    others = {"Jacobian norm": f", {OWN}", "SNIP": f", {OWN}", STEP: "", RANDOM: ""}
    alone += [(f"A kept by {by}{of}", replace(kept, by=by)) for by, of in others.items() if by in choices(p)]
    ends = [(f"{row}, all kept", everything(replace(chosen[ROWS[row][0]], **ROWS[row][1]))) for row in CURVES]
    return [*models(p).items(), *chosen.items(), *peaks.items(), *ends, *compared, *alone]


def models(p: SimpleNamespace) -> dict[str, str]:
    """The base and the experts, unmerged."""
    a, b = p.DOMAINS
    return {"base": "base", f"{a} expert": "a", f"{b} expert": "b"}


def table_rows(p: SimpleNamespace) -> list[str]:
    """The names of the rows of Table 3, from the base and the experts on."""
    names = list(models(p))
    for row, (without, _) in ROWS.items():
        names += [] if without in names else [without]
        names += [f"{row}, {by}" for by in FILTERS]
    return [*names, "DARE task", "DARE TIES"]


# --- what the answers say


def by_domain(correct: Any, asked: Questions) -> pd.DataFrame:
    """The share of right answers in each domain: columns domain, accuracy, low, high (Wilson), n.

    correct: whether each question is answered right, one domain after the other.
    """
    lines = []
    for domain, at in _places(asked).items():
        right = np.asarray(correct)[at]
        lines.append((domain, float(right.mean()), *wilson(int(right.sum()), len(right)), len(right)))
    return pd.DataFrame(lines, columns=["domain", "accuracy", "low", "high", "n"])


@dataclass(frozen=True, eq=False)
class Results:
    """Answers to the questions of both domains, one domain after the other, with the names of what was asked.

    Intervals (95 %) are a bootstrap over calibration sets and questions, paired in differences. A domain may
    be "mean", the mean of both.
    """

    trials: Trials
    questions: Questions
    seed: int

    def means(self) -> pd.DataFrame:
        """A row for each name and set: the labels, set, the accuracy in each domain, their mean, and n."""
        lines = []
        for trial in self.trials.tried:
            found = by_domain(trial.values["correct"], self.questions).set_index("domain")
            about = {"mean": found.accuracy.mean(), "n": found.n.sum()}
            lines.append({**trial.labels, "set": trial.set, **found.accuracy, **about})
        return pd.DataFrame(lines)

    def by_domain(self) -> pd.DataFrame:
        """A row for each name, set and domain: the labels, set, and those of `by_domain`."""
        parts = [
            by_domain(t.values["correct"], self.questions).assign(**t.labels, set=t.set)
            for t in self.trials.tried
        ]
        return pd.concat(parts, ignore_index=True)

    def best(self, asked: Pairs) -> dict[str, Any]:
        """Of what was asked under each name, once each, that of the highest mean; the first among equals."""
        places = self.means()["mean"].groupby([name for name, _ in asked], sort=False).idxmax()
        return {name: asked[place][1] for name, place in places.items()}

    def peaks(self, curves: Mapping[str, Setting]) -> dict[str, Setting]:
        """The best share of each of the curves by FI that protects something and not everything."""
        means = self.means().groupby("name")["mean"].mean()
        found = {}
        for curve, setting in curves.items():
            points = {share: means[name] for share, name in self._points(curve).items() if 0 < share < 1}
            if setting.by != RANDOM:
                found[f"{curve}, at the peak"] = replace(setting, share=max(points, key=points.__getitem__))
        return found

    def added(self, curves: Mapping[str, Setting]) -> pd.DataFrame:
        """What protection adds along the curves: columns method, by, share, and those of `differences`."""
        parts = []
        for curve, setting in curves.items():
            points = self._points(curve)
            found = self.differences([(name, points[0]) for name in points.values()])
            row = curve.removesuffix(f", {setting.by}")
            parts.append(found.assign(method=row, by=setting.by, share=list(points)))
        return pd.concat(parts, ignore_index=True)

    def _points(self, curve: str) -> dict[float, str]:
        """The names that were asked along a curve, by the protected share, in ascending order."""
        names = [t.labels["name"] for t in self.trials.tried if t.labels["name"].startswith(f"{curve}, ")]
        return {float(name.rpartition(", ")[2]): name for name in names}

    def accuracy(self, names: Iterable[str]) -> pd.DataFrame:
        """Columns name, domain (the mean, too), accuracy, low, high, n."""
        lines = []
        for name in names:
            answers = self.trials.answers(name=name)
            for domain in (*self.questions, "mean"):
                values = self._weighted(answers, domain)
                found = crossed_difference(values, 0 * values, seed=self.seed, resamples=RESAMPLES)
                lines.append((name, domain, *found, values.shape[1]))
        return pd.DataFrame(lines, columns=["name", "domain", "accuracy", "low", "high", "n"])

    def differences(
        self, pairs: Iterable[tuple[str, str]], domain: str = "mean", value: str = "accuracy"
    ) -> pd.DataFrame:
        """Accuracy (or log P of the right answer, log_prob) of the first of each pair minus the second's.

        Columns first, minus, difference, low, high, n.
        """
        lines = [(*pair, *self._difference([pair], domain, value)) for pair in pairs]
        return pd.DataFrame(lines, columns=["first", "minus", "difference", "low", "high", "n"])

    def pooled(self) -> pd.DataFrame:
        """What protection by each filter adds to all ROWS together: measure, and as `differences`."""
        pairs = {by: [(f"{row}, {by}", without) for row, (without, _) in ROWS.items()] for by in FILTERS}
        lines = [(by, *self._difference(pairs[by], "mean", "accuracy")) for by in FILTERS]
        return pd.DataFrame(lines, columns=["measure", "difference", "low", "high", "n"])

    def paired(self, p: SimpleNamespace) -> pd.DataFrame:
        """The paired differences on which the claims about merging rest.

        Columns topic, measure (what protects; "" for none), n, those of `differences`, and log_p and
        by_log_p: the difference of log P, and what its interval says of "above zero".
        """
        behind = [("task arithmetic", "DARE task"), ("TIES", "DARE TIES")]
        asked = [(by, *said) for by in FILTERS for said in _claimed(p, by)]
        parts = []
        for by, topic, pairs, domain in [*asked, ("", BEHIND, behind, "mean")]:
            found = self.differences(pairs, domain)
            likely = with_verdict(self.differences(pairs, domain, "log_prob"), above=0)
            found = found.assign(topic=topic, measure=by, log_p=likely.difference, by_log_p=likely.verdict)
            parts.append(found)
        columns = ["topic", "measure", "n", *found.columns[:5], "log_p", "by_log_p"]
        whole = pd.concat(parts, ignore_index=True)[columns]
        return whole.sort_values("topic", kind="stable", ignore_index=True)

    def _difference(
        self, pairs: Sequence[tuple[str, str]], domain: str, value: str
    ) -> tuple[float, float, float, int]:
        """The mean over pairs of the first minus the second, its interval, and the number of questions."""
        # a merge that depends on no calibration set is the same in all
        both = [np.broadcast_arrays(*(self.trials.answers(value, name=n) for n in pair)) for pair in pairs]
        a, b = (self._weighted(np.mean([pair[i] for pair in both], 0), domain) for i in (0, 1))
        mean, low, high = crossed_difference(a, b, seed=self.seed, resamples=RESAMPLES)
        # an end at zero is no rounding error above it
        return round(mean, 9) + 0.0, round(low, 9) + 0.0, round(high, 9) + 0.0, a.shape[1]

    def _weighted(self, values: np.ndarray, domain: str) -> np.ndarray:
        """The questions of one domain, or all of them so that their mean is that of the domains' means."""
        if domain != "mean":
            return values[:, _places(self.questions)[domain]]
        sizes = [len(found) for found in self.questions.values()]
        return values * np.concatenate([np.full(n, sum(sizes) / (len(sizes) * n)) for n in sizes])


def _places(asked: Questions) -> dict[str, slice]:
    ends = np.cumsum([0, *map(len, asked.values())])
    return {domain: slice(ends[i], ends[i + 1]) for i, domain in enumerate(asked)}


def _claimed(p: SimpleNamespace, by: str) -> list[tuple[str, list[tuple[str, str]], str]]:
    """What the claims say of FI by one filter: topic, which rows should be above which, and where."""
    with_without = [(f"{row}, {by}", without) for row, (without, _) in ROWS.items()]
    rises = [(f"{row}, {by}, at the peak", ROWS[row][0]) for row in CURVES]
    falls = [(f"{row}, {by}, at the peak", f"{row}, all kept") for row in CURVES]
    others = [n for n in table_rows(p)[3:] if not n.startswith("TIES I,")]
    rest = [name for name in FILTERS if name != by]
    best = [(f"TIES I, {by}", other) for other in others if not any(name in other for name in rest)]
    kept = f"A kept by {by}, "
    places = [(kept + OWN, f"A kept by {RANDOM}"), (kept + OWN, "average")]
    places += [(kept + OWN, kept + place) for place in (OTHER, NEITHER)]
    return [
        (HELPS, with_without, "mean"),
        (BEST, best, "mean"),
        (RISES, rises, "mean"),
        (FALLS, falls, "mean"),
        (DOMAIN, places, next(iter(p.DOMAINS))),
    ]
