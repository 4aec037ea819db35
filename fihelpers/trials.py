"""One loop for every experiment: ask a model as it is, perturb, ask again, keep what was answered.

def tries(k):                                                  # in the notebook, in plain sight
    questions = load_task("bundled", subject, "val", 32, seed=k)  # calibrate
    scores = score_weights(model, questions, measures)            # score
    for measure, share in product(measures, shares):
        with zeroed(model, select(scores[measure], share)):       # perturb
            yield {"measure": measure, "share": share}, ask()     # evaluate

trials = collect(ask, tries, sets=5, kept=run.kept("zeroing"))
trials.table("measure", "share")                  # means with intervals
trials.compare([("FI exact", "random")], "share")  # paired differences with intervals and verdicts
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fihelpers.data import write_atomically
from fihelpers.evaluate.questions import Outcome
from fihelpers.evaluate.stats import crossed_difference, mean_interval, paired_difference, wilson
from fihelpers.identity import Unknown, identity

log = logging.getLogger(__name__)

Labels = Mapping[str, Any]
Values = Mapping[str, np.ndarray]
Ask = Callable[..., Outcome | Mapping[str, Any]]
Tries = Callable[[Any], Iterable[tuple[Labels, Outcome | Mapping[str, Any]]]]

RIGHT = {"accuracy": "correct"}  # what the mean of an answer's values is called -> the values
RESAMPLES = 10_000  # of a bootstrap
ID = "id"  # a value that names its question, if there is one
BELOW, ABOVE, UNDECIDED = "below", "above", "undecided"


@dataclass(frozen=True, eq=False)
class Trial:
    """What was answered once: `values` of each question, (N,), under `labels`, in a calibration set."""

    set: int
    labels: Labels
    values: Values


@dataclass(frozen=True)
class Kept:
    """Where an experiment's finished sets lie, and what they depend on beside the loop itself.

    about: files, parameters and versions, as something that `identity` knows.
    """

    folder: Path
    name: str
    about: object

    def key(self, *things: object) -> str:
        """What the sets made by these things are kept under; empty, and logged, where one has no hash."""
        try:
            return identity(self.about, *things)
        except Unknown as unknown:
            log.warning("“%s” is not kept, since there is no hash of %s.", self.name, unknown)
            return ""

    def path(self, key: str, k: int, given: object) -> Path | None:
        """The file of set k, made of what is given; None for an empty key."""
        return self.folder / f"{self.name}.{identity(key, given)[:16]}.{k}.npz" if key else None

    def frame(self, make: Callable[..., pd.DataFrame], *given: object) -> pd.DataFrame:
        """The table `make(*given)`, with plain columns and index, made once and kept to the last digit."""
        key = self.key(make, *given)
        if not key:
            return make(*given)
        path = self.folder / f"{self.name}.{key[:16]}.json"
        if not path.is_file():
            made = make(*given)
            kinds = {name: str(kind) for name, kind in made.dtypes.items()}
            content = {"kinds": kinds, **made.to_dict("tight")}
            write_atomically(path, json.dumps(content, default=_plain).encode())
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds = content.pop("kinds")
        return pd.DataFrame.from_dict(content, orient="tight").astype(kinds)


@dataclass(frozen=True, eq=False)
class Trials:
    """What was answered: intact, and under every perturbation of every calibration set.

    Questions that are asked under the same labels, such as those of several subjects, are pooled; where they
    have a value "id", they stand in its order, however they were put into batches.
    """

    intact: Sequence[Trial]
    tried: Sequence[Trial]

    def __len__(self) -> int:
        return len(self.tried)

    def __add__(self, others: Trials) -> Trials:
        """The trials of both; what both have under the same labels is taken from the first."""
        known = [trial.labels for trial in self.tried]
        return Trials(self.intact, [*self.tried, *(t for t in others.tried if t.labels not in known)])

    def rows(self) -> pd.DataFrame:
        """A row for every answer under a perturbation: set, its labels and all its values."""
        made = [pd.DataFrame({"set": t.set, **t.labels, **t.values}) for t in self.tried]
        return pd.concat(made, ignore_index=True)

    def where(self, **labels: Any) -> Trials:
        """Those under these labels. Raises ValueError where there are none."""
        found = [trial for trial in self.tried if _fits(trial.labels, labels)]
        if not found:
            wanted = ", ".join(f"{name} = {value!r}" for name, value in labels.items())
            raise ValueError(f"no trial has {wanted}; the labels are {', '.join(self._names())}.")
        intact = [trial for trial in self.intact if _fits(trial.labels, labels, missing=True)]
        return Trials(intact, found)

    def answers(self, value: str = "accuracy", **labels: Any) -> np.ndarray:
        """The values (sets, questions) under these labels: right (1) or wrong (0) by default.

        Raises ValueError for labels that no trial has, and where the sets were not asked the same questions.
        """
        return _stacked(self.where(**labels).tried if labels else self.tried, value)

    def start(self, value: str = "accuracy") -> np.ndarray:
        """The values (questions,) before anything was perturbed."""
        return _stacked(self.intact, value)[0]

    def table(self, *by: str, value: str = "accuracy") -> pd.DataFrame:
        """The mean for every combination of the labels `by`, with a 95 % interval.

        The interval is over calibration sets (t) where there are several, else over questions (Wilson, of
        right and wrong). Columns: the labels, the value, low, high, log_prob (mean log P of the answer, if
        known), sets and n (questions).
        """
        lines = []
        for key, trials in self._groups(by).items():
            values = _stacked(trials, value)
            line = {**dict(zip(by, key, strict=True)), **_mean(values, value)}
            if value == "accuracy" and "log_prob" in trials[0].values:
                line["log_prob"] = _stacked(trials, "log_prob").mean()
            lines.append({**line, "sets": len(values), "n": values.shape[1]})
        return pd.DataFrame(lines)

    def compare(
        self,
        pairs: Iterable[tuple[object, object]],
        *at: str,
        label: str = "measure",
        value: str = "accuracy",
        seed: int = 0,
        over_sets: bool = False,
        resamples: int = RESAMPLES,
    ) -> pd.DataFrame:
        """The first of each pair minus the second, question by question, for every combination of `at`.

        Of questions that have ids, those that both were asked count.

        The 95 % interval is a bootstrap over sets and questions, or over questions where there is one set;
        over_sets: a t interval of the means of the sets, for few of them. Columns: first, minus, the labels
        `at`, difference, low, high, n and verdict: below or above where the interval lies on one side of
        zero, else undecided.
        """
        lines = []
        for first, minus in pairs:
            mine, others = (self.where(**{label: name})._groups(at) for name in (first, minus))
            for key in (key for key in mine if key in others):
                a, b = _shared(mine[key], others[key], value)
                mean, low, high = _paired(a, b, seed, over_sets, resamples)
                names = dict(zip(at, key, strict=True))
                line = {"first": first, "minus": minus, **names, "difference": mean, "low": low, "high": high}
                lines.append({**line, "n": a.shape[1], "verdict": side(low, high)})
        return pd.DataFrame(lines)

    def with_values(self, name: str, values: Iterable[float]) -> Trials:
        """The same trials with one more number each, which all its questions share."""
        pairs = zip(self.tried, values, strict=True)
        tried = [replace(t, values={**t.values, name: np.full(len(_first(t.values)), x)}) for t, x in pairs]
        return Trials(self.intact, tried)

    def _groups(self, by: Sequence[str]) -> dict[tuple[Any, ...], list[Trial]]:
        """The trials by what they say of the labels, in the order of the first set; others are left out."""
        groups: dict[tuple[Any, ...], list[Trial]] = {}
        for trial in self.tried:
            if all(name in trial.labels for name in by):
                groups.setdefault(tuple(trial.labels[name] for name in by), []).append(trial)
        if not groups:
            raise ValueError(f"no trial has the labels {', '.join(by)}, only {', '.join(self._names())}.")
        return groups

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for trial in self.tried for name in trial.labels))


def collect(
    ask: Ask | Mapping[str, Ask] | None,
    tries: Tries,
    *,
    sets: int | Sequence[Any] = 1,
    kept: Kept | None = None,
) -> Trials:
    """Ask the intact model, then run all tries for every calibration set.

    ask: returns what the model answers as it is now; a mapping from subjects has one for each. None where
        the tries hold all answers, such as those under each of several prompts.
    tries: a generator of (labels, outcome) for a set, by its number (or for one of `sets`, where these are
        batches of questions or of pictures: then ask takes the batch, too, and all are pooled).
    kept: where finished sets lie; an interrupted run goes on after the last one.

    An outcome is what `ask` returns, or a mapping from names to a value for each question.
    """
    batches = None if isinstance(sets, int) else list(sets)
    key = kept.key(ask, tries) if kept else ""
    intact = [_trial(0, *pair) for pair in _asked(ask, batches)]
    tried: list[Trial] = []
    for k in tqdm(range(sets if isinstance(sets, int) else len(sets)), desc="trials", unit="set"):
        given = k if batches is None else batches[k]
        place = 0 if batches is not None else k
        path = kept.path(key, k, given) if kept else None
        if path is None or not path.is_file():
            found = [_trial(place, labels, outcome) for labels, outcome in tries(given)]
            if path is not None:
                write_atomically(path, _written(found))
        tried += found if path is None else _read(path)
    return Trials(intact, tried)


def side(low: float, high: float) -> str:
    """On which side of zero an interval lies: below, above, or undecided."""
    if high < 0:
        return BELOW
    return ABOVE if low > 0 else UNDECIDED


def _asked(
    ask: Ask | Mapping[str, Ask] | None, batches: Sequence[Any] | None
) -> Iterator[tuple[Labels, Outcome | Mapping[str, Any]]]:
    if ask is None:
        return
    if isinstance(ask, Mapping):
        for subject, one in ask.items():
            yield {"subject": subject}, one()
    elif batches is None:
        yield {}, ask()
    else:
        for batch in batches:
            yield {}, ask(batch)


def _trial(k: int, labels: Labels, outcome: Outcome | Mapping[str, Any]) -> Trial:
    if isinstance(outcome, Outcome):
        outcome = {
            "correct": outcome.correct,
            "log_prob": outcome.log_prob,
            "said": outcome.predicted,
            "right": outcome.answer,
        }
    return Trial(k, dict(labels), {name: np.asarray(values) for name, values in outcome.items()})


def _fits(labels: Labels, wanted: Labels, missing: bool = False) -> bool:
    """Whether labels say what is wanted, with numbers equal up to rounding; missing: or say nothing."""
    return all(_equal(labels[name], value) if name in labels else missing for name, value in wanted.items())


def _equal(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9)
    return a == b


def _stacked(trials: Sequence[Trial], value: str) -> np.ndarray:
    """The values (sets, questions) of trials, those of a set one after the other."""
    name = RIGHT.get(value, value)
    if name not in trials[0].values:
        raise ValueError(f"no answer has {value!r}; it has {', '.join(trials[0].values)}.")
    by_set: dict[int, list[Values]] = {}
    for trial in trials:
        by_set.setdefault(trial.set, []).append(trial.values)
    lines = [_in_order(parts, name) for parts in by_set.values()]
    if len({len(line) for line in lines}) > 1:
        raise ValueError("the calibration sets were not asked the same questions; compare fewer labels.")
    stacked = np.stack(lines)
    return stacked if stacked.dtype.kind == "U" else stacked.astype(float)


def _shared(first: Sequence[Trial], minus: Sequence[Trial], value: str) -> tuple[np.ndarray, np.ndarray]:
    """The values (sets, questions) of the questions of both, as their ids tell where there are any."""
    a, b = (_stacked(trials, value) for trials in (first, minus))
    if ID not in first[0].values or ID not in minus[0].values:
        return a, b
    ids = [_stacked(trials, ID)[0] for trials in (first, minus)]
    _, left, right = np.intersect1d(*ids, return_indices=True)
    return a[:, left], b[:, right]


def _in_order(parts: Sequence[Values], name: str) -> np.ndarray:
    """The values of the questions of a set, one part after the other, or in the order of their ids."""
    whole = np.concatenate([part[name] for part in parts])
    if any(ID not in part for part in parts):
        return whole
    return whole[np.concatenate([part[ID] for part in parts]).argsort(kind="stable")]


def _mean(values: np.ndarray, name: str) -> dict[str, float]:
    """The mean of values (sets, questions) and its interval, which no share leaves.

    Sets that answer alike, as where no question chose the weights, count as one (Wilson's interval).
    """
    means = values.mean(1)
    low = high = math.nan
    if name in RIGHT and (values == values[0]).all():
        low, high = wilson(round(values[0].sum()), values.shape[1])
    elif len(means) > 1:
        _, low, high = mean_interval(means)
    if values.min() >= 0 and values.max() <= 1:
        low, high = np.clip([low, high], 0, 1).tolist()
    return {name: float(means.mean()), "low": low, "high": high}


def _paired(
    a: np.ndarray, b: np.ndarray, seed: int, over_sets: bool, resamples: int
) -> tuple[float, float, float]:
    if over_sets and len(a) > 1:
        return mean_interval((a - b).mean(1))
    if len(a) == 1:
        return paired_difference(a[0], b[0], seed=seed, resamples=resamples)
    return crossed_difference(a, b, seed=seed, resamples=resamples)


def _first(values: Values) -> np.ndarray:
    return next(iter(values.values()))


def _written(trials: Sequence[Trial]) -> bytes:
    arrays: Any = {f"{i}/{name}": v for i, trial in enumerate(trials) for name, v in trial.values.items()}
    about = json.dumps([[trial.set, trial.labels] for trial in trials], default=_plain)
    file = io.BytesIO()
    np.savez_compressed(file, about=np.frombuffer(about.encode(), np.uint8), **arrays)
    return file.getvalue()


def _read(path: Path) -> list[Trial]:
    with np.load(path) as file:  # which opens no pickles
        about = json.loads(file["about"].tobytes().decode())
        values: list[dict[str, np.ndarray]] = [{} for _ in about]
        for key in file.files:
            number, _, name = key.partition("/")
            if name:
                values[int(number)][name] = file[key]
    return [Trial(k, labels, found) for (k, labels), found in zip(about, values, strict=True)]


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    return value.item()
