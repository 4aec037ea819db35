"""Mask the pixels or patches that a score names (method 4.1).

An image is a tensor (3, H, W) of grey levels 0 to 255.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

Fill = Literal["black", "mean", "blur", "noise"]

BLUR = 1 / 16  # standard deviation of the blur, relative to the image's shorter side


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


def _largest(scores: Tensor, count: int | None, seed: int, things: str) -> Tensor:
    """Mark the `count` largest of the last two axes."""
    flat = scores.flatten(-2)
    if not isinstance(count, int) or not 0 <= count <= flat.shape[-1]:
        raise ValueError(
            f"the number of {things} must be a whole number from 0 to {flat.shape[-1]}, not {count}."
        )
    if flat.isnan().any():
        raise ValueError(f"the scores of the {things} hold NaN and have no order; score the image again.")
    mask = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        border = flat.kthvalue(flat.shape[-1] - count + 1, keepdim=True).values
        drawing = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(flat.shape[-1], generator=drawing).to(flat.device)
        above, tied = flat > border, (flat == border)[..., shuffled]
        drawn = tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True))
        mask[..., shuffled] = above[..., shuffled] | drawn
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
