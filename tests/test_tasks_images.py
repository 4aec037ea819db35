"""Image questions: the same dataclass from every source; a bad row is named and left out, never a crash."""

import base64
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fichapters.ch04 import lab as pixels
from fichapters.ch05 import lab as prompts
from fihelpers.images import read_image
from fihelpers.tasks import Example, Task, image_prompt, load_task, with_instruction
from fihelpers.tasks.base import make_task
from fihelpers.tasks.pictures import HUB_REVISIONS
from fiminis.manifest import write_manifest


def png(level: int = 7, size: tuple[int, int] = (5, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, format="PNG")
    return file.getvalue()


def check_invariants(task: Task) -> None:
    assert len({example.id for example in task}) == len(task)
    for example in task:
        assert 2 <= len(example.options) <= 6 and len(set(example.options)) == len(example.options)
        assert all(option == option.strip() != "" for option in example.options)
        assert example.answer in range(len(example.options))
        assert example.image is not None and read_image(example.image).shape[0] == 3
        assert example.prompt == image_prompt(example.question, example.options, example.hint)


def test_the_prompt_is_instruction_hint_question_and_lettered_options() -> None:
    assert image_prompt("Who?", ["x", "y"]) == "Who?\nA. x\nB. y\nAnswer:"
    assert image_prompt("Who?", "uvwxyz", "A zoo.", "Be brave.") == (
        "Be brave.\nA zoo.\nWho?\nA. u\nB. v\nC. w\nD. x\nE. y\nF. z\nAnswer:"
    )


def image_example(**changes: object) -> Example:
    values: dict = {"id": "a/1", "subject": "a", "options": ("x", "y"), "answer": 1, "question": "Who?"}
    values |= {"prompt": image_prompt("Who?", ("x", "y")), "image": png(), **changes}
    return Example(**values)


def test_an_instruction_replaces_the_one_before() -> None:
    plain = image_example(hint="A zoo.", prompt=image_prompt("Who?", ("x", "y"), "A zoo."))
    brave = with_instruction(plain, "Be brave.")
    assert brave.prompt == "Be brave.\n" + plain.prompt and brave.instruction == "Be brave."
    assert with_instruction(with_instruction(plain, "Be shy."), "Be brave.") == brave
    assert with_instruction(brave, "") == plain
    with pytest.raises(ValueError, match="'a/1' has no image"):
        with_instruction(dataclasses.replace(plain, image=None), "Be brave.")


def test_the_hash_of_text_is_the_old_one_and_that_of_images_knows_image_and_hint() -> None:
    text = image_example(image=None)
    content = [(text.id, text.subject, text.prompt, text.options, text.answer)]
    old = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    variants = [text, image_example(), image_example(image=png(8)), image_example(hint="A zoo.")]
    hashes = [make_task("t", "a", "test", [example], None, 0).sha256 for example in variants]
    assert hashes[0] == old
    assert len(set(hashes)) == len(hashes)
    assert "image" not in repr(variants[1])


VQA = ("id", "subject", "image", "question", "options", "answer")


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder that ships six questions a split."""
    subjects = ("action", "function")
    (tmp_path / "vqa").mkdir()
    for split in ("val", "test"):
        rows = [
            (f"{subject}/{split}/{i}", subject, png(i), f"{subject} {i}?", [f"a{i}", f"b{i}", "c", "d"], i)
            for subject in subjects
            for i in range(3)
        ]
        columns = dict(zip(VQA, map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pa.table(columns), tmp_path / "vqa" / f"{split}.parquet")
    write_manifest(tmp_path)
    monkeypatch.setenv("FIHELPERS_DATA", str(tmp_path))
    return tmp_path


def test_bundled_questions_are_read(bundled: Path) -> None:
    task = load_task("bundled-images")
    check_invariants(task)
    assert (task.name, task.subject, task.split, len(task), task.skipped) == (
        "bundled-images",
        "all",
        "test",
        6,
        (),
    )
    example = load_task("bundled-images", "function", "val").examples[2]
    assert (example.id, example.answer, example.image) == ("function/val/2", 2, png(2))
    assert example.prompt == "function 2?\nA. a2\nB. b2\nC. c\nD. d\nAnswer:"
    assert load_task("bundled-images", n=4, seed=1) == load_task("bundled-images", n=4, seed=1)
    assert {e.id for e in load_task("bundled-images", n=4)} < {e.id for e in task}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subject": "law"}, "unknown subject 'law'; use one of action, function"),
        ({"split": "dev"}, "bundled-images has no split 'dev'; use one of val, test"),
        ({"shots": 1}, "bundled-images has no solved questions, so none for 1 shots"),
        ({"n": 7}, "has 6 examples, fewer than the 7"),
    ],
)
def test_what_cannot_be_given_is_refused(bundled: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task("bundled-images", **options)


def test_a_damaged_bundled_file_is_named(bundled: Path) -> None:
    with open(bundled / "vqa" / "test.parquet", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"vqa/test\.parquet is damaged"):
        load_task("bundled-images")
    assert len(load_task("bundled-images", split="val")) == 6


COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"]


def mmbench_row(index: int, **changes: str) -> dict[str, str]:
    image = base64.b64encode(png(index)).decode()
    row = {"index": str(index), "question": f"Q{index}?", "hint": "nan", "answer": "B", "split": "dev"}
    row |= {"A": "a", "B": "b", "C": "c", "D": "d", "category": "action_recognition", "image": image}
    return row | changes


WriteTable = Callable[..., Path]


@pytest.fixture
def write_table(tmp_path: Path) -> WriteTable:
    def write(*rows: dict[str, str], columns: Sequence[str] = COLUMNS) -> Path:
        path = tmp_path / "mmbench_dev.tsv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


def test_mmbench_is_read(write_table: WriteTable) -> None:
    rows = [
        mmbench_row(1, hint="A zoo.\nAt night."),
        mmbench_row(2, C="nan", D="", category="identity_reasoning"),
        mmbench_row(3, C="", answer="D", image="1"),  # the image of row 1; D becomes C
    ]
    task = load_task(write_table(*rows))
    check_invariants(task)
    assert (task.name, task.split, task.skipped) == ("mmbench_dev", "dev", ())
    first, second, third = task
    assert first.prompt == "A zoo.\nAt night.\nQ1?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert (first.id, first.hint) == ("action_recognition/1", "A zoo.\nAt night.")
    assert (second.options, second.answer, second.hint) == (("a", "b"), 1, "")
    assert (third.options, third.answer, third.image) == (("a", "b", "d"), 2, first.image)
    assert load_task(write_table(*rows), "identity_reasoning").examples == (second,)
    with pytest.raises(ValueError, match="use one of action_recognition, identity_reasoning"):
        load_task(write_table(*rows), "action")


def test_an_image_may_be_longer_than_a_csv_field_is_by_default(write_table: WriteTable) -> None:
    large = base64.b64encode(os.urandom(100_000)).decode()
    before = csv.field_size_limit()
    task = load_task(write_table(mmbench_row(1), mmbench_row(2, image=large)))
    assert len(large) > csv.field_size_limit() == before
    assert len(task) == 1 and task.skipped[0].startswith("row 2: the image is corrupt")


def test_of_several_splits_the_one_asked_for_is_read(write_table: WriteTable) -> None:
    path = write_table(*(mmbench_row(i, split="test" if i > 2 else "dev") for i in range(1, 6)))
    assert [len(load_task(path, split=split)) for split in ("dev", "test")] == [2, 3]
    with pytest.raises(ValueError, match="has no split 'val'; use one of dev, test"):
        load_task(path, split="val")
    columns = [name for name in COLUMNS if name not in ("split", "hint", "C", "D")]
    task = load_task(write_table(mmbench_row(1), columns=columns))
    assert (task.split, task.examples[0].options) == ("all", ("a", "b"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": ""}, "the answer '' is not among A, B, C, D; use a file with answers"),
        ({"answer": "C", "C": "nan"}, "the answer 'C' is not among A, B, D"),
        ({"question": " "}, "the question is empty"),
        ({"B": "nan", "answer": "A"}, "option B is empty"),
        ({"C": "a"}, "the option 'a' appears twice"),
        ({"image": "99"}, "the image '99' is neither base64 nor the index of a row that has one"),
        ({"image": "2"}, "the image '2' is neither"),  # its own index
        ({"image": ""}, "the image '' is neither"),
        ({"image": "*" * 100}, "the image is not base64"),
        ({"image": "é" * 100}, "the image is not base64"),
        ({"image": "data:image/png;base64,"}, "the image is empty"),
        ({"image": "data:image/png,%89PNG"}, "the image is not base64 (it begins with 'data:image/png,')"),
        ({"image": "data:image/png;base64,*"}, "the image is not base64"),
        ({"image": base64.b64encode(b"GIF89a" * 20).decode()}, "the image is corrupt"),
        ({"image": base64.b64encode(png(size=(1, 5000))).decode()}, "the image has 1 x 5000 pixels"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_kept(
    write_table: WriteTable, changes: dict, reason: str
) -> None:
    path = write_table(mmbench_row(1), mmbench_row(2, **changes), mmbench_row(3))
    task = load_task(path)
    check_invariants(task)
    assert [example.question for example in task] == ["Q1?", "Q3?"]
    (line,) = task.skipped
    assert line.startswith(f"row 2: {reason}")
    assert "\n" not in line


COLUMNS_FAULT = "the row does not have as many columns as the header; correct line {}."
QUOTE_FAULT = "a quoted field is not closed, or followed by text; correct line {}."
NUL_FAULT = "line {} holds a NUL character; remove it."
UTF8_FAULT = "line {} is not UTF-8; save it as UTF-8."


def raw_row(index: int, **changes: str) -> bytes:
    """A row as it stands in the file, without any quoting; "\\udcff" becomes the byte ff."""
    row = mmbench_row(index, **changes)
    return "\t".join(row[name] for name in COLUMNS).encode(errors="surrogateescape")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (b"2\tQ2?", COLUMNS_FAULT),
        (raw_row(2) + b"\tmore\tstill more", COLUMNS_FAULT),
        (raw_row(2, question='"Q2?'), QUOTE_FAULT),
        (raw_row(2, question='"'), QUOTE_FAULT),
        (raw_row(2, split='"dev'), QUOTE_FAULT),
        (raw_row(2, question='"Q2?" she said'), QUOTE_FAULT),
        (raw_row(2, question='"Is "this" it?"'), QUOTE_FAULT),
        (raw_row(2, question='"Q2\nmore?" he said'), QUOTE_FAULT),
        (raw_row(2, question='"Is "this"\n\nit?"'), QUOTE_FAULT),
        (raw_row(2, split='"de"v\n\ndev"'), QUOTE_FAULT),
        (raw_row(2, question='"Q2\nmore?"') + b"\tmore", COLUMNS_FAULT),
        (raw_row(2, question="Q\0?"), NUL_FAULT),
        (raw_row(2, image="\0" * 200_000), NUL_FAULT),
        (raw_row(2, question="Q\udcff?"), UTF8_FAULT),
        (raw_row(2, question='"' + "Q" * 200_000), QUOTE_FAULT),
    ],
)
def test_a_malformed_row_is_named_by_its_line_and_takes_no_other_along(
    write_table: WriteTable, bad: bytes, fault: str, end: bytes
) -> None:
    header, before = "\t".join(COLUMNS).encode(), raw_row(1, question='"Two\n\n""lines""?"')
    questions = {3: '"Q3\n""?"', 4: '""', 5: 'A 5"', 6: "é"}
    for after in ([raw_row(i, question=text) for i, text in questions.items()], []):
        path = write_table()
        path.write_bytes(end.join(line.replace(b"\n", end) for line in (header, before, bad, *after)))
        task = load_task(path)
        check_invariants(task)
        asked = [example.question.replace(end.decode(), "\n") for example in task]
        assert asked == ['Two\n\n"lines"?', *(['Q3\n"?', 'A 5"', "é"] if after else [])]
        empty = ["row 4: the question is empty; write one."] if after else []
        assert task.skipped == ("row 2: " + fault.format(5), *empty)
        assert load_task(path, "action_recognition").skipped == task.skipped  # it may be of any subject


@pytest.mark.parametrize("lab", [pixels, prompts])
def test_chapters_that_ask_by_subject_count_a_malformed_row_once(write_table: WriteTable, lab: Any) -> None:
    rows = [mmbench_row(i, category="xy"[i % 2], split="test") for i in range(4)]
    path = write_table(*rows)
    with open(path, "ab") as file:
        file.write(b'4\t"Q4?')
    examples, skipped = lab.load_pictures(str(path), ["x", "y"], 2, 0)
    assert [example.subject for example in examples] in (["x", "x", "y", "y"], ["x", "y", "x", "y"])
    assert skipped == ["row 5: " + QUOTE_FAULT.format(6)]


def test_malformed_rows_one_after_the_other_are_counted_each(write_table: WriteTable) -> None:
    changes = [
        *({"question": '"Q1?'}, {"question": '"Q2?'}, {"A": 'a 5"'}, {"A": '"a"b'}, {"A": "a\tmore"}),
        *({"hint": '"'}, {"hint": '"'}, {"hint": 'x"'}, {"split": '"'}),
    ]
    lines = [raw_row(i, **change) for i, change in enumerate(changes, start=1)]
    path = write_table()
    path.write_bytes(b"\n".join(["\t".join(COLUMNS).encode(), *lines, b"", raw_row(10)]))
    task = load_task(path)
    assert [example.id.split("/")[1] for example in task] == ["3", "8", "10"]
    faults = {1: QUOTE_FAULT, 2: QUOTE_FAULT, 4: QUOTE_FAULT, 5: COLUMNS_FAULT}
    faults |= {6: QUOTE_FAULT, 7: QUOTE_FAULT, 9: QUOTE_FAULT}
    assert task.skipped == tuple(f"row {i}: {fault.format(i + 1)}" for i, fault in faults.items())


@pytest.mark.parametrize("first", ["question", "index"])
def test_valid_quoted_fields_are_read_as_they_stand(write_table: WriteTable, first: str) -> None:
    texts = [
        "one\ntwo",
        'a "word"',
        "if x:\n\treturn\ty",
        "def f(x):\n\treturn",
        "x\n\ny = 1\t# one",
        "tab\there",
        '"',
        "\n\n",
        '5" wide',
        '""\n""',
        "\u2028\x0c\x85x",
    ]
    rows = [mmbench_row(i, hint=text, question=f"{text} {i}") for i, text in enumerate(texts)]
    task = load_task(write_table(*rows, columns=sorted(COLUMNS, key=lambda name: name != first)))
    assert task.skipped == ()
    assert [example.hint for example in task] == [text.strip() for text in texts]
    assert [example.question for example in task] == [f"{text} {i}".strip() for i, text in enumerate(texts)]


def test_a_quote_that_a_later_row_closes_swallows_no_row(write_table: WriteTable) -> None:
    cut = b'1\t"Q1?'  # one tab, and its quote meets that of row 4
    for bad in (raw_row(1, question='"Q1?'), cut):
        rest = [raw_row(2), raw_row(3), raw_row(4, question='A 5"')]
        path = write_table()
        path.write_bytes(b"\n".join(["\t".join(COLUMNS).encode(), bad, *rest]))
        task = load_task(path)
        assert [example.question for example in task] == ["Q2?", "Q3?", 'A 5"']
        assert task.skipped == ("row 1: " + QUOTE_FAULT.format(2),)


def test_blank_lines_of_a_table_are_passed_over(write_table: WriteTable) -> None:
    path = write_table()
    header = "\t".join(COLUMNS).encode()
    path.write_bytes(b"\n".join([b"", header, b"", b" ", raw_row(1), b"\t" * 10, b"", b"2\tQ2?", b" \n"]))
    task = load_task(path)
    assert [example.question for example in task] == ["Q1?"]
    assert task.skipped == ("row 2: " + COLUMNS_FAULT.format(8),)


def lined(text: str, end: str = "\n") -> str:
    return end.join(text[i : i + 76] for i in range(0, len(text), 76)) + end


@pytest.mark.parametrize(
    "write",
    [
        lambda text: f"data:image/png;base64,{text}",
        lambda text: f"data:;base64,{text}",
        lined,
        lambda text: lined(text, "\r\n"),
        lambda text: f"data:image/png;base64,\n{lined(text)}",
        lambda text: " ".join(text),
        lambda text: text.replace("+", "-").replace("/", "_"),
    ],
)
def test_base64_of_an_image_may_have_a_prefix_or_line_breaks(
    write_table: WriteTable, write: Callable[[str], str]
) -> None:
    rows = [mmbench_row(1), mmbench_row(2, image="1")]
    expected = load_task(write_table(*rows)).examples
    rows[0]["image"] = write(rows[0]["image"])
    task = load_task(write_table(*rows))
    assert (task.examples, task.skipped) == (expected, ())


def test_a_data_url_may_be_shorter_than_the_index_of_a_row(write_table: WriteTable) -> None:
    short = "data:;base64," + base64.b64encode(b"P5 1 1 255\n\7").decode()
    assert len(short) < 64
    assert load_task(write_table(mmbench_row(1, image=short))).examples[0].image == b"P5 1 1 255\n\7"


def test_where_no_row_is_left_the_first_reasons_are_given(write_table: WriteTable) -> None:
    path = write_table(*(mmbench_row(i, answer="") for i in range(1, 9)))
    with pytest.raises(ValueError, match=r"no row that can be used.*row 1: the answer.*row 3: ") as error:
        load_task(path)
    assert "row 4" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks the columns index, question, A, B, answer, category, image"),
        (b"index,question\n1,2\n", "lacks the columns"),
        (b"\xff\xfe\n", r"mmbench_dev\.tsv is no tab-separated table in UTF-8"),
        (
            b'index\t"question\n1\t2\n',
            r"mmbench_dev\.tsv is no tab-separated table in UTF-8: a quoted.* line 1",
        ),
        ("\t".join(COLUMNS).encode() + b'\n1\t"Q?\n', "no row that can be used.* row 1: a quoted.* line 2"),
        (b"\n\n", "lacks the columns index"),
        ("\t".join(COLUMNS).encode() + b"\n", "has no examples"),
    ],
)
def test_a_file_that_is_no_such_table_is_named(write_table: WriteTable, content: bytes, message: str) -> None:
    path = write_table()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no table .*mmbench_dev\.tsv"):
        load_task(path)


def problem(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": ""}
    return values | {"image": "image.png", "split": "test", "subject": "natural science", **changes}


WriteScience = Callable[..., Path]
WritePuzzles = Callable[..., Path]


@pytest.fixture
def write_science(tmp_path: Path) -> WriteScience:
    """Writes a ScienceQA folder whose test split asks these problems, numbered from 1."""

    def write(*problems: object) -> Path:
        numbered = {str(i): each for i, each in enumerate(problems, start=1)}
        (tmp_path / "problems.json").write_text(json.dumps(numbered))
        splits = {"train": [], "val": [], "test": list(numbered)}
        (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
        for i in numbered:
            folder = tmp_path / "images" / "test" / i
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "image.png").write_bytes(png(int(i)))
        return tmp_path

    return write


def test_scienceqa_is_read_and_questions_without_image_are_counted(write_science: WriteScience) -> None:
    five = problem(choices=list("vwxyz"), answer=4, hint="Look.", subject="social science")
    folder = write_science(problem(), problem(image=None), five, problem(image=None))
    task = load_task(folder)
    check_invariants(task)
    assert task.skipped == ("2 of 4 questions have no image.",)
    assert [example.id for example in task] == ["test/1", "test/3"]
    first, third = task
    assert (first.subject, first.answer, first.image) == ("natural science", 1, png(1))
    assert (third.options, third.answer, third.hint) == (tuple("vwxyz"), 4, "Look.")
    only = load_task(folder, "social science")
    assert (only.examples, only.skipped) == ((third,), ())
    with pytest.raises(ValueError, match="use one of natural science, social science"):
        load_task(folder, "physics")
    with pytest.raises(ValueError, match="has no examples"):
        load_task(folder, split="val")
    with pytest.raises(ValueError, match=r"no row that can be used.* 1 of 1 questions have no image"):
        load_task(write_science(problem(image=None)))


def test_an_image_may_stand_in_the_file_itself(
    write_science: WriteScience, write_puzzles: WritePuzzles
) -> None:
    url = "data:image/png;base64," + lined(base64.b64encode(png(9)).decode())
    for folder in (write_science(problem(image=url)), write_puzzles(puzzle(image=url))):
        (example,) = load_task(folder)
        assert example.image == png(9)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (problem(answer=2), "the answer 2 is not among the 2 options"),
        (problem(answer=-1), "the answer -1 is not among"),
        (problem(answer=True), "the answer True is not among"),
        (problem(choices=[]), "0 options; give 2 to 6"),
        (problem(choices=["x"]), "1 options"),
        (problem(choices=list("abcdefg")), "7 options"),
        (problem(choices="xy"), "the options 'xy' are not a list"),
        (problem(choices=["x", None]), "None is neither text nor a number"),
        (problem(image="../1/../../../problems.json"), "the image is corrupt"),  # inside the folder, no image
        (problem(image="../../../../outside.png"), r"the image .* lies outside the folder"),
        (problem(image="data:image/png;base64,*"), "the image is not base64"),
        (problem(image="other.png"), r"the image 'images/test/2/other\.png' is missing"),
        (problem(image="a\0b"), ".*null"),  # in Python's words
        ({"subject": "natural science"}, "the field 'image' is missing"),
        (None, "the record is missing or no object"),
    ],
)
def test_a_bad_problem_is_named(write_science: WriteScience, bad: object, reason: str) -> None:
    task = load_task(write_science(problem(), bad))
    assert len(task) == 1
    (line,) = task.skipped
    assert re.match(f"question 2: {reason}", line)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("problems.json", "{", r"problems\.json is not JSON"),
        ("problems.json", "[]", r"problems\.json holds no JSON object"),
        ("pid_splits.json", '{"train": []}', "lists no split 'test'; use one of train"),
    ],
)
def test_a_malformed_scienceqa_folder_is_named(
    write_science: WriteScience, name: str, content: str, message: str
) -> None:
    folder = write_science(problem())
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task(folder)
    (folder / "pid_splits.json").unlink()
    (folder / "problems.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no file .*pid_splits\.json"):
        load_task(folder)


@pytest.fixture
def write_puzzles(tmp_path: Path) -> WritePuzzles:
    """Writes a PuzzleVQA folder of one kind with these lines; text is written as it is."""

    def write(*lines: object) -> Path:
        folder = tmp_path / "puzzles"
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "a.png").write_bytes(png())
        text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        (folder / "sides.json").write_text("\n".join(text) + "\n", encoding="utf-8")
        return folder

    return write


def puzzle(**changes: object) -> dict[str, object]:
    return {"image": "images/a.png", "question": "How many?", "answer": "3", "options": [3, 6], **changes}


def test_puzzles_with_options_of_mixed_type_are_read_as_text(write_puzzles: WritePuzzles) -> None:
    folder = write_puzzles(
        puzzle(),
        puzzle(answer=3, options=["small", "3", 6.0]),
        "",
        puzzle(answer=2.5, options=["2.5", 6, "none\u2028at all"]),
    )
    task = load_task(folder)
    check_invariants(task)
    assert [example.options for example in task] == [
        ("3", "6"),
        ("small", "3", "6"),
        ("2.5", "6", "none\u2028at all"),
    ]
    assert [example.answer for example in task] == [0, 1, 0]
    assert [example.id for example in task] == ["sides/1", "sides/2", "sides/4"]
    assert (task.name, task.subject, task.split, task.skipped) == ("puzzles", "all", "all", ())
    assert load_task(folder, "sides", split="val").sha256 == task.sha256
    with pytest.raises(ValueError, match="unknown subject 'color'; use one of sides"):
        load_task(folder, "color")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (puzzle(answer="4"), "the answer '4' is not among the 2 options"),
        (puzzle(answer=None), "None is neither text nor a number"),
        (puzzle(options=[]), "0 options"),
        (puzzle(options=[3, "3"]), "the option '3' appears twice"),
        (puzzle(options=[3, 3.0]), "the option '3' appears twice"),
        (puzzle(options=["3", " "]), "option B is empty"),
        (puzzle(options=[3, float("nan")]), "nan is neither text nor a number"),
        (puzzle(options=[3, True]), "True is neither text nor a number"),
        (puzzle(image="../outside.png"), "the image '../outside.png' lies outside the folder"),
        (puzzle(image="/outside.png"), "the image '/outside.png' lies outside the folder"),
        (puzzle(image="images/b.png"), "the image 'images/b.png' is missing"),
        (puzzle(image="x" * 5000), ""),  # in the words of the file system
        (puzzle(image="link.png"), "the image 'link.png' lies outside the folder"),
        (puzzle(image="data:image/png,a"), "the image is not base64"),
        (puzzle(image=None), "the image 'None' is missing"),
        ({"image": "images/a.png"}, "the field 'answer' is missing"),
        ([1, 2], "the record is missing or no object"),
        ("{", "the line is not JSON"),
    ],
)
def test_a_bad_puzzle_is_named(write_puzzles: WritePuzzles, bad: object, reason: str) -> None:
    folder = write_puzzles(puzzle(), bad, puzzle())
    (folder.parent / "outside.png").write_bytes(png())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    task = load_task(folder)
    check_invariants(task)
    assert len(task) == 2
    (line,) = task.skipped
    assert line.startswith(f"sides.json, line 2: {reason}")


def test_a_puzzle_file_that_is_not_text_is_named(write_puzzles: WritePuzzles) -> None:
    folder = write_puzzles(puzzle())
    (folder / "sides.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"sides\.json is not UTF-8 text"):
        load_task(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The hub's two data sets with three rows each; holds the names and splits asked for."""
    calls: list[tuple[str, str]] = []
    picture = {"bytes": png(), "path": "color_grid_0003.png"}
    science = [problem(image=picture), problem(image=None), problem(image={"bytes": b"x", "path": None})]
    puzzles = [
        puzzle(image=picture, options=["3", "6"]),
        puzzle(image=picture | {"path": None}, options=["3", "6"]),
        puzzle(image=None, options=["3", "6"]),
    ]

    def load_dataset(name: str, *, split: str, revision: str) -> datasets.Dataset:
        assert revision == HUB_REVISIONS[name] and len(revision) == 40
        calls.append((name, split))
        table = datasets.Dataset.from_list(science if "Science" in name else puzzles)
        return table.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_the_hubs_data_sets_are_read(hub: list[tuple[str, str]]) -> None:
    science = load_task("derek-thomas/ScienceQA", split="val")
    check_invariants(science)
    assert (science.name, science.split, len(science)) == ("derek-thomas/ScienceQA", "val", 1)
    assert science.examples[0].image == png()
    assert science.skipped[0].startswith("row 3: the image is corrupt")
    assert science.skipped[1:] == ("1 of 3 questions have no image.",)
    puzzles = load_task("declare-lab/PuzzleVQA")
    check_invariants(puzzles)
    assert [example.subject for example in puzzles] == ["color_grid", "no subject"]
    assert (puzzles.split, puzzles.skipped) == (
        "all",
        ("row 3: the image has no content; leave the row out.",),
    )
    assert hub == [("derek-thomas/ScienceQA", "validation"), ("declare-lab/PuzzleVQA", "train")]


@pytest.mark.parametrize("name", HUB_REVISIONS)
def test_a_silent_hub_is_a_connection_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ConnectionError, match=rf"^the hub did not give {name} \(OSError\); check the network"
    ):
        load_task(name)


def test_the_published_puzzles_are_read(real_data: Path) -> None:
    task = load_task(real_data / "puzzlevqa")
    check_invariants(task)
    assert (len(task), task.skipped) == (100, ())
    assert {len(example.options) for example in task} == {3, 4}
    assert len({example.subject for example in task}) == 5
    assert {example.answer for example in task} == {0, 1, 2, 3}
    assert len(load_task(real_data / "puzzlevqa", "size_grid", n=5)) == 5
