"""Masks: exactly the named pixels change."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fichapters.noises import information_loss
from fihelpers.perturb.pixels import Fill, masked, top_patches, top_pixels

FILLS = get_args(Fill)


def picture(height: int = 24, width: int = 18, seed: int = 0) -> Tensor:
    """Grey levels that no fill can hit by chance: the fills are whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(20, 230, width).expand(3, height, width)
    return (ramp + 20 * torch.rand(3, height, width, generator=generator)).floor() + 0.5


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FILLS), st.integers(0, 10_000), st.integers(0, 24 * 18))
def test_a_mask_changes_exactly_the_named_pixels(fill: Fill, seed: int, count: int) -> None:
    image = picture(seed=seed)
    mask = top_pixels(torch.rand(24, 18, generator=torch.Generator().manual_seed(seed)), count)
    changed = masked(image, mask, fill, seed)
    assert mask.sum() == count
    assert torch.equal((changed != image).all(0), mask)
    assert torch.equal((changed != image).any(0), mask)
    assert changed.min() >= 0 and changed.max() <= 255


@pytest.mark.parametrize("fill", FILLS)
def test_images_of_a_batch_are_masked_as_each_alone(fill: Fill) -> None:
    images = torch.stack([picture(seed=i) for i in range(3)])
    scores = torch.rand(3, 24, 18, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    masks = top_pixels(scores, share=0.1, seed=3)
    alone = [top_pixels(one, share=0.1, seed=3) for one in scores]
    assert torch.equal(masks, torch.stack(alone))
    each = [masked(image, mask, fill, 5) for image, mask in zip(images, alone, strict=True)]
    assert torch.equal(masked(images, masks, fill, 5), torch.stack(each))


def test_fills_are_what_they_are_called() -> None:
    image, everything = picture(), torch.ones(24, 18, dtype=torch.bool)
    assert masked(image, everything, "black").abs().max() == 0
    mean = masked(image, everything, "mean")
    torch.testing.assert_close(mean[:, 3, 4], image.mean((1, 2)).round())
    blurred = masked(image, everything, "blur")
    assert 0 < information_loss(image, blurred) < 0.1  # the ramp outlasts the blur, the noise on it does not
    noise = masked(image, everything, "noise", seed=1)
    assert not torch.equal(noise, masked(image, everything, "noise", seed=2))
    assert information_loss(image, mean) == pytest.approx(1, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_the_largest_scores_are_chosen_and_ties_are_drawn(seed: int, count: int) -> None:
    scores = torch.randint(4, (5, 8), generator=torch.Generator().manual_seed(seed)).float()
    mask = top_pixels(scores, count, seed=seed)
    border = scores.flatten().sort(descending=True).values[count - 1]
    assert mask[scores > border].all()
    assert not mask[scores < border].any()
    assert torch.equal(mask, top_pixels(scores, count, seed=seed))


def test_a_tie_is_no_matter_of_position() -> None:
    level = torch.zeros(20, 20)
    draws = [top_pixels(level, 40, seed=seed) for seed in range(50)]
    share = torch.stack(draws).float().mean(0)
    assert share[:10].mean() == pytest.approx(0.1, abs=0.02)
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 50


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.data())
def test_patches_are_whole_squares_but_for_the_edges(
    height: int, width: int, patch: int, data: st.DataObject
) -> None:
    grid = (-(-height // patch), -(-width // patch))
    scores = torch.rand(grid, generator=torch.Generator().manual_seed(0))
    count = data.draw(st.integers(0, grid[0] * grid[1]))
    mask = top_patches(scores, count, patch=patch, size=(height, width))
    assert mask.shape == (height, width)
    chosen = top_pixels(scores, count)
    rows, columns = torch.arange(height) // patch, torch.arange(width) // patch
    assert torch.equal(mask, chosen[rows[:, None], columns])


@pytest.mark.parametrize(
    ("scores", "kwargs", "message"),
    [
        (torch.rand(4, 4), {"count": -1}, "whole number from 0 to 16, not -1"),
        (torch.rand(4, 4), {"count": 17}, "whole number from 0 to 16, not 17"),
        (torch.rand(4, 4), {"count": 2.5}, "whole number from 0 to 16, not 2.5"),
        (torch.rand(4, 4), {"share": 1.5}, "between 0 and 1, not 1.5"),
        (torch.rand(4, 4), {"share": float("nan")}, "between 0 and 1, not nan"),
        (torch.rand(4, 4), {}, "count=None and share=None"),
        (torch.rand(4, 4), {"count": 1, "share": 0.1}, "not count=1 and share=0.1"),
        (torch.full((4, 4), torch.nan), {"count": 1}, "hold NaN"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(scores: Tensor, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_pixels(scores, **kwargs)


@pytest.mark.parametrize(
    ("patch", "count", "message"),
    [
        ((2, 3), 1, r"a patch is a square.*not \(2, 3\)"),
        (0, 1, "a patch is a square.*not 0"),
        (3, 1, r"into 3 x 3, but the scores are 4 x 4"),
        (2, 17, "number of patches must be a whole number from 0 to 16, not 17"),
    ],
)
def test_patches_that_make_no_sense_are_refused(patch: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_patches(torch.rand(4, 4), count, patch=patch, size=(8, 8))


def test_masks_and_fills_that_make_no_sense_are_refused() -> None:
    image = picture()
    with pytest.raises(ValueError, match="unknown fill 'pink'; use one of black, mean, blur, noise"):
        masked(image, torch.ones(24, 18, dtype=torch.bool), "pink")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"of shape \(24, 18\), not torch.bool and \(18, 24\)"):
        masked(image, torch.ones(18, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="boolean"):
        masked(image, torch.ones(24, 18))
