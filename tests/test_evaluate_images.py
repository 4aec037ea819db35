"""Answers to questions about images, with as many letters as each has options."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_vision import VISION_KINDS, encode_png, random_image, save_vision_model

from fihelpers.answers import Top, letters
from fihelpers.evaluate.questions import Outcome, answer_images
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.tasks import Example


def asked(n: int = 7, options: tuple[int, ...] = (4,)) -> list[Example]:
    made = []
    for i in range(n):
        prompt = " ".join(f"w{i + k}" for k in range(2 + i % 3))
        image = encode_png(random_image(16, (16, 24)[i % 2], seed=i))
        count = options[i % len(options)]
        made.append(Example(f"tiny/{i}", "tiny", prompt, tuple("abcdef"[:count]), i % count, prompt, image))
    return made


def opened(kind: str, folder: Path) -> VisionModel:
    return open_vision_model(save_vision_model(kind, folder / kind))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    return opened("qwen2_5_vl", tmp_path_factory.mktemp("models"))


def slowly(model: VisionModel, examples: list[Example]) -> list[torch.Tensor]:
    """One question at a time."""
    with torch.no_grad():
        return [
            letters(model.tokenizer, "ABCDEF"[: len(e.options)]).log_probs(
                model.last_logits([random_image(16, (16, 24)[i % 2], seed=i)], [e.prompt])
            )[0]
            for i, e in enumerate(examples)
        ]


@pytest.mark.parametrize("kind", VISION_KINDS)
@pytest.mark.parametrize("options", [(4,), (2, 6, 3)], ids=str)
def test_answers_are_those_of_each_question_alone(
    kind: str, options: tuple[int, ...], tmp_path: Path
) -> None:
    model, examples = opened(kind, tmp_path), asked(options=options)
    outcome = answer_images(model, examples, batch_size=3)
    assert outcome.log_probs.shape == (7, max(options))
    for i, alone in enumerate(slowly(model, examples)):
        torch.testing.assert_close(outcome.log_probs[i, : len(alone)], alone, rtol=1e-4, atol=1e-4)
        assert (outcome.log_probs[i, len(alone) :] == -torch.inf).all()
        assert outcome.predicted[i] == alone.argmax()
        assert outcome.answer[i] == examples[i].answer
    assert outcome.log_prob.isfinite().all()
    assert 0 <= outcome.accuracy <= 1 and 0 < outcome.confidence <= 1


def test_other_images_take_the_place_of_the_examples_own(qwen: VisionModel) -> None:
    examples = asked(options=(2, 4))
    intact = answer_images(qwen, examples)
    same = [random_image(16, (16, 24)[i % 2], seed=i) for i in range(7)]
    again = answer_images(qwen, examples, images=same, reference=intact)
    torch.testing.assert_close(again.log_probs, intact.log_probs)
    black = answer_images(qwen, examples, images=[0 * image for image in same], reference=intact)
    assert not torch.allclose(black.log_prob, intact.log_prob)
    assert str(black.classes) == "A B C D"


def test_the_classes_of_the_intact_images_are_kept(qwen: VisionModel) -> None:
    examples = asked()
    intact = answer_images(qwen, examples, answers=Top(3))
    assert intact.correct.all()  # the model's own choice is the answer
    changed = [torch.flip(random_image(16, 16, seed=9), [0])] * 7
    after = answer_images(qwen, examples, images=changed, reference=intact, batch_size=2)
    with torch.no_grad():
        logits = qwen.last_logits(torch.stack(changed), [e.prompt for e in examples])
    expected = intact.classes.log_probs(logits)
    torch.testing.assert_close(after.log_probs, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(after.answer, intact.answer)


def test_an_example_without_an_answer_keeps_the_choice_of_the_intact_model(qwen: VisionModel) -> None:
    examples = [replace(e, answer=None) for e in asked(options=(3, 4))]
    intact = answer_images(qwen, examples)
    assert isinstance(intact, Outcome) and intact.correct.all()
    black = answer_images(qwen, examples, images=[torch.zeros(3, 16, 16)] * 7, reference=intact)
    assert torch.equal(black.answer, intact.predicted)


def test_what_cannot_be_answered_is_refused(qwen: VisionModel) -> None:
    examples = asked(3)
    with pytest.raises(ValueError, match="there are 0 examples"):
        answer_images(qwen, [])
    with pytest.raises(ValueError, match="there are 3 examples and 2 images"):
        answer_images(qwen, examples, images=[torch.zeros(3, 16, 16)] * 2)
    with pytest.raises(ValueError, match="'tiny/1' has no image"):
        answer_images(qwen, [examples[0], replace(examples[1], image=None)])
    with pytest.raises(ValueError, match="'tiny/0' has 4 options, but there are 2 answer classes"):
        answer_images(qwen, examples, answers=letters(qwen.tokenizer, "AB"))
    with pytest.raises(ValueError, match="2 to 6 options, not 1"):
        answer_images(qwen, [replace(examples[0], options=("a",)), *examples])
    with pytest.raises(ValueError, match="the reference has 3 examples, not the 2 given"):
        answer_images(qwen, examples[:2], reference=answer_images(qwen, examples))
