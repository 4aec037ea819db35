"""Mask the pixels or patches that a score names, and noise that destroys as much (method 4.1).

An image is a tensor (3, H, W) of grey levels 0 to 255.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from skimage.util import random_noise
from torch import Tensor

Fill = Literal["black", "mean", "blur", "noise"]
Noise = Literal["Poisson", "salt & pepper", "speckle", "random erasing"]

BLUR = 1 / 16  # standard deviation of the blur, relative to the image's shorter side
TOLERANCE = 0.01  # relative; how close the search for a noise's strength comes
SEARCH_STEPS = 50
MAX_DEVIATION = 1e3  # of speckle; nearly every pixel is black or white there


def top_pixels(
    scores: Tensor, count: int | None = None, *, share: float | None = None, seed: int = 0
) -> Tensor:
    """Mark the pixels with the largest scores, in each image by itself.

    scores: (..., H, W). Either `count` pixels or the `share` of all, rounded to whole pixels. Ties are
    settled by a seeded random draw, the same for each image of that size. Returns a boolean mask (..., H, W).
    Raises ValueError for a count or share out of range, for both or neither, and for scores that are NaN.
    """
    pixels = scores.shape[-2] * scores.shape[-1]
    if (count is None) == (share is None):
        raise ValueError(f"give a count of pixels or a share of them, not count={count} and share={share}.")
    if share is not None:
        if not 0 <= share <= 1:
            raise ValueError(f"the share of pixels must lie between 0 and 1, not {share}.")
        count = round(share * pixels)
    return _largest(scores, count, seed, "pixels")


def top_patches(scores: Tensor, count: int, *, patch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Mark all pixels of the `count` patches with the largest scores, in each image by itself.

    scores: (..., rows, columns), one for each square of `patch` x `patch` pixels of images of `size` (H, W),
    the last ones smaller where they do not fit. Ties as in :func:`top_pixels`. Returns a boolean mask
    (..., H, W). Raises ValueError for a count out of range, a patch that is not square, or another grid.
    """
    if not isinstance(patch, int) or patch < 1:
        raise ValueError(f"a patch is a square, so give its side as one whole number of pixels, not {patch}.")
    grid = tuple(-(-side // patch) for side in size)
    if tuple(scores.shape[-2:]) != grid:
        raise ValueError(
            f"patches of {patch} pixels cut images of {size[0]} x {size[1]} into {grid[0]} x {grid[1]}, but "
            f"the scores are {scores.shape[-2]} x {scores.shape[-1]}; score it with this patch size."
        )
    chosen = _largest(scores, count, seed, "patches")
    pixels = chosen.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    return pixels[..., : size[0], : size[1]]


def masked(image: Tensor, mask: Tensor, fill: Fill = "black", seed: int = 0) -> Tensor:
    """Replace the marked pixels of an image, and no others.

    image: (..., 3, H, W); mask: (..., H, W), boolean. fill: "black"; "mean", the image's mean colour; "blur",
    the image under a Gaussian of 1/16 of its shorter side; "noise", seeded uniform grey levels, the same for
    each image of that size. What is filled in is rounded to whole grey levels.
    Raises ValueError for an unknown fill or a mask of another shape.
    """
    if fill not in get_args(Fill):
        raise ValueError(f"unknown fill {fill!r}; use one of {', '.join(get_args(Fill))}.")
    if mask.shape != image.shape[:-3] + image.shape[-2:] or mask.dtype != torch.bool:
        raise ValueError(
            f"a mask for an image of shape {tuple(image.shape)} is boolean and of shape "
            f"{tuple(image.shape[:-3] + image.shape[-2:])}, not {mask.dtype} and {tuple(mask.shape)}."
        )
    return torch.where(mask.unsqueeze(-3), _filling(image, fill, seed).round(), image)


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


def noised(image: Tensor, kind: Noise, loss: float, seed: int = 0) -> Tensor:
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


def _largest(scores: Tensor, count: int | None, seed: int, things: str) -> Tensor:
    """Mark the `count` largest of the last two axes."""
    flat = scores.flatten(-2)
    if not isinstance(count, int) or not 0 <= count <= flat.shape[-1]:
        raise ValueError(
            f"the number of {things} must be a whole number from 0 to {flat.shape[-1]}, not {count}."
        )
    if flat.isnan().any():
        raise ValueError(f"the scores of the {things} hold NaN and have no order; score the image again.")
    shuffled = torch.randperm(flat.shape[-1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    order = flat[..., shuffled].argsort(dim=-1, descending=True, stable=True)[..., :count]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, shuffled[order], True)
    return mask.unflatten(-1, scores.shape[-2:])


def _filling(image: Tensor, fill: Fill, seed: int) -> Tensor:
    if fill == "black":
        return torch.zeros_like(image)
    if fill == "mean":
        return image.mean((-2, -1), keepdim=True)
    if fill == "noise":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(256, image.shape[-3:], generator=generator).to(image)
    sigma = BLUR * min(image.shape[-2:])
    blurred = gaussian_filter(image.cpu().numpy(), (0,) * (image.dim() - 2) + (sigma, sigma))
    return torch.from_numpy(blurred).to(image)


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
