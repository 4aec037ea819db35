"""Tables to read: no running index, nothing cut off, and a value with its interval."""

import pandas as pd

from fihelpers.experiments.tables import judged_lines, show

CLAIM = "24: a claim whose words are longer than the fifty letters that pandas prints of a column"
JUDGED = pd.DataFrame(
    [
        (CLAIM, "timed", 6, 1.653, 1.429, 2.069, "undecided"),
        (CLAIM, "counted", 1, 2.0323, 2.0323, 2.0323, "does not hold"),
    ],
    columns=["claim", "setting", "n", "value", "low", "high", "verdict"],
)


def test_a_judged_setting_has_its_interval_and_a_count_has_none() -> None:
    lines = judged_lines(JUDGED, "ratio")
    assert lines.ratio.tolist() == ["1.65 [1.43, 2.07]", "2.03"]
    assert judged_lines(JUDGED, "ratio", "+.1f").ratio.iloc[0] == "+1.7 [+1.4, +2.1]"
    assert lines.loc[(CLAIM, "counted"), "verdict"] == "does not hold"
    assert lines.to_html().count(CLAIM) == 1  # once for all of its settings, and whole


def test_a_shown_table_has_its_formats_and_no_index() -> None:
    html = show(JUDGED, value="{:.1%}").to_html()
    assert "165.3%" in html and CLAIM in html and "row_heading" not in html
