"""Tasks: the same dataclass from every source, and a clear sentence for every malformed one."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pytest

from fihelpers.tasks import load_task
from fihelpers.tasks.mcq import HUB_REVISION, Row, format_prompt
from fiminis.manifest import write_manifest

SUBJECTS = ("business", "world_law")
QUESTIONS = {"dev": 3, "val": 4, "test": 6}


def row(subject: str, split: str, i: int) -> list[str]:
    return [f"{subject} {split} question {i}?", f"w{i}", f"x{i}", f"y{i}", f"z{i}", "ABCD"[i % 4]]


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """A folder in the MMLU CSV layout."""
    for subject in SUBJECTS:
        for split, n in QUESTIONS.items():
            rows = [row(subject, split, i) for i in range(n)]
            write_csv(tmp_path / "my_mmlu" / split / f"{subject}_{split}.csv", rows)
    return tmp_path / "my_mmlu"


@pytest.fixture
def bundled(mmlu: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder that ships the same questions."""
    data = mmlu.parent / "data"
    data.mkdir()
    mmlu.rename(data / "mcq")
    write_manifest(data)
    monkeypatch.setenv("FIHELPERS_DATA", str(data))
    return data


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The hub's cais/mmlu with the same questions; holds the calls it got."""
    calls: list[dict] = []

    def load_dataset(name: str, config: str, *, split: str, revision: str) -> list[dict]:
        calls.append({"name": name, "config": config, "split": split, "revision": revision})
        ours = {"dev": "dev", "validation": "val", "test": "test"}[split]
        rows = [
            (subject, row(subject, ours, i))
            for subject in (SUBJECTS if config == "all" else [config])
            for i in range(QUESTIONS[ours])
        ]
        return [
            {"question": q, "subject": subject, "choices": options, "answer": "ABCD".index(answer)}
            for subject, (q, *options, answer) in rows
        ]

    def get_dataset_config_names(name: str, *, revision: str) -> list[str]:
        assert (name, revision) == ("cais/mmlu", HUB_REVISION)
        return ["all", "auxiliary_train", *SUBJECTS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", get_dataset_config_names)
    return calls


def test_the_prompt_is_the_standard_one() -> None:
    assert format_prompt("world_law", "Who?", ("a", "b", "c", "d")) == (
        "The following are multiple choice questions (with answers) about world law.\n\n"
        "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )


def test_shots_come_before_the_question_with_their_letters() -> None:
    shots = [Row("One?", ("a", "b", "c", "d"), 1), Row("Two?", ("e", "f", "g", "h"), 3)]
    plain = format_prompt("law", "Who?", ("i", "j", "k", "l"))
    header, question = plain.split("\n\n")
    assert format_prompt("law", "Who?", ("i", "j", "k", "l"), shots) == (
        f"{header}\n\nOne?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\nTwo?\nA. e\nB. f\nC. g\nD. h\nAnswer: D\n\n"
        f"{question}"
    )


def test_every_source_gives_the_same_examples(
    mmlu: Path, hub: list[dict], request: pytest.FixtureRequest
) -> None:
    for subject, split, shots in ((None, "test", 0), ("business", "val", 2), (None, "val", 3)):
        folder = load_task(mmlu, subject, split, shots=shots)
        online = load_task("cais/mmlu", subject, split, shots=shots)
        assert folder.examples == online.examples
        assert folder.sha256 == online.sha256
        assert (folder.name, online.name) == ("my_mmlu", "cais/mmlu")
    assert all(call["revision"] == HUB_REVISION and len(HUB_REVISION) == 40 for call in hub)
    assert [call["config"] for call in hub] == ["all", "business", "business", "all", "all"]
    expected = load_task(mmlu).examples
    request.getfixturevalue("bundled")  # moves the folder into a data folder
    assert load_task().examples == expected


def test_a_task_holds_what_the_file_says(mmlu: Path) -> None:
    task = load_task(mmlu, "world_law", "val")
    assert (task.subject, task.split, len(task)) == ("world_law", "val", 4)
    third = list(task)[2]
    assert third.id == "world_law/val/3"
    assert (third.question, third.options) == ("world_law val question 2?", ("w2", "x2", "y2", "z2"))
    assert third.answer == 2
    assert third.prompt == format_prompt("world_law", third.question, third.options)


def test_no_subject_means_all_one_after_the_other(mmlu: Path) -> None:
    task = load_task(mmlu)
    assert (task.subject, len(task)) == ("all", 12)
    parts = [load_task(mmlu, subject).examples for subject in SUBJECTS]
    assert task.examples == parts[0] + parts[1]
    assert len({example.id for example in task}) == len(task)


def test_n_draws_a_seeded_subset_in_order(mmlu: Path) -> None:
    whole = load_task(mmlu).examples
    drawn = [load_task(mmlu, n=5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({task.sha256 for task in drawn}) == 2
    for task in drawn:
        places = [whole.index(example) for example in task]
        assert len(places) == 5 and places == sorted(set(places))
    assert load_task(mmlu, n=12).examples == whole


def test_shots_are_the_subjects_own_first_dev_questions(mmlu: Path) -> None:
    for example in load_task(mmlu, shots=2):
        solved, asked = example.prompt.rsplit("\n\n", 1)
        assert asked.startswith(example.question)
        assert [f"{example.subject} dev question {i}?" in solved for i in range(3)] == [True, True, False]


def test_quoted_line_breaks_and_spaces_around_values_are_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "test" / "law_test.csv", [[" Which\nlaw?", "a,b ", 'c"d', "e", "f", "D "]])
    (example,) = load_task(tmp_path, "law")
    assert (example.question, example.options, example.answer) == ("Which\nlaw?", ("a,b", 'c"d', "e", "f"), 3)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("blank", ["", " ", "\t \t", "\u3000", "\x0c"])
def test_blank_lines_are_passed_over_and_counted(tmp_path: Path, blank: str, end: str) -> None:
    path = tmp_path / "test" / "law_test.csv"
    path.parent.mkdir()
    lines = [blank, "Q1?,a,b,c,d,A", blank, blank, '"Q2', "", 'more?",a,b,c,d,B', blank]
    path.write_text(end.join(lines), encoding="utf-8", newline="")
    first, second = load_task(tmp_path, "law")
    assert (first.id, first.question, first.answer) == ("law/test/1", "Q1?", 0)
    assert (second.id, second.question, second.answer) == ("law/test/2", f"Q2{end}{end}more?", 1)
    path.write_text(end.join([*lines, "Q3?,a,b"]), encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=r"^test/law_test\.csv, line 9: 3 columns"):
        load_task(tmp_path, "law")
    path.write_text(end.join([*lines, '"Q3?,a,b', ""]), encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=r"^test/law_test\.csv, line 9: unexpected end of data"):
        load_task(tmp_path, "law")
    path.write_bytes(end.join(lines).encode() + end.encode() + b"\xff")
    with pytest.raises(ValueError, match=r"^test/law_test\.csv, line 9: .*utf-8"):
        load_task(tmp_path, "law")


GOOD = ["Q?", "a", "b", "c", "d", "A"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["Q?", "a", "b", "c", "A"], "5 columns"),
        ([*GOOD, "more"], "7 columns"),
        ([""] * 6, "the question is empty"),
        (["Q?", "a", "b", "c", "d", "E"], "the answer 'E' is not among"),
        (["Q?", "a", "b", "c", "d", "AB"], "the answer 'AB' is not among"),
        (["Q?", "a", "b", "c", "d", ""], "the answer '' is not among"),
        (["  ", "a", "b", "c", "d", "A"], "the question is empty"),
        (["Q?", "a", "", "c", "d", "A"], "option B is empty"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, bad: list[str], message: str) -> None:
    path = write_csv(tmp_path / "test" / "law_test.csv", [["Line\nbreak?", *GOOD[1:]]])
    with open(path, "a", newline="", encoding="utf-8") as file:
        file.write(",".join(bad) + "\n")
    with pytest.raises(ValueError, match=rf"^test/law_test\.csv, line 3: {message}"):
        load_task(tmp_path, "law")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\r\n\t\n", "is empty"),
        (b"\xef\xbb\xbf\n", "is empty"),
        (b'Q?,a,b,c,d,A\n"Q?,a,b,c,d,A\n', "line 2: "),
        (b"Q?,a,b,c,\xff,A\n", "line 1: .*utf-8"),
    ],
)
def test_a_file_that_is_no_csv_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "law_test.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^test/law_test\.csv.* {message}"):
        load_task(tmp_path, "law")


def test_a_repeated_option_is_an_error_in_our_data_but_kept_in_published_data(mmlu: Path, request) -> None:
    path = mmlu / "test" / "business_test.csv"
    write_csv(path, [["Q?", "a", "b", "a", "d", "D"]])
    assert load_task(mmlu, "business").examples[0].options == ("a", "b", "a", "d")
    request.getfixturevalue("bundled")
    with pytest.raises(ValueError, match=r"business_test\.csv, line 1: the option 'a' appears twice"):
        load_task("bundled", "business")


def test_a_damaged_bundled_file_is_named(bundled: Path) -> None:
    assert len(load_task("bundled", "business")) == 6
    with open(bundled / "mcq" / "test" / "business_test.csv", "a") as file:
        file.write("Q?,a,b,c,d,A\n")
    with pytest.raises(ValueError, match=r"mcq/test/business_test\.csv is damaged"):
        load_task("bundled", "business")
    assert len(load_task("bundled", "world_law")) == 6


@pytest.mark.parametrize("source", ["folder", "hub"])
@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("economics", "unknown subject 'economics'; use one of business, world_law"),
        ("../dev/business", "unknown subject '../dev/business'"),
        ("..", "unknown subject '..'"),
        ("", "unknown subject ''"),
    ],
)
def test_an_unknown_subject_is_refused_with_the_known_ones(
    mmlu: Path, hub: list[dict], source: str, subject: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(mmlu if source == "folder" else "cais/mmlu", subject)
    assert hub == []  # nothing was asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 13}, "has 12 examples, fewer than the 13 asked for"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"split": "train"}, "unknown split 'train'; use one of dev, val, test"),
        ({"shots": 4}, "'business' has 3 dev questions, fewer than the 4 shots"),
        ({"shots": -1}, "-1 shots"),
        ({"shots": 1, "split": "dev"}, "1 shots with split 'dev'"),
    ],
)
def test_what_cannot_be_given_is_refused(mmlu: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(mmlu, **options)


def test_an_unknown_task_and_a_folder_of_another_layout_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no task 'nowhere': give 'bundled', 'bundled-experts'"):
        load_task("nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no test/\*_test\.csv"):
        load_task(tmp_path)


@pytest.mark.parametrize("function", ["load_dataset", "get_dataset_config_names"])
def test_a_silent_hub_is_a_connection_error(hub, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(datasets, function, fail)
    with pytest.raises(
        ConnectionError, match=r"^the hub did not give cais/mmlu \(OSError\); check the network"
    ):
        load_task("cais/mmlu", "business")


def test_a_malformed_hub_row_is_named(monkeypatch: pytest.MonkeyPatch, hub) -> None:
    record = {"question": "Q?", "subject": "business", "choices": list("abcd"), "answer": 4}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [record])
    with pytest.raises(ValueError, match="cais/mmlu business test, row 1: the answer '4' is not among"):
        load_task("cais/mmlu", "business")


@pytest.fixture
def write_text(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "openings.txt"
        path.write_bytes(content)
        return path

    return write


def test_text_has_one_context_a_line_and_no_answer(write_text) -> None:
    task = load_task(write_text("Once upon a time\n\nTom ate \nÉva\n".encode()), split="val")
    assert [example.prompt for example in task] == ["Once upon a time", "Tom ate ", "Éva"]
    assert {(e.subject, e.options, e.answer, e.question == e.prompt) for e in task} == {
        ("text", (), None, True)
    }
    assert [example.id for example in task] == ["text/1", "text/3", "text/4"]
    assert (task.name, task.subject, task.split) == ("openings", "text", "all")
    assert len(load_task(write_text(b"a\nb\nc\n"), "text", n=2)) == 2


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", list("\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"))
def test_only_line_ends_part_contexts(write_text, mark: str, end: str) -> None:
    lines = [f"Once{mark}upon a time", f"{mark}Tom", f"ate{mark}"]
    task = load_task(write_text(end.join([*lines, mark, ""]).encode()))
    assert [example.prompt for example in task] == lines
    assert [example.id for example in task] == ["text/1", "text/2", "text/3"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"\n \n", {}, "has no examples"),
        (b"a\n", {"n": 2}, "has 1 examples, fewer than the 2"),
        (b"a\n", {"subject": "law"}, "without subject 'law'"),
        (b"a\n", {"shots": 1}, "set shots to 0"),
        (b"\xff\xfe", {}, r"openings\.txt is not UTF-8"),
    ],
)
def test_text_that_cannot_be_a_task_is_refused(
    write_text, content: bytes, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(write_text(content), **options)


def test_a_missing_text_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.txt"):
        load_task(tmp_path / "none.txt")


def test_the_published_mmlu_files_are_read(real_data: Path) -> None:
    task = load_task(real_data / "mmlu", "international_law", shots=5)
    assert len(task) == 121
    assert task.examples[0].prompt.count("\nAnswer:") == 6
    for split in QUESTIONS:
        whole = load_task(real_data / "mmlu", split=split)
        assert len({example.subject for example in whole}) == 8
        answers = [example.answer for example in whole]
        assert set(answers) == {0, 1, 2, 3}
    assert len(load_task(real_data / "mmlu", split="dev")) == 8 * 5
