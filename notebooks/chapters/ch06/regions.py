"""Which tokens of a prompt are the question's own."""

from __future__ import annotations

from string import ascii_uppercase

import torch
from torch import Tensor

from fihelpers.models.language import LanguageModel
from fihelpers.tasks import Example


def question_region(model: LanguageModel, example: Example) -> Tensor:
    """Mark the tokens (T,) of an example's own question and of its options' texts, boolean.

    Instruction, solved examples, option letters and the closing "Answer:" are left out; a token that reaches
    into the question or an option belongs to it. Of plain text, and of a statement to finish, all of the
    prompt is the question. Raises ValueError for a tokenizer that does not say where its tokens stand, or a
    prompt that does not hold the question with its options as the MMLU prompt writes them.
    """
    if not model.tokenizer.is_fast:
        raise ValueError(f"the tokenizer of model {model.name!r} gives no offsets; use its fast version.")
    encoded = model.tokenizer(example.prompt, return_offsets_mapping=True, verbose=False)
    spans = [(0, len(example.prompt))] if example.in_words else _question_spans(example)
    inside = [
        any(start < end_of and begin_of < end for begin_of, end_of in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return torch.tensor(inside, dtype=torch.bool)


def _question_spans(example: Example) -> list[tuple[int, int]]:
    """Where the question and the texts of its options stand in the prompt: (begin, end) in characters."""
    pairs = [(f"\n{letter}. ", text) for letter, text in zip(ascii_uppercase, example.options, strict=False)]
    body = example.question + "".join(label + option for label, option in pairs)
    begin = example.prompt.rfind(body)
    if begin < 0 or not example.question:
        raise ValueError(
            f"the prompt of example {example.id!r} does not hold its question and options as the MMLU prompt "
            "writes them, so the question's tokens are unknown; give a prompt that does."
        )
    spans = [(begin, begin + len(example.question))]
    for label, option in pairs:
        begin = spans[-1][1] + len(label)
        spans.append((begin, begin + len(option)))
    return spans
