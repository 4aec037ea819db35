"""What every task is made of."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One prompt, with the index of the right option, or None where nothing is right or wrong.

    ``options`` is empty for plain text, whose ``question`` is the prompt itself.
    """

    id: str
    subject: str
    prompt: str
    options: tuple[str, ...]
    answer: int | None
    question: str


@dataclass(frozen=True)
class Task:
    """Examples of one origin. ``subject`` is "all" for several; ``sha256`` is of the examples themselves."""

    name: str
    subject: str
    split: str
    examples: tuple[Example, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)


def make_task(
    name: str, subject: str, split: str, examples: Sequence[Example], n: int | None, seed: int
) -> Task:
    """Draw n of the examples with a seed (all if n is None), keep their order and hash them.

    Raises ValueError if there are fewer than n, or none.
    """
    label = f"task {name!r} (subject {subject}, split {split})"
    if not examples:
        raise ValueError(f"{label} has no examples; give a file that has some.")
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    if n is not None and n > len(examples):
        raise ValueError(f"{label} has {len(examples)} examples, fewer than the {n} asked for; lower n.")
    if n is not None:
        chosen = sorted(random.Random(seed).sample(range(len(examples)), n))
        examples = [examples[i] for i in chosen]
    content = [(e.id, e.subject, e.prompt, e.options, e.answer) for e in examples]
    sha256 = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    return Task(name, subject, split, tuple(examples), sha256)
