"""Which token stands for an option in its own words: the first that continues the prompt (method 1 and 5)."""

from transformers import PreTrainedTokenizerBase

from fihelpers.tasks.base import Example

# what to do where first tokens do not tell options apart
INSTEAD = "load the task with tokenizer=model.tokenizer, which leaves such questions out"


def first_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """The first token of each option of an example, as it continues its prompt.

    After a word a space parts the two. Raises ValueError for an example without two options, and where the
    tokens say nothing: two are the same, all are single characters of longer words (digits of a number say
    something), or the tokens of the prompt change with what follows.
    """
    whose = f"{label_of(tokenizer)} for example {example.id!r}"
    if len(example.options) < 2:
        raise ValueError(
            f"example {example.id!r} has {len(example.options)} options, whose first tokens cannot be the "
            "answer classes; take a task with options, or other classes."
        )
    gap = "" if example.prompt[-1:].isspace() else " "
    texts = [example.prompt, *(example.prompt + gap + option for option in example.options)]
    prompt, *whole = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if any(ids[: len(prompt)] != prompt or len(ids) == len(prompt) for ids in whole):
        raise ValueError(f"the tokenizer of {whose} joins the prompt and its options; {INSTEAD}.")
    found = [ids[len(prompt)] for ids in whole]
    if len(set(found)) < len(found):
        twice = next(option for i, option in enumerate(example.options) if found[i] in found[:i])
        raise ValueError(
            f"by the tokenizer of {whose} the option {twice!r} begins with the same token as another one; "
            f"{INSTEAD}."
        )
    spelled = [str(tokenizer.decode([token])).strip() for token in found]
    pairs = zip(spelled, example.options, strict=True)
    if all(len(start) < 2 <= len(word.split(maxsplit=1)[0]) and not start.isdigit() for start, word in pairs):
        raise ValueError(f"the tokenizer of {whose} splits the first letters of the options off; {INSTEAD}.")
    return found


def label_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Whose tokenizer it is, in the words of a message."""
    path = str(tokenizer.name_or_path).rstrip("/")
    return f"model {path.rsplit('/', 1)[-1]!r}" if path else "this model"
