"""What every task is made of."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import TypeVar

Kind = TypeVar("Kind", dict, list)
SHOWN_REASONS = 3  # of the rows left out, where none is left


@dataclass(frozen=True)
class Example:
    """One prompt, with the index of the right option, or None where nothing is right or wrong.

    ``options`` is empty for plain text, whose ``question`` is the prompt itself. Of an image question,
    ``image`` is the encoded file; ``hint`` and ``instruction`` stand in the prompt already. ``reference``
    is an answer in free text that comes with an instruction, written by its author or by another model.
    ``in_words``: the answer is an option's own words, which the prompt does not list, not its letter.
    """

    id: str
    subject: str
    prompt: str
    options: tuple[str, ...]
    answer: int | None
    question: str
    image: bytes | None = field(default=None, repr=False)
    hint: str = ""
    instruction: str = ""
    reference: str = ""
    in_words: bool = False


@dataclass(frozen=True)
class Task:
    """Examples of one origin. ``subject`` is "all" for several; ``sha256`` is of the examples themselves.

    ``skipped`` says which rows of the origin were left out, and why.
    """

    name: str
    subject: str
    split: str
    examples: tuple[Example, ...]
    sha256: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)


def make_task(
    name: str,
    subject: str,
    split: str,
    examples: Sequence[Example],
    n: int | None,
    seed: int,
    skipped: Sequence[str] = (),
) -> Task:
    """Draw n of the examples with a seed (all if n is None), keep their order and hash them.

    Raises ValueError if there are fewer than n, or none.
    """
    label = f"task {name!r} (subject {subject}, split {split})"
    if not examples and skipped:
        reasons = "; ".join(skipped[:SHOWN_REASONS])
        raise ValueError(f"{label} has no row that can be used, so correct its rows. {reasons}")
    if not examples:
        raise ValueError(f"{label} has no examples; give a file that has some.")
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    if n is not None and n > len(examples):
        raise ValueError(f"{label} has {len(examples)} examples, fewer than the {n} asked for; lower n.")
    if n is not None:
        chosen = sorted(random.Random(seed).sample(range(len(examples)), n))
        examples = [examples[i] for i in chosen]
    content = [_content(example) for example in examples]
    sha256 = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    return Task(name, subject, split, tuple(examples), sha256, tuple(skipped))


def _content(example: Example) -> tuple[object, ...]:
    """What the hash is of; text examples have no image, and keep the hash that they had before images."""
    text = (example.id, example.subject, example.prompt, example.options, example.answer)
    if example.image is None:
        return text
    return (*text, hashlib.sha256(example.image).hexdigest(), example.hint)


def lettered(question: str, options: Sequence[str]) -> str:
    """A question with its options, each after its letter, up to where the answer begins."""
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question, *lines, "Answer:"])


def check_subject(subject: str | None, known: Iterable[str]) -> None:
    """Raise ValueError for a subject that is none of those known; None stands for all of them."""
    if subject is not None and subject not in set(known):
        raise ValueError(f"unknown subject {subject!r}; use one of {', '.join(known)}.")


def read_utf8(path: Path, remedy: str) -> str:
    """The text of a file, every line end as LF.

    Raises FileNotFoundError, with the remedy, for a missing file, and ValueError for one that is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; {remedy}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error


def read_json(path: Path, kind: type[Kind], remedy: str) -> Kind:
    """The object (dict) or list that a JSON file holds.

    Raises what :func:`read_utf8` raises, and ValueError, with the remedy, for a file of anything else.
    """
    text = read_utf8(path, remedy)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error}); fetch it again.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path.name} holds no JSON {'list' if kind is list else 'object'}; {remedy}.")
    return content


@contextmanager
def asking_hub(name: str, instead: str) -> Iterator[None]:
    """Raise ConnectionError, in one sentence, for whatever the hub's client raises."""
    try:
        yield
    except Exception as error:  # of many types; the remedy is the same
        raise ConnectionError(
            f"the hub did not give {name} ({type(error).__name__}); check the network or use {instead}."
        ) from error
