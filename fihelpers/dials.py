"""The dials of chapters 03, 04 and 09: what their explorers show, made of what the chapters computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fihelpers.answers import usual_answers
from fihelpers.evaluate import Evaluator, wilson
from fihelpers.experiments import limits, merging, pixels
from fihelpers.explorers import Axes, Bar, Dial, Line, Live, Position, dial
from fihelpers.figures.pixels import covered
from fihelpers.figures.style import SEQUENTIAL
from fihelpers.influence import Damped
from fihelpers.measures import Influence
from fihelpers.models import LanguageModel
from fihelpers.perturb.sparsify import select, zeroed
from fihelpers.scores import Scores, score_weights
from fihelpers.tasks import Example

# --- chapter 03: from exact FI through damping to the Jacobian norm

FILTERS = (
    "FI exact",
    *(f"FI damped {x}" for x in ("1e-08", "1e-07", "1e-06", "1e-05", "0.0001", "0.01")),
    limits.JACOBIAN2,
)
ZEROED = (0.003, 0.01, 0.02, 0.05)  # shares of the weights
SIDE = 64  # weights along a side of the shown corner of a matrix


def filter_curves(
    model: LanguageModel,
    scores: Mapping[str, Scores],
    test: Sequence[Example],
    names: Sequence[str],
    seed: int,
    shares: Sequence[float] = ZEROED,
) -> pd.DataFrame:
    """Zero the top share by each ranking and ask again.

    scores: by ranking. Columns: ranking, share (0: nothing zeroed), accuracy, low, high (Wilson), n.
    """
    ask = Evaluator(model, test, usual_answers(model.tokenizer, lettered=bool(test[0].options)))
    intact = int(ask().correct.sum())
    rows = []
    for ranking, found in tqdm(scores.items(), desc="damage by filter", unit="ranking"):
        rows.append((ranking, 0.0, intact))
        for share in shares:
            with zeroed(model.network, select(found, share, names=names, seed=seed)):
                rows.append((ranking, share, int(ask().correct.sum())))
    n = len(test)
    lines = [(ranking, share, right / n, *wilson(right, n), n) for ranking, share, right in rows]
    return pd.DataFrame(lines, columns=["ranking", "share", "accuracy", "low", "high", "n"])


def filter_dial(
    model: LanguageModel,
    sweep: limits.Sweep,
    curves: pd.DataFrame,
    matrices: Sequence[str],
    calibration: Sequence[Example],
    test: Sequence[Example],
    names: Sequence[str],
    seed: int,
) -> Dial:
    """Turn the filter from exact FI to the Jacobian norm: the ranking of a matrix, and the damage it does.

    curves: from `filter_curves`, with FILTERS and "random" among its rankings. The first of `calibration`
    sets made `sweep.scores`.
    """
    likeness = sweep.ranks.groupby("ranking")["with_jacobian"].mean()
    end = sweep.scores[limits.JACOBIAN2]

    def position(
        ranking: str, matrix: str, scores: Mapping[str, Tensor], own: pd.DataFrame, told: str
    ) -> Position:
        at = own.set_index("share").accuracy
        return Position(
            label=ranking.removeprefix("FI "),
            note=f"{ranking}: accuracy {at[0.02]:.2f} with 2 % zeroed, {at[0.05]:.2f} with 5 %{told}",
            pictures={ranking: _ranks(scores[matrix]), limits.JACOBIAN2: _ranks(end[matrix])}
            if ranking != limits.JACOBIAN2
            else {ranking: _ranks(end[matrix])},
            lines=[
                _damage_line("this ranking", own, banded=True),
                *(
                    _damage_line(name, curves[curves.ranking == name])
                    for name in (limits.JACOBIAN2, "random")
                ),
            ],
        )

    def stored(ranking: str, matrix: str) -> Position:
        told = (
            f". Over all weights its rank correlation with the {limits.JACOBIAN2} is {likeness[ranking]:.2f}."
        )
        own = curves[curves.ranking == ranking]
        return position(ranking, matrix, sweep.scores[ranking].values, own, told)

    def compute(options: tuple[str, ...], decade: float) -> Position:
        measure = Influence(Damped(10**decade))
        found = score_weights(model, calibration, [measure], only=names)[measure.name]
        own = filter_curves(model, {measure.name: found}, test, names, seed)
        return position(measure.name, named[options[0]], found.values, own, ".")

    n = int(curves.n.iloc[0])
    named = {f"block {limits.layer_of(m)}, {limits.matrix_of(m)}": m for m in matrices}
    return dial(
        {(name,): [stored(ranking, matrix) for ranking in FILTERS] for name, matrix in named.items()},
        title="From exact FI to the squared Jacobian norm",
        caption=(
            "Move the filter, with the mouse or the arrow keys. Pictures: ranks of the weights in a corner "
            f"of {SIDE} × {SIDE} of the matrix (a row an output, a column an input; yellow is most fragile). "
            f"Chart: accuracy on {n} test questions after zeroing the top share of all weights; the band is "
            "the 95 % Wilson interval. Try: at which λ do the stripes come, and where does the curve fall?"
        ),
        names=("matrix", "filter"),
        axes=Axes("share of the weights zeroed", "accuracy", ticks=_percent_ticks((0, *ZEROED))),
        start=FILTERS.index("FI damped 1e-06"),
        live=Live("log₁₀ λ", -6.5, -12, 4, compute),
    )


def _damage_line(name: str, rows: pd.DataFrame, banded: bool = False) -> Line:
    x = list(map(float, range(len(rows))))
    ends = {"low": _rounded(rows.low), "high": _rounded(rows.high)} if banded else {}
    return Line(name, x, _rounded(rows.accuracy), **ends)


def _ranks(values: Tensor) -> np.ndarray:
    """The ranks of a matrix's weights within it, as colours; the corner of SIDE by SIDE."""
    ranks = values.flatten().argsort().argsort().reshape(values.shape).double() / (values.numel() - 1)
    return _coloured(ranks[:SIDE, :SIDE].cpu())


# --- chapter 04: a picture, its map, and the answers while pixels are masked

GUIDES = ("FI damped 0.0001", "FI exact", "Jacobian norm", "random")


def mask_dial(gallery: Sequence[pixels.Scored], flips: pd.DataFrame, seed: int) -> Dial:
    """Mask more and more of a picture's highest pixels and see the answers move, for three pictures.

    flips: from `pixels.flip_counts`; its first, middle and last picture are shown.
    """
    chosen = {"most fragile": 0, "in the middle": len(flips) // 2, "sturdiest": len(flips) - 1}
    at = {name: flips.iloc[[place]] for name, place in chosen.items()}
    counts = pixels.CASE_COUNTS

    def cases(name: str, masked: Sequence[int]) -> dict[str, pixels.Case]:
        return {guide: pixels.look_at(gallery, at[name], guide, masked, seed) for guide in GUIDES}

    known = {name: cases(name, counts) for name in chosen}

    def lines(name: str) -> list[Line]:
        x = list(map(float, range(len(counts) + 1)))
        return [
            Line(guide, x, _rounded(case.probs[n][case.example.answer] for n in (0, *counts)))
            for guide, case in known[name].items()
        ]

    def compute(options: tuple[str, ...], value: float) -> Position:
        name, guide = options
        case = pixels.look_at(gallery, at[name], guide, (max(1, round(value)),), seed)
        return _masked_position(case, max(1, round(value)), lines(name), None)

    groups: dict[tuple[str, ...], list[Position]] = {
        (name, guide): [
            _masked_position(case, n, lines(name), float(place)) for place, n in enumerate((0, *counts))
        ]
        for name, found in known.items()
        for guide, case in found.items()
    }
    ticks = {float(place): str(n) for place, n in enumerate((0, *counts))}
    size = next(iter(known["most fragile"].values())).scores.numel()
    return dial(
        groups,
        title="Mask the pixels that a measure points at",
        caption=(
            f"Move the number of masked pixels (of {size}), with the mouse or the arrow keys. Pictures: the "
            "highest pixels painted black, and the measure's map. Chart: P of the right answer for each "
            "guide, on this one picture (n = 1). Bars: P of every answer; ✓ is right. Try: by which guide "
            "does the answer turn over first, and does that guide look where you do?"
        ),
        names=("picture", "guide", "masked pixels"),
        axes=Axes("masked pixels", "P of the right answer", ticks=ticks),
        bars="P of each answer",
        start=3,
        live=Live("masked pixels", 150, 1, size, compute),
    )


def _masked_position(case: pixels.Case, count: int, lines: list[Line], marker: float | None) -> Position:
    probs, example = case.probs[count], case.example
    best = int(probs.argmax())
    right = "rightly" if best == example.answer else "wrongly"
    low, high = float(case.scores.min()), float(case.scores.quantile(0.99))
    return Position(
        label=str(count),
        note=(
            f"{example.question} With {count} pixels masked by {case.measure} the model says {right} "
            f"{example.options[best]!r}, P = {float(probs[best]):.2f}."
        ),
        pictures={
            f"{count} pixels masked": covered(case, count).permute(1, 2, 0).clamp(0, 255).byte().numpy(),
            f"{case.measure}, dark {low:.2g} to light {high:.2g}": _coloured(
                (case.scores - low) / (high - low or 1)
            ),
        },
        lines=lines,
        bars=[
            Bar(f"{'ABCDEF'[i]}. {option}{' ✓' if i == example.answer else ''}", round(p, 4), f"{p:.2f}")
            for i, (option, p) in enumerate(zip(example.options, probs.tolist(), strict=True))
        ],
        marker=marker,
    )


# --- chapter 09: how much to protect, and by which merge


def protection_dial(
    search: merging.Search, curve: pd.DataFrame, settings: Mapping[str, merging.Setting]
) -> Dial:
    """Turn the protected share k of each merge and see the accuracy in both domains.

    curve: from `Search.curve` for these settings. The questions are those of the search.
    """
    counts = search.exam.counts
    shares = (0.0, *sorted(curve.share.unique()))
    plain = {name: search.exam.row(name, merging.Setting(s.method), 0) for name, s in settings.items()}

    def lines(name: str) -> list[Line]:
        own = curve[curve.curve == name].groupby("share")
        x = list(map(float, range(len(shares))))
        ends = {
            domain: [[plain[name][domain], *own[domain].agg(how)] for how in ("mean", "min", "max")]
            for domain in (*counts, "mean")
        }
        return [
            Line("mean of both" if d == "mean" else d, x, *map(_rounded, found)) for d, found in ends.items()
        ]

    def position(name: str, share: float, levels: Mapping[str, float], marker: float | None) -> Position:
        told = ", ".join(f"{domain} {levels[domain]:.2f}" for domain in (*counts, "mean"))
        before = ", ".join(f"{domain} {plain[name][domain]:.2f}" for domain in (*counts, "mean"))
        return Position(
            label=f"{share:.3g} %",
            note=f"{name}, {share:.3g} % protected: {told}. Without protection: {before}.",
            lines=lines(name),
            bars=[
                Bar(f"{domain} (n = {n})", round(levels[domain], 4), f"{levels[domain]:.2f}")
                for domain, n in counts.items()
            ],
            marker=marker,
        )

    def stored(name: str) -> list[Position]:
        curves = {line.name.replace("mean of both", "mean"): line.y for line in lines(name)}
        at = [{domain: y[place] for domain, y in curves.items()} for place in range(len(shares))]
        return [
            position(name, 100 * share, levels, float(i))
            for i, (share, levels) in enumerate(zip(shares, at, strict=True))
        ]

    def compute(options: tuple[str, ...], value: float) -> Position:
        name = options[0]
        row = search.exam.row(name, replace(settings[name], share=value / 100), 0)
        return position(name, value, row, None)  # type: ignore[arg-type]

    sets = int(curve["set"].max()) + 1
    return dial(
        {(name,): stored(name) for name in settings},
        title="How much to protect, and in which merge",
        caption=(
            "Choose a merge and move k, with the mouse or the arrow keys. Bars and chart: accuracy on the "
            f"validation questions of the search, mean of {sets} calibration sets; bands from the lowest to "
            f"the highest set. One question is worth {1 / max(counts.values()):.3f}. Try: does any k lift "
            "both domains at once, and does protection by chance look different?"
        ),
        names=("merge, kept by", "protected, k"),
        axes=Axes("protected share k of the linear weights", "accuracy", ticks=_percent_ticks(shares)),
        bars="accuracy in each domain",
        start=1,
        live=Live("k in percent (first calibration set)", 5, 0.01, 99, compute),
    )


def _percent_ticks(shares: Sequence[float]) -> dict[float, str]:
    return {float(place): f"{100 * share:.3g} %" for place, share in enumerate(shares)}


def _coloured(values: Tensor) -> np.ndarray:
    """Values from 0 to 1 as colours, (H, W, 3) uint8."""
    colours = matplotlib.colormaps[SEQUENTIAL](torch.as_tensor(values).double().clamp(0, 1).numpy())
    return (255 * colours[..., :3]).round().astype(np.uint8)


def _rounded(values: object) -> list[float]:
    return [round(float(value), 4) for value in values]  # type: ignore[attr-defined]
