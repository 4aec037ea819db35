"""Runs of chapters by papermill: a notebook and a profile in, an executed notebook and its tables out.

A run leaves ``{chapter}.ipynb``, ``{chapter}.json`` (what it ran with), ``{chapter}.*.csv`` (tables) and
``{chapter}.key`` in its folder; the notebook's metadata say how many seconds it took. The key is a hash of
everything the run depends on; while it holds, the chapter is not run again.
"""

import ast
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import psutil

from fichapters.kept import REAL, kept_folder, results_beside
from fichapters.kernels import ChapterError, execute
from fichapters.parameters import NOTEBOOKS, declared, nearest, read_profile, settle
from fihelpers.data import (
    MANIFEST,
    PACKAGE,
    data_folder,
    file_sha256,
    lasting_files,
    package_sha256,
    write_atomically,
)
from fihelpers.threads import VARIABLE, patient

CHAPTERS = Path(__file__).resolve().parent
RECORDS = ("*.json", "*.csv")
READING = threading.Lock()  # Python 3.11 cannot parse sources in several threads at once
INJECTED = "injected-parameters"  # the tag of the cell that papermill adds
READS = "READS"  # the parameter of a chapter that names, by a pattern, the results of others that it reads


def notebooks_folder() -> Path:
    """Return the folder of the chapters: ``notebooks`` in the working directory, else the checkout's.

    Raises FileNotFoundError if neither holds chapters.
    """
    for folder in (Path.cwd() / "notebooks", Path(__file__).resolve().parents[1]):
        if chapters(folder):
            return folder
    raise FileNotFoundError("no notebooks/ with chapters was found; run from a checkout.")


def chapters(folder: Path) -> list[Path]:
    """Return the chapters' notebooks in the order of their numbers."""
    return sorted(Path(folder).glob(NOTEBOOKS))


def find_chapter(folder: Path, wanted: str) -> Path:
    """Return the notebook of a chapter named by its number ("7", "07") or its name ("07_sparsification")."""
    found = chapters(folder)
    for path in found:
        number, _, title = path.stem.partition("_")
        if wanted in (path.stem, title) or (wanted.isdecimal() and int(wanted) == int(number)):
            return path
    raise ValueError(f"unknown chapter {wanted!r}{nearest(wanted, [path.stem for path in found])}")


def run_chapter(
    notebook: Path,
    profile: str,
    parameters: Mapping[str, Any],
    out: Path,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Run one chapter unless it was run before, and return its executed notebook in the folder `out`.

    `parameters` go before the profile's values; `threads` limits the CPU threads of the kernel. Progress is
    told by `say`, a line at the start and one at the end, and the cells' bars go to ``{chapter}.log`` until
    it succeeds; else all is shown. Where only Markdown changed since, the executed notebook gets the new text
    and nothing runs. Raises ValueError for an unknown or ill-typed parameter before anything runs, and
    ChapterError if a cell fails. Nothing in `out` changes
    but by success, apart from ``{chapter}.failed.ipynb`` for a look at the failure.
    """
    if "PROFILE" in parameters:
        raise ValueError("PROFILE is not given as a parameter here; name the profile itself (--profile).")
    chapter = notebook.stem
    given = {"PROFILE": profile, **parameters}
    profiles = notebook.parent / "profiles"
    with READING:
        settled = settle(chapter, declared(notebook), read_profile(profiles, profile), given)
        key = _key(notebook, settled, out)
    done = out / f"{chapter}.ipynb"
    if _is_current(done, key) and _has_text_of(notebook, done):
        if say:
            say(f"{chapter} stands: nothing that it depends on has changed")
        return done
    out.mkdir(parents=True, exist_ok=True)
    _clear_killed(out, chapter)
    prefix = f".{chapter}.{platform.node()}.{os.getpid()}."
    with _told(chapter, say), tempfile.TemporaryDirectory(prefix=prefix, dir=out) as folder:
        work = Path(folder)
        environment = {
            "FIHELPERS_RESULTS": folder,
            "FIHELPERS_RUN": str(out.resolve()),
            "FIHELPERS_CACHE": str((out / "cache").resolve()),
            "FIHELPERS_PROFILES": str(profiles.resolve()),
            **patient(),
        }
        if threads:
            environment[VARIABLE] = str(threads)
        with _logged(out / f"{chapter}.log", say) as log:
            execute(notebook, work / done.name, given, environment, log)
        if not (work / f"{chapter}.json").is_file():
            raise ChapterError(f"{chapter} kept nothing; its first cell must call begin({chapter!r}).")
        _publish(work, out, chapter, key)
    return done


@contextmanager
def _told(chapter: str, say: Callable[[str], None] | None) -> Iterator[None]:
    """Say when a chapter starts, and how it ended and after how long."""
    if say is None:
        yield
        return
    say(f"{chapter} starts")
    started = time.monotonic()
    try:
        yield
    except Exception as error:
        say(f"{chapter} failed after {time.monotonic() - started:.0f} s: {error}")
        raise
    say(f"{chapter} is done after {time.monotonic() - started:.0f} s")


@contextmanager
def _logged(path: Path, say: Callable[[str], None] | None) -> Iterator[TextIO | None]:
    """A file for the bars of a run that tells its progress otherwise; it goes when the run succeeds."""
    if say is None:
        yield None
        return
    with path.open("w", encoding="utf-8", buffering=1) as log:
        yield log
    path.unlink()


def _clear_killed(out: Path, chapter: str) -> None:
    """Remove what killed runs of a chapter left: folders of processes that are no more, on this machine."""
    for folder in out.glob(f".{chapter}.*"):
        place, _, _ = folder.name.rpartition(".")
        start, _, process = place.rpartition(".")
        ours = start == f".{chapter}.{platform.node()}" and process.isdecimal()
        if ours and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def runs_folder(notebooks: Path, profile: str) -> Path:
    """Return where the runs of a profile lie."""
    return notebooks.parent / "build" / "runs" / profile


def keep_results(out: Path, results: Path, chapter: str = "") -> None:
    """Make a run's files and tables, or those of one chapter, the ones in `results`; earlier ones go."""
    kept = {path.name: path.read_bytes() for path in _records(out, chapter)}
    for old in _records(results, chapter):
        if old.name not in kept:
            old.unlink()
    for name, content in kept.items():
        write_atomically(results / name, content)


def _records(folder: Path, chapter: str) -> list[Path]:
    found = [path for pattern in RECORDS for path in sorted(folder.glob(pattern))]
    return [path for path in found if path.name.startswith(f"{chapter}." if chapter else "")]


def _key(notebook: Path, settings: Mapping[str, Any], out: Path) -> str:
    """Hash of the notebook's code, library, what it uses of the chapters, versions, data, parameters, files.

    For a chapter that reads others' results, those that it would find beside `out` count as well, and for all
    the kept ones of a real model that they may draw.
    """
    named = [Path(text).expanduser() for text in _texts(settings) if text]
    read = results_beside(out, settings[READS]) if READS in settings else {}
    others = {name: path for name, path in read.items() if not name.startswith(f"{notebook.stem}.")}
    if settings.get("PROFILE") != REAL:  # which makes them
        drawn = kept_folder().glob("*" if READS in settings else f"{notebook.stem}.*")
        others |= {f"{REAL}/{path.name}": path for path in drawn}
    parts = {
        "notebook": [(_source(cell), cell["metadata"]) for cell in _code(notebook)],
        "library": package_sha256(PACKAGE),
        "chapters": {path.name: file_sha256(path) for path in used_files(notebook)},
        "versions": [sys.version, *(version(name) for name in ("torch", "transformers"))],
        "data": file_sha256(data_folder() / MANIFEST),
        "parameters": settings,
        "files": {str(path): _stamps(path) for path in named if path.exists()},
        "results": {name: file_sha256(path) for name, path in others.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def used_files(notebook: Path, chapters: Path = CHAPTERS) -> list[Path]:
    """The files of the chapters' package that a notebook uses: what it imports, directly or not.

    A chapter's own folder counts whole, as do files that are no modules, such as those of widgets.
    """
    sources = [_source(cell) for cell in _code(notebook)]
    own = chapters / f"ch{notebook.stem[:2]}"
    found = {path for path in lasting_files(chapters) if path.suffix != ".py" or path.parent == own}
    sources += [path.read_text(encoding="utf-8") for path in found if path.suffix == ".py"]
    todo = [name for source in sources for name in _imported(source)]
    while todo:
        place = chapters.joinpath(*todo.pop().split(".")[1:])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file() and path not in found:
                found.add(path)
                todo += _imported(path.read_text(encoding="utf-8"))
    return sorted(found)


def _cells(notebook: Path) -> list[dict[str, Any]]:
    return list(json.loads(notebook.read_text(encoding="utf-8"))["cells"])


def _code(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in _cells(notebook) if cell["cell_type"] == "code"]


def _source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])


@lru_cache(maxsize=256)
def _imported(source: str) -> list[str]:
    """The modules of the chapters' package that a source imports, and what might be one."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # of a notebook's cell; running it will say so
        return []
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.partition(".")[0] == __package__]


def _texts(settings: Mapping[str, Any]) -> Iterator[str]:
    """The settings that are text, those in groups too."""
    for value in settings.values():
        if isinstance(value, dict):
            yield from _texts(value)
        elif isinstance(value, str):
            yield value


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files that a parameter names, such as a model's folder."""
    files = lasting_files(path) if path.is_dir() else [path]
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def _is_current(done: Path, key: str) -> bool:
    stored = done.with_suffix(".key")
    return done.is_file() and stored.is_file() and stored.read_text(encoding="utf-8") == key


def _has_text_of(notebook: Path, done: Path) -> bool:
    """Give an executed notebook the Markdown of its source; False where it ran other cells."""
    executed = json.loads(done.read_text(encoding="utf-8"))
    ran = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    cells = []
    for cell in _cells(notebook):
        if cell["cell_type"] != "code":
            cells.append(cell)
            continue
        if not ran or _source(ran[0]) != _source(cell):
            return False
        cells.append(ran.pop(0))
        while ran and INJECTED in ran[0]["metadata"].get("tags", ()):
            cells.append(ran.pop(0))
    if ran:
        return False
    if [*map(_source, cells)] != [*map(_source, executed["cells"])]:
        text = json.dumps({**executed, "cells": cells}, indent=1, ensure_ascii=False)
        write_atomically(done, text.encode())
    return True


def _publish(work: Path, out: Path, chapter: str, key: str) -> None:
    """Put the files of a run in place; the key goes first and comes last, so it never vouches for a mix."""
    for stale in (".key", ".failed.ipynb"):
        (out / f"{chapter}{stale}").unlink(missing_ok=True)
    for table in out.glob(f"{chapter}.*.csv"):
        table.unlink()
    for path in work.iterdir():
        os.replace(path, out / path.name)
    write_atomically(out / f"{chapter}.key", key.encode())
