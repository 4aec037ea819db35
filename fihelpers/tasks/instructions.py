"""Instructions to answer in free text: the bundled ones, and AlpacaEval's JSON from a file or the hub."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fihelpers.data import check_file, data_folder
from fihelpers.tasks.base import Example, asking_hub, check_subject, read_json

log = logging.getLogger(__name__)

BUNDLED = "bundled-instructions"
SUBJECT = "instructions"
FILE = "instructions.yaml"
ALPACA = "tatsu-lab/alpaca_eval"
ALPACA_FILE = "alpaca_eval.json"
NO_DATASET = "no data set"  # of a row that does not say where it comes from
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where it is there, in a tenth of the time
SPLITS = ("val", "test")  # rows 0, 2, 4, ... and rows 1, 3, 5, ...


def load_instructions(folder: Path) -> list[dict]:
    """data/instructions.yaml: entries of three wordings (the last is held out) and one answer."""
    return yaml.load((folder / FILE).read_text(encoding="ascii"), LOADER)["instructions"]


def instruction_prompt(wording: str) -> str:
    """An instruction as the bundled model reads it, up to where its response begins."""
    return f"Instruction: {wording}\nResponse:"


def read_bundled(split: str) -> list[Example]:
    """Every other instruction of ``data/instructions.yaml``, in its first wording.

    The bundled model was trained on this wording and one more, and answers only these. The file is checked
    against the manifest. Raises ValueError for another split than val and test.
    """
    check_file(data_folder() / FILE)
    entries = load_instructions(data_folder())
    rows = [{"instruction": entry["wordings"][0], "output": entry["answer"]} for entry in entries]
    return _examples(rows, BUNDLED, split, SUBJECT)


def read_alpaca(path: Path, split: str) -> list[Example]:
    """Every other row of a file in AlpacaEval's layout: a JSON list of {instruction, output, dataset, ...}.

    The subject is the row's data set, and ``reference`` is its output, another model's answer. Raises
    FileNotFoundError for a missing file and ValueError for one of another layout, naming the row.
    """
    rows = read_json(path, list, "give a .json file in the layout of AlpacaEval")
    return _examples(rows, path.name, split, NO_DATASET)


def read_alpaca_hub(split: str) -> list[Example]:
    """Every other row of the hub's ``tatsu-lab/alpaca_eval`` at its present commit, which is logged.

    Raises ConnectionError if the hub does not answer.
    """
    path, commit = from_hub(ALPACA_FILE)
    log.info("task %s: using commit %s", ALPACA, commit)
    return read_alpaca(path, split)


def from_hub(name: str) -> tuple[Path, str]:
    """A file of the hub's AlpacaEval at its present commit, and that; ConnectionError without an answer."""
    from huggingface_hub import hf_hub_download

    with asking_hub(ALPACA, "its file"):
        path = Path(hf_hub_download(ALPACA, name, repo_type="dataset"))
    return path, path.parent.name


Reader = Callable[[str], list[Example]]


def of_subject(examples: Sequence[Example], subject: str | None) -> list[Example]:
    """The examples of one subject, or all. Raises ValueError for an unknown one."""
    known = list(dict.fromkeys(example.subject for example in examples))
    check_subject(subject, known)
    return [example for example in examples if subject in (None, example.subject)]


def _examples(rows: Sequence[Any], source: str, split: str, subject: str) -> list[Example]:
    if split not in SPLITS:
        raise ValueError(f"{source} has no split {split!r}; use one of {', '.join(SPLITS)}.")
    numbered = list(enumerate(rows, start=1))[SPLITS.index(split) :: len(SPLITS)]
    return [_example(row, f"{source}, row {number}", number, split, subject) for number, row in numbered]


def _example(row: Any, where: str, number: int, split: str, subject: str) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__}, not an object with an instruction; correct it.")
    instruction, reference = row.get("instruction"), row.get("output") or ""
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"{where} has no text under 'instruction'; write one.")
    if not isinstance(reference, str):
        raise ValueError(f"{where} has an output that is no text ({reference!r}); correct it.")
    named = str(row.get("dataset") or subject)
    return Example(
        id=f"{named}/{split}/{number}",
        subject=named,
        prompt=instruction_prompt(instruction.strip()),
        options=(),
        answer=None,
        question=instruction.strip(),
        reference=reference.strip(),
    )
