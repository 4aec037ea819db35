"""All chapters of a book: side by side where cores and memory allow it, the longest first."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import psutil

from fichapters.kernels import end_kernels
from fichapters.parameters import MINUTES, declared, read_profile
from fichapters.runs import READS, chapters, run_chapter
from fihelpers.threads import threads_for

NEEDED = 1.5e9  # bytes that a chapter takes at most on the bundled models
ALONE = ("10_cost",)  # chapters that measure time, which another at work would lengthen


def side_by_side(asked: int | None = None, needed: float = NEEDED) -> int:
    """Return how many runs may go on at a time: as many as asked for, else a run for each physical core.

    In either case no more than the free memory holds, of which each may need so many bytes; it is said where
    fewer run than asked for.
    """
    held = max(1, int(psutil.virtual_memory().available // needed))
    if asked is not None and asked > held:
        say(f"memory is free for {held} at a time, not {asked}: each may need {needed / 1e9:.2g} GB")
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):  # a process may be kept to some of them
        cores = min(cores, len(os.sched_getaffinity(0)))
    return min(asked or cores, held)


def say(line: str) -> None:
    """Tell how far the runs are, with the time of day, on stderr."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def run_all(
    folder: Path, profile: str, out: Path, jobs: int | None = None, threads: int | None = None
) -> list[Path]:
    """Run every chapter of a folder and return the executed notebooks, in order.

    jobs: run at a time (by default as :func:`side_by_side` finds). threads: of each chapter, by default as
    :func:`fihelpers.threads.threads_for` says. Raises ValueError for jobs < 1, and what `run_chapters`
    raises.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"at least one job must run, not {jobs}.")
    foreseen = read_profile(folder / "profiles", profile).get(MINUTES, {})
    run = partial(run_chapter, profile=profile, parameters={}, out=out, say=say)
    return run_chapters(chapters(folder), run, out, foreseen, side_by_side(jobs), threads)


def run_chapters(
    paths: Sequence[Path],
    run: Callable[..., Path],
    out: Path,
    foreseen: Mapping[str, float],
    jobs: int,
    threads: int | None,
) -> list[Path]:
    """Run some chapters, so many at a time, and return the executed notebooks, in order.

    run: runs the notebook that it is given with the ``threads`` that it is given. foreseen: minutes of
    chapters. The longest start first; those that measure time and those that read the others' results come
    last, each by itself. After a failure no chapter starts any more, and the first one in the order of the
    chapters is raised. An interrupt ends all kernels.
    """
    single = threads_for(asked=threads)
    reading = [path for path in paths if READS in declared(path)]
    timing = [path for path in paths if path.stem in ALONE and path not in reading]
    others = [path for path in paths if path not in (*reading, *timing)]
    others.sort(key=lambda path: _seconds(path.stem, out, foreseen), reverse=True)
    jobs = min(jobs, max(1, len(others)))
    done = _run(others, partial(run, threads=threads_for(jobs, threads)), jobs)
    for path in (*timing, *reading):
        done += _run([path], partial(run, threads=single), 1)
    return sorted(done)


def _run(paths: Sequence[Path], run: Callable[[Path], Path], jobs: int) -> list[Path]:
    """Run some chapters, so many at a time, in this order."""
    pool = ThreadPoolExecutor(jobs)
    runs = {path: pool.submit(run, path) for path in paths}

    def stop_after_failure(ended: Future[Path]) -> None:
        if not ended.cancelled() and ended.exception():
            pool.shutdown(wait=False, cancel_futures=True)

    for future in runs.values():
        future.add_done_callback(stop_after_failure)  # called before the same thread starts another
    try:
        wait(runs.values(), return_when=FIRST_EXCEPTION)
        pool.shutdown()
    except BaseException:  # an interrupt
        pool.shutdown(wait=False, cancel_futures=True)
        _end(list(runs.values()))
        raise
    return [runs[path].result() for path in sorted(runs) if not runs[path].cancelled()]


def _end(runs: Sequence[Future[Path]]) -> None:
    """End all kernels, and those that were just about to start."""
    say("interrupted: all chapters under way are ended")
    while not all(run.done() for run in runs):
        end_kernels()
        time.sleep(0.1)


def _seconds(chapter: str, out: Path, foreseen: Mapping[str, float]) -> float:
    """How long a chapter took when it was last run into this folder, or what its profile foresees in minutes.

    A chapter of which neither is known comes first.
    """
    last = out / f"{chapter}.ipynb"
    found = {}
    if last.is_file():
        found = json.loads(last.read_text(encoding="utf-8"))["metadata"].get("fihelpers", {})
    return float(found.get("seconds", 60 * foreseen.get(chapter, math.inf)))
