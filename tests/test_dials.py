"""The dials of the chapters: they show what was computed, and compute what is asked for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_examples, tiny_model
from torch import Tensor

from fichapters import dials
from fichapters.ch04 import lab as pixels
from fichapters.explorers import Dial
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import linear_names
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Example

EXAMPLES = tiny_examples(4)


def asked(dial: Dial, message: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the kernel answers to a message of the page."""
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(dial, "send", sent.append)
    dial._answer(dial, message, [])
    (answer,) = sent
    return answer


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("qwen2")


SHOWN = ["FI exact", *(f"FI damped {lam}" for lam in ("1e-08", "1e-06", "0.0001", "0.01")), dials.SQUARED]


@pytest.fixture(scope="module")
def filter_dial(model: LanguageModel) -> Dial:
    names = linear_names(model.network)
    scores = score_weights(model, EXAMPLES[:2], [*SHOWN, "FI cut 0.01", "random"], only=names)
    return dials.filter_dial(model, scores, EXAMPLES[:2], EXAMPLES, 0)


def test_the_filter_turns_from_exact_to_the_squared_score(filter_dial: Dial) -> None:
    first, *others = filter_dial.groups
    assert [position["label"] for position in first] == [name.removeprefix("FI ") for name in SHOWN]
    assert [line["name"] for line in first[0]["lines"]] == ["this ranking", dials.SQUARED, "random"]
    last = first[-1]["lines"]
    assert last[0]["y"] == last[1]["y"]  # at the end the ranking is the squared score's
    assert last[0]["y"][0] == last[2]["y"][0]  # nothing zeroed
    assert first[0]["pictures"][0] != others[0][0]["pictures"][0]
    assert [menu["name"] for menu in filter_dial.menus] == ["matrix"]


def test_a_kernel_filters_by_any_lambda(filter_dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(filter_dial, {"live": True}, monkeypatch)["live"]["label"] == "log₁₀ λ"
    option = filter_dial.menus[0]["options"][1]
    made = asked(filter_dial, {"options": [option], "value": -4}, monkeypatch)
    stored = next(p for p in filter_dial.groups[1] if p["label"] == "damped 0.0001")
    assert made["position"]["lines"] == stored["lines"]
    assert made["images"][0] == filter_dial.images[stored["pictures"][0]["image"]]
    refused = asked(filter_dial, {"options": [option], "value": 99}, monkeypatch)
    assert refused == {"error": "Choose a value from -12 to 4."}


class Gallery:
    """Three pictures whose answer is sure of its class by what is left of the light."""

    examples = tuple(Example(f"p{i}", "tiny", "?", ("dark", "light"), 1, "Which?") for i in range(3))
    images = torch.full((3, 3, 40, 40), 200.0)

    model = None

    def scores(self, measures: list[str]) -> dict[str, Tensor]:
        ramp = torch.arange(1600.0).reshape(40, 40).expand(3, 40, 40)
        return {measure: ramp * (1 if measure == "FI exact" else -1) for measure in measures}


@pytest.fixture
def mask_dial(monkeypatch: pytest.MonkeyPatch) -> Dial:
    def light(model: None, examples: list[Example], images: list[Tensor]) -> SimpleNamespace:
        left = torch.stack([image.mean() / 200 for image in images])
        return SimpleNamespace(log_probs=torch.stack([1 - left, left], 1).log())

    monkeypatch.setattr(pixels, "answer_images", light)
    return dials.mask_dial([Gallery()], ["p2", "p0", "p1"], 0)  # type: ignore[list-item]


def test_masks_grow_and_the_answer_follows(mask_dial: Dial) -> None:
    assert [menu["options"] for menu in mask_dial.menus] == [
        ["most fragile", "in the middle", "sturdiest"],
        list(dials.GUIDES),
    ]
    assert len(mask_dial.groups) == 12
    for positions in mask_dial.groups:
        counts = [int(position["label"]) for position in positions]
        assert counts == [*pixels.CASE_COUNTS]
        light = [position["bars"][1]["value"] for position in positions]
        assert light == pytest.approx([1 - n / 1600 for n in counts], abs=1e-3)
        assert [position["marker"] for position in positions] == list(range(len(counts)))
        assert positions[0]["lines"][0]["y"] == pytest.approx(light)
    assert "rightly 'light'" in mask_dial.groups[0][0]["note"]
    assert mask_dial.groups[0][1]["bars"][1]["name"] == "B. light ✓"


def test_a_kernel_masks_any_number(mask_dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    made = asked(mask_dial, {"options": ["sturdiest", "FI exact"], "value": 1200}, monkeypatch)["position"]
    assert made["label"] == "1200" and made["bars"][1]["value"] == pytest.approx(0.25)
    assert "wrongly 'dark'" in made["note"]
