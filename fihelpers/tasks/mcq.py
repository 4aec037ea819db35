"""Multiple-choice questions: the MMLU CSV layout, the hub's ``cais/mmlu``, and how they are asked."""

import csv
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fihelpers.data import check_file
from fihelpers.extras import optional
from fihelpers.tasks.base import Example, asking_hub, check_subject, lettered

log = logging.getLogger(__name__)

LETTERS = "ABCD"
SPLITS = ("dev", "val", "test")
HUB = "cais/mmlu"
HUB_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"
HUB_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}
HUB_OTHER_CONFIGS = {"all", "auxiliary_train"}  # configurations that are not subjects


@dataclass(frozen=True)
class Row:
    """One question with four options and the index of the right one."""

    question: str
    options: tuple[str, ...]
    answer: int


Rows = dict[str, list[Row]]  # subject -> its questions in the order of the file


def format_prompt(subject: str, question: str, options: Sequence[str], shots: Sequence[Row] = ()) -> str:
    """Write the standard MMLU prompt, which ends in "Answer:"; shots are answered questions before it."""
    solved = [f"{lettered(shot.question, shot.options)} {LETTERS[shot.answer]}\n\n" for shot in shots]
    return header(subject) + "".join(solved) + lettered(question, options)


def header(subject: str) -> str:
    """What the MMLU prompt begins with."""
    title = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {title}.\n\n"


def statement(subject: str, question: str, options: Sequence[str], shots: Sequence[Row] = ()) -> str:
    """A statement to finish, after finished ones."""
    solved = [f"{shot.question} {shot.options[shot.answer]}\n\n" for shot in shots]
    return "".join(solved) + question


def open_prompt(subject: str, question: str, options: Sequence[str], shots: Sequence[Row] = ()) -> str:
    """The MMLU question without its options, as lm-evaluation-harness asks it in its form "continuation"."""
    solved = [f"Question: {shot.question}\nAnswer: {shot.options[shot.answer]}\n\n" for shot in shots]
    return open_header(subject) + "".join(solved) + f"Question: {question}\nAnswer:"


def open_header(subject: str) -> str:
    """What that prompt begins with."""
    return f"The following are questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def make_examples(
    rows: Rows, split: str, solved: Rows, shots: int, prompt: Callable[..., str] = format_prompt
) -> list[Example]:
    """Turn the questions of every subject into examples, each after the first ``shots`` solved ones.

    prompt: as `format_prompt`, which asks for a letter; every other one asks for an option in its words.
    Raises ValueError if a subject has fewer solved questions than that.
    """
    for subject in rows:
        available = len(solved.get(subject, []))
        if available < shots:
            raise ValueError(
                f"subject {subject!r} has {available} dev questions, fewer than the {shots} shots asked for; "
                "lower shots."
            )
    return [
        Example(
            id=f"{subject}/{split}/{number}",
            subject=subject,
            prompt=prompt(subject, row.question, row.options, solved.get(subject, [])[:shots]),
            options=row.options,
            answer=row.answer,
            question=row.question,
            in_words=prompt is not format_prompt,
        )
        for subject, asked in rows.items()
        for number, row in enumerate(asked, start=1)
    ]


def read_folder(folder: Path, subject: str | None, split: str, bundled: bool) -> Rows:
    """Read ``{split}/{subject}_{split}.csv`` without header, for one subject or all in the folder.

    Blank lines are passed over. Bundled files are checked against the manifest. Elsewhere a question may
    repeat an option, as some of the published MMLU questions do. Raises ValueError, naming file and line,
    for a malformed row, and ValueError for an unknown subject.
    """
    known = sorted(path.stem.removesuffix(f"_{split}") for path in (folder / split).glob(f"*_{split}.csv"))
    if not known:
        raise FileNotFoundError(
            f"{folder} has no {split}/*_{split}.csv; give a folder in the MMLU CSV layout with that split."
        )
    rows = {}
    check_subject(subject, known)  # one of the files' own names, so it can hold no path
    for name in known if subject is None else [subject]:
        path = folder / split / f"{name}_{split}.csv"
        if bundled:
            check_file(path)
        rows[name] = list(_read_csv(path, repeats=not bundled))
    return rows


def _read_csv(path: Path, repeats: bool) -> Iterator[Row]:
    where = f"{path.parent.name}/{path.name}"
    reader = csv.reader(io.StringIO(_decode(path, where), newline=""), strict=True)
    line, empty = 0, True  # the last line of the previous row: a quoted question may hold line breaks
    try:
        for values in reader:
            if "".join(values).strip() or len(values) > 1:  # not a blank line
                yield _make_row(values, f"{where}, line {line + 1}", repeats)
                empty = False
            line = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{where}, line {line + 1}: {error}; correct it.") from error
    if empty:
        raise ValueError(f"{where} is empty; give at least one question.")


def _decode(path: Path, where: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((error.object[: error.start] + b"?").splitlines())
        raise ValueError(f"{where}, line {line}: {error}; correct it.") from error


def _make_row(values: Sequence[str], where: str, repeats: bool) -> Row:
    """Check one row: question, four options, answer letter. Only ``repeats`` lets it repeat an option."""
    if len(values) != 6:
        raise ValueError(f"{where}: {len(values)} columns; write question, A, B, C, D, answer.")
    question, *options, answer = (value.strip() for value in values)
    if not question:
        raise ValueError(f"{where}: the question is empty; write one.")
    for letter, option in zip(LETTERS, options, strict=True):
        if not option:
            raise ValueError(f"{where}: option {letter} is empty; write one.")
        if options.count(option) > 1 and not repeats:
            raise ValueError(f"{where}: the option {option!r} appears twice; make the options differ.")
    if len(set(options)) < 4:
        log.info("%s: a repeated option is kept as published", where)
    if answer not in tuple(LETTERS):
        raise ValueError(f"{where}: the answer {answer!r} is not among A, B, C, D; correct it.")
    return Row(question, tuple(options), LETTERS.index(answer))


def read_hub(subject: str | None, split: str) -> Rows:
    """Read one subject, or all, of the hub's ``cais/mmlu`` at the pinned revision.

    Raises ValueError for an unknown subject or malformed row, ConnectionError if the hub does not answer.
    """
    with optional():
        import datasets

    with asking_hub(HUB, "a folder of CSV files"):
        configs = datasets.get_dataset_config_names(HUB, revision=HUB_REVISION)
    check_subject(subject, sorted(set(configs) - HUB_OTHER_CONFIGS))
    config = subject or "all"
    with asking_hub(HUB, "a folder of CSV files"):
        table = datasets.load_dataset(HUB, config, split=HUB_SPLITS[split], revision=HUB_REVISION)
    rows: Rows = {}
    for number, record in enumerate(table, start=1):
        name = subject or str(record["subject"])
        rows.setdefault(name, []).append(_from_record(record, f"{HUB} {config} {split}, row {number}"))
    return rows


def _from_record(record: Mapping[str, Any], where: str) -> Row:
    answer = record["answer"]
    letter = LETTERS[answer] if answer in range(len(LETTERS)) else str(answer)
    return _make_row([record["question"], *record["choices"], letter], where, repeats=True)
