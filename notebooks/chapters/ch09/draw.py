"""Figures of chapter 09: TIES step by step, what merging costs, and what protection gives back."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from fichapters import plots
from fichapters.ch09 import lab
from fichapters.papers import published
from fichapters.style import DIVERGING, WIDTH, new_figure

PUBLISHED = {  # with and without protection, by the merge
    "average": ("merge_average_with", "merge_average"),
    "task arithmetic": ("merge_task_with", "merge_task"),
    "TIES I": ("merge_ties_one", "merge_ties"),
    "TIES II": ("merge_ties_two", "merge_ties"),
}
NONE = "no protection"


def steps(delta_a: Tensor, delta_b: Tensor, trim: Callable[[Tensor], Tensor], merged: Tensor) -> Figure:
    """The worked example of TIES: both displacements, what the trim leaves of them, elected signs, the merge.

    delta_a, delta_b, merged: (rows, columns). trim: of one displacement.
    """
    kept_a, kept_b = trim(delta_a), trim(delta_b)
    shown = {
        "1. A moved by": delta_a, "2. trimmed": kept_a, "3. elected signs": (kept_a + kept_b).sign(),
        "1. B moved by": delta_b, "2. trimmed ": kept_b, "4. merged": merged,
    }  # fmt: skip
    most = float(max(values.abs().max() for values in shown.values()))
    figure, axes = new_figure(2, 3, size=(WIDTH, 3.6))
    for ax, (title, values) in zip(axes.flat, shown.items(), strict=True):
        form = "+.0f" if "signs" in title else ".2g"
        top = 1.5 if "signs" in title else 1.3 * most
        sns.heatmap(
            values.numpy(), ax=ax, annot=True, fmt=form, cmap=DIVERGING, vmin=-top, vmax=top, cbar=False
        )
        ax.set(title=title.strip(), xticks=[], yticks=[])
    return figure


def gammas(tried: pd.DataFrame, alone: pd.DataFrame) -> Figure:
    """Validation accuracy over gamma in each domain, without protection.

    tried: of `Results.by_domain`. alone: of `lab.by_domain`, with the model; each domain's expert is a line.
    """
    domains = list(dict.fromkeys(alone.domain))
    kept = ["" if pd.isna(x) else f", {x:.0%} kept" for x in tried.density]
    ends = pd.DataFrame({"task_weight": [tried.task_weight.min(), tried.task_weight.max()]})
    own = pd.concat(
        [alone[(alone.model == a) & (alone.domain == d)] for a, d in zip("ab", domains, strict=True)]
    )
    lines = [
        tried.assign(merge=tried.name + kept),
        own.assign(merge="the expert alone").merge(ends, how="cross"),
    ]
    n = int(own.n.sum())
    return plots.curves(
        pd.concat(lines), "task_weight", "accuracy", "merge", "domain", levels={"guessing": 0.25},
        scale="linear", labels=("task weight γ", f"accuracy ({n} validation questions)"),
    )  # fmt: skip


def chosen(tried: pd.DataFrame) -> pd.DataFrame:
    """The settings that the search chose, to read; tried: all of its tries, rows of `Results.means`."""
    best = tried.loc[tried.groupby("name", sort=False)["mean"].idxmax()]
    text = best.drop(columns=["method", "by", "set"]).round(3).astype(object)
    titles = {"share": "protected share", "task_weight": "γ"}
    return text.where(text.notna(), "").rename(columns=titles).set_index("name")


def added(curve: pd.DataFrame) -> Figure:
    """What protection adds over the protected share k, one panel a merge (Fig. 5 of the paper)."""
    label = f"accuracy with minus without\n({curve.n.max()} validation questions)"
    return plots.curves(
        curve[curve.share > 0], "share", "difference", "by", "method",
        levels={NONE: 0.0}, scale="log", labels=("protected share k", label),
    )  # fmt: skip


def accuracies(table: pd.DataFrame) -> Figure:
    """Table 3: the accuracy of every merge in each domain and in the mean of both."""
    merges = _rows(table.name)
    kept = [name.removeprefix(row).removeprefix(", ") for name, row in zip(table.name, merges, strict=True)]
    shown = table.assign(merge=merges, by=[by or NONE for by in kept])
    return plots.forest(
        shown, "merge", "accuracy", "by", line=None, panels="domain", label="accuracy", first=lab.FILTERS
    )


def gains(paired: pd.DataFrame, pooled: pd.DataFrame) -> Figure:
    """What protection adds in each method and in all, beside what it adds in the paper (hollow)."""
    own = paired[paired.topic == lab.HELPS]
    shown = pd.concat([own.assign(merge=_rows(own["first"])), pooled.assign(merge="all together")])
    marks = {row: published(a).value - published(b).value for row, (a, b) in PUBLISHED.items()}
    return plots.forest(shown, "merge", by="measure", label="accuracy with minus without", marks=marks)


def beside(both: pd.DataFrame) -> Figure:
    """What protection adds in each method, a panel a model. both: `Results.paired` by `real.both`."""
    own = both[both.topic == lab.HELPS]
    shown = own.assign(merge=_rows(own["first"]))
    return plots.forest(shown, "merge", by="measure", label="accuracy with minus without", panels="model")


def turns(paired: pd.DataFrame) -> Figure:
    """A curve's peak minus no protection, and minus protection of everything."""
    own = paired[paired.topic.isin([lab.RISES, lab.FALLS])]
    titles = {lab.RISES: "peak minus none protected", lab.FALLS: "peak minus all protected"}
    shown = own.assign(merge=_rows(own["first"]), topic=own.topic.map(titles))
    shown = shown.sort_values("topic", ascending=False, kind="stable")
    return plots.forest(shown, "merge", by="measure", label="accuracy", panels="topic")


def choices(table: pd.DataFrame) -> Figure:
    """The average protected by each score, minus no protection and minus random protection."""
    titles = {"average": "minus no protection", f"average by {lab.RANDOM}": "minus random protection"}
    shown = table.assign(kept=table["first"].str.removeprefix("average by "), minus=table.minus.map(titles))
    return plots.forest(shown, "kept", label="accuracy", panels="minus")


def whose(table: pd.DataFrame) -> Figure:
    """A kept from the average by scores from different questions: the difference in each domain."""
    parts = table["first"].str.removeprefix("A kept by ").str.split(", ", n=1, expand=True)
    shown = table.assign(by=parts[0], place=parts[1].fillna("no questions"))
    return plots.forest(shown, "place", by="by", label="accuracy with minus without", panels="domain")


def _rows(names: pd.Series) -> list[str]:
    """The merges, without what protects them, of the names of rows."""
    ending = "|".join(lab.FILTERS)
    return list(names.str.replace(rf", ({ending})(, at the peak)?$", "", regex=True))
