"""Instructions: the bundled ones, AlpacaEval's layout, and what is refused."""

import json
from pathlib import Path

import pytest

from fihelpers.data import data_folder
from fihelpers.models.language import open_model
from fihelpers.tasks import load_task
from fihelpers.tasks.instructions import instruction_prompt, load_instructions

ROWS = [
    {"instruction": f"Do {i}.", "output": f"Done {i}.", "generator": "g", "dataset": "ab"[i % 3 > 0]}
    for i in range(7)
]


def _file(folder: Path, content: object) -> str:
    path = folder / "rows.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_the_bundled_instructions_alternate_between_val_and_test() -> None:
    entries = load_instructions(data_folder())
    val, test = (load_task("bundled-instructions", split=split) for split in ("val", "test"))
    assert len(val) + len(test) == len(entries)
    together = [e for pair in zip(val, test, strict=True) for e in pair]
    for entry, example in zip(entries, together, strict=True):
        assert example.prompt == instruction_prompt(entry["wordings"][0])
        assert (example.question, example.reference) == (entry["wordings"][0], entry["answer"])
        assert example.options == () and example.answer is None
    assert not {e.id for e in val} & {e.id for e in test}


def test_a_draw_is_seeded_and_the_prompts_fit_the_bundled_model() -> None:
    one, again, other = (load_task("bundled-instructions", n=9, seed=s) for s in (1, 1, 2))
    assert one == again and one.sha256 != other.sha256
    assert open_model().batches([e.prompt for e in load_task("bundled-instructions")])


def test_rows_of_alpaca_eval(tmp_path: Path) -> None:
    path = _file(tmp_path, ROWS)
    val, test = (load_task(path, split=split) for split in ("val", "test"))
    assert [e.question for e in val] == [f"Do {i}." for i in (0, 2, 4, 6)]
    assert [e.reference for e in test] == [f"Done {i}." for i in (1, 3, 5)]
    assert val.name == "rows" and {e.subject for e in val} == {"a", "b"}
    assert [e.question for e in load_task(path, subject="a", split="val")] == ["Do 0.", "Do 6."]
    # a file of bare instructions will do
    assert load_task(_file(tmp_path, [{"instruction": "Sing."}]), split="val").examples[0].reference == ""


def test_the_published_file_is_read(real_data: Path) -> None:
    task = load_task(real_data / "alpaca_eval" / "gpt-3.5-turbo-1106.json")
    assert len(task) == 25 and all(e.reference and e.prompt.endswith("\nResponse:") for e in task)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON"),
        ({"instruction": "a"}, "holds no JSON list"),
        (["a"], "row 1 is str"),
        ([{"instruction": " "}], "row 1 has no text under 'instruction'"),
        ([{"output": "b"}], "row 1 has no text under 'instruction'"),
        ([{"instruction": "a", "output": 3}], "row 1 has an output that is no text"),
        ([], "has no examples"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(_file(tmp_path, content), split="val")


def test_bad_arguments_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, ROWS)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_task(str(tmp_path / "absent.json"))
    for name in (path, "bundled-instructions"):
        with pytest.raises(ValueError, match="has no split 'dev'"):
            load_task(name, split="dev")
        with pytest.raises(ValueError, match="set shots to 0"):
            load_task(name, shots=1)
        with pytest.raises(ValueError, match="unknown subject 'law'"):
            load_task(name, subject="law")
    with pytest.raises(ValueError, match="fewer than the 5"):
        load_task(path, n=5)

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(ConnectionError, match="the hub did not give tatsu-lab/alpaca_eval"):
        load_task("tatsu-lab/alpaca_eval")


def test_the_hub_gives_the_file_of_its_present_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = _file(tmp_path, ROWS), {}

    def download(*names: str, **options: str) -> str:
        asked.update(options)
        return path

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    task = load_task("tatsu-lab/alpaca_eval")
    assert task.name == "tatsu-lab/alpaca_eval" and len(task) == 3
    assert asked == {"repo_type": "dataset"}


def test_story_openings_are_open_and_plain() -> None:
    path = data_folder() / "openings.txt"
    lines = path.read_text(encoding="ascii").splitlines()
    assert len(lines) == len(set(lines)) == len(load_task(path)) >= 40
    assert all(line[-1].isalpha() and line.count(".") <= 2 for line in lines)
