"""Sweeps: grids, workers that die, schedulers that vanish, tables. One test runs notebooks in processes."""

import gc
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import WriteChapter
from distributed import LocalCluster

from fichapters import sweeps
from fichapters.runs import ChapterError
from fichapters.sweeps import Cell, Work, cells_of, read_grid, run_cell, sweep
from fihelpers.__main__ import main

# dask leaves sockets of lost connections to the garbage collector, which is called before the next test
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

OUT = Path("out")
KEEP = 'import pandas as pd\nrun.keep("n", pd.DataFrame({"n": [run.p.N, 10]}))'
TABLE = "01_tiny.n.csv"
# the second cell fails once; the third kills the worker that runs it once
TROUBLE = """
import os
import signal
from pathlib import Path

marker = Path(f"ran.{N}")
again = marker.exists()
marker.write_text(marker.read_text() + "x" if again else "x")
if N == 2 and not again:
    raise ValueError("a bad day")
if N == 3 and not again:
    os.kill(os.getppid(), signal.SIGKILL)
"""


def tried() -> list[int]:
    """The values of N in the joined table."""
    return list(dict.fromkeys(pd.read_csv(OUT / TABLE).N))


def ran() -> dict[str, int]:
    """How often each cell was run, which the cells write down themselves."""
    return {path.suffix[1:]: len(path.read_text()) for path in sorted(Path().glob("ran.*"))}


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def quick_cells(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Runs of chapters that take no time: the list holds their parameters."""
    runs: list[dict[str, Any]] = []

    def run(notebook: Path, profile: str, parameters: dict[str, Any], out: Path, threads: int | None) -> None:
        runs.append(parameters)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{notebook.stem}.json").write_text("{}")
        (out / f"{notebook.stem}.n.csv").write_text("n\n10\n")

    monkeypatch.setattr(sweeps, "run_chapter", run)
    return runs


def cluster(workers: int, port: int = 0) -> LocalCluster:
    """A scheduler with workers in threads of this process, so that what a test replaces is so for them."""
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        scheduler_port=port,
        dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,
    )


@pytest.fixture
def scheduler() -> Iterator[str]:
    with cluster(2) as running:
        yield running.scheduler_address


def test_a_sweep_survives_a_failure_and_a_killed_worker_and_resumes(
    write_chapter: WriteChapter, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    notebook = write_chapter(KEEP, TROUBLE)
    assert sweep(notebook, "smoke", {"N": [2, 3], "LIMIT": [[0.5, "a"]]}, OUT, workers=2) == OUT
    expected = [[n, '[0.5, "a"]', value] for n in (2, 3) for value in (n, 10)]
    assert pd.read_csv(OUT / TABLE).to_numpy().tolist() == expected
    assert ran() == {"2": 2, "3": 2}
    folders = sorted(path for path in OUT.iterdir() if path.is_dir())
    assert len(folders) == 2
    for folder in folders:
        assert {path.name for path in folder.iterdir()} - {"cache", "01_tiny.failed.ipynb"} == {
            "01_tiny.ipynb",
            "01_tiny.json",
            "01_tiny.key",
            TABLE,
        }
        kept = json.loads((folder / "01_tiny.json").read_text())
        assert "1 threads" in kept["versions"]["machine"]
    before = {path: path.stat().st_mtime_ns for path in OUT.rglob("01_tiny.*")}
    Path("grid.yaml").write_text("N: [2, 3]\nLIMIT: [[0.5, a]]")
    arguments = ["sweep", "1", "--profile", "smoke", "--grid", "grid.yaml", "--out", "out"]
    assert main([*arguments, "--scheduler", scheduler]) == 0
    assert ran() == {"2": 2, "3": 2}  # nothing ran again
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path for path in before if before[path] != after[path]] == [OUT / TABLE]


def test_cells_that_fail_do_not_stop_the_others(
    write_chapter: WriteChapter, quick_cells: list[dict[str, Any]], scheduler: str, monkeypatch: Any
) -> None:
    notebook, run = write_chapter(), sweeps.run_chapter

    def fail(notebook: Path, profile: str, parameters: dict[str, Any], *others: Any) -> None:
        if parameters["N"] > 2:
            quick_cells.append(parameters)
            raise ChapterError(f"N = {parameters['N']} is too much\nand more")
        run(notebook, profile, parameters, *others)

    monkeypatch.setattr(sweeps, "run_chapter", fail)
    with pytest.raises(
        ChapterError, match=r"^2 of 4 cells failed, .* in out; the first is N=3 \(N = 3 is too much\)$"
    ):
        sweep(notebook, "smoke", {"N": [1, 2, 3, 4]}, OUT, scheduler=scheduler, retries=2)
    assert sorted(run["N"] for run in quick_cells) == [1, 2, 3, 3, 3, 4, 4, 4]
    assert tried() == [1, 2]
    monkeypatch.setattr(sweeps, "run_chapter", run)
    sweep(notebook, "smoke", {"N": [1, 2, 3, 4]}, OUT, scheduler=scheduler)
    assert tried() == [1, 2, 3, 4]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_scheduler_that_is_lost_is_said_and_the_same_sweep_goes_on(
    write_chapter: WriteChapter, quick_cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook, port, run = write_chapter(), free_port(), sweeps.run_chapter
    two_done = threading.Event()

    def wait(notebook: Path, profile: str, parameters: dict[str, Any], *others: Any) -> None:
        if len(quick_cells) == 2:
            two_done.set()
            time.sleep(0.5)
        run(notebook, profile, parameters, *others)

    def end() -> None:
        two_done.wait(20)
        first.close()

    monkeypatch.setattr(sweeps, "run_chapter", wait)
    grid, address = {"N": [1, 2, 3, 4]}, f"tcp://127.0.0.1:{port}"
    with cluster(1, port) as first:
        thread = threading.Thread(target=end)
        thread.start()
        with pytest.raises(ConnectionError, match=r"was lost\. What is finished is kept"):
            sweep(notebook, "smoke", grid, OUT, scheduler=address)
        thread.join()
    with cluster(1, port):
        sweep(notebook, "smoke", grid, OUT, scheduler=address)
    assert tried() == [1, 2, 3, 4]


def test_a_scheduler_that_stays_away_is_said_plainly(
    write_chapter: WriteChapter, quick_cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "CONNECT", 0.5)
    notebook, grid = write_chapter(), {"N": [1, 2]}
    for address in (f"tcp://127.0.0.1:{free_port()}", "nowhere"):
        with pytest.raises(
            ConnectionError, match=rf"no dask scheduler answers at {address}; start one\. What"
        ):
            sweep(notebook, "smoke", grid, OUT, scheduler=address)
    with cluster(0) as idle, pytest.raises(ConnectionError, match="has no worker; start some"):
        sweep(notebook, "smoke", grid, OUT, scheduler=idle.scheduler_address)
    assert not OUT.exists() and not quick_cells


def test_a_worker_elsewhere_must_see_the_same(
    write_chapter: WriteChapter, quick_cells: list[dict[str, Any]], scheduler: str, monkeypatch: Any
) -> None:
    notebook = write_chapter()
    (cell,) = cells_of(notebook, "smoke", {"N": [1]}, OUT)
    good = Work(notebook, "smoke", None, sweeps.package_sha256(sweeps.PACKAGE, sweeps.CHAPTERS), Path.cwd())
    with pytest.raises(ValueError, match="another state of the package"):
        run_cell(cell, Work(notebook, "smoke", None, "0", Path.cwd()))
    with pytest.raises(ValueError, match=r"a worker runs in .*; start it in /elsewhere"):
        run_cell(cell, Work(notebook, "smoke", None, good.package, Path("/elsewhere")))
    run_cell(cell, good)
    assert quick_cells == [{"N": 1}]
    monkeypatch.setattr(sweeps, "run_chapter", lambda *arguments: None)  # writes where we do not see it
    with pytest.raises(FileNotFoundError, match="must share the folder"):
        sweep(notebook, "smoke", {"N": [5]}, OUT, scheduler=scheduler)


def test_a_device_has_one_run_at_a_time(write_chapter: WriteChapter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def run_all(cells: Any, work: Work, scheduler: str | None, workers: int, retries: int) -> dict[Path, str]:
        asked.append(workers)
        return {}

    monkeypatch.setattr(sweeps, "_run_all", run_all)
    monkeypatch.setattr(sweeps, "_join_tables", lambda *_: None)
    monkeypatch.setattr(sweeps, "side_by_side", lambda workers: workers)
    notebook = write_chapter()
    sweep(notebook, "smoke", {"N": [1, 2, 3]}, OUT, workers=2)
    text = notebook.read_text().replace("LIMIT = None", 'LIMIT = None\\nDEVICE = \\"cuda:1\\"')
    notebook.write_text(text)
    sweep(notebook, "smoke", {"N": [1, 2, 3]}, OUT, workers=2)
    assert asked == [2, 1]


def test_a_cell_keeps_its_folder_when_the_grid_grows(write_chapter: WriteChapter) -> None:
    notebook = write_chapter()
    small = cells_of(notebook, "smoke", {"N": [1, 2], "RATES": [[0.1]]}, OUT)
    large = cells_of(notebook, "smoke", {"RATES": [[0.1], [0.2]], "N": [1, 2, 3]}, OUT)
    assert len(large) == 6 and {cell.folder for cell in small} < {cell.folder for cell in large}
    assert str(large[1]) == "RATES=[0.1], N=2"
    embedded = cells_of(notebook, "embedded", {"N": [1, 2], "RATES": [[0.1]]}, OUT)
    assert not {cell.folder for cell in small} & {cell.folder for cell in embedded}


@pytest.mark.parametrize(
    ("grid", "arguments", "message"),
    [
        ("NN: [1]", [], "01_tiny has no parameter NN (given 1); did you mean N?"),
        ("N: [1, '2']", [], "the parameter N must be of the type of its default"),
        ("PROFILE: [smoke]", [], "PROFILE is not swept"),
        ("N: 1", [], "grid.yaml: N must be a list of values to try, not 1."),
        ("N: []", [], "grid.yaml: N must be a list of values to try, not []."),
        ("- N", [], "grid.yaml must map names of parameters to lists of values."),
        ("N: [1", [], "grid.yaml is not valid YAML"),
        ("N: [1, 2, 1]", [], "the grid holds 1 cells twice; give each value once."),
        ("N: [1]", ["--workers", "0"], "a sweep needs workers ≥ 1 and retries ≥ 0, not 0 and 1."),
        (
            "N: [1]",
            ["--workers", "2", "--retries", "-1"],
            "a sweep needs workers ≥ 1 and retries ≥ 0, not 2 and -1.",
        ),
        ("N: [1]", ["--profile", "smook"], "unknown profile 'smook'"),
        (None, [], "there is no grid at grid.yaml"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(
    write_chapter: WriteChapter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    grid: str | None,
    arguments: list[str],
    message: str,
) -> None:
    write_chapter()
    monkeypatch.setattr(sweeps, "_run_all", None)
    if grid:
        Path("grid.yaml").write_text(grid)
    assert main(["sweep", "1", "--profile", "smoke", "--grid", "grid.yaml", "--out", "out", *arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("fihelpers: ") and message in told and told.count("\n") == 1
    assert not OUT.exists()


def test_a_grid_reads_numbers_as_chapters_do(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("LAM: [1e-3, 1.0]\nNAMES: [[a, b], []]")
    assert read_grid(tmp_path / "grid.yaml") == {"LAM": [0.001, 1.0], "NAMES": [["a", "b"], []]}


def test_the_tables_of_a_chapter_are_joined_over_all_cells(tmp_path: Path) -> None:
    cells = [Cell({"N": n, "RATES": [0.1]}, tmp_path / str(n), "cpu") for n in (1, 2)]
    for cell in cells:
        cell.folder.mkdir()
        (cell.folder / "01_tiny.json").write_text("{}")
        (cell.folder / "01_tiny.zeroing.csv").write_text(f"measure,accuracy\nSNIP,0.{cell.parameters['N']}\n")
    sweeps._join_tables(tmp_path, cells, "01_tiny")
    joined = (tmp_path / "01_tiny.zeroing.csv").read_text()
    assert joined == "N,RATES,measure,accuracy\n1,[0.1],SNIP,0.1\n2,[0.1],SNIP,0.2\n"
