"""The dials of chapters 03 and 04: what their explorers show, made of what the chapters computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from torch import Tensor
from tqdm import tqdm

from fichapters.ch03 import lab as limits
from fichapters.ch04 import lab as pixels
from fichapters.explorers import Axes, Dial, Line, Live, Position, dial
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
FILTER_CAPTION = (
    "Move the filter, with the mouse or the arrow keys. Pictures: ranks of the weights in a corner of "
    f"{SIDE} × {SIDE} of the matrix (a row an output, a column an input; yellow is most fragile). Chart: "
    "accuracy on {n} test questions after zeroing the top share of all weights; the band is the 95 % Wilson "
    "interval. Try: at which λ do the stripes come, and where does the curve fall?"
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
    ask, squared = Evaluator(model, test), scores[SQUARED]
    intact, matrices = ask().accuracy, _matrices(list(squared.values))

    def position(ranking: str, found: Scores, matrix: str, damage: Line) -> Position:
        maps = {ranking: _ranks(found[matrix]), SQUARED: _ranks(squared[matrix])}  # one where the dial ends
        told = [f"{a:.2f} with {100 * k:g} %" for k, a in zip(ZEROED, damage.y[1:], strict=True)]
        note = f"{ranking}: accuracy {', '.join(told)} zeroed."
        return Position(ranking.removeprefix("FI "), note, maps, [damage, *beside])

    def compute(options: tuple[str, ...], decade: float) -> Position:
        measure = f"FI damped {10**decade:g}"
        (found,) = score_weights(model, calibration, [measure], only=list(squared.values)).values()
        return position(measure, found, matrices[options[0]], _damage(ask, intact, found, seed))

    asked = tqdm((*filters, "random"), desc="damage by filter", unit="ranking", leave=False)
    damages = {ranking: _damage(ask, intact, scores[ranking], seed) for ranking in asked}
    beside = [Line(name, damages[name].y) for name in (SQUARED, "random")]
    return dial(
        {(name,): [position(r, scores[r], m, damages[r]) for r in filters] for name, m in matrices.items()},
        title="From exact FI to the squared score",
        caption=FILTER_CAPTION.format(n=len(test)),
        names=("matrix", "filter"),
        axes=Axes("share of the weights zeroed", "accuracy", [f"{100 * k:.3g} %" for k in (0, *ZEROED)]),
        start=len(filters) // 2,
        live=Live("log₁₀ λ", -6.5, -12, 4, compute),
    )


def _matrices(names: Sequence[str]) -> dict[str, str]:
    """The first, a middle and the last matrix of the earlier blocks, by what the menu says."""
    earlier = [name for name, part in limits.parts_of(names).items() if part == limits.EARLIER]
    chosen = (earlier[0], earlier[len(earlier) // 2], earlier[-1])
    return {f"block {limits.layer_of(name)}, {limits.matrix_of(name)}": name for name in chosen}


def _damage(ask: Evaluator, intact: float, ranking: Scores, seed: int) -> Line:
    """Accuracy with nothing and with each share of ZEROED zeroed, of the weights that rank highest."""
    accuracies = [intact]
    for share in ZEROED:
        with zeroed(ask.model, select(ranking, share, seed=seed)):
            accuracies.append(ask().accuracy)
    n = len(ask.examples)
    low, high = zip(*(wilson(round(a * n), n) for a in accuracies), strict=True)
    return Line("this ranking", accuracies, low, high)


def _ranks(values: Tensor) -> np.ndarray:
    """The ranks of a matrix's weights within it, as colours; the corner of SIDE by SIDE."""
    ranks = values.flatten().argsort().argsort().reshape(values.shape).double() / (values.numel() - 1)
    return _coloured(ranks[:SIDE, :SIDE].cpu())


# --- chapter 04: a picture, its map, and the answers while pixels are masked

GUIDES = ("FI damped 0.0001", "FI exact", "Jacobian norm", "random")
MASK_CAPTION = (
    "Move the number of masked pixels (of {n}), with the mouse or the arrow keys. Pictures: the highest "
    "pixels painted black, and the measure's map. Chart: P of the right answer for each guide, on this one "
    "picture (n = 1). Bars: P of every answer; ✓ is right. Try: by which guide does the answer turn over "
    "first, and does that guide look where you do?"
)


def mask_dial(batches: Sequence[PixelBatch], ids: Sequence[str], seed: int) -> Dial:
    """Mask more and more of a picture's highest pixels and see the answers move, for three pictures.

    ids: of pictures of the batches, from the most fragile one on; the first, middle and last are shown.
    """
    chosen = {"most fragile": ids[0], "in the middle": ids[len(ids) // 2], "sturdiest": ids[-1]}
    counts = pixels.CASE_COUNTS
    cases, lines = {}, {}
    for name, at in chosen.items():
        own = [pixels.look_at(batches, at, guide, counts, seed) for guide in GUIDES]
        lines[name] = [Line(c.measure, [float(c.probs[n][c.example.answer]) for n in counts]) for c in own]
        cases.update({(name, case.measure): case for case in own})

    def compute(options: tuple[str, ...], value: float) -> Position:
        name, guide = options
        count = max(1, round(value))
        case = pixels.look_at(batches, chosen[name], guide, (count,), seed)
        return _masked(case, count, lines[name], None)

    size = cases["most fragile", GUIDES[0]].scores.numel()
    return dial(
        {k: [_masked(case, n, lines[k[0]], at) for at, n in enumerate(counts)] for k, case in cases.items()},
        title="Mask the pixels that a measure points at",
        caption=MASK_CAPTION.format(n=size),
        names=("picture", "guide", "masked pixels"),
        axes=Axes("masked pixels", "P of the right answer", list(map(str, counts))),
        bars="P of each answer",
        start=3,
        live=Live("masked pixels", 150, 1, size, compute),
    )


def _masked(case: pixels.Case, count: int, lines: Sequence[Line], marker: int | None) -> Position:
    """A picture with so many pixels masked, its map, and the answers."""
    probs, example = case.probs[count], case.example
    best = int(probs.argmax())
    right = "rightly" if best == example.answer else "wrongly"
    low, high = float(case.scores.min()), float(case.scores.quantile(0.99))
    picture = case.shown[count].permute(1, 2, 0).clamp(0, 255).byte().numpy()
    heights = _coloured((case.scores - low) / (high - low or 1))
    names = [
        f"{'ABCDEF'[i]}. {option}{' ✓' if i == example.answer else ''}"
        for i, option in enumerate(example.options)
    ]
    note = (
        f"{example.question} With {count} pixels masked by {case.measure} the model says {right} "
        f"{example.options[best]!r}, P = {float(probs[best]):.2f}."
    )
    shown = f"{case.measure}, dark {low:.2g} to light {high:.2g}"
    pictures = {f"{count} pixels masked": picture, shown: heights}
    bars = dict(zip(names, probs.tolist(), strict=True))
    return Position(str(count), note, pictures, lines, bars, marker)


def _coloured(values: Tensor) -> np.ndarray:
    """Values from 0 to 1 as colours, (H, W, 3) uint8."""
    colours = matplotlib.colormaps[SEQUENTIAL](values.double().clamp(0, 1).numpy())
    return (255 * colours[..., :3]).round().astype(np.uint8)
