"""Every claim with what the chapters found: parts that name numbers of kept tables, judged by one rule.

The claims and their parts stand in ``data/claims.yaml``, whose head explains the keys. Nothing here knows a
chapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fichapters.kept import KEPT
from fichapters.papers import published
from fihelpers.data import check_file, data_folder
from fihelpers.evaluate.stats import wilson

FILE = "claims.yaml"
WEB = Path(__file__).parent / "web"
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
NOT_MEASURED, ANSWERED = "not measured", "answered"
IN_PART = "holds in part"  # of whole claims only
NO_FILTER = "no filter"
FILTERS = ("exact", "cut", "damped", NO_FILTER)
COLUMNS = ["id", "chapter", "part", "setting", "filter", "n", "value", "low", "high", "verdict"]
Read = Callable[[str, str], pd.DataFrame]  # a chapter's table, empty where there is none


@dataclass(frozen=True)
class Part:
    """What has to be true of the rows of one table; the keys are explained in the file of the claims.

    names: whatever else the file says of it, for the texts.
    """

    words: str
    setting: str
    chapter: str
    table: str
    names: Mapping[str, Any]
    where: Mapping[str, Any]
    measure: str = "{measure}"
    value: str = "value"
    low: str = "low"
    high: str = "high"
    n: str = "n"
    above: float | Mapping[str, str] = -math.inf
    below: float | Mapping[str, str] = math.inf
    margin: float = 0.0


@dataclass(frozen=True)
class Claim:
    """One claim or question in our words.

    kind: "claim", "question" (a reviewer's) or "ours". number: what the numbers of its parts are. published:
    keys of the published figures. needs: what a test would take that the bundled models cannot give.
    """

    id: str
    short: str
    words: str
    source: str
    kind: str = "claim"
    number: str = ""
    published: tuple[str, ...] = ()
    needs: str = ""
    parts: tuple[Part, ...] = ()


# --- the file


def load_claims() -> dict[str, Claim]:
    """Return the claims by id, in the order of the file. Raises ValueError for an id that is listed twice."""
    listed = _content()["claims"]
    claims = {line["id"]: _claim(line) for line in listed}
    if len(claims) < len(listed):
        raise ValueError(f"{FILE} lists an id twice.")
    return claims


@lru_cache(maxsize=1)
def _content() -> dict[str, Any]:
    path = data_folder() / FILE
    check_file(path)
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _claim(line: Mapping[str, Any]) -> Claim:
    told = line.items()
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told if k != "parts"}
    return Claim(**given, parts=tuple(part for said in line.get("parts", ()) for part in _expand(said)))


def _expand(said: Mapping[str, Any]) -> Iterator[Part]:
    """A part for every item of its "for" and every choice from the lists of its "where"."""
    known = {field.name for field in fields(Part)}
    for item in said.get("for", [{}]):
        made = {k: v for k, v in said.items() if k != "for"} | item
        lists = [v if isinstance(v, list) else [v] for v in made["where"].values()]
        told = {k: v for k, v in made.items() if k in known}
        names = {k: v for k, v in made.items() if k not in known}
        for values in product(*lists):
            where = dict(zip(made["where"], values, strict=True))
            yield Part(**told | {"where": where, "names": names | where})


# --- the rule


def judge(
    low: float, high: float, above: float = -math.inf, below: float = math.inf, margin: float = 0
) -> str:
    """What an interval says of the claim that a number lies between two bounds.

    It holds where the whole interval [low, high] lies inside, does not hold where the whole of it lies
    outside on one side, and is undecided otherwise. margin: by so much the interval may stick out and the
    claim still holds, if it does not lie outside.
    """
    if high < above or low > below:
        return FAILS
    return HOLDS if low > above - margin and high < below + margin else OPEN


def judged(claims: Mapping[str, Claim], read: Read) -> pd.DataFrame:
    """A row for every setting of every part of the claims; columns as `COLUMNS`, NaN where not measured.

    Raises ValueError for a column that a table does not have, and for a measure whose filter nobody named.
    """
    parts = [(claim.id, part) for claim in claims.values() for part in claim.parts]
    return pd.DataFrame([line for named in parts for line in _lines(*named, read)], columns=COLUMNS)


def _lines(claim: str, part: Part, read: Read) -> Iterator[tuple[Any, ...]]:
    columns = (part.n, part.value, part.low, part.high)
    found = _rows(read(part.chapter, part.table), part.where, columns, part)
    for row in found.to_dict("records") or [{}]:
        names = {**{k: v for k, v in row.items() if not pd.isna(v)}, **part.names}
        names["measure"] = _told(part.measure, names, "")
        words = _told(part.words, names, part.words)
        setting = _told(part.setting, names, ", ".join(map(str, part.where.values())))
        n, value, *ends = (row[name] for name in columns) if row else (0, *[math.nan] * 3)
        low, high = (value if pd.isna(end) else end for end in ends)  # a number may have no interval
        above, below = (_bound(bound, row) for bound in (part.above, part.below))
        if any(math.isnan(number) for number in (value, above, below)):
            verdict = NOT_MEASURED
        elif math.isinf(above) and math.isinf(below):
            verdict = ANSWERED
        else:
            verdict = judge(low, high, above, below, part.margin)
        about = (claim, part.chapter, words, setting, _filter(names["measure"]))
        yield *about, n, value, low, high, verdict


def _rows(table: pd.DataFrame, where: Mapping[str, Any], columns: Iterable[str], part: Part) -> pd.DataFrame:
    """The rows of a table in which all columns have these values. Raises ValueError for a missing column."""
    missing = [name for name in (*where, *columns) if name not in table]
    if missing and not table.empty:
        place = f"the table {part.table!r} of {part.chapter}"
        raise ValueError(
            f"{place} has no column {missing[0]!r}, which {FILE} reads; keep it, or name another."
        )
    return table if table.empty else table[(table[list(where)] == pd.Series(where)).all(axis=1)]


def _bound(bound: float | Mapping[str, str], row: Mapping[str, Any]) -> float:
    """A bound as a number; NaN where it is a cell of a row that was not measured."""
    return float(row.get(bound["column"], math.nan)) if isinstance(bound, Mapping) else bound


def _told(template: str, names: Mapping[str, Any], otherwise: str) -> str:
    """A text with names put in; `otherwise` where one of them is known only from a row that is not there."""
    try:
        return template.format_map(names)
    except KeyError:
        return otherwise


def _filter(measure: str) -> str:
    if not measure:
        return NO_FILTER
    for name, measures in _content()["filters"].items():
        if measure in measures:
            return NO_FILTER if name == "none" else str(name)
    raise ValueError(f"the measure {measure!r} is in no list of filters; add it to one in {FILE}.")


# --- where the numbers are


def of_run(folder: Path | None = None) -> Read:
    """Read a run's tables; of a chapter that it has no results of, or without a run, those of the book."""

    @cache
    def read(chapter: str, table: str) -> pd.DataFrame:
        own = folder if folder and (folder / f"{chapter}.json").is_file() else data_folder() / KEPT
        return _read(own / f"{chapter}.{table}.csv")

    return read


def of_folder(folder: Path) -> Read:
    """Read the tables that lie in a folder, such as those of a real model, and no others."""
    return cache(lambda chapter, table: _read(folder / f"{chapter}.{table}.csv"))


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


# --- one verdict from many settings


def deciding(rows: pd.DataFrame) -> pd.DataFrame:
    """The settings that decide: in each part of a claim those of FI if there are any, where measured."""
    own = rows.assign(fi=rows["filter"] != NO_FILTER)
    has_fi = own.groupby(["id", "part"]).fi.transform("any")
    return rows[(own.fi | ~has_fi) & (rows.verdict != NOT_MEASURED)]


def counts(rows: pd.DataFrame, *by: str) -> pd.DataFrame:
    """How many of the deciding settings hold, do not, and are undecided: columns, with a row a group."""
    counted = deciding(rows)
    each = counted.assign(**{said: (counted.verdict == said).astype(int) for said in (HOLDS, FAILS, OPEN)})
    return each.groupby(list(by), sort=False)[[HOLDS, FAILS, OPEN]].sum()


def headline(claim: Claim, rows: pd.DataFrame) -> str:
    """The verdict on a claim from its settings (`rows` of :func:`judged`), by the rule of chapter 12."""
    counted = deciding(rows)
    if counted.empty:
        return NOT_MEASURED
    if claim.kind == "question":
        return ANSWERED
    if (counted.verdict == HOLDS).all():
        return HOLDS
    cells = counts(rows, "part", "filter")
    if (cells[HOLDS] > cells.sum(axis=1) / 2).any():
        return IN_PART
    return FAILS if (counted.verdict == FAILS).mean() > 0.5 else OPEN


def carried(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """How often two models say the same of a setting: columns of, n, value, low, high (Wilson, 95 %).

    rows, others: of `judged`. of: a chapter, or "all". n: settings that hold or do not on both, and decide on
    both. value: the share of them with one verdict.
    """
    keys = ["id", "chapter", "part", "setting", "filter"]
    both = deciding(rows).merge(deciding(others), on=keys, suffixes=("", "_there"))
    sure = both[both.verdict.isin((HOLDS, FAILS)) & both.verdict_there.isin((HOLDS, FAILS))]
    alike = sure.verdict == sure.verdict_there
    lines = []
    for name in ("all", *dict.fromkeys(sure.chapter)):
        own = alike if name == "all" else alike[sure.chapter == name]
        ends = wilson(int(own.sum()), len(own)) if len(own) else (math.nan, math.nan)
        lines.append((name, len(own), own.mean(), *ends))
    return pd.DataFrame(lines, columns=["of", "n", "value", "low", "high"])


def condense(claims: Mapping[str, Claim], rows: pd.DataFrame) -> pd.DataFrame:
    """A row a claim: id, short, kind, verdict, settings, and chapters where it was tested and is missing."""
    lines = []
    for claim in claims.values():
        own = rows[rows.id == claim.id]
        tested = list(dict.fromkeys(own.chapter[own.verdict != NOT_MEASURED]))
        missing = [name for name in dict.fromkeys(own.chapter) if name not in tested]
        about = (claim.id, claim.short, claim.kind, headline(claim, own), len(own))
        lines.append((*about, " ".join(tested), " ".join(missing)))
    return pd.DataFrame(lines, columns=["id", "short", "kind", "verdict", "settings", "tested", "missing"])


# --- the page


def as_html(
    claims: Sequence[Claim], rows: pd.DataFrame, condensed: pd.DataFrame, others: Mapping[str, pd.DataFrame]
) -> str:
    """All that the book says of each claim: verdict, where, its parts, published figures, every setting.

    others: rows of the same claims, of `judged`, on other models by their names.
    """
    found = condensed.set_index("id")
    entries = []
    for claim in claims:
        own = {model: table[table.id == claim.id] for model, table in others.items()}
        entries.append(_entry(claim, rows[rows.id == claim.id], found.loc[claim.id], own))
    return "\n".join(entries)


def finder() -> str:
    """Fields that narrow the lists of claims on the page down, by words and verdict; they need no kernel."""
    verdicts = (HOLDS, IN_PART, FAILS, OPEN, NOT_MEASURED, ANSWERED)
    options = "".join(f"<option>{verdict}</option>" for verdict in verdicts)
    script, style = ((WEB / f"claims.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    return (
        f'<style>{style}</style><div role="search"><label>Words <input type="search"></label> '
        f'<label>Verdict <select><option value="">any</option>{options}</select></label> '
        f"<output></output><script>{script}</script></div>"
    )


def _entry(claim: Claim, rows: pd.DataFrame, line: pd.Series, others: Mapping[str, pd.DataFrame]) -> str:
    measured = {model: own[own.verdict != NOT_MEASURED] for model, own in others.items()}
    pieces = [
        f"<p><strong>{claim.id}.</strong> {escape(claim.words)} <em>({escape(claim.source)})</em></p>",
        _said(claim, line, measured),
        _parts(rows) if claim.parts else "",
        _published(claim),
        _settings(claim, rows) if claim.parts else "",
        *(_settings(claim, own, f" on {model}") for model, own in measured.items() if len(own)),
    ]
    place = f'id="claim-{claim.id.lower()}" data-verdict="{escape(line.verdict)}"'
    return f"<section {place}>{''.join(pieces)}</section>"


def _said(claim: Claim, line: pd.Series, others: Mapping[str, pd.DataFrame]) -> str:
    """The verdict, that on other models, and where it was tested; a question is asked of one model only."""
    said = f"<strong>{escape(line.verdict)}</strong>"
    for model, own in others.items():
        if len(own) or claim.kind != "question":
            said += f"; on {escape(model)} <strong>{escape(headline(claim, own))}</strong>"
    tested = ", ".join(f'<a href="{name}.html">{name[:2]}</a>' for name in line.tested.split())
    where = f" Tested in chapter {tested}." if tested else ""
    if line.missing:
        where += f" Chapter {line.missing.replace(' ', ', ')}: {NOT_MEASURED}."
    needs = f" It takes {escape(claim.needs)}." if claim.needs else ""
    return f"<p>{said}.{where}{needs}</p>"


def _parts(rows: pd.DataFrame, where: str = "") -> str:
    """The verdicts of the parts: how many settings of each filter hold, do not, and are undecided."""
    cells = counts(rows, "part", "filter").iterrows()
    said = {place: "; ".join(f"{name} {n}" for name, n in line.items() if n) for place, line in cells}
    used = [name for name in FILTERS if any(place[1] == name for place in said)]
    table = [[part, *(said.get((part, name), "") for name in used)] for part in dict.fromkeys(rows.part)]
    return _table(f"parts of claim {rows.id.iloc[0]}{where}", ["part", *used], table)


def _published(claim: Claim) -> str:
    if not claim.published:
        return ""
    return f"<p>Published: {escape('; '.join(published(key).as_text() for key in claim.published))}.</p>"


def _settings(claim: Claim, rows: pd.DataFrame, where: str = "") -> str:
    """Every setting with its number, to unfold; of another model, with the verdicts of the parts."""
    lines = [[r.chapter[:2], r.part, r.setting, _number(r), r.verdict] for r in rows.itertuples()]
    region = f"settings of claim {claim.id}{where}"
    table = _table(region, ["chapter", "part", "setting", "number", "verdict"], lines)
    many = ("The one setting" if len(rows) == 1 else f"All {len(rows)} settings") + where
    about = f" Numbers: {escape(claim.number)}." if claim.number and not where else ""
    parts = _parts(rows, where) if where else ""
    return f"<details><summary>{many}.{about}</summary>{parts}{table}</details>"


def _number(row: Any) -> str:
    if math.isnan(row.value):
        return ""
    between = f" [{row.low:.3g}, {row.high:.3g}]" if row.low < row.high else ""
    return f"{row.value:.3g}{between}, n = {row.n:,.0f}"


def _table(label: str, titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in a region of its own, which can be scrolled sideways by mouse and keyboard."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div style="overflow-x: auto" role="region" aria-label="{label}" tabindex="0">{table}</div>'
