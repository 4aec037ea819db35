"""Grids of runs: a chapter with all combinations of some parameters, side by side on dask.distributed.

    python -m fihelpers sweep CHAPTER --grid grid.yaml --out folder

The grid maps names of parameters to lists of values. Each combination is a cell with a folder of its own, in
which `fichapters.runs` leaves what a run leaves; a cell that was run before is not run again. Each table that
the chapter keeps is joined over all cells.
"""

import hashlib
import itertools
import json
import logging
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm import tqdm

from fichapters.parameters import declared, parse_yaml, read_profile, settle
from fichapters.runs import CHAPTERS, ChapterError, run_chapter
from fichapters.schedule import side_by_side
from fihelpers.data import PACKAGE, package_sha256, write_atomically
from fihelpers.threads import threads_for

if TYPE_CHECKING:
    from distributed import Client

Grid = Mapping[str, Sequence[Any]]

RETRIES = 1
KEPT = "What is finished is kept, and the same command goes on from there."
CONNECT = 30.0  # seconds in which a scheduler has to answer and to show a worker


@dataclass(frozen=True)
class Cell:
    """One combination: its parameters, where its files go, and the device it computes on."""

    parameters: dict[str, Any]
    folder: Path
    device: str

    def __str__(self) -> str:
        return ", ".join(f"{name}={_text(value)}" for name, value in self.parameters.items())


@dataclass(frozen=True)
class Work:
    """What all cells of a sweep share; `package` and `directory` are those that a worker has to have."""

    notebook: Path
    profile: str
    threads: int | None
    package: str
    directory: Path


def read_grid(path: Path) -> dict[str, list[Any]]:
    """Read a grid, YAML that maps each parameter to a list of values. Raises ValueError for any other."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no grid at {path}; give a YAML file that maps names to lists.")
    grid = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"{path} must map names of parameters to lists of values.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: {name} must be a list of values to try, not {values!r}.")
    return grid


def cells_of(notebook: Path, profile: str, grid: Grid, out: Path) -> list[Cell]:
    """All combinations of a grid in order, each with a folder named by a hash of what it runs with.

    Raises ValueError for a parameter that the chapter does not declare, a value of another type, or one that
    is given twice.
    """
    if "PROFILE" in grid:
        raise ValueError("PROFILE is not swept; run one sweep a profile (--profile).")
    defaults, sections = declared(notebook), read_profile(notebook.parent / "profiles", profile)
    cells = []
    for values in itertools.product(*grid.values()):
        parameters = dict(zip(grid, values, strict=True))
        settings = settle(notebook.stem, defaults, sections, {"PROFILE": profile, **parameters})
        name = hashlib.sha256(json.dumps([profile, parameters], sort_keys=True).encode()).hexdigest()[:12]
        folder = out.resolve() / f"{notebook.stem}.{name}"
        cells.append(Cell(parameters, folder, str(settings.get("DEVICE", "cpu"))))
    twice = {cell.folder: cell for cell in reversed(cells)}
    if len(twice) < len(cells):
        raise ValueError(f"the grid holds {len(cells) - len(twice)} cells twice; give each value once.")
    return cells


def sweep(
    notebook: Path,
    profile: str,
    grid: Grid,
    out: Path,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    retries: int = RETRIES,
    threads: int | None = None,
) -> Path:
    """Run every cell of a grid that was not run before, and return the folder with the joined tables.

    scheduler: the address of a dask scheduler; by default `workers` processes of this machine share the
    work, as many as :func:`fichapters.schedule.side_by_side` finds, or one where a GPU is used. Workers
    elsewhere, one for each GPU, need the same package, the same working directory and the folder `out`. A
    cell that fails is tried `retries` times more; one whose worker dies is run by another. threads: of each
    cell, by default those of :func:`fihelpers.threads.threads_for`.

    Raises ValueError for a bad grid, before anything runs; ConnectionError for a scheduler that does not
    answer, has no workers or is lost; and ChapterError where cells failed, after the others are done and in
    the tables. What is finished stays, and the same call goes on from there.
    """
    if (workers is not None and workers < 1) or retries < 0:
        raise ValueError(f"a sweep needs workers ≥ 1 and retries ≥ 0, not {workers} and {retries}.")
    cells = cells_of(notebook, profile, grid, out)
    alone = scheduler or any(cell.device != "cpu" for cell in cells)  # a GPU has one run at a time
    workers = 1 if alone else min(side_by_side(workers), len(cells))
    threads = threads_for(workers, threads)
    work = Work(notebook.resolve(), profile, threads, package_sha256(PACKAGE, CHAPTERS), Path.cwd())
    failed = _run_all(cells, work, scheduler, workers, retries)
    for cell in cells:
        for half in cell.folder.glob(f".{notebook.stem}.*"):  # of a worker that died
            shutil.rmtree(half, ignore_errors=True)
    _join_tables(out, [cell for cell in cells if cell.folder not in failed], notebook.stem)
    if failed:
        first = next(cell for cell in cells if cell.folder in failed)
        raise ChapterError(
            f"{len(failed)} of {len(cells)} cells failed, the tables of the others are in {out}; "
            f"the first is {first} ({failed[first.folder]})"
        )
    return out


def run_cell(cell: Cell, work: Work) -> None:
    """Run one cell where a worker is. Raises ValueError for a worker that would compute something else."""
    if package_sha256(PACKAGE, CHAPTERS) != work.package:
        raise ValueError(f"{platform.node()} has another state of the package; update it there.")
    if Path.cwd() != work.directory:
        raise ValueError(f"a worker runs in {Path.cwd()}; start it in {work.directory}, as the sweep is.")
    run_chapter(work.notebook, work.profile, cell.parameters, cell.folder, work.threads)


def _run_all(
    cells: Sequence[Cell], work: Work, scheduler: str | None, workers: int, retries: int
) -> dict[Path, str]:
    """Run all cells on a cluster; returns why cells failed, by folder. ConnectionError where it is lost."""
    from distributed import as_completed

    failed: dict[Path, str] = {}
    bar = tqdm(total=len(cells), desc=work.notebook.stem, unit="cell")
    with bar, _client(scheduler, workers) as client, client.as_current():
        keys = [f"{cell.folder.name}-{work.package[:8]}" for cell in cells]
        submitted = client.map(run_cell, cells, work=work, key=keys, retries=retries)
        futures = dict(zip(submitted, cells, strict=True))
        for future in as_completed(futures):
            if future.status not in ("finished", "error"):  # it cannot tell any more how the cell ended
                raise ConnectionError(f"the scheduler at {scheduler} was lost. {KEPT}")
            error = future.exception()
            if error is not None:
                failed[futures[future].folder] = _reason(error)
                bar.set_postfix(failed=len(failed))
            bar.update()
    return failed


def _reason(error: BaseException) -> str:
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return f"its worker died {error.allowed_failures + 1} times, perhaps for lack of memory"
    return str(error).partition("\n")[0]


@contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator["Client"]:
    """A client of the scheduler at an address, or of a cluster of processes that lives as long as this.

    Raises ConnectionError where no scheduler answers, or it has no worker.
    """
    import dask
    from distributed import Client

    # what goes wrong is said once, in a sentence
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    if scheduler is None:
        # instead of dask's one thread for each process; the bars of several runs would write over each other
        with (
            dask.config.set({"distributed.nanny.pre-spawn-environ": {"TQDM_DISABLE": "1"}}),
            Client(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=None,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
                set_as_default=False,
            ) as client,
        ):
            yield client
        return
    _check_answers(scheduler)
    with Client(scheduler, timeout=CONNECT, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=CONNECT)
        except TimeoutError as error:
            raise ConnectionError(
                f"the scheduler at {scheduler} has no worker; start some. {KEPT}"
            ) from error
        yield client


def _check_answers(scheduler: str) -> None:
    """Raise ConnectionError where nothing listens at an address; dask's client would hang at times."""
    from distributed.comm import get_address_host_port

    try:
        socket.create_connection(get_address_host_port(scheduler, strict=True), CONNECT).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no dask scheduler answers at {scheduler}; start one. {KEPT}") from error


def _join_tables(out: Path, cells: Sequence[Cell], chapter: str) -> None:
    """Write each table that the chapter keeps, over all cells: a cell's parameters, then the table's columns.

    Raises FileNotFoundError where a cell's results are not here.
    """
    tables: dict[str, list[pd.DataFrame]] = {}
    for cell in cells:
        if not (cell.folder / f"{chapter}.json").is_file():
            raise FileNotFoundError(
                f"{cell.folder} has no results; workers and this machine must share the folder."
            )
        values = {name: _text(value) for name, value in cell.parameters.items()}
        for path in sorted(cell.folder.glob(f"{chapter}.*.csv")):
            part = pd.read_csv(path)
            labels = pd.DataFrame(values, index=part.index)
            tables.setdefault(path.name, []).append(pd.concat([labels, part], axis=1))
    for name, parts in tables.items():
        write_atomically(out / name, pd.concat(parts).to_csv(index=False, lineterminator="\n").encode())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
