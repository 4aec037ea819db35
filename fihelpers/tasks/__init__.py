"""Tasks: prompts with or without right answers, all as the same dataclass."""

from functools import partial
from os import PathLike
from pathlib import Path

from fihelpers.data import data_folder
from fihelpers.tasks import mcq, text
from fihelpers.tasks.base import Example, Task, make_task

__all__ = ["Example", "Task", "load_task"]

ALL = "all"


def load_task(
    name: str | PathLike[str] = "bundled",
    subject: str | None = None,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    shots: int = 0,
) -> Task:
    """Load "bundled", "cais/mmlu", a folder in the MMLU CSV layout, or a .txt file with one context a line.

    ``subject`` None takes all subjects, one after the other; ``n`` draws a seeded subset; ``shots`` puts
    that many solved questions of the dev split before each question. A text file has neither subjects nor
    shots, and is the same for every split. Raises FileNotFoundError for an unknown name and ValueError for
    any other bad argument or a malformed row.
    """
    name = str(name)
    if split not in mcq.SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(mcq.SPLITS)}.")
    if shots < 0 or (shots and split == "dev"):
        raise ValueError(f"{shots} shots with split {split!r}: ask for 0 or more, of val or test questions.")
    if name.endswith(".txt"):
        return _text_task(Path(name), subject, n, seed, shots)
    read = _reader(name)
    rows = read(subject=subject, split=split)
    solved = read(subject=subject, split="dev") if shots else {}
    examples = mcq.make_examples(rows, split, solved, shots)
    return make_task(_label(name), subject or ALL, split, examples, n, seed)


def _reader(name: str) -> partial[mcq.Rows]:
    if name == mcq.HUB:
        return partial(mcq.read_hub)
    if name == "bundled":
        return partial(mcq.read_folder, data_folder() / "mcq", bundled=True)
    if Path(name).expanduser().is_dir():
        return partial(mcq.read_folder, Path(name).expanduser(), bundled=False)
    raise FileNotFoundError(
        f"no task {name!r}: give 'bundled', {mcq.HUB!r}, a folder in the MMLU CSV layout or a .txt file."
    )


def _label(name: str) -> str:
    return name if name in ("bundled", mcq.HUB) else Path(name).expanduser().resolve().name


def _text_task(path: Path, subject: str | None, n: int | None, seed: int, shots: int) -> Task:
    if not path.is_file():
        raise FileNotFoundError(f"no text file {str(path)!r}; give one with a context a line.")
    if subject not in (None, text.SUBJECT):
        raise ValueError(f"{path.name} is plain text, without subject {subject!r}; leave the subject out.")
    if shots:
        raise ValueError(f"{path.name} is plain text, which has no {shots} solved questions; set shots to 0.")
    return make_task(path.stem, text.SUBJECT, ALL, text.read_text(path), n, seed)
