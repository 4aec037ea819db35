"""Verdicts on claims: rules for numbers, one verdict from many settings, and ids that must be known."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fichapters import claims as judges
from fichapters.ch12 import draw
from fichapters.claims import Claim, condense, gather, headline, load_claims
from fichapters.judged import COLUMNS, NOT_MEASURED, RULES, Judged, judged
from fichapters.papers import published
from fichapters.results import Record, load_results, results_beside
from fichapters.runs import chapters

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
CHAPTERS = {path.stem for path in chapters(ROOT / "notebooks")}
A = Claim("7", "a", "A claim.", "somewhere", chapters=("04_some",))


def record(name: str, value: float, low: float | None = None, high: float | None = None) -> Record:
    return Record(name, value, low, high, 9, "", 0, None, None, None, None, "04_some", "embedded", {})


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        (Judged("7: x", "s", "up", above=0), "holds"),
        (Judged("7: x", "s", "wide", above=0), "undecided"),
        (Judged("7: x", "s", "up", below=0), "does not hold"),
        (Judged("7: x", "s", "up", above=0.15), "undecided"),
        (Judged("7: x", "s", "up", above=0.05, below=0.4), "holds"),
        (Judged("7: x", "s", "fact", above=1), "does not hold"),  # on the bound is not above it
        (Judged("7: x", "s", "up", above="fact"), "does not hold"),
        (Judged("7: x", "s", "fact", above="up"), "holds"),
        (Judged("7: x", "s", "wide", above="fact"), "does not hold"),
        (Judged("7: x", "s", "nowhere", above=0), NOT_MEASURED),
        (Judged("7: x", "s", "up", above="nowhere"), NOT_MEASURED),
    ],
)
def test_a_rule_judges_by_the_whole_interval(rule: Judged, verdict: str) -> None:
    known = [record("up", 0.2, 0.1, 0.3), record("wide", 0.2, -0.1, 0.5), record("fact", 1.0)]
    table = judged([rule], {r.name: r for r in known})
    assert list(table) == COLUMNS and table.verdict.tolist() == [verdict]


def rows_of(*lines: tuple[str, str, str]) -> pd.DataFrame:
    """Rows of one claim from (part, filter, verdict)."""
    table = pd.DataFrame(lines, columns=["part", "filter", "verdict"])
    return table.assign(
        id="7", chapter="04_some", setting="s", n=3, value=0.1, low=0.0, high=0.2, said=table.verdict
    )


H, F, U = judges.HOLDS, judges.FAILS, judges.OPEN


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ([("p", "exact", H), ("p", "damped", H)], "holds"),
        ([("p", "exact", F), ("p", "damped", H)], "holds only with damping"),
        ([("p", "exact", U), ("p", "cut", H), ("p", "damped", H)], "holds only with a cut and damping"),
        ([("p", "damped", H), ("q", "damped", F), ("p", "exact", U)], "holds only in part: p (damping)"),
        ([("p", judges.NO_FILTER, H), ("q", judges.NO_FILTER, F)], "holds only in part: p"),
        ([("p", "exact", H), ("p", "exact", F), ("p", "exact", F)], "does not hold"),
        ([("p", "exact", U), ("p", "damped", F)], "undecided"),
        # what other measures do is no evidence, where FI was tested
        ([("p", "exact", U), ("p", judges.NO_FILTER, H)], "undecided"),
        ([("p", "exact", judges.NOTHING)], "nothing to recover"),
        ([("p", "exact", NOT_MEASURED)], NOT_MEASURED),
        ([("p", "exact", judges.NOTHING), ("p", "exact", H)], "holds"),
        # the filter helps, yet a part without filters fails: only that part can be named
        (
            [("p", "exact", H), ("p", "damped", F), ("q", judges.NO_FILTER, F)],
            "holds only in part: p (exact FI)",
        ),
    ],
)
def test_one_verdict_from_many_settings(lines: list[tuple[str, str, str]], verdict: str) -> None:
    assert headline(A, rows_of(*lines)) == verdict
    assert judges.kind_of(verdict) in judges.HEADLINES.values()


def test_a_question_is_answered_and_what_needs_other_models_says_so() -> None:
    rows = rows_of(("p", "exact", F))
    assert headline(replace(A, kind="question"), rows) == "answered"
    assert headline(replace(A, needs="time"), rows) == "needs the paper's models"
    assert headline(A, rows[:0]) == NOT_MEASURED


def test_the_setting_shown_is_that_of_the_largest_n_and_not_the_best() -> None:
    rows = rows_of(
        ("p", "damped", H),
        ("p", "exact", H),
        ("p", "exact", F),
        ("q", "exact", H),
        ("p", judges.NO_FILTER, H),
    )
    found = judges.shown(rows.assign(n=[3, 3, 9, 9, 99], setting=list("abcde")))
    assert found.setting.tolist() == ["a", "c"]  # in the chapters' order; the last does not decide
    assert judges.shown(rows[:0]).empty


def write(path: Path, *lines: tuple[str, str, str]) -> dict[str, Path]:
    """A chapter's table of (claim, setting, verdict)."""
    table = pd.DataFrame([(c, s, 5, -0.01, -0.02, 0.0, v) for c, s, v in lines], columns=COLUMNS)
    table.to_csv(path / "04_some.claims.csv", index=False)
    return {"04_some.claims.csv": path / "04_some.claims.csv"}


def test_lines_are_read_with_ids_parts_and_filters(tmp_path: Path) -> None:
    tables = write(
        tmp_path,
        ("7, 10: guided beats random", "FI exact, count 10", "undecided"),
        ("7: ahead", "FI damped 0.0001 against Jacobian norm, 10 pixels", "the reverse holds"),
        ("10: random does no harm", "random", "no loss seen"),
        ("7: it costs", "rows, o_proj", "does not hold: because"),
    )
    rows = gather(tables, {"7": A, "10": replace(A, id="10")})
    assert rows.id.tolist() == ["7", "10", "7", "10", "7"]
    assert rows["filter"].tolist() == ["exact", "exact", "damped", judges.NO_FILTER, judges.NO_FILTER]
    assert set(rows.part[rows.said == "the reverse holds"]) == {"ahead, against Jacobian norm"}
    assert rows.verdict.tolist() == [U, U, F, H, F]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("99: x", "s", "holds"), "99: judged in a chapter, but not in claims.yaml"),
        (("no id", "s", "holds"), "should begin with a claim's id"),
        (("7: x", "s", "maybe"), "the verdict 'maybe' is none of"),
        (("8: x", "s", "holds"), "04_some has no line on claim 7"),
    ],
)
def test_missing_and_unknown_ids_fail_loudly(
    line: tuple[str, str, str], message: str, tmp_path: Path
) -> None:
    known = {"7": A, "8": replace(A, id="8", chapters=())}
    with pytest.raises(ValueError, match=message):
        gather(write(tmp_path, line), known)
    with pytest.raises(ValueError, match="no chapter has judged"):
        gather({}, known)


def test_the_claims_are_complete_and_name_what_exists() -> None:
    claims = load_claims()
    numbers = [str(i) for i in range(1, 26)] + [f"R{i}" for i in range(1, 11)]
    assert [i for i in claims if not i.startswith("O")] == numbers
    for claim in claims.values():
        assert claim.chapters or claim.needs
        assert claim.kind == {"R": "question", "O": "ours"}.get(claim.id[0], "claim")
        assert all(published(key).what for key in claim.published)
    later = {"10_cost", "11_relatives"}
    assert {chapter for claim in claims.values() for chapter in claim.chapters} <= CHAPTERS | later


def test_every_rule_names_a_known_claim_and_a_number_of_its_chapter() -> None:
    claims, records = load_claims(), load_results(RESULTS)
    for chapter, rules in RULES.items():
        for rule in rules:
            found = judges.IDS.fullmatch(rule.claim)
            assert found and all(chapter in claims[i].chapters for i in found[1].split(", ")), rule
            for name in (rule.record, rule.above, rule.below):
                assert not isinstance(name, str) or (chapter, name) in records, (
                    f"{chapter} does not record {name}"
                )


def test_what_is_kept_tells_every_claim() -> None:
    claims = load_claims()
    rows = gather(results_beside(RESULTS, judges.TABLES), claims)
    condensed = condense(claims, rows)
    assert list(condensed.id) == list(claims)
    for claim, line in zip(claims.values(), condensed.itertuples(), strict=True):
        page = judges.as_html([claim], rows, condensed)
        assert f'id="claim-{claim.id.lower()}"' in page and "nan" not in page
        assert all(f'href="{chapter}.html"' in page for chapter in str(line.tested).split())
    figure = draw.verdict_grid(condensed[condensed.kind != "question"])
    assert figure.get_size_inches()[0] <= 7.2


def test_nothing_is_missing_from_what_is_kept() -> None:
    claims = load_claims()
    condensed = condense(claims, gather(results_beside(RESULTS, judges.TABLES), claims))
    assert not condensed.missing.any() and NOT_MEASURED not in set(condensed.verdict)


def test_results_of_the_run_go_before_those_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, run = tmp_path / "data" / "results", tmp_path / "run"
    kept.mkdir(parents=True)
    run.mkdir()
    monkeypatch.setenv("FIHELPERS_DATA", str(kept.parent))
    for path in (kept / "1.claims.csv", kept / "2.claims.csv", run / "2.claims.csv", run / "2.other.csv"):
        path.write_text("")
    found = results_beside(run, "*.claims.csv")
    assert found == {"1.claims.csv": kept / "1.claims.csv", "2.claims.csv": run / "2.claims.csv"}
