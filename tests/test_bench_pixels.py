"""The pixel rows of the bench: its peers compute what they are named after, and its rows are consistent."""

from pathlib import Path

import pytest
import torch
from tiny_vision import encode_png, random_image, save_vision_model

from fichapters import bench_pixels
from fichapters.bench_pixels import FILTERS, JACOBIAN, SALIENCY, captum_saliency, pixel_rows, plain_jacobian
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.scores.pixels import score_pixels
from fihelpers.tasks import Example


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    folder: Path = tmp_path_factory.mktemp("models") / "qwen2_5_vl"
    return open_vision_model(save_vision_model("qwen2_5_vl", folder))


def examples(count: int) -> list[Example]:
    return [
        Example(f"t/{i}", "t", f"w{i}", tuple("abcd"), 0, f"w{i}", encode_png(random_image(16, 16, seed=i)))
        for i in range(count)
    ]


def test_peers_are_the_jacobian_norm(model: VisionModel) -> None:
    asked = examples(3)
    images = torch.stack([random_image(16, 16, seed=i) for i in range(3)])
    prompts = [example.prompt for example in asked]
    ours = torch.stack(score_pixels(model, asked, ["Jacobian norm"])["Jacobian norm"])
    for peer in (plain_jacobian, captum_saliency):
        found = peer(model, images, prompts)
        assert float((found - ours).abs().max()) < 1e-4 * float(ours.max())


def test_rows_are_consistent(model: VisionModel) -> None:
    rows = pixel_rows(model, examples(2), batch_sizes=(1, 2), rounds=2)
    assert [r.peer for r in rows] == [JACOBIAN, SALIENCY] * 2 * len(FILTERS)
    assert [r.work for r in rows[::2]] == [f"pixel FI {f}, batch {size}" for size in (1, 2) for f in FILTERS]
    for row in rows:
        assert row.seconds > 0 and row.peer_seconds > 0 and row.low <= row.ratio <= row.high
    assert (rows[0].goal, rows[0].floor, rows[1].goal) == (2.1, 2.0, None)
    assert rows[0].met == (rows[0].ratio <= 2.1)
    assert rows[-2].met is None  # nothing is asked of batches of 2
    assert all(p.requires_grad for p in model.network.parameters())  # thawed again


def test_too_few_examples_are_refused(model: VisionModel) -> None:
    with pytest.raises(ValueError, match="at least 2 examples, not 1"):
        pixel_rows(model, examples(1), batch_sizes=(2,), rounds=1)


def test_the_bundled_pictures_are_measured_in_both_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(bench_pixels, "pixel_rows", lambda *arguments: asked.append(arguments))
    bench_pixels.bundled_rows(3)
    ((model, found, sizes, rounds),) = asked
    assert model.name == "mini-vlm" and len(found) == 32 and sizes == (1, 32) and rounds == 3
