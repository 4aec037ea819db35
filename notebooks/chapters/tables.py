"""What the tables of several chapters share: paired differences between measures, and intervals as text."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from pandas.io.formats.style import Styler

from fihelpers.evaluate.stats import paired_difference

RESAMPLES = 2000


def difference(a: pd.Series, b: pd.Series, seed: int) -> tuple[float, float, float]:
    """Mean of a - b over what both index, and its bootstrap interval: (mean difference, low, high)."""
    return paired_difference(a.to_numpy(), b.to_numpy(), seed=seed, resamples=RESAMPLES)


def average(values: pd.Series, seed: int) -> tuple[float, float, float]:
    """Mean over pictures or questions, and its bootstrap interval over them: (mean, low, high)."""
    return difference(values, 0 * values, seed)


def against(values: Mapping[str, pd.DataFrame], reference: str, seed: int) -> pd.DataFrame:
    """Every measure minus `reference`, paired by row, with bootstrap intervals over the rows.

    values: of each name a table with a row a picture or question and a column a measure. Returns a row a
    measure; columns n, and for each name the difference with its _low and _high. Rows that one of the two
    lacks are left out.
    """
    lines: dict[str, dict[str, float]] = {}
    for name, table in values.items():
        for measure in table.columns.drop(reference):
            pair = table[[measure, reference]].dropna()
            found = difference(pair[measure], pair[reference], seed)
            line = lines.setdefault(str(measure), {"n": len(pair)})
            line |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("measure")


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says about a claim that the difference is below zero."""
    if high < 0:
        return "holds"
    return "the reverse holds" if low > 0 else "undecided"


def as_text(table: pd.DataFrame, names: Mapping[str, str], digits: int = 3) -> pd.DataFrame:
    """Values with their intervals as text to read: a column for each of `names`, {column: title}, and n."""
    made = {}
    for name, title in names.items():
        ends = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
        made[title] = [f"{v:+.{digits}f} [{a:+.{digits}f}, {b:+.{digits}f}]" for v, a, b in ends]
    return pd.DataFrame(made, index=table.index).assign(n=table.n.astype(int).astype(str))


def duel_grid(table: pd.DataFrame) -> pd.DataFrame:
    """Duels as text to read: a row a setting of FI, a column an opponent.

    table: columns fi, other, difference, low, high, verdict.
    """
    text = table.apply(lambda r: f"{r.difference:+.3f} [{r.low:+.3f}, {r.high:+.3f}] {r.verdict}", axis=1)
    grid = table.assign(text=text).pivot(index="fi", columns="other", values="text")
    return grid.loc[list(dict.fromkeys(table.fi)), list(dict.fromkeys(table.other))]


def judged_lines(judged: pd.DataFrame, title: str, form: str = ".3g") -> pd.DataFrame:
    """Judged settings as text to read, below their claims: the value with its interval, n and the verdict.

    judged: columns claim, setting, n, value, low, high, verdict. title: of the column of values, with their
    unit. form: how a number is written. A value that is its own interval, a count, is written once. The
    settings of a claim stand together, the claims in the order in which they first appear.
    """
    places = judged.claim.map({claim: i for i, claim in enumerate(judged.claim.unique())})
    judged = judged.loc[places.sort_values(kind="stable").index]
    ends = zip(judged.value, judged.low, judged.high, strict=True)
    text = [f"{v:{form}}" + (f" [{a:{form}}, {b:{form}}]" if a < b else "") for v, a, b in ends]
    made = judged[["claim", "setting"]].assign(**{title: text}, n=judged.n, verdict=judged.verdict)
    return made.set_index(["claim", "setting"])


def show(table: pd.DataFrame, **formats: str) -> Styler:
    """A table to read, without its index; formats, by column, are those of `str.format`."""
    styled = table.style.format(formats).hide(axis="index")
    return styled.set_uuid("table").set_table_attributes('class="dataframe"')
