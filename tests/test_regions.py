"""The tokens of a question: its own words and its options, and nothing around them."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_perturb_embeddings import moved
from tiny import tiny_examples, tiny_model

from fichapters.ch06.regions import question_region
from fihelpers.data import data_folder
from fihelpers.models.language import open_model, open_tokenizer
from fihelpers.perturb.embeddings import attack, top_dimensions
from fihelpers.scores.inputs import embedding_batches
from fihelpers.tasks import Example, load_task
from fihelpers.tasks.mcq import Row, format_prompt


def asked(question: str, options: tuple[str, ...], shots: tuple[Row, ...] = ()) -> Example:
    prompt = format_prompt("law", question, options, shots)
    return Example("law/test/1", "law", prompt, options, 0, question)


def test_the_region_of_a_question_is_its_own_words_and_its_options() -> None:
    model = tiny_model("qwen2")  # its tokens are words and marks
    options = ("w3", "w1 w4", "A", "w1")
    shot = Row("w1 w2?", options, 3)
    for shots in ((), (shot,), (shot, shot)):
        example = asked("w1 w2?", options, shots)
        region = question_region(model, example)
        tokens = model.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(example.prompt)
        own = [word for (word, _), inside in zip(tokens, region.tolist(), strict=True) if inside]
        assert own == ["w1", "w2", "?", "w3", "w1", "w4", "A", "w1"]
        # question 3, four options of "A", "." and 5 words, "Answer" and ":"
        assert region.nonzero()[0, 0] == len(region) - (3 + 8 + 5 + 2)


def test_the_region_of_plain_text_is_all_of_it() -> None:
    example = tiny_examples(1)[0]
    text = replace(example, options=(), answer=None)
    assert question_region(tiny_model("llama"), text).all()
    statement = replace(example, options=("w3", "w4"), answer=0, in_words=True)
    assert question_region(tiny_model("llama"), statement).all()


def test_the_region_of_bundled_questions_spells_them() -> None:
    folder = data_folder() / "models" / "mini-lm"
    model: Any = SimpleNamespace(tokenizer=open_tokenizer(folder, "mini-lm"), name="mini-lm")
    for shots in (0, 2):
        for example in load_task("bundled", n=12, shots=shots):
            region = question_region(model, example)
            ids = torch.tensor(model.tokenizer(example.prompt)["input_ids"])
            assert len(region) == len(ids)
            own, other = (model.tokenizer.decode(ids[part]) for part in (region, ~region))
            squeezed = "".join([example.question, *example.options]).replace(" ", "")
            assert own.replace(" ", "") == squeezed
            assert other.startswith("The following are multiple choice")
            assert other.endswith("Answer:")


def test_only_the_question_is_attacked_where_the_rest_is_protected() -> None:
    model = open_model("mini-lm")
    examples = load_task("bundled", n=4).examples
    regions = {e.id: question_region(model, e) for e in examples}
    (batch,) = embedding_batches(model, examples)
    scores = batch.scores(["Jacobian norm"])["Jacobian norm"]
    chosen = [
        top_dimensions(s, 0.01, region=regions[e.id]) for s, e in zip(scores, batch.examples, strict=True)
    ]
    for example, positions in zip(batch.examples, moved(batch, attack(batch, chosen, 0.1)), strict=True):
        tokens = positions // batch.embeddings.shape[2]
        assert len(tokens) and regions[example.id][tokens].all()


def test_questions_that_cannot_be_found_are_refused() -> None:
    model = tiny_model("qwen2")
    example = asked("w1 w2?", ("w3", "w4", "w5", "w6"))
    for other in (
        replace(example, question="w9?"),
        replace(example, question=""),
        replace(example, options=("w6", "w5", "w4", "w3")),
        replace(example, options=tuple("abcdefg")),
    ):
        with pytest.raises(ValueError, match="'law/test/1' does not hold its question and options"):
            question_region(model, other)
    slow: Any = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False), name="old")
    with pytest.raises(ValueError, match="tokenizer of model 'old' gives no offsets"):
        question_region(slow, example)
