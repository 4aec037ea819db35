"""Scores of the parts of images: the ceiling everywhere, groups that join their own pixels, batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import VISION_KINDS, encode_png, random_image, save_vision_model

from fihelpers.answers import Top
from fihelpers.filters import Damped
from fihelpers.influence import SaturationWarning, ceiling, gram
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.scores.pixels import pixel_batches, score_pixels
from fihelpers.tasks import Example

SIZES = ((16, 16), (24, 16), (19, 21))  # the last is resized by every kind
EVERY = ("FI summed", "Jacobian norm", "SNIP", "saliency", "random", "information length")


def example(i: int, size: tuple[int, int], options: int) -> Example:
    prompt = " ".join(f"w{i + k}" for k in range(3 + i % 3))
    image = encode_png(random_image(*size, seed=i))
    return Example(f"tiny/{i}", "tiny", prompt, tuple("abcdef"[:options]), i % 2, prompt, image)


def examples(options: tuple[int, ...] = (6,)) -> list[Example]:
    return [example(i, SIZES[i % len(SIZES)], options[i % len(options)]) for i in range(5)]


@pytest.fixture(scope="module", params=VISION_KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    folder = tmp_path_factory.mktemp("models") / request.param
    return open_vision_model(save_vision_model(request.param, folder))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    folder = tmp_path_factory.mktemp("models") / "qwen2_5_vl"
    return open_vision_model(save_vision_model("qwen2_5_vl", folder))


@pytest.mark.filterwarnings("ignore::fihelpers.influence.SaturationWarning")  # patches are saturated
@pytest.mark.parametrize("over", ["pixel", "channel", "patch", "token"])
@pytest.mark.parametrize("answers", [None, Top(7)], ids=str)
def test_fi_never_passes_its_ceiling(model: VisionModel, over: Any, answers: Top | None) -> None:
    for batch in pixel_batches(model, examples((6, 5)), answers):
        tops = ceiling(batch.grads.probs)
        for name, maps in batch.scores(["FI", "FI cut 0.001"], over, patch=5).items():
            for top, values in zip(tops, maps, strict=True):
                assert values.isfinite().all() and (values >= 0).all()
                assert (values <= top * (1 + 1e-5)).all()
                assert values.max() > 0, name


def test_pixels_under_four_letters_are_saturated_and_one_warning_says_so(qwen: VisionModel) -> None:
    asked = examples((4,))
    for over in ("pixel", "patch"):
        with pytest.warns(SaturationWarning) as caught:
            score_pixels(qwen, asked, over=over, batch_size=1)  # type: ignore[arg-type]
        assert len(caught) == 1
    score_pixels(qwen, asked, over="channel")
    score_pixels(qwen, asked, ["FI", "FI summed"], Damped(1e-2), over="patch")


def check_alone(model: VisionModel, measures: list[str], over: Any) -> None:
    """Each example's maps are the same whichever batch it came in."""
    asked = examples((6, 5))[:4]
    together = score_pixels(model, asked, measures, Damped(), over=over, patch=7)
    assert len(together) == len(measures)
    for i, one in enumerate(asked):
        for name, (alone,) in score_pixels(model, one, measures, Damped(), over=over, patch=7).items():
            scale = float(alone.abs().max())
            assert scale > 0, name
            difference = float((together[name][i] - alone).abs().max())
            assert difference < 1e-3 * scale, f"{name} of example {i} differs by {difference / scale:.2g}"


@pytest.mark.parametrize("over", ["pixel", "channel", "patch", "token"])
def test_examples_together_are_scored_as_each_alone(qwen: VisionModel, over: Any) -> None:
    check_alone(qwen, ["FI", *EVERY], over)


def test_maps_have_the_shapes_of_their_groups(qwen: VisionModel) -> None:
    asked = example(0, (24, 16), 6)
    shapes = {"pixel": (24, 16), "channel": (3, 24, 16), "patch": (5, 4), "token": (3, 2)}
    for over, shape in shapes.items():
        (found,) = score_pixels(qwen, asked, ["SNIP"], over=over, patch=5)["SNIP"]  # type: ignore[arg-type]
        assert found.shape == shape


def test_patches_and_tokens_join_their_own_pixels(qwen: VisionModel) -> None:
    (batch,) = pixel_batches(qwen, [example(0, (24, 16), 6)])
    grads, probs = batch.grads.class_grads, batch.grads.probs
    measures = ["FI", "Jacobian norm", "information length"]
    for over, side in (("patch", 7), ("token", 8)):
        found = batch.scores(measures, over, patch=side, spectral=Damped())  # type: ignore[arg-type]
        for row in range(3):
            for column in range(2):
                cut = (..., slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
                alone = replace(batch.grads, class_grads=grads[cut], value=batch.grads.value[cut])
                for name, value in alone.scores(measures, (0, 1, 2), Damped()).items():
                    torch.testing.assert_close(found[name][:, row, column], value, rtol=1e-4, atol=1e-9)
    whole = gram(grads, (1, 2, 3))
    blocks = batch._blocks("patch", 7)
    assert blocks
    parts = gram(blocks.cut_grads(batch.grads).class_grads, (1, 3, 5))
    torch.testing.assert_close(parts.sum((3, 4)), whole, rtol=1e-5, atol=0)
    assert probs.shape == (6, 1)


@pytest.mark.parametrize("answers", [None, Top(4)], ids=str)
def test_pixel_gradients_are_those_of_finite_differences(model: VisionModel, answers: Top | None) -> None:
    double = open_vision_model(Path(model.network.name_or_path), dtype="float64")
    (batch,) = pixel_batches(double, [example(0, (16, 16), 6)], answers)
    batch = replace(batch, images=batch.images.double())
    x, rows, step = batch.images / 255, torch.tensor([0]), 2e-3  # norms and softmax stay in float32
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        way = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        with torch.no_grad():
            ends = [batch.log_probs(x + s * step * way, rows) for s in (1, -1)]
        along = (batch.grads.class_grads * way).sum((2, 3, 4))
        torch.testing.assert_close(along.T, (ends[0] - ends[1]) / (2 * step), rtol=1e-2, atol=2e-3)


def test_random_scores_depend_on_the_example_only(qwen: VisionModel) -> None:
    asked = [example(i, (16, 16), 6) for i in range(3)]
    first, second, third = score_pixels(qwen, asked, ["random"])["random"]
    assert not torch.equal(first, second)
    assert torch.equal(score_pixels(qwen, asked[::-1], ["random"], batch_size=2)["random"][0], third)


def test_images_and_groupings_that_make_no_sense_are_refused(qwen: VisionModel) -> None:
    asked = example(0, (16, 16), 4)
    with pytest.raises(ValueError, match="over must be one of pixel, channel, patch, token, not 'limb'"):
        score_pixels(qwen, asked, ["SNIP"], over="limb")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a patch is a square.*not 0"):
        score_pixels(qwen, asked, ["SNIP"], over="patch", patch=0)
    with pytest.raises(ValueError, match="example 'tiny/0' has no image"):
        score_pixels(qwen, replace(asked, image=None))
    with pytest.raises(ValueError, match="2 to 6 options, not 1"):
        score_pixels(qwen, replace(asked, options=("a",)))
    with pytest.raises(ValueError, match="at least one example"):
        score_pixels(qwen, [])
    with pytest.raises(ValueError, match="Unknown measure 'beauty'"):
        score_pixels(qwen, asked, ["beauty"])
