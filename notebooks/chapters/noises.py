"""How much of an image a change destroys, and noise that destroys as much as a mask does (method 4.1).

An image is a tensor (3, H, W) of grey levels 0 to 255.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from skimage.util import random_noise
from torch import Tensor

TOLERANCE = 0.01  # relative; how close the search for a noise's strength comes
SEARCH_STEPS = 50
MAX_DEVIATION = 1e3  # of speckle; nearly every pixel is black or white there


def information_loss(image: Tensor, changed: Tensor) -> float:
    """Share of the image's variance that a change destroys: |changed - image|^2 / |image - mean colour|^2.

    It is 0 for no change and 1 for an image that is nothing but its mean colour; it may exceed 1, and is
    1 - R^2 of the image explained by what is left of it. Dimensionless. **Ours**: the paper's earlier version
    matches its noises by an information loss that it does not define (method 4.1).
    Raises ValueError for an image of a single colour, which has nothing to lose, or unequal shapes.
    """
    if image.shape != changed.shape:
        raise ValueError(f"images of shapes {tuple(image.shape)} and {tuple(changed.shape)}; use one size.")
    original = image.double()
    variation = (original - original.mean((-2, -1), keepdim=True)).square().sum()
    if variation == 0:
        raise ValueError("the image is of a single colour, so its information loss is not defined.")
    return float((changed.double() - original).square().sum() / variation)


def noised(image: Tensor, kind: str, loss: float, seed: int = 0) -> Tensor:
    """Add noise whose :func:`information_loss` is `loss`, within 1e-4 of it.

    image: (3, H, W). kind: "Poisson" (photons), "salt & pepper" (single values to 0 or 255), "speckle"
    (multiplied with Gaussian noise), or "random erasing" (one rectangle of uniform noise; Zhong et al. 2020).
    The strength is the smallest found by bisection that destroys at least `loss` and at most 1 % more, if
    such a strength exists; the difference that is left is scaled down to `loss`.
    Returns grey levels in [0, 255], not rounded. Raises ValueError for an unknown kind, a loss that is
    negative, or one beyond what the kind can destroy in this image.
    """
    if kind not in NOISES:
        raise ValueError(f"unknown noise {kind!r}; use one of {', '.join(NOISES)}.")
    if not loss >= 0:
        raise ValueError(f"the information loss must be at least 0, not {loss}.")
    if loss == 0:
        return image.clone()
    original = image.double()
    levels = original.cpu().numpy() / 255

    def at(strength: float) -> tuple[Tensor, float]:
        rng = np.random.default_rng(seed)
        noisy = torch.from_numpy(NOISES[kind](levels, strength, rng) * 255).to(original)
        return noisy, information_loss(original, noisy)

    noisy, found = at(1.0)
    if found < loss:
        raise ValueError(f"{kind} destroys at most {found:.4g} of this image's variance, not {loss:.4g}.")
    weak, strong = 0.0, 1.0
    for _ in range(SEARCH_STEPS):
        if found <= loss * (1 + TOLERANCE):
            break
        middle = (weak + strong) / 2
        trial, reached = at(middle)
        if reached < loss:
            weak = middle
        else:
            noisy, found, strong = trial, reached, middle
    return (original + (loss / found) ** 0.5 * (noisy - original)).to(image.dtype)


# Noises take grey levels in [0, 1] and a strength in [0, 1], and destroy more the stronger they are. Each
# draws the same random numbers at every strength as far as it can, so that the loss moves smoothly with it.


def _poisson(levels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Counts of photons, 1 / strength^2 of them at white; scikit-image's Poisson noise has no strength."""
    photons = strength**-2
    return np.clip(rng.poisson(levels * photons) / photons, 0, 1)


def _salt_and_pepper(levels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return random_noise(levels, mode="s&p", amount=strength, rng=rng)


def _speckle(levels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    deviation = strength / (1 - strength + 1 / MAX_DEVIATION)
    return random_noise(levels, mode="speckle", var=deviation**2, rng=rng)


def _random_erasing(levels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A rectangle at a random place of a random shape, the share strength^2 of the image's area."""
    noise = rng.uniform(size=levels.shape)
    slant = rng.uniform(0.5, 1.5)
    erased = levels.copy()
    spans = []
    for side, share in zip(levels.shape[-2:], (strength**slant, strength ** (2 - slant)), strict=True):
        centre = rng.uniform(0, side)
        spans.append(slice(round(centre * (1 - share)), round(centre + (side - centre) * share)))
    erased[:, *spans] = noise[:, *spans]
    return erased


NOISES: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "Poisson": _poisson,
    "salt & pepper": _salt_and_pepper,
    "speckle": _speckle,
    "random erasing": _random_erasing,
}
