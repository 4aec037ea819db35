"""Noises destroy as much as they are asked to, and no more."""

import numpy as np
import pytest
import torch
from test_pixels import picture

from fichapters.noises import NOISES, information_loss, noised
from fihelpers.perturb.pixels import masked, top_pixels


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("share", [10 / (40 * 40), 0.05, 0.3])
def test_a_noise_destroys_as_much_as_the_mask(kind: str, share: float) -> None:
    image = picture(40, 40)
    scores = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    loss = information_loss(image, masked(image, top_pixels(scores, share=share), "mean"))
    noisy = noised(image, kind, loss, seed=1)
    assert information_loss(image, noisy) == pytest.approx(loss, rel=1e-4)
    assert noisy.min() >= 0 and noisy.max() <= 255
    assert torch.equal(noisy, noised(image, kind, loss, seed=1))
    assert not torch.equal(noisy, noised(image, kind, loss, seed=2))


def test_noises_have_their_own_shapes() -> None:
    image = picture(40, 40)
    touched = {kind: (noised(image, kind, 0.2) != image).float() for kind in NOISES}
    assert touched["Poisson"].mean() > 0.95
    assert touched["speckle"].mean() > 0.95
    assert touched["salt & pepper"].mean() < 0.2
    rows, columns = np.nonzero(touched["random erasing"].amax(0).numpy())
    area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert touched["random erasing"].amax(0).sum() == area  # one full rectangle


def test_no_loss_is_the_image_itself() -> None:
    assert torch.equal(noised(picture(), "speckle", 0), picture())


def test_information_loss_of_known_changes() -> None:
    image = picture()
    assert information_loss(image, image) == 0
    centre = image.mean((1, 2), keepdim=True)
    assert information_loss(image, centre.expand_as(image)) == pytest.approx(1, rel=1e-6)
    assert information_loss(image, image + 0.1 * (image - centre)) == pytest.approx(0.01, rel=1e-4)


def test_noise_and_loss_that_make_no_sense_are_refused() -> None:
    image = picture()
    with pytest.raises(ValueError, match="unknown noise 'rain'; use one of Poisson, salt & pepper"):
        noised(image, "rain", 0.1)
    with pytest.raises(ValueError, match="at least 0, not -1"):
        noised(image, "Poisson", -1)
    with pytest.raises(ValueError, match="at least 0, not nan"):
        noised(image, "Poisson", float("nan"))
    with pytest.raises(ValueError, match=r"salt & pepper destroys at most \d.*variance, not 100\."):
        noised(image, "salt & pepper", 100)
    with pytest.raises(ValueError, match="of a single colour"):
        noised(torch.full((3, 8, 8), 7.0), "Poisson", 0.1)
    with pytest.raises(ValueError, match="use one size"):
        information_loss(image, image[:, :5])
