"""Questions about images with two to six options: bundled, MMBench, ScienceQA and PuzzleVQA."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fihelpers.data import check_file, data_folder
from fihelpers.extras import optional
from fihelpers.images import check_image, decode_base64, is_data_url
from fihelpers.tasks.base import Example, asking_hub, check_subject, lettered, read_json, read_utf8
from fihelpers.tasks.tables import TableRow, read_tsv

LETTERS = "ABCDEF"
BUNDLED = "bundled-images"
BUNDLED_SPLITS = ("val", "test")
SCIENCEQA = "derek-thomas/ScienceQA"
SCIENCEQA_FILE, SPLITS_FILE = "problems.json", "pid_splits.json"
SCIENCEQA_SPLITS = {"dev": "train", "val": "val", "test": "test"}
SCIENCEQA_HUB_SPLITS = {"dev": "train", "val": "validation", "test": "test"}
PUZZLEVQA = "declare-lab/PuzzleVQA"
HUB_REVISIONS = {
    SCIENCEQA: "f18b0a70359ebfb41f658fd564208d0355b013f4",
    PUZZLEVQA: "cc5c866d99edfb0b8cdc088d46200b719a816618",
}
ONE_SPLIT = "all"  # of a source that is not split
NO_SUBJECT = "no subject"
MMBENCH_COLUMNS = ("index", "question", "A", "B", "answer", "category", "image")
LONGEST_REFERENCE = 64  # characters; MMBench's own tools take a longer image field for an image
PUZZLE_IMAGE = re.compile(r"(\w+)_\d+\.\w+")  # the kind of puzzle and its number


class NoImageError(ValueError):
    """A question of a mixed source is one without an image."""


@dataclass(frozen=True)
class Row:
    """One row of a source; ``make`` turns it into an example, or raises ValueError or OSError.

    ``subject`` is None where the row is too damaged to tell.
    """

    where: str
    subject: str | None
    make: Callable[[], Example]


Source = tuple[Sequence[Row], str]  # the rows of a file, folder or hub data set, and the split they belong to


def image_prompt(question: str, options: Sequence[str], hint: str = "", instruction: str = "") -> str:
    """Write instruction, hint, question and lettered options, up to "Answer:"; the model adds the image."""
    return "\n".join([*filter(None, (instruction, hint)), lettered(question, options)])


def with_instruction(example: Example, instruction: str) -> Example:
    """Put an instruction before an image question, in place of the one it has.

    Raises ValueError for an example without an image.
    """
    if example.image is None:
        raise ValueError(f"example {example.id!r} has no image; instructions go before image questions.")
    prompt = image_prompt(example.question, example.options, example.hint, instruction)
    return replace(example, prompt=prompt, instruction=instruction)


def make_examples(rows: Sequence[Row], subject: str | None) -> tuple[list[Example], list[str]]:
    """Turn the rows of one subject, or of all, into examples, and say of every other row why it is left out.

    Every image is decoded once. Questions of a mixed source that have no image are counted in one line. A
    row whose subject cannot be told may be of any, so each subject leaves it out.
    Raises ValueError for an unknown subject.
    """
    known = sorted({row.subject for row in rows if row.subject is not None})
    if known:
        check_subject(subject, known)
    chosen = [row for row in rows if subject is None or row.subject in (None, subject)]
    examples: list[Example] = []
    skipped: list[str] = []
    without = 0
    for row in tqdm(chosen, desc="reading images", unit="image", delay=3, leave=False):
        try:
            examples.append(row.make())
        except NoImageError:
            without += 1
        except (ValueError, OSError) as error:
            skipped.append(f"{row.where}: {error}")
    if without:
        skipped.append(f"{without} of {len(chosen)} questions have no image.")
    return examples, skipped


def read_bundled(split: str) -> Source:
    """Read ``data/vqa/{split}.parquet``, checked against the manifest.

    Raises ValueError for another split than val and test, and for a damaged file.
    """
    from pyarrow import parquet

    if split not in BUNDLED_SPLITS:
        raise ValueError(f"{BUNDLED} has no split {split!r}; use one of {', '.join(BUNDLED_SPLITS)}.")
    path = data_folder() / "vqa" / f"{split}.parquet"
    check_file(path)
    records = parquet.read_table(path).to_pylist()
    columns = ("id", "subject", "question", "options", "answer", "image")
    rows = [
        Row(f"row {number}", record["subject"], partial(_example, *(record[name] for name in columns)))
        for number, record in enumerate(records, start=1)
    ]
    return rows, split


def read_mmbench(path: Path, split: str) -> Source:
    """Read a file in the layout of MMBench: tab-separated, with a header and images in base64.

    A file whose rows are all of one split, as published, is taken whole. Empty options after the second
    drop out. An image field may be a data URL, hold line breaks, or name another row's index. Where a file
    asks a question again with its options rotated, each row is an example of its own. Raises
    FileNotFoundError for a missing file and ValueError for one that is no such table or has several splits
    but not this one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no table {str(path)!r}; give a .tsv file in the layout of MMBench.")
    table = read_tsv(path, MMBENCH_COLUMNS, "the layout of MMBench")
    whole = [row for row in table if not row.fault]
    images = {row.fields["index"].strip(): row.fields["image"] for row in whole}
    splits = sorted({_cell(row, "split") for row in whole})
    if len(splits) < 2:
        split = "".join(splits) or ONE_SPLIT
    elif split not in splits:
        raise ValueError(f"{path.name} has no split {split!r}; use one of {', '.join(splits)}.")
    rows = [
        Row(f"row {number}", _mmbench_subject(row), partial(_mmbench, row, images))
        for number, row in enumerate(table, start=1)
        if len(splits) < 2 or row.fault or _cell(row, "split") == split
    ]
    return rows, split


def read_scienceqa(folder: Path, split: str) -> Source:
    """Read ScienceQA's own folder: problems.json, pid_splits.json, images/{split}/{id}/{file}.

    Its "train" answers to our dev. Raises FileNotFoundError or ValueError for a missing or malformed file.
    """
    problems, splits = (
        read_json(folder / name, dict, "give a folder of ScienceQA") for name in (SCIENCEQA_FILE, SPLITS_FILE)
    )
    name = SCIENCEQA_SPLITS[split]
    if not isinstance(splits.get(name), list):
        raise ValueError(f"{SPLITS_FILE} lists no split {name!r}; use one of {', '.join(splits)}.")

    def image(key: str, problem: object) -> bytes:
        return _read_image(folder, f"images/{_get(problem, 'split')}/{key}/", _get(problem, "image"))

    rows = [
        _scienceqa(f"question {key}", problems.get(key), f"{split}/{key}", partial(image, key))
        for key in map(str, splits[name])
    ]
    return rows, split


def read_scienceqa_hub(split: str) -> Source:
    """Read the hub's ``derek-thomas/ScienceQA`` at the pinned revision.

    Raises ConnectionError if the hub does not answer.
    """
    records = enumerate(_ask_hub(SCIENCEQA, SCIENCEQA_HUB_SPLITS[split]), start=1)
    rows = [_scienceqa(f"row {i}", record, f"{split}/{i}", _hub_image) for i, record in records]
    return rows, split


def read_puzzlevqa(folder: Path, split: str) -> Source:
    """Read a folder of PuzzleVQA: {kind}.json with one object a line, whose images lie below the folder.

    It is the same for every split. Raises ValueError for a file that is not UTF-8.
    """
    rows = []
    for path in sorted(folder.glob("*.json")):
        for number, line in enumerate(read_utf8(path, "restore it").split("\n"), start=1):
            if line.strip():
                make = partial(_puzzle_of_line, folder, line, path.stem, number)
                rows.append(Row(f"{path.name}, line {number}", path.stem, make))
    return rows, ONE_SPLIT


def read_puzzlevqa_hub(split: str) -> Source:
    """Read the hub's ``declare-lab/PuzzleVQA`` at the pinned revision; it is the same for every split.

    The kind of puzzle is taken from the name of the image's file. Raises ConnectionError if the hub does
    not answer.
    """
    rows = []
    for number, record in enumerate(_ask_hub(PUZZLEVQA, "train"), start=1):
        path = str((record["image"] or {}).get("path") or "")
        named = PUZZLE_IMAGE.fullmatch(Path(path).name)
        subject = named[1] if named else NO_SUBJECT
        rows.append(Row(f"row {number}", subject, partial(_puzzle, record, subject, number, _hub_image)))
    return rows, ONE_SPLIT


def _example(
    id: str, subject: str, question: str, options: object, answer: object, image: bytes, hint: str = ""
) -> Example:
    """Check one question. ``answer`` is the index of the right option (int) or its text (str)."""
    question, hint = str(question).strip(), hint.strip()
    if not question:
        raise ValueError("the question is empty; write one.")
    texts = _options(options)
    index = _answer(answer, texts)
    check_image(image)
    return Example(
        id=id,
        subject=subject,
        prompt=image_prompt(question, texts, hint),
        options=texts,
        answer=index,
        question=question,
        image=image,
        hint=hint,
    )


def _options(options: object) -> tuple[str, ...]:
    if not isinstance(options, list):
        raise ValueError(f"the options {options!r} are not a list; write one.")
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} options; give 2 to {len(LETTERS)}.")
    texts = tuple(map(_as_text, options))
    for letter, text in zip(LETTERS, texts, strict=False):
        if not text:
            raise ValueError(f"option {letter} is empty; write one.")
        if texts.count(text) > 1:
            raise ValueError(f"the option {text!r} appears twice; make the options differ.")
    return texts


def _answer(answer: object, options: tuple[str, ...]) -> int:
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    raise ValueError(f"the answer {answer!r} is not among the {len(options)} options; correct it.")


def _as_text(value: object) -> str:
    """Write a text or number so that 3, 3.0 and "3" are the same option."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is neither text nor a number; correct it.")
    return str(int(value)) if value == int(value) else str(value)


def _mmbench(row: TableRow, images: Mapping[str, str]) -> Example:
    if row.fault:
        raise ValueError(row.fault)
    letters = [letter for letter in LETTERS if letter in "AB" or _cell(row, letter)]
    answer = _cell(row, "answer")
    if answer not in letters:
        raise ValueError(f"the answer {answer!r} is not among {', '.join(letters)}; use a file with answers.")
    subject = _cell(row, "category") or NO_SUBJECT
    return _example(
        f"{subject}/{_cell(row, 'index')}",
        subject,
        _cell(row, "question"),
        [_cell(row, letter) for letter in letters],
        letters.index(answer),
        _mmbench_image(_cell(row, "image"), images),
        _cell(row, "hint"),
    )


def _mmbench_subject(row: TableRow) -> str | None:
    return None if row.fault else _cell(row, "category") or NO_SUBJECT


def _mmbench_image(field: str, images: Mapping[str, str]) -> bytes:
    encoded = field if _holds_image(field) else images.get(field, "")
    if not _holds_image(encoded):
        raise ValueError(
            f"the image {field!r} is neither base64 nor the index of a row that has one; add it."
        )
    return decode_base64(encoded)


def _holds_image(field: str) -> bool:
    return len(field) > LONGEST_REFERENCE or is_data_url(field)


def _cell(row: TableRow, name: str) -> str:
    """The text of one field, "" where the table has no such column, or "nan", as pandas writes a gap."""
    text = row.fields.get(name, "").strip()
    return "" if text.casefold() == "nan" else text


def _scienceqa(where: str, record: object, id: str, image: Callable[[object], bytes]) -> Row:
    """The row of one question, whose image ``image(record)`` reads."""
    named = record.get("subject") if isinstance(record, Mapping) else None
    subject = str(named or NO_SUBJECT)

    def make() -> Example:
        if _get(record, "image") is None:
            raise NoImageError("the question has no image.")
        question, options, answer = (_get(record, name) for name in ("question", "choices", "answer"))
        hint = str(_get(record, "hint") or "")
        return _example(id, subject, question, options, answer, image(record), hint)

    return Row(where, subject, make)


def _puzzle_of_line(folder: Path, line: str, subject: str, number: int) -> Example:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"the line is not JSON ({error}); correct it.") from error
    return _puzzle(record, subject, number, lambda found: _read_image(folder, "", _get(found, "image")))


def _puzzle(record: object, subject: str, number: int, image: Callable[[object], bytes]) -> Example:
    answer = _as_text(_get(record, "answer"))
    question, options = _get(record, "question"), _get(record, "options")
    return _example(f"{subject}/{number}", subject, question, options, answer, image(record))


def _hub_image(record: object) -> bytes:
    content = (_get(record, "image") or {}).get("bytes")
    if not content:
        raise ValueError("the image has no content; leave the row out.")
    return bytes(content)


def _read_image(folder: Path, where: str, image: object) -> bytes:
    """The image of that name, or the one that stands in a data URL."""
    name = str(image)
    return decode_base64(name) if is_data_url(name) else _inside(folder, where + name).read_bytes()


def _inside(folder: Path, name: str) -> Path:
    """The file of that name, which must lie below the folder, also behind links."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the image {name!r} lies outside the folder; move it inside.")
    if not path.is_file():
        raise ValueError(f"the image {name!r} is missing; restore it.")
    return path


def _get(record: object, name: str) -> Any:
    if not isinstance(record, Mapping):
        raise ValueError("the record is missing or no object with fields; correct it.")
    if name not in record:
        raise ValueError(f"the field {name!r} is missing; add it.")
    return record[name]


def _ask_hub(name: str, split: str) -> Iterator[dict[str, Any]]:
    with optional():
        import datasets

    with asking_hub(name, "a folder"):
        table = datasets.load_dataset(name, split=split, revision=HUB_REVISIONS[name])
    yield from table.cast_column("image", datasets.Image(decode=False))  # its bytes, not a decoded image
