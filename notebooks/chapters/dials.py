"""The dials of chapters 03 and 04: what their explorers show, made of what the chapters computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fichapters.ch03 import lab as limits
from fichapters.ch04 import lab as pixels
from fichapters.ch04.draw import covered
from fichapters.explorers import Axes, Bar, Dial, Line, Live, Position, dial
from fichapters.style import SEQUENTIAL
from fihelpers.evaluate.questions import Evaluator
from fihelpers.evaluate.stats import wilson
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import select, zeroed
from fihelpers.scores.pixels import PixelBatch
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example

# --- chapter 03: from exact FI through damping to the Jacobian norm

SQUARED = "squared score"  # the square of the Jacobian norm, where the dial ends
ZEROED = (0.003, 0.01, 0.02, 0.05)  # shares of the weights
SIDE = 64  # weights along a side of the shown corner of a matrix


def filter_curves(
    model: LanguageModel, scores: Mapping[str, Scores], test: Sequence[Example], seed: int
) -> dict[str, list[float]]:
    """Accuracy with the top share by each ranking zeroed, for none and each of ZEROED."""
    ask = Evaluator(model, test)
    intact = ask().accuracy
    curves = {}
    for ranking, found in tqdm(scores.items(), desc="damage by filter", unit="ranking", leave=False):
        curves[ranking] = [intact]
        for share in ZEROED:
            with zeroed(model, select(found, share, seed=seed)):
                curves[ranking].append(ask().accuracy)
    return curves


@dataclass(frozen=True)
class _Filters:
    """What the dial of the filters shows: the ranks in a matrix, and the damage that a ranking does."""

    model: LanguageModel
    scores: Mapping[str, Scores]
    curves: Mapping[str, list[float]]
    calibration: Sequence[Example]
    test: Sequence[Example]
    seed: int

    def stored(self, ranking: str, matrix: str) -> Position:
        """One of the rankings that the chapter computed."""
        return self._position(ranking, matrix, self.scores[ranking].values, self.curves[ranking])

    def computed(self, matrix: str, decade: float) -> Position:
        """Damping by any 10^decade, computed now."""
        measure, names = f"FI damped {10**decade:g}", list(self.scores[SQUARED].values)
        found = score_weights(self.model, self.calibration, [measure], only=names)
        curve = filter_curves(self.model, found, self.test, self.seed)
        return self._position(measure, matrix, found[measure].values, next(iter(curve.values())))

    def _position(
        self, ranking: str, matrix: str, scores: Mapping[str, Tensor], own: Sequence[float]
    ) -> Position:
        right = [wilson(round(a * len(self.test)), len(self.test)) for a in own]
        low, high = (_rounded(ends) for ends in zip(*right, strict=True))
        x = list(map(float, range(len(own))))
        beside = [Line(name, x, _rounded(self.curves[name])) for name in (SQUARED, "random")]
        told = ", ".join(f"{a:.2f} with {100 * k:g} %" for k, a in zip(ZEROED, own[1:], strict=True))
        return Position(
            label=ranking.removeprefix("FI "),
            note=f"{ranking}: accuracy {told} zeroed.",
            # at the end of the dial the two are one
            pictures={ranking: _ranks(scores[matrix]), SQUARED: _ranks(self.scores[SQUARED][matrix])},
            lines=[Line("this ranking", x, _rounded(own), low=low, high=high), *beside],
        )


def filter_dial(
    model: LanguageModel,
    scores: Mapping[str, Scores],
    calibration: Sequence[Example],
    test: Sequence[Example],
    seed: int,
) -> Dial:
    """Turn the filter from exact FI to the squared score: the ranking of a matrix, and the damage it does.

    scores: by ranking, of the questions `calibration`: "FI exact", dampings from light to heavy, the squared
    score, and "random".
    """
    filters = [name for name in scores if name == SQUARED or name.startswith(("FI exact", "FI damped"))]
    shown_scores = {name: scores[name] for name in (*filters, "random")}
    curves = filter_curves(model, shown_scores, test, seed)
    shown = _Filters(model, shown_scores, curves, calibration, test, seed)
    parts = limits.parts_of(list(scores[SQUARED].values))
    earlier = [name for name, part in parts.items() if part == limits.EARLIER]
    matrices = dict.fromkeys([earlier[0], earlier[len(earlier) // 2], earlier[-1]])
    named = {f"block {limits.layer_of(m)}, {limits.matrix_of(m)}": m for m in matrices}
    return dial(
        {(name,): [shown.stored(ranking, matrix) for ranking in filters] for name, matrix in named.items()},
        title="From exact FI to the squared score",
        caption=(
            "Move the filter, with the mouse or the arrow keys. Pictures: ranks of the weights in a corner "
            f"of {SIDE} × {SIDE} of the matrix (a row an output, a column an input; yellow is most fragile). "
            f"Chart: accuracy on {len(test)} test questions after zeroing the top share of all weights; the "
            "band is the 95 % Wilson interval. Try: at which λ do the stripes come, and where does the curve "
            "fall?"
        ),
        names=("matrix", "filter"),
        axes=Axes("share of the weights zeroed", "accuracy", ticks=_percent_ticks((0, *ZEROED))),
        start=len(filters) // 2,
        live=Live("log₁₀ λ", -6.5, -12, 4, lambda options, decade: shown.computed(named[options[0]], decade)),
    )


def _ranks(values: Tensor) -> np.ndarray:
    """The ranks of a matrix's weights within it, as colours; the corner of SIDE by SIDE."""
    ranks = values.flatten().argsort().argsort().reshape(values.shape).double() / (values.numel() - 1)
    return _coloured(ranks[:SIDE, :SIDE].cpu())


# --- chapter 04: a picture, its map, and the answers while pixels are masked

GUIDES = ("FI damped 0.0001", "FI exact", "Jacobian norm", "random")


@dataclass(frozen=True)
class _Masks:
    """What the dial of the masks shows; at: the id of each shown picture."""

    batches: Sequence[PixelBatch]
    at: Mapping[str, str]
    seed: int

    def cases(self, name: str) -> dict[str, pixels.Case]:
        """One picture masked by every guide, at the counts of the slider."""
        return {guide: self._case(name, guide, pixels.CASE_COUNTS) for guide in GUIDES}

    def stored(self, cases: Mapping[str, pixels.Case]) -> dict[str, list[Position]]:
        """The positions of one picture, by guide; cases: of the picture."""
        places = list(enumerate((0, *pixels.CASE_COUNTS)))
        return {
            guide: [_masked_position(case, n, _guide_lines(cases), float(place)) for place, n in places]
            for guide, case in cases.items()
        }

    def computed(self, name: str, guide: str, value: float, cases: Mapping[str, pixels.Case]) -> Position:
        """Any number of masked pixels, computed now."""
        count = max(1, round(value))
        return _masked_position(self._case(name, guide, (count,)), count, _guide_lines(cases), None)

    def _case(self, name: str, guide: str, counts: Sequence[int]) -> pixels.Case:
        return pixels.look_at(self.batches, self.at[name], guide, counts, self.seed)


def _guide_lines(cases: Mapping[str, pixels.Case]) -> list[Line]:
    """P of the right answer along the slider, a line a guide."""
    counts = (0, *pixels.CASE_COUNTS)
    x = list(map(float, range(len(counts))))
    return [
        Line(guide, x, _rounded(case.probs[n][case.example.answer] for n in counts))
        for guide, case in cases.items()
    ]


def mask_dial(batches: Sequence[PixelBatch], ids: Sequence[str], seed: int) -> Dial:
    """Mask more and more of a picture's highest pixels and see the answers move, for three pictures.

    ids: of pictures of the batches, from the most fragile one on; the first, middle and last are shown.
    """
    chosen = {"most fragile": ids[0], "in the middle": ids[len(ids) // 2], "sturdiest": ids[-1]}
    shown = _Masks(batches, chosen, seed)
    known = {name: shown.cases(name) for name in chosen}
    groups: dict[tuple[str, ...], list[Position]] = {
        (name, guide): positions
        for name, cases in known.items()
        for guide, positions in shown.stored(cases).items()
    }

    def compute(options: tuple[str, ...], value: float) -> Position:
        name, guide = options
        return shown.computed(name, guide, value, known[name])

    ticks = {float(place): str(n) for place, n in enumerate((0, *pixels.CASE_COUNTS))}
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


def _percent_ticks(shares: Sequence[float]) -> dict[float, str]:
    return {float(place): f"{100 * share:.3g} %" for place, share in enumerate(shares)}


def _coloured(values: Tensor) -> np.ndarray:
    """Values from 0 to 1 as colours, (H, W, 3) uint8."""
    colours = matplotlib.colormaps[SEQUENTIAL](torch.as_tensor(values).double().clamp(0, 1).numpy())
    return (255 * colours[..., :3]).round().astype(np.uint8)


def _rounded(values: object) -> list[float]:
    return [round(float(value), 4) for value in values]  # type: ignore[attr-defined]
