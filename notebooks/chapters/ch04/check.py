"""Checks of chapter 04: classes against dimensions, deletion curves, pairing, information loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fichapters.exercises import Wrong, equal, exercise, tensor, whole
from fichapters.noises import information_loss
from fihelpers.evaluate.stats import mean_interval, paired_difference

ENDS = 0.3  # of half its width, by which an interval's end may be off: other seeds are right too


@exercise
def fewest_tokens(for_pixel: object, for_square: object, channels: int, side: int) -> str:
    """The smallest m with which exact FI under the top m + rest has room below its ceiling (method 1b.2)."""
    for name, answer, p in (
        ("`for_pixel`", for_pixel, channels),
        ("`for_square`", for_square, channels * side**2),
    ):
        m = whole(answer, name)
        if m == p + 2:
            raise Wrong(f"{name} is the number of classes K. One of them is the rest, which is no token.")
        if m == p:
            raise Wrong(f"With {name} = {m} there are {m + 1} classes, and K - 1 is p: still at the ceiling.")
        if m != p + 1:
            raise Wrong(
                f"{name} is too {'large' if m > p else 'small'}. One perturbation has p = {p} "
                "dimensions, and K - 1 must be larger than p. What is K?"
            )
    return "The room has to be filled, though: classes with hardly any probability leave FI near the ceiling."


@exercise
def mean_height(answer: object, shares: Sequence[float], log_p: Sequence[float]) -> str:
    """The area under a deletion curve over its width, by straight lines between the points."""
    x, y = np.array(shares), np.array(log_p)
    area, mean = float(np.trapezoid(y, x)), float(y.mean())
    slips = {
        "That is the mean of the points; they are not evenly spaced, so wide steps count more.": mean,
        "That is the area itself; divide it by the width to get a height.": area,
        "That is the curve's last point.": float(y[-1]),
    }
    hint = "Add up (mean of two neighbours) × (distance between them), and divide by the whole width."
    equal(answer, area / (x[-1] - x[0]), slips, hint=hint)
    return "The lower the mean height, the earlier a measure finds what the answer rests on."


@exercise
def pairing(difference: object, decided: object, first: Sequence[float], second: Sequence[float]) -> str:
    """(mean, low, high) of first - second, paired by picture, and whether its interval excludes zero."""
    mean, low, high = paired_difference(first, second, seed=0)
    found, a, b = tensor(difference, (3,), "`difference`").tolist()
    equal(found, mean, {"The order is `first` minus `second`.": -mean}, name="The mean of `difference`")
    if not a <= found <= b:
        raise Wrong("`difference` should hold the mean, the lower end and the upper end, in this order.")
    if max(abs(a - low), abs(b - high)) > ENDS * (high - low) / 2:
        raise Wrong("The mean is right, the ends are not those of `paired_difference`.")
    if not isinstance(decided, bool):
        raise Wrong("`decided` should be True or False.")
    if decided != (low > 0 or high < 0):
        raise Wrong("Look again: a difference is decided where its interval does not contain zero.")
    (_, _, top), (_, bottom, _) = mean_interval(first), mean_interval(second)
    return (
        f"Taken alone, the interval of `first` ends at {top:.2f} and that of `second` begins at "
        f"{bottom:.2f}, so the two overlap: pictures differ from each other by more than the masks do. "
        "Pairing takes that out."
    )


@exercise
def costly_pixel(picture: object) -> str:
    """A picture (3, 8, 8), 0 to 255, that loses more than its variance when its first pixel turns black."""
    painted = tensor(picture, (3, 8, 8), "`picture`")
    if painted.min() < 0 or painted.max() > 255:
        raise Wrong("Grey levels lie between 0 and 255.")
    if (painted == painted[:, :1, :1]).all():
        raise Wrong(
            "A picture of one colour has no variance that could be lost. Let a few pixels differ a little."
        )
    black = painted.clone()
    black[:, 0, 0] = 0
    loss = information_loss(painted, black)
    if loss <= 1:
        raise Wrong(
            f"One black pixel costs {loss:.2f} of the variance. The change should be large beside "
            "everything else in the picture: think of light paper."
        )
    return (
        f"One pixel of 64 costs {loss:.1f} times the picture's whole variance. On light drawings "
        "information loss measures the paint as much as the picture."
    )


def two_masks() -> tuple[list[float], list[float]]:
    """log P of the right answer of twelve pictures, under two masks that differ by little on each of them."""
    generator = torch.Generator().manual_seed(1)
    easy = -3 * torch.rand(12, generator=generator, dtype=torch.float64)
    gap = 0.15 + 0.1 * torch.randn(12, generator=generator, dtype=torch.float64)
    return (easy - gap).round(decimals=2).tolist(), easy.round(decimals=2).tolist()
