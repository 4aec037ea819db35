"""Every claim with what the chapters found: their tables "claims" gathered, condensed by one rule, and shown.

The claims stand in ``data/claims.yaml``. A chapter's line names the claim by its id ("7, 10: words"); an id
that nobody knows, or one that a chapter has not judged although it should have, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fichapters.judged import NOT_MEASURED
from fichapters.papers import published
from fihelpers.data import check_file, data_folder

FILE = "claims.yaml"
TABLES = "*.claims.csv"
HOLDS, FAILS, OPEN, NOTHING = "holds", "does not hold", "undecided", "nothing to recover"
NEEDS, ANSWERED = "needs the paper's models", "answered"
STANDS = {  # what a chapter's verdict means for the claim
    HOLDS: HOLDS,
    "more than all": HOLDS,
    "a gain": HOLDS,
    OPEN: OPEN,
    "no difference seen": OPEN,
    FAILS: FAILS,
    "the reverse holds": FAILS,
    "less than all": FAILS,
    "a loss": FAILS,
    NOTHING: NOTHING,
    ANSWERED: ANSWERED,  # a number that a question asked for
    NOT_MEASURED: NOT_MEASURED,
}
HEADLINES = {  # of claims, and what the names of records are made of
    "holds": HOLDS,
    "only": "holds only with …",
    "fails": FAILS,
    "undecided": OPEN,
    "needs": NEEDS,
    "nothing": NOTHING,
    "missing": NOT_MEASURED,
}
NO_LOSS = "no loss seen"  # holds if the interval excludes a larger loss than this
LOSS = 0.05
FILTERS = {"exact": "exact FI", "cut": "a cut", "damped": "damping"}
NO_FILTER = "no filter"
IDS = re.compile(r"([RO]?\d+(?:, [RO]?\d+)*): (.+)")
FILTER = re.compile(r"FI (?:[^,]+, )?(exact|cut|damped)")
OPPONENT = r" against ([\w ]+)"


@dataclass(frozen=True)
class Claim:
    """One claim or question in our words.

    kind: "claim", "question" (a reviewer's) or "ours". chapters: those that have to judge it. number: what
    the numbers in their lines are. published: keys of the published figures. needs: what a test would take
    that the bundled models cannot give.
    """

    id: str
    short: str
    words: str
    source: str
    kind: str = "claim"
    chapters: tuple[str, ...] = ()
    number: str = ""
    published: tuple[str, ...] = ()
    needs: str = ""


def load_claims() -> dict[str, Claim]:
    """Return the claims by id, in the order of the file. Raises ValueError for an id that is listed twice."""
    path = data_folder() / FILE
    check_file(path)
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]
    claims = {line["id"]: _claim(line) for line in listed}
    if len(claims) < len(listed):
        raise ValueError(f"{FILE} lists an id twice.")
    return claims


def _claim(line: Mapping[str, Any]) -> Claim:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in line.items()}
    return Claim(**fields)


def gather(tables: Mapping[str, Path], claims: Mapping[str, Claim]) -> pd.DataFrame:
    """One row for every setting of every claim, from the chapters' tables.

    Columns: id, chapter, part, setting, filter, n, value, low, high, said (the chapter's verdict), verdict
    (what it means for the claim). tables: {file name: path}, each file named ``{chapter}.claims.csv``. Raises
    ValueError for an unknown id or verdict, and for a claim that a chapter should judge and does not.
    """
    parts = [_read(path, name.split(".")[0]) for name, path in sorted(tables.items())]
    if not parts:
        raise ValueError("no chapter has judged a claim; run the chapters, or restore data/results.")
    rows = pd.concat(parts, ignore_index=True)
    unknown = sorted(set(rows.id) - set(claims))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: judged in a chapter, but not in {FILE}.")
    for claim in claims.values():
        for chapter in set(claim.chapters) & set(rows.chapter):
            if not ((rows.id == claim.id) & (rows.chapter == chapter)).any():
                raise ValueError(f"{chapter} has no line on claim {claim.id}, which it should judge.")
    return rows


def _read(path: Path, chapter: str) -> pd.DataFrame:
    """A chapter's table in the one form of :func:`gather`, a row for each id of a line."""
    table = pd.read_csv(path)
    if "setting" not in table:  # chapter 09 sets one thing against another
        table["setting"] = table["first"] + " minus " + table["minus"]
        table["value"] = table["difference"]
        table["other"] = table["minus"]
    else:
        table["other"] = table.setting.str.extract(OPPONENT, expand=False)
    table["filter"] = [_filter(text) for text in table.setting]
    matches = [IDS.fullmatch(text) for text in table.claim]
    for text, found in zip(table.claim, matches, strict=True):
        if found is None:
            raise ValueError(f"{path.name}: {text!r} should begin with a claim's id, such as '11: '.")
    table["id"] = [found[1].split(", ") for found in matches if found]
    words = [found[2] for found in matches if found]
    others = [f", against {other}" if isinstance(other, str) else "" for other in table.other]
    table["part"] = [word + other for word, other in zip(words, others, strict=True)]
    table["said"] = table.verdict
    ends = zip(table.verdict, table.low, strict=True)
    table["verdict"] = [_stands(said, low, path.name) for said, low in ends]
    columns = ["id", "chapter", "part", "setting", "filter", "n", "value", "low", "high", "said", "verdict"]
    return table.assign(chapter=chapter).explode("id")[columns]


def _filter(setting: str) -> str:
    found = FILTER.search(setting)
    return found[1] if found else NO_FILTER


def _stands(said: str, low: float, where: str) -> str:
    if said == NO_LOSS:
        return HOLDS if low >= -LOSS else OPEN
    name = said.split(":")[0]
    if name not in STANDS:
        known = ", ".join([*STANDS, NO_LOSS])
        raise ValueError(f"{where}: the verdict {said!r} is none of {known}.")
    return STANDS[name]


# --- the rule


def deciding(rows: pd.DataFrame) -> pd.DataFrame:
    """The settings that decide a claim: in each part those of FI if there are any, and only tested ones."""
    own = rows.assign(fi=rows["filter"] != NO_FILTER)
    has_fi = own.groupby("part").fi.transform("any")
    tested = ~own.verdict.isin([NOTHING, NOT_MEASURED])
    return rows[(own.fi | ~has_fi) & tested]


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the deciding settings one for every filter: that of the largest n, whatever came out.

    Of several with the same n the first in the chapters' own order. The filters keep that order too.
    """
    counted = deciding(rows)
    largest = counted.sort_values("n", ascending=False, kind="stable").drop_duplicates("filter")
    filters = list(dict.fromkeys(counted["filter"]))
    return largest.set_index("filter", drop=False).loc[filters]


def headline(claim: Claim, rows: pd.DataFrame) -> str:
    """The verdict on a claim from all its settings (`rows` of :func:`gather`).

    A part of a claim holds with a filter where more than half of their settings do. The claim *holds* where
    every setting does; *only with* some filters where all parts hold with these; *only in part* where some
    parts hold, with the filters named. It *does not hold* where more than half of the settings say so, and is
    *undecided* otherwise. A question is *answered* by a number.
    """
    if claim.needs:
        return NEEDS
    counted = deciding(rows)
    if counted.empty:
        return NOTHING if (rows.verdict == NOTHING).any() else NOT_MEASURED
    if claim.kind == "question":
        return ANSWERED
    if (counted.verdict == HOLDS).all():
        return HOLDS
    share = (counted.verdict == HOLDS).groupby([counted.part, counted["filter"]], sort=False).mean()
    held = (share > 0.5).unstack()  # part x filter; missing where they were not tested together
    if held.isin([True]).any(axis=None):
        return _only(held)
    return FAILS if (counted.verdict == FAILS).mean() > 0.5 else OPEN


def _only(held: pd.DataFrame) -> str:
    """In words, where a claim holds that does not hold everywhere."""
    filters = [name for name in FILTERS if name in held]
    strong = [name for name in filters if held[name].dropna().all()]
    rest = held[NO_FILTER].dropna().all() if NO_FILTER in held else True
    if strong and rest and len(strong) < len(filters):
        return f"holds only with {_join(strong)}"
    said = []
    for part, cells in held.iterrows():
        tested = cells.dropna()
        names = [name for name in filters if tested.get(name)]
        limited = f" ({_join(names)})" if names and len(names) < len(tested) else ""
        if tested.any():
            said.append(f"{part}{limited}")
    return f"holds only in part: {'; '.join(said)}"


def _join(names: Sequence[str]) -> str:
    return " and ".join(FILTERS[name] for name in names)


def condense(claims: Mapping[str, Claim], rows: pd.DataFrame) -> pd.DataFrame:
    """A row a claim: id, short, kind, verdict, tested (chapters), missing (chapters), settings, and for every
    filter how many of the deciding settings hold, do not, and are undecided, as "2/0/1" ("" where none).
    """
    lines = []
    for claim in claims.values():
        own = rows[rows.id == claim.id]
        missing = [chapter for chapter in claim.chapters if chapter not in set(rows.chapter)]
        line = {
            "id": claim.id,
            "short": claim.short,
            "kind": claim.kind,
            "verdict": headline(claim, own),
            "tested": " ".join(dict.fromkeys(own.chapter)),
            "missing": " ".join(missing),
            "settings": len(own),
        }
        counted = deciding(own)
        for name in (*FILTERS, NO_FILTER):
            verdicts = counted[counted["filter"] == name].verdict
            counts = [int((verdicts == said).sum()) for said in (HOLDS, FAILS, OPEN)]
            line[name] = "/".join(map(str, counts)) if sum(counts) else ""
        lines.append(line)
    return pd.DataFrame(lines)


def kind_of(verdict: str) -> str:
    """A headline without what it is limited to: "holds only with damping" is "holds only with …"."""
    return HEADLINES["only"] if verdict.startswith("holds only") else verdict


# --- the page


def as_html(claims: Sequence[Claim], rows: pd.DataFrame, condensed: pd.DataFrame) -> str:
    """All that the book says of each claim: verdict, where, numbers, published figures, every setting."""
    found = condensed.set_index("id")
    return "\n".join(_entry(claim, rows[rows.id == claim.id], found.loc[claim.id]) for claim in claims)


def _entry(claim: Claim, rows: pd.DataFrame, line: pd.Series) -> str:
    tested = ", ".join(f'<a href="{name}.html">{name[:2]}</a>' for name in str(line.tested).split())
    where = f"Tested in chapter {tested}." if tested else ""
    if line.missing:
        where += f" Chapter {line.missing.replace(' ', ', ')}: {NOT_MEASURED}."
    pieces = [
        f"<p><strong>{claim.id}.</strong> {escape(claim.words)} <em>({escape(claim.source)})</em></p>",
        f"<p><strong>{escape(line.verdict)}</strong>. {where}{_why(claim)}</p>",
        _numbers(claim, rows),
        _published(claim),
        _settings(rows),
    ]
    return f'<section id="claim-{claim.id.lower()}">{"".join(pieces)}</section>'


def _why(claim: Claim) -> str:
    return f" It takes {escape(claim.needs)}." if claim.needs else ""


def _numbers(claim: Claim, rows: pd.DataFrame) -> str:
    """The setting of every filter that :func:`shown` picks."""
    first = shown(rows)
    if first.empty:
        return ""
    items = "".join(
        f"<li>{escape(f'{row.part} ({row.setting})')}: {_number(row)}, {row.said}</li>"
        for row in first.itertuples()
    )
    about = f"<p>{escape(claim.number[0].upper() + claim.number[1:])}.</p>" if claim.number else ""
    return f"{about}<ul>{items}</ul>"


def _number(row: object) -> str:
    value, low, high, n = (float(getattr(row, name)) for name in ("value", "low", "high", "n"))
    between = f" [{low:.3g}, {high:.3g}]" if low < high else ""
    return f"{value:.3g}{between}, n = {n:,.0f}"


def _published(claim: Claim) -> str:
    if not claim.published:
        return ""
    return f"<p>Published: {escape('; '.join(published(key).as_text() for key in claim.published))}.</p>"


def _settings(rows: pd.DataFrame) -> str:
    """Every setting, to unfold."""
    if rows.empty:
        return ""
    lines = "".join(
        f"<tr><td>{row.chapter[:2]}</td><td>{escape(row.part)}</td><td>{escape(row.setting)}</td>"
        f"<td>{'' if pd.isna(row.value) else _number(row)}</td><td>{escape(row.said)}</td></tr>"
        for row in rows.itertuples()
    )
    head = "".join(f"<th>{name}</th>" for name in ("chapter", "part", "setting", "number", "verdict"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    unfold = f"<summary>{'The one setting' if len(rows) == 1 else f'All {len(rows)} settings'}</summary>"
    region = f'role="region" aria-label="settings of claim {rows.id.iloc[0]}" tabindex="0"'
    return f'<details>{unfold}<div style="overflow-x: auto" {region}>{table}</div></details>'
