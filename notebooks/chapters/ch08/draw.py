"""Figures of chapter 08: where the loss of quantization begins, what protected channels win back and cost."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from fichapters.ch08.lab import EARLIER, LENGTH, RANDOM, Cases, claimed
from fichapters.plots import curves, forest

STORED = "bits a weight, scales included"
BESIDE = (RANDOM, "FI damped 0.0001", LENGTH)  # what is drawn beside more bits for all


def loss_sweep(sweep: pd.DataFrame, intact: float) -> Figure:
    """Accuracy against stored bits a weight without protection, a panel for each set of matrices.

    sweep: columns matrices, group, stored, accuracy, low, high, n. intact: accuracy before, a dashed line.
    """
    shared = sweep.group.map({g: f"a scale for {g} weights" if g else "a scale a row" for g in sweep.group})
    return curves(
        sweep.assign(shared=shared),
        "stored",
        by="shared",
        panels="matrices",
        levels={"intact": intact},
        labels=(STORED, ""),
        scale="linear",
    )


def protection(table: pd.DataFrame, sweep: pd.DataFrame, cases: Cases, intact: float) -> Figure:
    """Accuracy against the share of rows kept, by FI high and low and at random, a panel a case.

    table: of `Trials.table`, with columns case, axis, keep, share. sweep and intact as in `loss_sweep`.
    """
    shown = _rows(table, cases, EARLIER)
    nothing = sweep[sweep.group == 0].set_index(["matrices", "bits"]).accuracy
    start = {case: nothing[place] for case, place in cases.items()}
    labels = ("share of rows kept in 16 bits", "")
    levels = {"intact": intact}
    return curves(
        shown, "share", by="keep", panels="case", start=start, levels=levels, labels=labels, columns=2
    )


def high_against_low(table: pd.DataFrame) -> Figure:
    """The earlier version's comparison in every case, by filter; hollow: the gain that it reports.

    table: of `lab.high_against_low`.
    """
    shown = _named(table[table.score == "accuracy"])
    label = "accuracy, rows of high FI minus rows of low FI"
    return forest(shown, "case", by="filter", label=label, marks={"o_proj, 1 bit": claimed("gain")})


def won_back(table: pd.DataFrame) -> Figure:
    """The share of the loss that a few rows win back; hollow: what the earlier version claims of them.

    table: of `lab.won_back`.
    """
    label = f"share of the loss won back by {table.share.iloc[0]:.0%} of the rows"
    marks = {"o_proj, 4 bit": claimed("recovery")}
    return forest(_named(table), "case", "recovered", by="keep", label=label, marks=marks)


def against_random(table: pd.DataFrame, axis: str) -> Figure:
    """Every score minus random channels, a panel a case. table: of the lab's; axis: "rows" or "columns"."""
    shown = table[(table.score == "accuracy") & (table.axis == axis)]
    return forest(shown, "first", panels="case", label=f"accuracy minus that with random {axis} kept")


def beside(both: pd.DataFrame, case: str) -> Figure:
    """Every score minus random rows in one case, a panel a model. both: `against_random` by `real.both`."""
    shown = both[(both.score == "accuracy") & (both.axis == "rows") & (both.case == case)]
    return forest(shown, "first", panels="model", label=f"accuracy minus that with random rows kept, {case}")


def duels(table: pd.DataFrame) -> Figure:
    """Pairs of scores, the first minus the second, a panel a case. table: of `lab.compare`."""
    shown = table[table.score == "accuracy"]
    shown = shown.assign(pair=shown["first"] + "\nminus " + shown["minus"])
    return forest(shown, "pair", panels="case", label="difference of accuracy")


def beside_more_bits(table: pd.DataFrame, sweep: pd.DataFrame, cases: Cases, intact: float) -> Figure:
    """Accuracy against stored bits a weight: rows protected in each case, and nothing, with other bits.

    Arguments as in `protection`.
    """
    plain = sweep[sweep.group == 0].assign(keep="nothing, other bits for all")
    others = [plain[plain.matrices == matrices].assign(case=case) for case, (matrices, _) in cases.items()]
    shown = pd.concat([*others, _rows(table, cases, BESIDE)])
    levels = {"intact": intact}
    labels = (STORED.replace("scales", "all"), "")
    return curves(
        shown, "stored", by="keep", panels="case", levels=levels, labels=labels, scale="linear", columns=2
    )


def one_step_more(table: pd.DataFrame) -> Figure:
    """One more bit for all weights minus protection, by the share of rows kept. table: of the lab's."""
    shown = table.assign(kept=[f"{share:.0%} of the rows kept" for share in table.share])
    label = f"accuracy, one more bit for all minus rows kept by {LENGTH}"
    return forest(shown, "kept", panels="case", label=label)


def _rows(table: pd.DataFrame, cases: Cases, keeps: Sequence[str]) -> pd.DataFrame:
    """What was tried with rows kept, in some cases and by some scores."""
    return table[(table.axis == "rows") & table.case.isin(list(cases)) & table.keep.isin(keeps)]


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the name of each row's case."""
    return table.assign(case=[f"{m}, {b} bit" for m, b in zip(table.matrices, table.bits, strict=True)])
