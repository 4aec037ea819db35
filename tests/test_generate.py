"""Greedy and sampled responses of tiny random models."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import WORDS, tiny_model
from torch import Tensor
from transformers import GenerationConfig

from fihelpers.models.generate import Response, greedy, sample
from fihelpers.models.language import LanguageModel

KINDS = ["qwen2", "llama", "gpt_neox", "gpt2"]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1", "w2 w2"]


def next_logits(model: LanguageModel, ids: list[int]) -> Tensor:
    """The plain way: the whole text again, alone, without a cache."""
    with torch.no_grad():
        return model.network(input_ids=torch.tensor([ids])).logits[0, -1]


def all_ids(responses: list[list[Response]]) -> list[list[tuple[int, ...]]]:
    return [[response.ids for response in of_prompt] for of_prompt in responses]


def ending_with(model: LanguageModel, *tokens: int) -> LanguageModel:
    model.network.generation_config.eos_token_id = list(tokens)
    return model


class Failing:
    """Makes the logits NaN for every text that holds a token."""

    def __init__(self, model: LanguageModel, word: str) -> None:
        token = WORDS.index(word)

        def spoil(module: torch.nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
            return out.masked_fill((inputs[0] == token).any(1)[:, None, None], torch.nan)

        self.hook = model.network.get_input_embeddings().register_forward_hook(spoil)

    def repair(self) -> None:
        self.hook.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_greedy_takes_the_likeliest_token_at_every_step(kind: str, batch_size: int) -> None:
    model = ending_with(tiny_model(kind), 8, 24)
    for prompt, response in zip(PROMPTS, greedy(model, PROMPTS, 7, batch_size), strict=True):
        start = model.tokenizer(prompt)["input_ids"]
        expected: list[int] = []
        while len(expected) < 7 and not {8, 24} & set(expected):
            expected.append(int(next_logits(model, start + expected).argmax()))
        ended = expected[-1] in (8, 24)
        assert response.ended == ended
        assert list(response.ids) == expected[: len(expected) - ended]
        assert response.text == " ".join(WORDS[i] for i in response.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_models_distribution(kind: str) -> None:
    model = tiny_model(kind)
    n = 3000
    (drawn,) = sample(ending_with(model, 0), PROMPTS[:1], n, 2, batch_size=1000)
    start = model.tokenizer(PROMPTS[0])["input_ids"]
    first = torch.bincount(torch.tensor([[*r.ids, 0][0] for r in drawn]), minlength=len(WORDS))
    p = next_logits(model, start).softmax(-1)
    assert ((first / n - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1 / n).all()
    common = int(first[1:].argmax()) + 1
    after = [[*r.ids, 0][1] for r in drawn if r.ids[:1] == (common,)]
    second = torch.bincount(torch.tensor(after), minlength=len(WORDS)) / len(after)
    p = next_logits(model, [*start, common]).softmax(-1)
    assert ((second - p).abs() <= 4.5 * (p * (1 - p) / len(after)).sqrt() + 1 / len(after)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_follows_from_seed_prompt_and_number_alone(kind: str) -> None:
    model = ending_with(tiny_model(kind), 5)
    drawn = sample(model, PROMPTS, 5, 6, seed=3)
    for batch_size in (1, 2, 7, 100):
        assert sample(model, PROMPTS, 5, 6, seed=3, batch_size=batch_size) == drawn
    assert sample(model, PROMPTS[::-1], 5, 6, seed=3) == drawn[::-1]
    assert sample(model, PROMPTS[1:2], 5, 6, seed=3) == drawn[1:2]
    assert [of[:2] for of in drawn] == sample(model, PROMPTS, 2, 6, seed=3)
    shorter = sample(model, PROMPTS, 5, 2, seed=3)
    assert all_ids(shorter) == [[r.ids[:2] for r in of] for of in drawn]
    assert all_ids(sample(model, PROMPTS, 5, 6, seed=4)) != all_ids(drawn)
    assert len({r.ids for of in drawn for r in of}) > 10  # the numbers differ from one another
    assert sample(model, ["w1", "w1"], 3, 4)[0] == sample(model, ["w1", "w1"], 3, 4)[1]


def test_a_prompt_is_read_once_for_all_its_samples() -> None:
    model = tiny_model("qwen2")
    sample(model, ["w1"], 1, 1)  # finds out how the model is to be read
    read: list[int] = []
    model.network.get_input_embeddings().register_forward_pre_hook(lambda _, x: read.append(x[0].numel()))
    sample(model, ["w1 w2 w3 w4 w5 w6 w7 w8"], 6, 3)
    assert read == [7, 6, 6, 6]  # all but its last token once, then one token a sample and step


def test_the_models_own_settings_change_nothing_and_stay() -> None:
    model = tiny_model("llama")
    drawn, likeliest = sample(model, PROMPTS, 4, 5), greedy(model, PROMPTS, 5)
    own = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=9.0,
        suppress_tokens=[5, 29],
        eos_token_id=2,
    )
    model.network.generation_config = own
    assert sample(model, PROMPTS, 4, 5) == drawn
    assert greedy(model, PROMPTS, 5) == likeliest
    assert model.network.generation_config is own


def test_a_response_may_end_at_once() -> None:
    model = tiny_model("gpt_neox")
    first = int(next_logits(model, model.tokenizer("w4")["input_ids"]).argmax())
    ending_with(model, first)
    assert greedy(model, ["w4"], 5) == [Response((), True, "")]
    assert greedy(model, ["w4"], 1) == [Response((), True, "")]
    model.network.generation_config.eos_token_id = None
    model.tokenizer.eos_token = WORDS[first]  # the tokenizer names the end where the settings do not
    assert greedy(model, ["w4"], 5) == [Response((), True, "")]


def test_a_longer_sample_begins_as_a_shorter_one_whatever_stands_beside_it() -> None:
    model = ending_with(tiny_model("qwen2"), 5, 6)
    longer, shorter = (sample(model, PROMPTS, 4, length) for length in (6, 3))
    cut = [[Response(r.ids[:3], r.ended and len(r.ids) < 3, "") for r in of] for of in longer]
    assert cut == [[replace(r, text="") for r in of] for of in shorter]
    assert sample(model, PROMPTS[:2], 3, 6, batch_size=3) == [of[:3] for of in longer[:2]]


@pytest.mark.parametrize("kind", KINDS)
def test_nan_logits_name_the_prompt(kind: str) -> None:
    model = tiny_model(kind)
    prompts = ["w1", "w2 w3", "w4 w26 w5", "w6 w7 w8 w9"]
    failing = Failing(model, "w26")
    with pytest.raises(FloatingPointError, match=f"tiny-{kind}.* prompt 2"):
        sample(model, prompts, 3, 1, batch_size=3)
    with pytest.raises(FloatingPointError, match=f"tiny-{kind}.* prompt 2"):
        greedy(model, prompts, 1)
    failing.repair()
    assert len(sample(model, prompts, 3, 1)) == len(prompts)


def test_nan_logits_at_a_later_step_are_found() -> None:
    model = tiny_model("qwen2")
    (drawn,) = sample(model, ["w1"], 20, 4)
    word = next(WORDS[r.ids[1]] for r in drawn if WORDS[r.ids[1]] != "w1")
    Failing(model, word)
    with pytest.raises(FloatingPointError, match="prompt 0"):
        sample(model, ["w1"], 20, 4)


@pytest.mark.parametrize("write", [greedy, lambda model, prompts, length: sample(model, prompts, 2, length)])
def test_bad_input_is_named(write: Callable) -> None:
    model = tiny_model("qwen2")
    assert len(write(model, ["w1 " * 20], 12)) == 1  # as much as fits
    with pytest.raises(ValueError, match=r"prompt 1 has 20 tokens and 13 more .* 32 .*tiny-qwen2"):
        write(model, ["w1", "w1 " * 20], 13)
    with pytest.raises(ValueError, match="prompt 0 has 33 tokens and 1 more to come, more than the 32"):
        write(model, ["w1 " * 33], 1)
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            write(model, ["w1", empty], 2)
    for nothing in ([], "w1"):
        with pytest.raises(ValueError, match="non-empty list of prompts"):
            write(model, nothing, 2)
    with pytest.raises(ValueError, match="length of a response must be at least 1, got 0"):
        write(model, ["w1"], 0)


def test_bad_numbers_are_named() -> None:
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match="number of responses to a prompt must be at least 1, got 0"):
        sample(model, ["w1"], 0, 2)
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        greedy(model, ["w1"], 2, batch_size=0)
