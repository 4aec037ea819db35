"""From data/facts/*.yaml to four-choice questions, statements to finish and training text.

Every relation has its own wordings for training, dev, val and test, so no question is asked in the
same words in two splits, while the training statements tell every fact.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fihelpers.data import write_atomically

SUBJECTS = ("business", "culture", "geography", "law")
LETTERS = "ABCD"
OBJECT = "{o}."  # how a statement ends whose object can be left out
DEV_QUESTIONS = 8
CALIBRATION = 0.28  # share of a relation's facts whose statements are of the split val


@dataclass(frozen=True)
class Fact:
    """Subject and object of one fact, and the objects that may be offered as wrong options."""

    subject: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """One kind of fact: its wordings, each with {s} (and {o} in statements), and its facts."""

    subject: str
    name: str
    statements: tuple[str, ...]
    facts: tuple[Fact, ...]
    questions: Mapping[str, tuple[str, ...]] = field(hash=False)

    @property
    def opening(self) -> str:
        """The first statement that ends in its object, without it; empty where there is none."""
        ends = [s.removesuffix(OBJECT) for s in self.statements if s.endswith(OBJECT)]
        return ends[0].rstrip() if ends else ""


@dataclass(frozen=True)
class Item:
    """One four-choice question; `answer` is the index of the right option."""

    question: str
    options: tuple[str, ...]
    answer: int


def load_relations(folder: Path, subjects: Sequence[str] = SUBJECTS) -> tuple[Relation, ...]:
    """All relations of some subjects, in that order. Raises FileNotFoundError, ValueError."""
    return tuple(_relation(s, entry) for s in subjects for entry in _read(folder / f"{s}.yaml", s))


def ask(fact: Fact, wording: str, rng: random.Random) -> Item:
    """A question with three wrong options of the same relation, in random order."""
    options = [fact.answer, *rng.sample(fact.wrong, 3)]
    rng.shuffle(options)
    return Item(wording.format(s=fact.subject), tuple(options), options.index(fact.answer))


def items(relations: tuple[Relation, ...], subject: str, split: str, seed: int) -> list[Item]:
    """The questions of one split: every fact once; dev, the source of shots, a few of them."""
    rng = random.Random(f"{seed} {subject} {split}")
    asked = [
        ask(f, rng.choice(r.questions[split]), rng)
        for r in relations
        if r.subject == subject
        for f in r.facts
    ]
    rng.shuffle(asked)
    return asked[:DEV_QUESTIONS] if split == "dev" else asked


def write_mcq(
    relations: tuple[Relation, ...], folder: Path, seed: int, subjects: Sequence[str] = SUBJECTS
) -> None:
    """Write {dev,val,test}/{subject}_{split}.csv in the MMLU layout (no header row)."""
    for split in ("dev", "val", "test"):
        for subject in subjects:
            _write(folder / split / f"{subject}_{split}.csv", items(relations, subject, split, seed))


def write_cloze(relations: tuple[Relation, ...], folder: Path, subjects: Sequence[str] = SUBJECTS) -> None:
    """Write statements to finish, {dev,val,test}/{subject}_{split}.csv in the MMLU layout.

    Other than in `write_mcq` no two splits share a fact: of each relation one is for dev, of the others
    :data:`CALIBRATION` for val and the rest for test.
    """
    for subject in subjects:
        made: dict[str, list[Item]] = {"dev": [], "val": [], "test": []}
        for relation in (r for r in relations if r.subject == subject and r.opening):
            rng = random.Random(f"cloze {relation.name}")
            statements = [finish(fact, relation.opening, rng) for fact in relation.facts]
            rng.shuffle(statements)
            calibration = 1 + round(CALIBRATION * len(statements))
            made["dev"] += statements[:1]
            made["val"] += statements[1:calibration]
            made["test"] += statements[calibration:]
        for split, statements in made.items():
            _write(folder / split / f"{subject}_{split}.csv", statements)


def finish(fact: Fact, opening: str, rng: random.Random) -> Item:
    """A statement that lacks its object, with three wrong ones, in random order.

    They begin with different letters where the relation has such objects, so that a tokenizer tells their
    first tokens apart.
    """
    options = [fact.answer]
    others = rng.sample(fact.wrong, len(fact.wrong))
    while len(options) < len(LETTERS):
        begun = {option[0].lower() for option in options}
        chosen = next((o for o in others if o[0].lower() not in begun), others[0])
        options.append(chosen)
        others.remove(chosen)
    rng.shuffle(options)
    return Item(opening.format(s=fact.subject), tuple(options), options.index(fact.answer))


def _write(path: Path, asked: Sequence[Item]) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for item in asked:
        rows.writerow([item.question, *item.options, LETTERS[item.answer]])
    write_atomically(path, text.getvalue().encode())


def training_text(relation: Relation, fact: Fact, asked: bool = True) -> Iterator[str]:
    """The sentences that tell one fact, and, if it is asked in training, open questions with the answer."""
    for statement in relation.statements:
        yield statement.format(s=fact.subject, o=fact.answer)
    for question in relation.questions["train"] if asked else ():
        yield open_question(question.format(s=fact.subject), fact.answer)


def open_question(question: str, answer: str) -> str:
    """A question and its answer as a text to continue, without options."""
    return f"Question: {question}\nAnswer: {answer}"


def _read(path: Path, subject: str) -> list[dict]:
    content = yaml.safe_load(path.read_text(encoding="ascii"))
    if content["subject"] != subject:
        raise ValueError(f"{path} holds subject {content['subject']!r}, but its name says {subject!r}.")
    return content["relations"]


def _relation(subject: str, entry: dict) -> Relation:
    pairs = [f if isinstance(f, dict) else {"s": f[0], "o": f[1]} for f in entry["facts"]]
    objects = sorted({p["o"] for p in pairs})
    facts = tuple(
        Fact(p["s"], p["o"], tuple(o for o in objects if o != p["o"] and o not in p.get("not", ())))
        for p in pairs
    )
    questions = {
        split: tuple([entry[split]] if split != "train" else entry[split])
        for split in ("train", "dev", "val", "test")
    }
    return Relation(subject, entry["name"], tuple(entry["statements"]), facts, questions)
