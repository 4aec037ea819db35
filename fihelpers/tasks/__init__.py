"""Tasks: prompts with or without images and right answers, all as the same dataclass."""

from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path

from fihelpers.data import data_folder
from fihelpers.tasks import instructions, mcq, text
from fihelpers.tasks import pictures as images
from fihelpers.tasks.base import Example, Task, make_task
from fihelpers.tasks.pictures import image_prompt, with_instruction

__all__ = ["Example", "Task", "image_prompt", "load_task", "with_instruction"]

ALL = "all"
BUNDLED = {"bundled": "mcq", "bundled-experts": "experts"}  # questions as text, by their folder in data/
JSON = ".json"
HUB_IMAGES = {images.SCIENCEQA: images.read_scienceqa_hub, images.PUZZLEVQA: images.read_puzzlevqa_hub}


def load_task(
    name: str | PathLike[str] = "bundled",
    subject: str | None = None,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    shots: int = 0,
) -> Task:
    """Load questions as text, questions about images, instructions, or contexts to continue.

    As text: "bundled", "bundled-experts", "cais/mmlu" or a folder in the MMLU CSV layout. About images:
    "bundled-images", a .tsv file in the layout of MMBench, a folder of ScienceQA or PuzzleVQA,
    "derek-thomas/ScienceQA" or "declare-lab/PuzzleVQA". Instructions: "bundled-instructions", a .json file in
    the layout of AlpacaEval or "tatsu-lab/alpaca_eval"; every other one is of split val, the others of test.
    Contexts: a .txt file with one a line.

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
    if name.endswith(".txt"):
        return _text_task(Path(name), subject, n, seed, shots)
    read_instructions = _instruction_reader(name)
    if read_instructions:
        return _instruction_task(name, read_instructions, subject, split, n, seed, shots)
    read_images = _image_reader(name)
    if read_images:
        return _image_task(name, read_images, subject, split, n, seed, shots)
    read = _reader(name)
    rows = read(subject=subject, split=split)
    solved = read(subject=subject, split="dev") if shots else {}
    examples = mcq.make_examples(rows, split, solved, shots)
    return make_task(_label(name), subject or ALL, split, examples, n, seed)


def _reader(name: str) -> partial[mcq.Rows]:
    if name == mcq.HUB:
        return partial(mcq.read_hub)
    if name in BUNDLED:
        return partial(mcq.read_folder, data_folder() / BUNDLED[name], bundled=True)
    if Path(name).expanduser().is_dir():
        return partial(mcq.read_folder, Path(name).expanduser(), bundled=False)
    raise FileNotFoundError(
        f"no task {name!r}: give {', '.join(map(repr, BUNDLED))}, {mcq.HUB!r}, a folder in the MMLU CSV "
        "layout or a .txt file; "
        f"for images {images.BUNDLED!r}, a .tsv file in the layout of MMBench, a folder of ScienceQA or "
        f"PuzzleVQA, {' or '.join(map(repr, HUB_IMAGES))}; for instructions {instructions.BUNDLED!r}, "
        f"{instructions.ALPACA!r} or a .json file in its layout."
    )


def _label(name: str) -> str:
    known = (*BUNDLED, mcq.HUB, images.BUNDLED, *HUB_IMAGES, instructions.BUNDLED, instructions.ALPACA)
    if name in known:
        return name
    return Path(name).expanduser().resolve().name.removesuffix(".tsv").removesuffix(JSON)


def _instruction_reader(name: str) -> instructions.Reader | None:
    """Return the reader of an instruction task, by its split; None for a task of another kind."""
    if name == instructions.BUNDLED:
        return instructions.read_bundled
    if name == instructions.ALPACA:
        return instructions.read_alpaca_hub
    if name.endswith(JSON):
        return partial(instructions.read_alpaca, Path(name).expanduser())
    return None


def _instruction_task(
    name: str,
    read: instructions.Reader,
    subject: str | None,
    split: str,
    n: int | None,
    seed: int,
    shots: int,
) -> Task:
    if shots:
        raise ValueError(f"{name} holds instructions, without {shots} solved ones; set shots to 0.")
    examples = instructions.of_subject(read(split), subject)
    return make_task(_label(name), subject or ALL, split, examples, n, seed)


def _image_reader(name: str) -> Callable[[str], images.Source] | None:
    """Return the reader of an image task, by its split; None for a task of another kind."""
    if name == images.BUNDLED:
        return images.read_bundled
    if name in HUB_IMAGES:
        return HUB_IMAGES[name]
    path = Path(name).expanduser()
    if name.endswith(".tsv"):
        return partial(images.read_mmbench, path)
    if (path / images.SCIENCEQA_FILE).is_file():
        return partial(images.read_scienceqa, path)
    if (path / "images").is_dir() and any(path.glob("*.json")):
        return partial(images.read_puzzlevqa, path)
    return None


def _image_task(
    name: str,
    read: Callable[[str], images.Source],
    subject: str | None,
    split: str,
    n: int | None,
    seed: int,
    shots: int,
) -> Task:
    if shots:
        raise ValueError(f"{name} asks about images, without {shots} solved questions; set shots to 0.")
    source = read(split)
    examples, skipped = images.make_examples(source.rows, subject)
    return make_task(_label(name), subject or ALL, source.split, examples, n, seed, skipped)


def _text_task(path: Path, subject: str | None, n: int | None, seed: int, shots: int) -> Task:
    if not path.is_file():
        raise FileNotFoundError(f"no text file {str(path)!r}; give one with a context a line.")
    if subject not in (None, text.SUBJECT):
        raise ValueError(f"{path.name} is plain text, without subject {subject!r}; leave the subject out.")
    if shots:
        raise ValueError(f"{path.name} is plain text, which has no {shots} solved questions; set shots to 0.")
    return make_task(path.stem, text.SUBJECT, ALL, text.read_text(path), n, seed)
