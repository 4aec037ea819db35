"""Captum's attributions of pixels: complete, the same in every batch, by features that carry the gradient."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from tiny_vision import ID, VISION_KINDS, encode_png, random_image, save_vision_model
from torch import Tensor

from fichapters.attributions import ATTRIBUTIONS, feature_maps, integrated_gradients
from fihelpers.answers import Groups
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.scores.pixels import PixelBatch, pixel_batches
from fihelpers.tasks import Example

PROMPTS = ["w1 w2 w3 Answer :", "w4", "w5 w6 w7"]
SIZES = ((16, 16), (24, 16), (19, 21))  # the last is resized by every kind


def example(i: int, size: tuple[int, int], options: int) -> Example:
    prompt = " ".join(f"w{i + k}" for k in range(3 + i % 3))
    image = encode_png(random_image(*size, seed=i))
    return Example(f"tiny/{i}", "tiny", prompt, tuple("abcdef"[:options]), i % 2, prompt, image)


@pytest.fixture(scope="module", params=VISION_KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> VisionModel:
    return open_vision_model(folder)


@pytest.fixture(scope="module")
def exact(folder: Path) -> VisionModel:
    return open_vision_model(folder, dtype="float64")


@pytest.mark.parametrize("name", ATTRIBUTIONS)
def test_examples_together_are_attributed_as_each_alone(name: str, model: VisionModel) -> None:
    asked = [example(i, SIZES[i % len(SIZES)], 6 - i % 2) for i in range(4)]
    for batch in pixel_batches(model, asked):
        together = ATTRIBUTIONS[name](batch)
        assert together.shape == batch.images[:, 0].shape
        for one, maps in zip(batch.examples, together, strict=True):
            (alone,) = pixel_batches(model, [one])
            (expected,) = ATTRIBUTIONS[name](alone)
            scale = float(expected.abs().max())
            assert scale > 0
            assert float((maps - expected).abs().max()) < 1e-3 * scale


def bright_is_likely(images: Tensor, prompts: list[str]) -> Tensor:
    """Logits of three tokens; the first grows with every pixel."""
    first = (images / 255).mean((1, 2, 3)) * 3
    return torch.stack([first, 0 * first, 0 * first], 1)


def test_integrated_gradients_are_complete() -> None:
    stub: Any = SimpleNamespace(last_logits=bright_is_likely)
    images = torch.stack([random_image(6, 6, seed=i) for i in range(3)])
    asked = tuple(example(i, (6, 6), 3) for i in range(3))
    batch = PixelBatch(stub, (0, 1, 2), asked, images, Groups(tuple("ABC"), ((0,), (1,), (2,))))
    with torch.no_grad():
        rows = torch.arange(3)
        change = batch.log_probs(images / 255, rows) - batch.log_probs(torch.zeros_like(images), rows)
    torch.testing.assert_close(integrated_gradients(batch).sum((1, 2)), change[:, 0], rtol=1e-5, atol=0)


def test_feature_maps_hold_the_image_tokens_and_carry_the_gradient(exact: VisionModel) -> None:
    height, width = (16, 16) if exact.network.config.model_type == "llava" else (16, 24)
    images = torch.stack([random_image(height, width, seed) for seed in range(3)]).double()
    layout = exact.layout(height, width)
    plain = exact.last_logits(images, PROMPTS)
    seen: list[Tensor] = []
    with feature_maps(exact, layout) as maps:
        maps.register_forward_hook(lambda module, args, output: seen.append(output))
        logits = exact.last_logits(images, PROMPTS)
    torch.testing.assert_close(logits, plain)
    assert seen[0].shape == (3, 16, layout.rows, layout.columns)
    features = exact.network.model.get_image_features(**exact.preprocess(images)).pooler_output
    torch.testing.assert_close(seen[0].flatten(2).transpose(1, 2), torch.stack(list(features)))
    assert torch.autograd.grad(logits[:, ID["A"]].sum(), seen[0])[0].abs().amax((1, 2, 3)).min() > 0
    exact.last_logits(images, PROMPTS)
    assert len(seen) == 1  # the route is closed with the context


def test_captum_takes_the_feature_maps_as_a_layer(exact: VisionModel) -> None:
    images = torch.stack([random_image(16, 16, seed) for seed in range(3)]).double()
    seen: list[Tensor] = []
    with feature_maps(exact, exact.layout(16, 16)) as maps:
        cam = LayerGradCam(lambda x: exact.last_logits(x, PROMPTS), maps).attribute(images, target=ID["B"])
        maps.register_forward_hook(lambda module, args, output: seen.append(output))
        logits = exact.last_logits(images, PROMPTS)
    (gradient,) = torch.autograd.grad(logits[:, ID["B"]].sum(), seen[0])
    expected = (gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1, keepdim=True)
    torch.testing.assert_close(cam, expected)
