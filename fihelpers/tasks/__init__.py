"""Tasks: prompts with or without images and right answers, all as the same dataclass."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fihelpers.data import data_folder
from fihelpers.tasks import instructions, mcq, text
from fihelpers.tasks import pictures as images
from fihelpers.tasks.base import Example, Task, make_task
from fihelpers.tasks.pictures import image_prompt, with_instruction
from fihelpers.tasks.words import first_tokens

__all__ = ["Example", "Task", "image_prompt", "load_task", "with_instruction"]

ALL = "all"
CLOZE = "cloze"  # statements to finish; before a colon and another task: its questions without options
# questions as text, by their folder in data/
BUNDLED = {
    "bundled": "mcq",
    "bundled-experts": "experts",
    CLOZE: "cloze",
    f"{CLOZE}-experts": "cloze-experts",
}
JSON, TEXT = ".json", ".txt"

Found = tuple[Sequence[Example], str, Sequence[str]]  # examples, their split, and what was left out and why


def load_task(
    name: str | PathLike[str] = "bundled",
    subject: str | None = None,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    shots: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Task:
    """Load questions as text, questions about images, instructions, or contexts to continue.

    As text: "bundled", "bundled-experts", "cais/mmlu" or a folder in the MMLU CSV layout. About images:
    "bundled-images", a .tsv file in the layout of MMBench, a folder of ScienceQA or PuzzleVQA,
    "derek-thomas/ScienceQA" or "declare-lab/PuzzleVQA". Instructions: "bundled-instructions", a .json file in
    the layout of AlpacaEval or "tatsu-lab/alpaca_eval"; every other one is of split val, the others of test.
    Contexts: a .txt file with one a line.

    Asked for the options' own words, not their letters: "cloze" and "cloze-experts", the bundled facts as
    statements to finish, of which no two splits share one; and "cloze:" before any questions as text
    ("cloze:cais/mmlu", "cloze:path/to/folder"). With the ``tokenizer`` of the model that is to be asked, the
    questions whose options it does not tell apart are left out before the draw, and named in
    ``Task.skipped``.

    ``subject`` None takes all subjects, one after the other; ``n`` draws a seeded subset; ``shots`` puts
    that many solved questions of the dev split before each question, for questions as text only. A text
    file has no subjects and, like PuzzleVQA, is the same for every split. A row about an image that cannot
    be used is left out and named in ``Task.skipped``. Raises FileNotFoundError for an unknown name and
    ValueError for any other bad argument, a malformed row of text, or where no row is left.
    """
    name = str(name)
    if split not in mcq.SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(mcq.SPLITS)}.")
    if shots < 0 or (shots and split == "dev"):
        raise ValueError(f"{shots} shots with split {split!r}: ask for 0 or more, of val or test questions.")
    read = _reader(name)
    if read and shots:
        raise ValueError(f"{name} has no solved questions, so none for {shots} shots; set shots to 0.")
    examples, split, skipped = read(subject, split) if read else _questions(name, subject, split, shots)
    if tokenizer is not None:
        examples, unclear = _told_apart(examples, tokenizer)
        skipped = (*skipped, *unclear)
    whole = text.SUBJECT if name.endswith(TEXT) else ALL
    return make_task(_label(name), subject or whole, split, examples, n, seed, skipped)


def _told_apart(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], list[str]]:
    """The examples that a model with this tokenizer can be asked, and why the others cannot."""
    kept, unclear = [], []
    for example in examples:
        try:
            kept.append(_as_asked(example, tokenizer) if example.in_words else example)
        except ValueError as error:
            unclear.append(str(error))
    return kept, unclear


def _as_asked(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """An example whose options the tokenizer tells apart, the space before them in its prompt if need be.

    Some tokenizers make that space a token of its own before a digit, and then all numbers begin alike.
    """
    try:
        first_tokens(tokenizer, example)
        return example
    except ValueError:
        if example.prompt[-1:].isspace():
            raise
        spaced = replace(example, prompt=f"{example.prompt} ")
        with contextlib.suppress(ValueError):
            first_tokens(tokenizer, spaced)
            return spaced
        raise


def _label(name: str) -> str:
    if name in (*BUNDLED, mcq.HUB, *READERS):
        return name
    if name.startswith(f"{CLOZE}:"):
        return f"{CLOZE}:{_label(name.removeprefix(f'{CLOZE}:'))}"
    label = Path(name).expanduser().resolve().name
    return label.removesuffix(".tsv").removesuffix(JSON).removesuffix(TEXT)


def _questions(name: str, subject: str | None, split: str, shots: int) -> Found:
    """Questions as text, each after solved ones."""
    read, prompt = question_reader(name)
    rows = read(subject=subject, split=split)
    solved = read(subject=subject, split="dev") if shots else {}
    return mcq.make_examples(rows, split, solved, shots, prompt), split, ()


def question_reader(name: str) -> tuple[partial[mcq.Rows], Callable[..., str]]:
    """What reads questions as text, by subject and split, and what makes a prompt of one.

    Raises FileNotFoundError for an unknown name.
    """
    inner = name.removeprefix(f"{CLOZE}:")
    if inner.startswith(CLOZE):
        return _row_reader(inner), mcq.statement
    return _row_reader(inner), mcq.format_prompt if inner == name else mcq.open_prompt


def _row_reader(name: str) -> partial[mcq.Rows]:
    if name == mcq.HUB:
        return partial(mcq.read_hub)
    if name in BUNDLED:
        return partial(mcq.read_folder, data_folder() / BUNDLED[name], bundled=True)
    if Path(name).expanduser().is_dir():
        return partial(mcq.read_folder, Path(name).expanduser(), bundled=False)
    raise FileNotFoundError(
        f"no task {name!r}: give {', '.join(map(repr, BUNDLED))}, {mcq.HUB!r}, a folder in the MMLU CSV "
        f"layout, each with {CLOZE}: before it to be asked without options, or a .txt file; "
        f"for images {images.BUNDLED!r}, a .tsv file in the layout of MMBench, a folder of ScienceQA or "
        f"PuzzleVQA, {images.SCIENCEQA!r} or {images.PUZZLEVQA!r}; for instructions "
        f"{instructions.BUNDLED!r}, {instructions.ALPACA!r} or a .json file in its layout."
    )


def _reader(name: str) -> Callable[[str | None, str], Found] | None:
    """What reads a task that has no solved questions, by subject and split; None for questions as text."""
    path = Path(name).expanduser()
    if name.endswith(TEXT):
        return lambda subject, split: (text.read_text(path, subject), ALL, ())
    if name in READERS:
        return READERS[name]
    if name.endswith(JSON):
        return partial(_instructions, partial(instructions.read_alpaca, path))
    if name.endswith(".tsv"):
        return partial(_image_questions, partial(images.read_mmbench, path))
    if (path / images.SCIENCEQA_FILE).is_file():
        return partial(_image_questions, partial(images.read_scienceqa, path))
    if (path / "images").is_dir() and any(path.glob("*.json")):
        return partial(_image_questions, partial(images.read_puzzlevqa, path))
    return None


def _instructions(read: instructions.Reader, subject: str | None, split: str) -> Found:
    return instructions.of_subject(read(split), subject), split, ()


def _image_questions(read: Callable[[str], images.Source], subject: str | None, split: str) -> Found:
    rows, split = read(split)
    examples, skipped = images.make_examples(rows, subject)
    return examples, split, skipped


# what is read by its name, not as a file or folder
READERS: dict[str, Callable[[str | None, str], Found]] = {
    instructions.BUNDLED: partial(_instructions, instructions.read_bundled),
    instructions.ALPACA: partial(_instructions, instructions.read_alpaca_hub),
    images.BUNDLED: partial(_image_questions, images.read_bundled),
    images.SCIENCEQA: partial(_image_questions, images.read_scienceqa_hub),
    images.PUZZLEVQA: partial(_image_questions, images.read_puzzlevqa_hub),
}
