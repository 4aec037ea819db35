"""What the tables of several chapters share."""

import pandas as pd
import pytest

from fichapters.tables import average, with_ends, with_verdict


def test_a_table_says_of_its_intervals_what_they_say_of_bounds() -> None:
    duels = pd.DataFrame({"low": [-0.3, 0.05, -0.1], "high": [-0.1, 0.2, 0.1]})
    assert with_verdict(duels, below=0).verdict.tolist() == ["holds", "does not hold", "undecided"]


def test_a_percentile_interval_holds_its_value() -> None:
    assert with_ends(pd.Series([0.5, *([0.0] * 99), 1.0])) == (0.5, 0, 0.5)
    assert with_ends(pd.Series([0.5, *range(-20, 21)])) == (0.5, -19, 19)


def test_the_interval_of_an_average_holds_it_and_narrows() -> None:
    few = pd.Series([0.0, 0.2, 0.1, 0.5])
    mean, low, high = average(few, 0)
    assert mean == pytest.approx(0.2) and 0 <= low < mean < high <= 0.5
    assert average(few + 1, 0)[1:] == pytest.approx((low + 1, high + 1))
    many = average(pd.concat([few] * 25, ignore_index=True), 0)
    assert many[2] - many[1] < (high - low) / 3
