"""The end of chapter 04: an image classifier of ten classes, whose pixels exact FI can rank (method 1b.2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fichapters.ch04.lab import INTACT, RANDOM
from fihelpers.influence import SaturationWarning, saturated
from fihelpers.measures import Random
from fihelpers.perturb.pixels import top_pixels
from fihelpers.scores.inputs import score_inputs
from fihelpers.trials import Labels, Trials, Values, collect

N_TESTED = 400  # digits
COUNTS = (1, 2, 4, 6, 8, 12, 16)  # pixels of 64


class Digits(NamedTuple):
    """A classifier of scikit-learn's 8 x 8 digits, and test digits (N, 8, 8) in [0, 1] with their classes."""

    network: nn.Module
    x: Tensor
    y: Tensor

    def log_probs(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, 10) of digits (N, 8, 8)."""
        return self.network(x.flatten(1)).log_softmax(-1)


def train(n: int, seed: int, steps: int = 400) -> Digits:
    """Train a small network on the first 1300 digits; test on the last n (at most 497)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    loss = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(network(x[:1300].flatten(1)), y[:1300]).backward()
        optimiser.step()
    return Digits(network.eval().requires_grad_(False), x[-n:], y[-n:])


def scores_of(digits: Digits, measures: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Scores of every pixel (N, 8, 8) by every measure; K = 10 classes."""
    named = [Random(seed) if m == RANDOM else m for m in measures]
    return score_inputs(digits.log_probs, digits.x, measures=named)


def saturation(digits: Digits) -> pd.DataFrame:
    """Exact FI of pixels (p = 1) and of squares of 2 x 2 and 4 x 4: share at the ceiling, and spread.

    Columns: group, p, at_ceiling, spread (90th over 10th percentile, the median over digits), n (digits).
    """
    with torch.no_grad():
        probs = digits.log_probs(digits.x).exp().T
    lines = []
    for side in (1, 2, 4):
        cut = digits.x.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))

        def log_probs(x: Tensor) -> Tensor:
            return digits.log_probs(x.flatten(-2).flatten(-3, -2))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SaturationWarning)
            values = score_inputs(log_probs, cut, over=(1, 3))["FI exact"]
        ends = values.flatten(1).double().quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=1)
        at = saturated(values, probs).double().mean()
        spread = float((ends[1] / ends[0].clamp(min=1e-12)).median())
        lines.append((f"{side} x {side}", side * side, float(at), spread, len(values)))
    return pd.DataFrame(lines, columns=["group", "p", "at_ceiling", "spread", "n"])


def masked_by(digits: Digits, scores: Mapping[str, Tensor], counts: Sequence[int], seed: int) -> Trials:
    """Erase (to 0, no ink) or invert (x to 1 - x) the top pixels: labels and values as in `lab.masked_by`."""
    fillings = {"erase": torch.zeros_like(digits.x), "invert": 1 - digits.x}

    def ask(x: Tensor = digits.x) -> Values:
        with torch.no_grad():
            log_p = digits.log_probs(x)
        right = log_p.gather(1, digits.y[:, None])[:, 0].double().numpy()
        correct = (log_p.argmax(1) == digits.y).double().numpy()
        return {"id": np.arange(len(x)).astype(str), "correct": correct, "log_prob": right}

    def tries(_: int) -> Iterator[tuple[Labels, Values]]:
        for (fill, filling), count in product(fillings.items(), counts):
            labels = {"kind": "count", "amount": float(count), "fill": fill}
            yield {"measure": INTACT, **labels}, ask()
            for measure, values in scores.items():
                mask = top_pixels(values, count, seed=seed)
                yield {"measure": measure, **labels}, ask(torch.where(mask, filling, digits.x))

    return collect(ask, tries)
