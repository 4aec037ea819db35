"""Runs of chapters for real: kernels, caching, failures, and the command line on top."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pandas as pd
import psutil
import pytest
from conftest import WriteChapter
from nbformat.v4 import new_markdown_cell

from fichapters import runs, schedule
from fichapters.runs import ChapterError, chapters, find_chapter, run_chapter
from fichapters.schedule import run_all
from fihelpers.__main__ import main

ROOT_NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "07_sparsification.ipynb"
OUT = Path("build/runs/smoke")
KEEP = 'import pandas as pd\n\nrun.keep("n", pd.DataFrame({"value": [run.p.N]}))'


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _texts(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.fixture
def no_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would execute a notebook fails."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a chapter was executed")

    monkeypatch.setattr(runs, "execute", refuse)


def test_a_chapter_runs_in_this_environment_and_is_not_run_again(
    write_chapter: WriteChapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel spec of the same name that comes first on Jupyter's path must not be taken."""
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["no-such-python", "{connection_file}"], "display_name": "other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setattr(runs, "PACKAGE", tmp_path / "data")  # so that nobody's edit meanwhile changes the key
    monkeypatch.setattr(runs, "CHAPTERS", tmp_path / "data")
    where = "import sys\n\nprint(sys.executable, run.p)"
    notebook = write_chapter(KEEP, where, "import ipywidgets\n\nipywidgets.IntSlider(5)")

    done = run_chapter(notebook, "smoke", {"RATES": [0.25]}, OUT)

    assert done == OUT / "01_tiny.ipynb"
    assert _names(OUT) == {"01_tiny.ipynb", "01_tiny.json", "01_tiny.key", "01_tiny.n.csv"}
    assert sys.executable in _texts(done) and "N=2, RATES=[0.25]" in _texts(done)
    executed = nbformat.read(done, as_version=4)
    assert executed.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert executed.metadata.fihelpers["seconds"] > 0
    assert pd.read_csv(OUT / "01_tiny.n.csv").value.tolist() == [2]

    before = {path: path.stat().st_mtime_ns for path in OUT.iterdir()}
    monkeypatch.setattr(runs, "execute", None)
    assert run_chapter(notebook, "smoke", {"RATES": [0.25]}, OUT) == done
    assert {path: path.stat().st_mtime_ns for path in OUT.iterdir()} == before
    with pytest.raises(TypeError):  # what calling the missing execute raises
        run_chapter(notebook, "smoke", {"RATES": [0.5]}, OUT)
    assert {path: path.stat().st_mtime_ns for path in OUT.iterdir()} == before


def test_a_change_of_prose_runs_nothing(
    write_chapter: WriteChapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executed notebook gets the new text, wherever cells of text came or went; its outputs stay."""
    monkeypatch.setattr(runs, "PACKAGE", tmp_path / "data")  # so that nobody's edit meanwhile changes the key
    monkeypatch.setattr(runs, "CHAPTERS", tmp_path / "data")
    notebook = write_chapter(KEEP, "print(run.p)")
    done = run_chapter(notebook, "smoke", {}, OUT)
    ran = [cell for cell in nbformat.read(done, as_version=4).cells if cell.cell_type == "code"]
    monkeypatch.setattr(runs, "execute", None)

    source = nbformat.read(notebook, as_version=4)
    source.cells[0].source = "# Small"
    source.cells.insert(2, new_markdown_cell("A word between"))
    source.cells.append(new_markdown_cell("and one at the end."))
    nbformat.write(source, notebook)
    assert run_chapter(notebook, "smoke", {}, OUT) == done
    executed = nbformat.read(done, as_version=4)
    assert [cell for cell in executed.cells if cell.cell_type == "code"] == ran
    texts = [cell.source for cell in executed.cells if cell.cell_type == "markdown"]
    assert texts == ["# Small", "A word between", "and one at the end."]
    assert executed.metadata.fihelpers["seconds"] > 0
    kinds = [cell.cell_type for cell in executed.cells]
    assert kinds == ["markdown", "code", "code", "markdown", "code", "code", "code", "markdown"]

    executed.cells[-2].source = "print('by hand')"  # nobody's run stands for it
    nbformat.write(executed, done)
    with pytest.raises(TypeError):  # what calling the missing execute raises
        run_chapter(notebook, "smoke", {}, OUT)


def test_what_a_killed_run_left_goes_and_what_another_works_in_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = platform.node()
    names = [f".01_tiny.{here}.{dead.pid}.abc", f".01_tiny.{here}.{os.getpid()}.abc"]
    names += [f".02_tiny.{here}.{dead.pid}.abc", f".01_tiny.elsewhere.{dead.pid}.abc", "cache"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "01_tiny.ipynb").touch()
    runs._clear_killed(tmp_path, "01_tiny")
    assert _names(tmp_path) == {*names[1:]}


def test_the_key_sees_all_that_a_run_depends_on(
    write_chapter: WriteChapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook, package, model = write_chapter(), tmp_path / "package", tmp_path / "model"
    package.mkdir()
    model.mkdir()
    (package / "a.py").write_text("a = 1")
    (package / "a.pyc").write_text("compiled")
    (model / "weights").write_text("w")
    monkeypatch.setattr(runs, "PACKAGE", package)

    def key(**settings: Any) -> str:
        return runs._key(notebook, {"N": 2, "MODEL": str(model), **settings}, OUT)

    keys = [key()]
    (package / "a.pyc").write_text("compiled again")
    assert key() == keys[0]
    assert key(N=3) != keys[0]
    source = notebook.read_text()
    notebook.write_text(source.replace("# Tiny", "# Small"))
    assert key() == keys[0]
    for change in (("begin(", "begin (", 1), ('"tags"', '"hidden": true, "tags"', 1)):
        assert source.count(change[0])
        notebook.write_text(source.replace(*change))
        keys.append(key())
    for path in (package / "a.py", package / "b.js", model / "weights", Path("data/manifest.json")):
        path.write_text(path.read_text() + " " if path.exists() else "new")
        keys.append(key())
    assert len(set(keys)) == len(keys)

    monkeypatch.setenv("HOME", str(tmp_path))
    nested = {"elsewhere": {"one": {"task": "~/model", "subjects": []}}}
    before = key(OPTIONS=nested)
    (model / "weights").write_text("other")
    assert key(OPTIONS=nested) != before
    keys = [key()]

    reading = [key(READS="*.claims.csv")]
    for path in (Path("data/results/04.claims.csv"), OUT / "04.claims.csv", OUT / "05.claims.csv"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path))
        reading.append(key(READS="*.claims.csv"))
    Path("data/results/04.claims.csv").write_text("the run has its own")
    assert key(READS="*.claims.csv") == reading[-1]
    (OUT / f"{notebook.stem}.claims.csv").write_text("its own results are not what a chapter reads")
    assert key(READS="*.claims.csv") == reading[-1]
    assert len(set(reading)) == len(reading)
    assert key() == keys[-1]  # a chapter that reads no results does not mind them

    own, other = (Path("data/results/real") / f"{stem}.curves.csv" for stem in (notebook.stem, "04"))
    own.parent.mkdir()
    making = key(PROFILE="real")
    other.write_text("of a real model")
    assert key() == keys[-1] and key(READS="*.claims.csv") != reading[-1]
    own.write_text("of a real model")
    assert key() != keys[-1] and key(PROFILE="real") == making  # it draws the table, or makes it


def test_a_chapter_depends_on_what_it_imports_of_the_chapters(
    write_chapter: WriteChapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = write_chapter("from fichapters.ch02 import draw\nimport fichapters.style")
    files = {
        "ch01/lab.py": "", "ch01/check.py": "from fichapters import exercises\n", "ch02/__init__.py": "",
        "ch02/draw.py": "from fichapters.tables import show\n", "ch02/lab.py": "", "style.py": "",
        "tables.py": "", "exercises.py": "", "results.py": "", "bench.py": "", "web/a.js": "",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(content)
    used = runs.used_files(notebook, tmp_path / "package")
    unused = {"ch02/lab.py", "bench.py"}
    assert {path.relative_to(tmp_path / "package").as_posix() for path in used} == files.keys() - unused
    real = {path.relative_to(runs.CHAPTERS).as_posix() for path in runs.used_files(ROOT_NOTEBOOK)}
    assert {"ch07/lab.py", "ch07/draw.py", "results.py", "style.py", "parameters.py"} <= real
    assert not {"ch04/lab.py", "bench.py", "sweeps.py", "runs.py"} & real


def test_a_failure_leaves_the_last_success_alone(write_chapter: WriteChapter) -> None:
    notebook = write_chapter(KEEP)
    run_chapter(notebook, "smoke", {}, OUT)
    kept = {path.name: path.read_bytes() for path in OUT.iterdir()}
    write_chapter(KEEP, 'values = {}\nvalues["thirteen"]')
    with pytest.raises(
        ChapterError, match=r"01_tiny failed in cell \[5\] .values = \{\}.: KeyError: 'thirteen'"
    ):
        run_chapter(notebook, "smoke", {}, OUT)
    assert {name: (OUT / name).read_bytes() for name in kept} == kept
    assert _names(OUT) - set(kept) == {"01_tiny.failed.ipynb"}
    write_chapter(KEEP)
    run_chapter(notebook, "smoke", {"N": 4}, OUT)
    assert _names(OUT) == set(kept)


def test_a_dead_kernel_and_a_chapter_without_begin_are_said_plainly(write_chapter: WriteChapter) -> None:
    with pytest.raises(ChapterError, match="01_tiny: its kernel died"):
        run_chapter(write_chapter("import os\n\nos._exit(1)"), "smoke", {}, OUT)
    notebook = write_chapter()
    notebook.write_text(notebook.read_text().replace('begin(\\"01_tiny', 'begin(\\"01_tony'))
    with pytest.raises(
        ChapterError, match=r"01_tiny kept nothing; its first cell must call begin\('01_tiny'\)"
    ):
        run_chapter(notebook, "smoke", {}, OUT)
    assert _names(OUT) == {"01_tiny.failed.ipynb"}


@pytest.mark.parametrize(
    ("profile", "parameters", "message"),
    [
        ("smoke", {"NN": 3}, r"01_tiny has no parameter NN .given 3.; did you mean N\?"),
        ("smoke", {"N": "3"}, "the parameter N must be of the type of its default"),
        ("smoke", {"PROFILE": "paper"}, "PROFILE is not given as a parameter"),
        ("smook", {}, r"unknown profile 'smook'; did you mean smoke\?"),
    ],
)
@pytest.mark.usefixtures("no_execution")
def test_bad_parameters_stop_before_anything_runs(
    write_chapter: WriteChapter, profile: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_chapter(write_chapter(), profile, parameters, OUT)
    assert not OUT.exists()


def test_bare_papermill_refuses_an_unknown_parameter_too(write_chapter: WriteChapter) -> None:
    arguments = ["papermill", str(write_chapter()), "out.ipynb", "-p", "NN", "3", "--no-progress-bar"]
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    assert "01_tiny has no parameter NN (given 3); did you mean N?" in done.stderr


def test_all_chapters_run_side_by_side_with_one_thread_each(
    write_chapter: WriteChapter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for folder_of in ("PACKAGE", "CHAPTERS"):  # so that nobody's edit meanwhile changes the key
        monkeypatch.setattr(runs, folder_of, Path("data").resolve())
    for name in ("10_last", "02_second", "Untitled"):
        folder = write_chapter(KEEP, name=name).parent
    names = ["02_second", "10_last"]
    assert [path.stem for path in chapters(folder)] == names
    done = run_all(folder, "smoke", OUT, jobs=2)
    assert [path.stem for path in done] == names
    about = [json.loads((OUT / f"{name}.json").read_text()) for name in names]
    assert [content["chapter"] for content in about] == names
    assert all("1 threads" in content["versions"]["machine"] for content in about)
    assert not list(OUT.glob("*.log"))  # of the cells' bars, until a chapter succeeds
    assert run_all(folder, "smoke", OUT, jobs=2) == done
    lines = [line.partition("  ")[2] for line in capsys.readouterr().err.splitlines()]
    assert sorted(lines[:2]) == [f"{name} starts" for name in names]
    assert sorted(re.sub(r"\d+ s", "N s", line) for line in lines[2:4]) == [
        f"{name} is done after N s" for name in names
    ]
    assert sorted(lines[4:]) == [f"{name} stands: nothing that it depends on has changed" for name in names]


class Started:
    """Runs of chapters that take no time: what started, with how many threads, while how many others ran."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.threads: dict[str, int | None] = {}
        self.beside: dict[str, int] = {}
        self.failing: tuple[str, ...] = ()
        self.running = 0

    def run(self, notebook: Path, threads: int | None, out: Path, **options: Any) -> Path:
        self.names.append(notebook.stem)
        self.threads[notebook.stem] = threads
        self.beside[notebook.stem] = self.running
        self.running += 1
        time.sleep(0.1)
        self.running -= 1
        if notebook.stem in self.failing:
            raise ChapterError(f"{notebook.stem} failed")
        return out / f"{notebook.stem}.ipynb"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    quick = Started()
    monkeypatch.setattr(schedule, "run_chapter", quick.run)
    return quick


def test_some_chapters_run_by_themselves_and_the_longest_starts_first(
    write_chapter: WriteChapter, started: Started
) -> None:
    for name in ("01_first_look", "07_sparsification", "08_quantization", "10_cost", "11_relatives"):
        folder = write_chapter(name=name).parent
    claims = write_chapter(name="12_claims")
    claims.write_text(claims.read_text().replace("LIMIT = None", r"READS = \"*.csv\""))
    done = run_all(folder, "smoke", OUT, jobs=2)
    assert [path.stem for path in done] == [path.stem for path in chapters(folder)]
    assert started.names[-2:] == ["10_cost", "12_claims"]
    assert max(started.beside.values()) == 1
    assert started.beside["10_cost"] == started.beside["12_claims"] == 0
    assert started.threads == {name: None if name[:2] in ("10", "12") else 1 for name in started.names}

    # one that was not run before may take longest
    OUT.mkdir(parents=True)
    for name, seconds in {"01_first_look": 9.0, "07_sparsification": 100.0, "08_quantization": 20.0}.items():
        metadata = {"fihelpers": {"seconds": seconds}}
        nbformat.write(nbformat.v4.new_notebook(metadata=metadata), OUT / f"{name}.ipynb")
    started.names.clear()
    run_all(folder, "smoke", OUT, jobs=1, threads=3)
    assert [name[:2] for name in started.names] == ["11", "07", "08", "01", "10", "12"]
    assert set(started.threads.values()) == {3}


def test_after_a_failure_no_chapter_starts_and_the_first_in_order_is_told(
    write_chapter: WriteChapter, started: Started
) -> None:
    for name in ("01_first_look", "07_sparsification", "08_quantization", "10_cost"):
        folder = write_chapter(name=name).parent
    started.failing = ("01_first_look", "07_sparsification")
    with pytest.raises(ChapterError, match="01_first_look failed"):
        run_all(folder, "smoke", OUT, jobs=2)
    assert "10_cost" not in started.names
    started.names.clear()
    started.failing = ("08_quantization",)
    with pytest.raises(ChapterError, match="08_quantization failed"):
        run_all(folder, "smoke", OUT, jobs=1)
    assert started.names == ["01_first_look", "07_sparsification", "08_quantization"]


def test_no_more_run_at_a_time_than_cores_and_free_memory_allow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = SimpleNamespace(available=3.5 * schedule.NEEDED)
    monkeypatch.setattr(schedule.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(schedule.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(schedule.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert schedule.side_by_side() == 3
    assert schedule.side_by_side(2) == 2
    assert not capsys.readouterr().err
    assert schedule.side_by_side(5) == 3
    assert "memory is free for 3 at a time, not 5: each may need 1.5 GB" in capsys.readouterr().err
    monkeypatch.setattr(schedule.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert schedule.side_by_side() == 2
    free.available = 0
    assert schedule.side_by_side() == 1


WAITING = """
import os
import subprocess
import time
from pathlib import Path

child = subprocess.Popen(["sleep", "600"])
Path(run.run_folder / f"{run.name}.pids").write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def _is_alive(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def test_an_interrupt_ends_all_kernels_at_once(write_chapter: WriteChapter) -> None:
    for name in ("01_one", "02_two", "03_three"):
        write_chapter(KEEP, WAITING, name=name)
    arguments = [sys.executable, "-m", "fihelpers", "build", "--profile", "smoke", "--jobs", "2"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as build:
        try:
            end = time.monotonic() + 300
            while len(files := [path for path in OUT.glob("*.pids") if path.read_text()]) < 2:
                assert build.poll() is None and time.monotonic() < end
                time.sleep(0.1)
            pids = [int(number) for path in files for number in path.read_text().split()]
            assert all(map(_is_alive, pids))
        finally:  # after a failure nothing waits for a build that goes on
            build.send_signal(signal.SIGINT)
        assert build.wait(60) != 0
        told = build.stderr.read() if build.stderr else ""
    assert "interrupted: all chapters under way are ended" in told
    assert "fihelpers: interrupted; what is finished is kept" in told and "Traceback" not in told
    assert not any(map(_is_alive, pids))
    assert not list(OUT.glob("*.key")) and not list(OUT.glob("03_three*"))


def test_a_chapter_is_found_by_number_or_name(write_chapter: WriteChapter) -> None:
    folder = write_chapter(name="07_sparsification").parent
    for wanted in ("7", "07", "sparsification", "07_sparsification"):
        assert find_chapter(folder, wanted).stem == "07_sparsification"
    for wanted in ("8", "sparsify", "", ".."):
        with pytest.raises(ValueError, match=f"unknown chapter '{wanted}'.*07_sparsification"):
            find_chapter(folder, wanted)


def test_kept_results_are_those_of_the_run_alone(tmp_path: Path) -> None:
    out, results = tmp_path / "out", tmp_path / "results"
    own = [out / f"01_a.{end}" for end in ("json", "curve.csv", "key")]
    for path in (*own, results / "02_b.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    runs.keep_results(out, results)
    assert _names(results) == {"01_a.json", "01_a.curve.csv"}


def test_the_command_line_runs_a_chapter(
    write_chapter: WriteChapter, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chapter(KEEP)
    arguments = [
        "run",
        "1",
        "--profile",
        "smoke",
        "-p",
        "RATES",
        "[1e-3]",
        "-p",
        "MODEL",
        "12",
        "--out",
        "mine",
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(Path("mine/01_tiny.ipynb"))
    kept = json.loads(Path("mine/01_tiny.json").read_text())["parameters"]
    assert kept == {"PROFILE": "smoke", "SEED": 0, "N": 2, "RATES": [0.001], "MODEL": "12", "LIMIT": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "1", "-p", "NN", "3"], "01_tiny has no parameter NN (given 3); did you mean N?"),
        (["run", "1", "-p", "N", "[3"], "the value '[3' is not valid YAML"),
        (["run", "2"], "unknown chapter '2'"),
        (["run", "1", "--profile", "lapto"], "unknown profile 'lapto'"),
        (["build", "--profile", "smoke", "--keep-results"], "--keep-results keeps the numbers of embedded"),
        (["build", "--jobs", "0"], "at least one job"),
    ],
)
@pytest.mark.usefixtures("no_execution")
def test_bad_input_is_one_sentence_and_exit_code_1(
    write_chapter: WriteChapter, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_chapter()
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert told.err.startswith("fihelpers: ") and message in told.err
    assert told.err.count("\n") == 1 and not told.out
    assert not Path("build").exists()


def test_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run"])
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_manifest_lists_what_ships(
    write_chapter: WriteChapter, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_chapter().parent.parent / "data"
    for name in ("facts/law.yaml", "results/01.json", ".hidden", "models/.cache/x", "models/m/config.json"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    assert main(["manifest"]) == 0
    listed = json.loads((data / "manifest.json").read_text())
    assert list(listed) == ["facts/law.yaml", "models/m/config.json"]
    from fihelpers.data import check_file

    for name in listed:
        assert check_file(data / name) == listed[name]
