"""What the tables of several chapters share: paired differences between measures, and intervals as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from fichapters.claims import ENDINGS, judge
from fihelpers.evaluate.stats import paired_difference
from fihelpers.trials import Trials

RESAMPLES = 2000


def difference(a: pd.Series, b: pd.Series, seed: int) -> tuple[float, float, float]:
    """Mean of a - b over what both index, and its bootstrap interval: (mean difference, low, high)."""
    return paired_difference(a.to_numpy(), b.to_numpy(), seed=seed, resamples=RESAMPLES)


def average(values: pd.Series, seed: int) -> tuple[float, float, float]:
    """Mean over pictures or questions, and its bootstrap interval over them: (mean, low, high)."""
    return difference(values, 0 * values, seed)


def measures_of(trials: Trials) -> list[str]:
    """The measures in the order in which they were tried, "intact" among them."""
    return list(dict.fromkeys(trial.labels["measure"] for trial in trials.tried))


def compare(
    trials: Trials,
    pairs: Iterable[tuple[Any, Any]],
    *at: str,
    seed: int,
    value: str = "log_prob",
    label: str = "measure",
) -> pd.DataFrame:
    """`Trials.compare` with the resamples of the chapters about inputs, of log P of the right answer."""
    return trials.compare(pairs, *at, label=label, value=value, seed=seed, resamples=RESAMPLES)


def against(trials: Trials, reference: str, seed: int) -> pd.DataFrame:
    """Every measure minus `reference`, paired by picture or question, with bootstrap intervals over these.

    trials: under one change. Index: measure. Columns: n, and for accuracy and log_prob the difference with
    its _low and _high.
    """
    pairs = [(name, reference) for name in measures_of(trials) if name != reference]
    found = {value: compare(trials, pairs, seed=seed, value=value) for value in ("accuracy", "log_prob")}
    made = {"measure": found["log_prob"]["first"], "n": found["log_prob"].n}
    for value, table in found.items():
        made |= {value: table.difference, f"{value}_low": table.low, f"{value}_high": table.high}
    return pd.DataFrame(made).set_index("measure")


def as_text(table: pd.DataFrame, names: Mapping[str, str], digits: int = 3) -> pd.DataFrame:
    """Values with their intervals as text to read: a column for each of `names`, {column: title}, and n."""
    made = {
        title: interval_text(table, name, f"{name}_low", f"{name}_high", digits)
        for name, title in names.items()
    }
    return pd.DataFrame(made, index=table.index).assign(n=table.n.astype(int).astype(str))


def interval_text(table: pd.DataFrame, value: str, low: str, high: str, digits: int = 3) -> list[str]:
    """Each line's value with its interval, as text."""
    ends = zip(table[value], table[low], table[high], strict=True)
    return [f"{v:+.{digits}f} [{a:+.{digits}f}, {b:+.{digits}f}]" for v, a, b in ends]


def with_verdict(table: pd.DataFrame, **bounds: float) -> pd.DataFrame:
    """A table with columns low and high, and what each interval says of the bounds (see `claims.judge`)."""
    said = [judge(low, high, **bounds) for low, high in zip(table.low, table.high, strict=True)]
    return table.assign(verdict=said)


def duel_grid(table: pd.DataFrame) -> pd.DataFrame:
    """Duels as text to read, with what each says of FI doing more: a row a setting of FI, a column an
    opponent.

    table: columns fi, other, difference, low, high; below zero FI does more damage.
    """
    shown = zip(
        interval_text(table, "difference", "low", "high"), with_verdict(table, below=0).verdict, strict=True
    )
    text = [" ".join(pair) for pair in shown]
    grid = table.assign(text=text).pivot(index="fi", columns="other", values="text")
    return grid.loc[list(dict.fromkeys(table.fi)), list(dict.fromkeys(table.other))]


def duel_counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many of the duels of each setting of FI with each opponent hold, are undecided, or do not hold."""
    said = with_verdict(table, below=0)
    counts = said.groupby(["fi", "other", "verdict"], sort=False).size().unstack(fill_value=0)
    pairs = pd.MultiIndex.from_product([table.fi.unique(), table.other.unique()], names=["fi", "other"])
    return counts.reindex(index=pairs, columns=list(ENDINGS.values()), fill_value=0)


def judged_lines(judged: pd.DataFrame, title: str, form: str = ".3g") -> pd.DataFrame:
    """Judged settings as text to read, below their claims: the value with its interval, n and the verdict.

    judged: from `claims.of_chapter`; a part that stands for several claims is one line. title: of the column
    of values, with their unit. form: how a number is written. A value that is its own interval is written
    once, one that was not measured not at all. The settings of a claim stand together, in the order of the
    claims.
    """
    ids = judged.groupby(["part", "setting"], sort=False).id.agg(", ".join)
    lines = judged.drop_duplicates(["part", "setting"])
    ends = zip(lines.value, lines.low, lines.high, strict=True)
    text = [
        f"{v:{form}}" + (f" [{a:{form}}, {b:{form}}]" if a < b else "") if v == v else "" for v, a, b in ends
    ]
    claims = [f"{of}: {part}" for of, part in zip(ids, lines.part, strict=True)]
    made = lines[["setting"]].assign(**{title: text}, n=lines.n, verdict=lines.verdict, claim=claims)
    places = {claim: i for i, claim in enumerate(dict.fromkeys(claims))}
    order = made.claim.map(places).sort_values(kind="stable").index
    return made.loc[order].set_index(["claim", "setting"])


def show(table: pd.DataFrame, **formats: str) -> Styler:
    """A table to read, without its index; formats, by column, are those of `str.format`."""
    styled = table.style.format(formats).hide(axis="index")
    return styled.set_uuid("table").set_table_attributes('class="dataframe"')
