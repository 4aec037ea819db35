"""Chapter 07, second half: what zeroing weights does to text that a model writes (method 4.4, Table 6).

The scores are those of whole sequences (method 2), the damage is measured on greedy answers against the
intact model's own: ROUGE-1, and the win rate by a judge, raw and at equal length.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fichapters.ch07.judges import (
    ApiJudge,
    Judge,
    LikelihoodJudge,
    length_controlled_win_rates,
    published_difficulties,
    rouge1,
)
from fichapters.ch07.lab import calibration_set, check_sets, tested_set
from fichapters.parameters import check_value
from fichapters.parameters import nearest as nearest_name
from fihelpers.data import data_folder, write_atomically
from fihelpers.evaluate.stats import mean_interval
from fihelpers.measures import names_of
from fihelpers.models.generate import Response, greedy
from fihelpers.models.language import LanguageModel, in_chat, open_model
from fihelpers.perturb.sparsify import Which, linear_names, select, zeroed
from fihelpers.scores.sequences import score_sequences
from fihelpers.tasks import Example
from fihelpers.tasks.instructions import (
    ALPACA,
    SUBJECT,
    instruction_prompt,
    load_instructions,
)

log = logging.getLogger(__name__)

INTACT = "intact"
RANDOM = "random"
LOW = ", low half"
SCORED = ("rouge1", "win_rate", "length_controlled")  # what is measured of a set of answers
ANSWERED = ("preferences", "lengths")  # of each prompt, from which the length-controlled win rates are fitted
STORY_LENGTH = 60  # tokens
BATCH = 64  # answers written at a time: a small model's time goes by steps, not by prompts


@dataclass(frozen=True)
class Plan:
    """What is run; the defaults are those of the chapter.

    rates: shares of the linear weights to zero, in (0, 1]. seeds: number of calibration sets. n_test None
    takes all prompts. length: tokens that an answer may have. horizon, samples: L and N of the sequence
    scores. low_of: FI measures for which "FI-low", a random draw from the lower half, is run as well.
    judge_url, judge_model: a judge behind an API in place of the stand-in. story_model: the folder of
    another model, which continues the bundled story openings.
    """

    task: str = "bundled-instructions"
    rates: tuple[float, ...] = (0.01, 0.03, 0.06, 0.1, 0.12)
    seeds: int = 3
    n_calibration: int = 24
    n_test: int | None = 48
    length: int = 40
    measures: tuple[str, ...] = ("FI exact", "FI damped 0.0001", "Jacobian norm", RANDOM)
    low_of: tuple[str, ...] = ("FI exact", "FI damped 0.0001")
    horizon: int = 5
    samples: int = 10
    seed: int = 0
    judge_url: str = ""
    judge_model: str = ""
    story_model: str = ""

    def __post_init__(self) -> None:
        for name in ("measures", "low_of"):
            object.__setattr__(self, name, names_of(getattr(self, name)))


def plan_of(settings: Mapping[str, Any], seed: int) -> Plan:
    """The plan with these settings, by name; the others keep their defaults.

    Measures are run beside those of the chapter, which its text speaks of. Raises ValueError for an unknown
    name or a value of another type than the default's, FileNotFoundError for a story model that is not there,
    and what `check` raises.
    """
    defaults = {field.name: field.default for field in fields(Plan) if field.name != "seed"}
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in defaults:
            raise ValueError(f"generated text has no setting {name!r}{nearest_name(name, defaults)}")
        default: Any = defaults[name]
        if not (name == "n_test" and value is None):
            check_value(f"TEXT.{name}", value, list(default) if isinstance(default, tuple) else default)
        joined = default if name in ("measures", "low_of") else ()
        given[name] = (*joined, *value) if isinstance(value, list) else value
    plan = Plan(**given, seed=seed)
    check(plan)
    if plan.story_model and not Path(plan.story_model).expanduser().is_dir():
        raise FileNotFoundError(
            f"there is no folder {plan.story_model!r} with a story model; correct the path."
        )
    return plan


class Bench:
    """A model's prompts, its own answers while it is intact, and the judge that compares others with them.

    Raises ValueError where the intact model ends an answer at once: there is nothing to compare with.
    """

    def __init__(
        self, model: LanguageModel, examples: Sequence[Example], length: int, judge: Judge | None = None
    ) -> None:
        self.model = model
        self.prompts = [framed(model, example).prompt for example in examples]
        self.length = length
        self.judge = judge or LikelihoodJudge(model)
        self.intact = greedy(model, self.prompts, length, BATCH)
        for example, answer in zip(examples, self.intact, strict=True):
            if not answer.text.strip():
                raise ValueError(
                    f"the intact model {model.name!r} ends its answer to {example.id!r} at once, so there is "
                    "nothing to compare with; leave that prompt out."
                )

    def answers(self) -> list[Response]:
        """What the model answers as it is now."""
        return greedy(self.model, self.prompts, self.length, BATCH)

    def compare(self, answers: Sequence[Response]) -> dict[str, object]:
        """ROUGE-1 and win rate of answers against the intact model's, which must be intact again.

        Beside them there are the mean length in characters, the share of answers that ended, the first
        answer as it stands, and as JSON what `at_equal_length` needs: see ANSWERED.
        """
        own = [answer.text for answer in answers]
        earlier = [answer.text for answer in self.intact]
        preferences = self.judge.prefer(self.prompts, answers, self.intact)
        lengths = _lengths(own)
        return {
            "rouge1": float(rouge1(own, earlier).mean()),
            "win_rate": float(preferences.mean()),
            "characters": float(np.mean(lengths)),
            "ended": float(np.mean([answer.ended for answer in answers])),
            "n": len(answers),
            "first": own[0],
            **dict(zip(ANSWERED, map(json.dumps, (preferences.tolist(), lengths)), strict=True)),
        }

    def floor(self) -> float:
        """ROUGE-1 of an answer to another prompt: what two unrelated answers of this model share."""
        texts = [answer.text for answer in self.intact]
        return float(rouge1(texts[1:] + texts[:1], texts).mean())


def judge_of(model: LanguageModel, plan: Plan, cache: Path) -> Judge:
    """The judge behind an API where the plan has an address, else the likelihood under the intact model.

    Its verdicts are kept in `cache`, whatever becomes of the run.
    """
    if not plan.judge_url:
        return LikelihoodJudge(model)
    return ApiJudge(plan.judge_url, plan.judge_model, cache=cache / "verdicts.jsonl")


def framed(model: LanguageModel, example: Example) -> Example:
    """The example in the words that a chat model expects: its own template around the instruction.

    A model without template gets the prompt as it stands, as does a context to continue.
    """
    if not model.tokenizer.chat_template or example.question == example.prompt:
        return example
    return replace(example, prompt=in_chat(model.tokenizer, example.question, model.name))


def run_sweep(model: LanguageModel, plan: Plan, cache: Path, judge: Judge | None = None) -> pd.DataFrame:
    """Zero shares of the linear weights by every measure, for every calibration set, and read the answers.

    Returns one row for each (seed, measure, rate) and one for the intact model: what `Bench.compare` and
    `at_equal_length` say of it. The judge is by default that of `judge_of`. Finished parts lie in `cache` and
    are not made again after an interruption. Raises ValueError for an unknown measure, a bad rate or no
    seeds.
    """
    check(plan)
    examples = tested_set(plan, None)
    bench = Bench(model, examples, plan.length, judge or judge_of(model, plan, cache))
    key = _key(model, plan, bench)
    parts = [pd.DataFrame([{"seed": 0, "measure": INTACT, "rate": 0.0, **bench.compare(bench.intact)}])]
    for k in tqdm(range(plan.seeds), desc="answers of sparse models", unit="calibration set"):
        path = cache / f"{key}.{k}.csv"
        if not path.is_file():
            found = pd.DataFrame(_one_calibration(plan, bench, k, cache / f"{key}.samples.jsonl"))
            # quoted, for a lone carriage return in an answer would end its row
            write_atomically(path, found.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC).encode())
        parts.append(pd.read_csv(io.BytesIO(path.read_bytes()), keep_default_na=False))
    known, source = known_difficulties(plan.task, examples)
    return at_equal_length(pd.concat(parts, ignore_index=True), bench.intact, known, source)


def known_difficulties(task: str, examples: Sequence[Example]) -> tuple[np.ndarray | None, str]:
    """The published difficulties (N,) of AlpacaEval's instructions and where they come from.

    None for another task, and where the hub does not answer, which is said and logged.
    """
    if task != ALPACA:
        return None, ""
    try:
        known, commit = published_difficulties(examples)
    except ConnectionError as error:
        log.warning("difficulties of instructions are estimated from the sweep: %s", error)
        return None, " (the published difficulties could not be had)"
    return known, f" ({ALPACA} at {commit})"


def at_equal_length(
    rows: pd.DataFrame, intact: Sequence[Response], known: np.ndarray | None, source: str
) -> pd.DataFrame:
    """The rows with `length_controlled`, fitted over all of them, in the place of ANSWERED.

    Every row is a setting: a measure, a rate and a calibration set. known, source: from
    `known_difficulties`. The column `length_fit` says how the difficulties of the prompts came about.
    """
    preferences, lengths = ([json.loads(text) for text in rows[name]] for name in ANSWERED)
    others = _lengths(answer.text for answer in intact)
    found = length_controlled_win_rates(preferences, lengths, others, known)
    return rows.drop(columns=list(ANSWERED)).assign(
        length_controlled=found.win_rates, length_fit=found.fit + source
    )


def _lengths(texts: Iterable[str]) -> list[int]:
    """The length of each text in characters."""
    return [len(text) for text in texts]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over calibration sets of each score, with its t interval cut to [0, 1], for each measure and rate.

    Columns: measure, rate, seeds, n, for each of SCORED the mean, {name}_low and {name}_high, and what
    `at_equal_length` says in `length_fit`. Rate 0 is the intact model, the same for every measure.
    """
    intact = rows[rows.measure == INTACT].iloc[0]
    lines = []
    for (measure, rate), part in rows[rows.measure != INTACT].groupby(["measure", "rate"], sort=False):
        lines.append({"measure": measure, "rate": rate, "seeds": len(part), "n": intact.n, **_means(part)})
    start = [
        {"measure": m, "rate": 0.0, "seeds": 1, "n": intact.n, **{s: intact[s] for s in SCORED}}
        for m in dict.fromkeys(line["measure"] for line in lines)
    ]
    table = pd.DataFrame(start + lines).drop_duplicates(["measure", "rate"], ignore_index=True)
    return table.assign(length_fit=intact.length_fit)


def table_of(table: pd.DataFrame, score: str, rates: Sequence[float]) -> pd.DataFrame:
    """Table 6's shape for one score: a row for each measure, a column for each rate, mean and interval."""
    part = table[table.rate.isin([0.0, *rates])]
    text = part.apply(lambda r: _with_interval(r[score], r[f"{score}_low"], r[f"{score}_high"]), axis=1)
    wide = part.assign(text=text).pivot(index="measure", columns="rate", values="text")
    return wide.loc[list(dict.fromkeys(part.measure))]


def differences(rows: pd.DataFrame, score: str, other: str = RANDOM) -> pd.DataFrame:
    """Each measure's score minus that of `other`, at every rate, with a 95 % t interval.

    The differences are paired by calibration set, over the same prompts. (A bootstrap over a few sets would
    be too sure of itself.) Columns: measure, rate, difference, low, high, and verdict: "more damage than
    random", "less damage than random" or "no difference seen".
    """
    means = rows[rows.measure != INTACT].pivot(index="seed", columns=["measure", "rate"], values=score)
    lines = []
    for measure, rate in means.columns:
        if measure != other:
            gap = (means[measure, rate] - means[other, rate]).to_numpy(float)
            mean, low, high = mean_interval(gap) if len(gap) > 1 else (gap[0], np.nan, np.nan)
            lines.append((measure, rate, mean, low, high, _verdict(low, high, other)))
    return pd.DataFrame(lines, columns=["measure", "rate", "difference", "low", "high", "verdict"])


def widest(found: pd.DataFrame) -> pd.DataFrame:
    """For each measure the rate at which it falls furthest below the other, and how often it was worse.

    Columns: rate, difference, low, high, worse (number of rates at which the interval lies below zero),
    better (above zero), rates.
    """
    chosen = found.loc[found.groupby("measure", sort=False).difference.idxmin()].set_index("measure")
    counts = found.assign(worse=found.high < 0, better=found.low > 0).groupby("measure", sort=False)
    return chosen[["rate", "difference", "low", "high"]].assign(
        worse=counts.worse.sum(), better=counts.better.sum(), rates=counts.size()
    )


def openings() -> str:
    """The path of the bundled story openings, a task for any model that writes stories."""
    return str(data_folder() / "openings.txt")


def stories(plan: Plan, cache: Path, device: str = "cpu", dtype: str = "float32") -> pd.DataFrame | None:
    """`run_sweep` of the plan's story model on the bundled openings; None where the plan has none."""
    if not plan.story_model:
        return None
    model = open_model(plan.story_model, device=device, dtype=dtype)
    return run_sweep(model, replace(plan, task=openings(), n_test=None, length=STORY_LENGTH), cache)


def nearest(rates: Sequence[float], wanted: float) -> float:
    """The rate of the sweep that is nearest to the wanted one."""
    return min(rates, key=lambda rate: abs(rate - wanted))


def recited(examples: Sequence[Example], answers: Sequence[Response]) -> float:
    """Share of the answers that equal, but for space around them, the reference of their instruction."""
    return float(
        np.mean([a.text.strip() == e.reference != "" for e, a in zip(examples, answers, strict=True)])
    )


def reworded(model: LanguageModel, n: int, length: int) -> np.ndarray:
    """ROUGE-1 (n,) of a model's answers to bundled instructions in other words, against those to the first.

    Each instruction of `data/instructions.yaml` has a third wording that the bundled model never saw.
    """
    entries = load_instructions(data_folder())[1::2][:n]
    found = []
    for place in (2, 0):
        wordings = [entry["wordings"][place] for entry in entries]
        asked = [Example(w, SUBJECT, instruction_prompt(w), (), None, w) for w in wordings]
        prompts = [framed(model, example).prompt for example in asked]
        found.append([answer.text for answer in greedy(model, prompts, length, BATCH)])
    return rouge1(*found)


def first_answers(rows: pd.DataFrame, measures: Sequence[str], rate: float) -> dict[str, str]:
    """The answer to the first prompt, by the intact model and after zeroing, first calibration set."""
    part = rows[(rows.seed == 0) & ((rows.measure == INTACT) | np.isclose(rows.rate, rate))]
    found = dict(zip(part.measure, part["first"], strict=True))
    return {name: str(found[name]) for name in (INTACT, *measures)}


def _one_calibration(plan: Plan, bench: Bench, k: int, samples: Path) -> list[dict]:
    model = bench.model
    examples = [framed(model, e) for e in calibration_set(plan, None, plan.seed + k)]
    scored = [m for m in dict.fromkeys((*plan.measures, *plan.low_of)) if m != RANDOM]
    scores = score_sequences(
        model, examples, scored, horizon=plan.horizon, samples=plan.samples, seed=plan.seed + k,
        only=linear_names(model.network), cache=samples,
    )  # fmt: skip
    ways: list[tuple[str, str, Which]] = [(m, m, "top") for m in plan.measures if m != RANDOM]
    ways += [(m, m + LOW, "low half") for m in plan.low_of]
    if RANDOM in plan.measures:
        ways.append((scored[0], RANDOM, "random"))
    rows = []
    for measure, label, which in ways:
        for rate in plan.rates:
            positions = select(scores[measure], rate, which, seed=plan.seed + k)
            with zeroed(model.network, positions):
                answers = bench.answers()
            rows.append({"seed": k, "measure": label, "rate": rate, **bench.compare(answers)})
    return rows


def _means(part: pd.DataFrame) -> dict[str, float]:
    found: dict[str, float] = {}
    for score in SCORED:
        values = part[score].to_numpy(float)
        low, high = np.clip(mean_interval(values)[1:], 0, 1) if len(values) > 1 else (np.nan, np.nan)
        found |= {score: values.mean(), f"{score}_low": low, f"{score}_high": high}
    return found


def _with_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f}" if np.isnan(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _verdict(low: float, high: float, other: str) -> str:
    if high < 0:
        return f"more damage than {other}"
    return f"less damage than {other}" if low > 0 else "no difference seen"


def length_effect(rows: pd.DataFrame) -> float:
    """The largest difference that controlling for length makes to a win rate of the sweep."""
    return float((rows.length_controlled - rows.win_rate).abs().max())


def check(plan: Plan) -> None:
    """Raise ValueError for a plan that cannot be run, and what `load_task` raises."""
    if RANDOM in plan.low_of:
        raise ValueError(f"FI-low is drawn from the lower half of a ranking, which {RANDOM!r} is not.")
    bad = [r for r in plan.rates if not 0 <= r <= 1]
    if bad:
        raise ValueError(f"The share to zero must lie in [0, 1], not {bad[0]}.")
    if plan.seeds < 1:
        raise ValueError(f"The number of calibration sets must be at least 1, not {plan.seeds}.")
    check_sets(plan, [None])


def _key(model: LanguageModel, plan: Plan, bench: Bench) -> str:
    text = [model.sha256, str(model.network.dtype), asdict(plan), bench.prompts, bench.judge.label]
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:16]
