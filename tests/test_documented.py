"""Every command and every snippet that the documents show is run, as it stands there, on small stand-ins.

They are taken from the files. What is too long to run is named here with the reason, and its arguments are
read. A line that is neither makes a test fail: say here how it is run.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import nbformat
import pandas as pd
import pytest
from lm_eval.tasks import TaskManager
from opening import NOTEBOOKS, Opened, run_until_opened, settled
from standins import ROOT, make_standins, write_notebooks

from fichapters.parameters import declared, spoken
from fichapters.runs import find_chapter
from fihelpers.__main__ import _parser
from fihelpers.evaluate import harness
from fihelpers.scores.store import Scores

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"book/{name}.md" for name in ("intro", "copies", "api")))
PROGRAMS = ("python", "papermill", "torchrun", "make", "conda", "pip", ".ci/run")
ALONE = ("make", ".ci/run")  # commands of one word; another program's name alone is no command
SMALLER = {  # sizes that the documents set, and what there is no network for
    "{task: tatsu-lab/alpaca_eval, length: 128}": "{task: alpaca_eval.json, length: 6, n_calibration: 2, "
    "n_test: 4, rates: [0.1], horizon: 2, samples: 2}",
    "n=200": "n=2",
    "--nproc_per_node 4": "--nproc_per_node 2",
}
NOT_RUN = {  # and why
    "make": "a name in a sentence",
    "make book": "runs all chapters: `make test` does so under the smoke profile",
    "make test": "runs this test",
    "make lab": "stays open",
    ".ci/run": "runs this test",
    "python -m fihelpers build --check": "`make test` runs it under the smoke profile",
    "python -m fihelpers build --keep-results": "runs all chapters; test_runs keeps results",
    "python -m fihelpers bench": "takes minutes; test_bench runs each of its rows in small",
    "python -m fihelpers pdf 3": "needs the built book; test_book prints a page",
    "conda env create -f environment.yml": "downloads an environment; test_project checks its versions",
    "python -m fihelpers fetch smollm2": "gets 92 MB; test_gguf fetches it where there is an index",
    "python -m fihelpers run 1 -p MODEL smollm2 -p TASK cloze": "needs that model, and minutes",
    "make real": "takes an evening; test_real runs its command without the chapters",
    "python -m fihelpers real": "takes an evening; test_real runs it without the chapters",
    "python -m fihelpers real --model path/to/model.gguf": "takes long; test_real gives it another model",
    "python -m fihelpers real 13 --model path/to/model.gguf --out build/mine": "takes long, as the last one",
    "python -m fihelpers real 1 --model Qwen/Qwen2.5-1.5B --task cais/mmlu --subjects "
    "high_school_psychology professional_law --out build/mine": "takes long, as the last one",
    "pip freeze": "a program of others",
    "python tools/ruler.py": "test_tools and test_notebooks read with it",
    "python tools/golden.py OLD NEW": "runs all chapters of two commits; test_tools compares with it",
    "pip install -e .": "a program of others",
    "pip install .": "a program of others; test_wheel installs what it makes",
    "git clone THE_PROJECT": "for Colab; the address is the reader's",
    "cd THE_FOLDER": "for Colab; the folder is the reader's",
}
FENCED = re.compile(r"^```(.*?)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^\n|\A)((?:    .*\n|\n(?=    ))+)", re.MULTILINE)  # after a blank line
LONG = 600  # seconds


@dataclass(frozen=True)
class Command:
    """One command of a document, as it stands there."""

    document: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of the command, with smaller sizes."""
        text = self.text
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        return shlex.split(text)

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"


def blocks(text: str) -> Iterator[str]:
    """Code blocks, fenced or indented; a fence with a directive of MyST is none."""
    for info, content in FENCED.findall(text):
        if not info.startswith("{"):
            yield content
    for found in INDENTED.findall(FENCED.sub("\n", text)):
        yield re.sub(r"^    ", "", found, flags=re.MULTILINE)


def inline(text: str) -> Iterator[str]:
    """What stands between single backticks, but for roles of MyST."""
    text = INDENTED.sub("\n", FENCED.sub("\n", text))
    text = re.sub(r"``.+?``", "", text, flags=re.DOTALL)
    for role, said in re.findall(r"(\{[^}`]*\})?`([^`]+)`", text):
        if not role:
            yield " ".join(said.split())


def is_snippet(block: str) -> bool:
    """Whether a block is Python that imports something."""
    try:
        return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(block)))
    except SyntaxError:
        return False


def commands() -> list[Command]:
    """The commands of all documents: each line of a block of them, and those in sentences."""
    found: dict[Command, None] = {}
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for block in blocks(text):
            if not is_snippet(block):
                for line in block.replace("\\\n", " ").splitlines():
                    words = shlex.split(line.lstrip("!%"), comments=True)
                    if words:
                        found[Command(document, shlex.join(words))] = None
        for said in inline(text):
            program, _, rest = said.partition(" ")
            if program in PROGRAMS and (rest or program in ALONE):
                found[Command(document, said)] = None
    return list(found)


def snippets() -> list[tuple[str, str]]:
    """The Python of all documents."""
    return [
        (document, block)
        for document in DOCUMENTS
        for block in blocks((ROOT / document).read_text(encoding="utf-8"))
        if is_snippet(block)
    ]


COMMANDS = commands()
RUN = [command for command in COMMANDS if command.text not in NOT_RUN]


def arguments(command: Command) -> Any:
    """The parsed arguments of `python -m fihelpers`, or of what torchrun starts as its module."""
    words = command.words
    return _parser().parse_args(words[words.index("fihelpers") + 1 :])


def chapter_of(command: Command) -> tuple[Path, str, dict[str, Any]]:
    """The notebook, the profile and the parameters of a command that runs one chapter."""
    words = command.words
    if words[0] == "papermill":
        given = {n: v for flag, n, v in zip(words, words[1:], words[2:], strict=False) if flag == "-p"}
        notebook, profile = ROOT / words[1], given.pop("PROFILE")
    else:
        options = arguments(command)
        notebook, profile = find_chapter(ROOT / "notebooks", options.chapter), options.profile
        given = dict(options.parameters)
    defaults = declared(notebook)
    return notebook, profile, {name: spoken(text, defaults[name]) for name, text in given.items()}


def runs_a_chapter(command: Command) -> bool:
    words = command.words
    return words[0] == "papermill" or words[:4] == ["python", "-m", "fihelpers", "run"]


# run to the end: README's last command for each chapter; the others end with the chapter's first table
README = [command for command in RUN if command.document == "README.md"]
WHOLE = {chapter_of(command)[0]: command for command in README if command.words[3:4] == ["run"]}

# --- what is in the documents


def test_the_documents_are_read() -> None:
    """The way in which each document shows its commands is understood."""
    texts = {command.text for command in COMMANDS}
    assert "make book" in texts and "conda env create -f environment.yml" in texts
    assert any(text.startswith("torchrun ") for text in texts)
    for document, least in {"README.md": 13, "book/intro.md": 6, "CONTRIBUTING.md": 4}.items():
        assert sum(command.document == document for command in COMMANDS) >= least
    assert [document for document, _ in snippets()] == ["README.md", "book/api.md", "book/api.md"]
    continued = [command for command in COMMANDS if "DOMAINS" in command.text]
    assert "elementary_mathematics" in continued[0].text and "\\" not in continued[0].text


def test_a_line_that_nobody_knows_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (
        "Text.\n\n    rm -r everything  # why not\n\nMore `make coffee`, and\n\n```\npython -m other\n```\n"
    )
    (tmp_path / "NEW.md").write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "DOCUMENTS", ("NEW.md",))
    found = commands()
    assert {command.text for command in found} == {"rm -r everything", "make coffee", "python -m other"}
    for command in found:
        with pytest.raises(ValueError, match="is not known"):
            as_started(command)


def test_nothing_that_is_named_here_is_gone_from_the_documents() -> None:
    texts = {command.text for command in COMMANDS}
    assert set(NOT_RUN) <= texts
    everything = "".join((ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS)
    assert all(large in everything for large in SMALLER)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_what_is_not_run_could_be(command: Command) -> None:
    words = command.words
    if "fihelpers" in words:
        arguments(command)
    if words[0] == "make" and words[1:]:
        done = subprocess.run(
            ["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    for word in words:
        if word.endswith((".yml", ".ci/run")) or word.startswith("notebooks/"):
            assert (ROOT / word).is_file()


# --- the commands


def as_started(command: Command) -> list[str]:
    """A command with this environment's Python in front. Raises ValueError for one that is not known."""
    program, *rest = command.words
    if program == "python" and rest[:2] == ["-m", "fihelpers"]:
        return [sys.executable, *rest]
    module = {"papermill": "papermill", "torchrun": "torch.distributed.run"}.get(program)
    if module is None:
        raise ValueError(f"the command {command} is not known; say in {Path(__file__).name} how to run it.")
    return [sys.executable, "-m", module, *rest]


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name, and under `short` the chapters that end with their first table."""
    folder = make_standins(tmp_path_factory.mktemp("standins"))
    write_notebooks(folder / "short" / "notebooks")
    for path in (folder / "short" / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        first = next(i for i, cell in enumerate(notebook.cells) if "run.keep(" in cell.source)
        notebook.cells = notebook.cells[: first + 1]
        nbformat.write(notebook, path)
    (folder / "data").mkdir()
    (folder / "data" / "facts.yaml").write_text("a: 1\n")
    return folder


def run_in(folder: Path, standins: Path, command: Command) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder where everything lies that it names."""
    for place in standins.iterdir():
        if place.name not in ("short", "data"):
            whole = command in WHOLE.values() or place.name != "notebooks"
            kept = place if whole else standins / "short" / "notebooks"
            (folder / place.name).symlink_to(kept)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FIHELPERS_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    environment |= {"FIHELPERS_HOME": str(folder / ".home")}
    if "manifest" in command.words:
        environment["FIHELPERS_DATA"] = str(standins / "data")
    return subprocess.run(
        as_started(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=LONG
    )


@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_command_does_what_it_says(command: Command, standins: Path, tmp_path: Path) -> None:
    done = run_in(tmp_path, standins, command)
    assert done.returncode == 0, done.stdout + done.stderr
    words = command.words
    if runs_a_chapter(command):
        check_chapter(command, tmp_path)
    elif "score" in words:
        scores = Scores.load(tmp_path / words[words.index("--out") + 1])
        assert scores.numel() > 0 and scores.metadata["measure"] == "FI exact"
    elif "sweep" in words:
        out = tmp_path / words[words.index("--out") + 1]
        table = pd.read_csv(out / "07_sparsification.curves.csv")
        assert len(table) and set(table.HEADLINE_RATE) == {0.02} and len(list(out.glob("*/*.json"))) == 1
    elif "cache" in words:
        assert done.stdout.splitlines() == [str(tmp_path / ".home")]  # nothing is kept yet
    elif "manifest" in words:
        assert list(json.loads((standins / "data" / "manifest.json").read_text())) == ["facts.yaml"]
    else:
        pytest.fail(f"say in {Path(__file__).name} what {command} leaves")


def check_chapter(command: Command, folder: Path) -> None:
    """An executed notebook and its tables lie where the documents say."""
    notebook, profile, given = chapter_of(command)
    if command.words[0] == "papermill":
        executed, out = folder / command.words[2], folder / "results" / profile
    else:
        out = folder / (arguments(command).out or f"build/runs/{profile}")
        executed = out / notebook.name
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    assert list(out.glob(f"{notebook.stem}.*.csv"))
    kept = json.loads((out / f"{notebook.stem}.json").read_text())["parameters"]
    assert given
    for name, value in given.items():  # of a group that is given in part the rest keeps its defaults
        assert kept[name] == (kept[name] | value if isinstance(value, dict) else value)


# --- with the project's own sizes


@pytest.mark.parametrize(
    "command",
    [command for command in RUN if runs_a_chapter(command) and chapter_of(command)[1] == "embedded"],
    ids=str,
)
def test_the_books_sizes_fit_what_is_shown(
    command: Command, standins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-ins have as many questions as the real files; sizes of the profile are not too large."""
    notebook, _, given = chapter_of(command)
    monkeypatch.chdir(standins)
    with pytest.raises(Opened):
        run_until_opened(notebook.stem, settled(notebook.stem, given), tmp_path, monkeypatch)


@pytest.mark.parametrize("chapter", [c for c in NOTEBOOKS if "SUBJECTS" in declared(NOTEBOOKS[c])])
def test_the_laptop_profile_fits_the_real_questions(
    chapter: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settled(chapter, {}, "laptop")
    if settings["TASK"] != "cais/mmlu":
        pytest.skip("the chapter asks about images")
    texts = {"TEXT": {**settings["TEXT"], "task": "bundled-instructions"}} if "TEXT" in settings else {}
    settings |= {"TASK": str(real_data / "mmlu"), "MODEL": "mini-lm", **texts}
    with pytest.raises(Opened):
        run_until_opened(chapter, settings, tmp_path, monkeypatch)


# --- the snippets


def questions(path: str, *_: Any, **__: Any) -> datasets.DatasetDict:
    """A few questions in the columns of GSM8K and of CMATH stand in for the hub."""
    ours = path.endswith("cmath")
    rows: list[dict[str, Any]] = [
        {"grade": 1, "question": "1 + 1?", "golden": "2"}
        if ours
        else {"question": "1 + 1?", "answer": "#### 2"}
    ]
    table = datasets.Dataset.from_list(rows * 12)
    return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), table))


@pytest.mark.parametrize(("document", "snippet"), snippets(), ids=[document for document, _ in snippets()])
@pytest.mark.filterwarnings("ignore:.*longer than the .* tokens:UserWarning")
def test_a_snippet_runs(
    document: str, snippet: str, standins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for large, small in SMALLER.items():
        snippet = snippet.replace(large, small)
    tasks = Path(lm_eval.__file__).parent / "tasks"  # reading all of them takes a minute
    manager = TaskManager(include_defaults=False, include_path=[tasks / "gsm8k"])
    monkeypatch.setattr(harness, "_standard_tasks", lambda: manager)
    monkeypatch.setattr(datasets, "load_dataset", questions)
    for place in standins.iterdir():
        (tmp_path / place.name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, document, "exec"), {})
    if "merged" in snippet:
        assert "TIES" in (tmp_path / "merged" / "README.md").read_text()
