"""Tables to read: no running index, nothing cut off, and a value with its interval."""

import pandas as pd
import pytest

from fichapters.tables import average, duel_counts, duel_grid, judged_lines, show, with_verdict

PART = "a claim whose words are longer than the fifty letters that pandas prints of a column"
CLAIM = f"24: {PART}"
JUDGED = pd.DataFrame(
    [
        ("24", PART, "timed", 6, 1.653, 1.429, 2.069, "undecided"),
        ("24", PART, "counted", 1, 2.0323, 2.0323, 2.0323, "does not hold"),
    ],
    columns=["id", "part", "setting", "n", "value", "low", "high", "verdict"],
)


def test_a_judged_setting_has_its_interval_and_a_count_has_none() -> None:
    lines = judged_lines(JUDGED, "ratio")
    assert lines.ratio.tolist() == ["1.65 [1.43, 2.07]", "2.03"]
    assert judged_lines(JUDGED, "ratio", "+.1f").ratio.iloc[0] == "+1.7 [+1.4, +2.1]"
    assert lines.loc[(CLAIM, "counted"), "verdict"] == "does not hold"
    assert lines.to_html().count(CLAIM) == 1  # once for all of its settings, and whole


def test_the_settings_of_a_claim_stand_together_in_the_order_of_the_claims() -> None:
    other = JUDGED.assign(id="5", part="another claim")
    mixed = pd.concat([JUDGED.iloc[:1], other, JUDGED.iloc[1:]], ignore_index=True)
    assert judged_lines(mixed, "ratio").index.tolist() == [
        (CLAIM, "timed"), (CLAIM, "counted"), ("5: another claim", "timed"), ("5: another claim", "counted"),
    ]  # fmt: skip


def test_a_part_of_two_claims_is_one_line_and_what_was_not_measured_has_no_number() -> None:
    nothing = JUDGED.assign(value=float("nan"), low=float("nan"), high=float("nan"), verdict="not measured")
    lines = judged_lines(pd.concat([nothing, nothing.assign(id="R2")], ignore_index=True), "ratio")
    assert lines.index.tolist() == [(f"24, R2: {PART}", "timed"), (f"24, R2: {PART}", "counted")]
    assert lines.ratio.tolist() == ["", ""]


def test_duels_are_shown_and_counted_by_what_they_say_of_more_damage() -> None:
    duels = pd.DataFrame(
        [("FI exact", "random", -0.2, -0.3, -0.1), ("FI exact", "SNIP", 0.1, 0.05, 0.2)],
        columns=["fi", "other", "difference", "low", "high"],
    )
    assert with_verdict(duels, below=0).verdict.tolist() == ["holds", "does not hold"]
    assert duel_grid(duels).loc["FI exact", "SNIP"] == "+0.100 [+0.050, +0.200] does not hold"
    assert duel_counts(duels).loc[("FI exact", "random")].tolist() == [1, 0, 0]


def test_the_interval_of_an_average_holds_it_and_narrows() -> None:
    few = pd.Series([0.0, 0.2, 0.1, 0.5])
    mean, low, high = average(few, 0)
    assert mean == pytest.approx(0.2) and 0 <= low < mean < high <= 0.5
    assert average(few + 1, 0)[1:] == pytest.approx((low + 1, high + 1))
    many = average(pd.concat([few] * 25, ignore_index=True), 0)
    assert many[2] - many[1] < (high - low) / 3


def test_a_shown_table_has_its_formats_and_no_index() -> None:
    html = show(JUDGED, value="{:.1%}").to_html()
    assert "165.3%" in html and PART in html and "row_heading" not in html
