"""A classifier of small handwritten digits, which chapter 11 scores: nothing in FI needs a language model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


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
