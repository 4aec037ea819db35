"""The profile ``real``, run chapter by chapter on a real model.

``python -m fihelpers real`` runs the chapters that the profile has minutes for, side by side where cores and
memory allow it. What is finished is kept, to the last calibration set, so that an interrupted or killed run
goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from fichapters.kept import REAL, kept_folder
from fichapters.parameters import declared, read_minutes, read_profile, settle
from fichapters.runs import find_chapter, keep_results, run_chapter
from fichapters.schedule import NEEDED, run_chapters, say, side_by_side
from fihelpers.jobs.preflight import SCORE, source_of, tokenizer_of
from fihelpers.tasks import load_task

COPIES = 15  # of a model's weights in float32, that a chapter was seen to hold at most
FEWEST = 20  # questions of a subject, below which a model's tokenizer leaves too few

_Asked = tuple[str, str | None, str, str]  # model, revision, task, subject


def run(
    notebooks: Path, out: Path, given: Mapping[str, Any], only: Sequence[str] = (), threads: int | None = None
) -> list[Path]:
    """Run the chapters of the profile into `out`, those of `only` or all, and return the notebooks.

    given: parameters of all chapters that declare them, before the profile's (a MODEL, a TASK). Where none is
    given, the tables become the book's after each chapter. Raises ValueError for a chapter that the profile
    has no minutes for and for too few questions, before anything runs, and what `run_chapter` raises.
    """
    profiles = notebooks / "profiles"
    minutes = read_minutes(profiles, REAL)
    wanted = [find_chapter(notebooks, name) for name in only or minutes]
    for path in wanted:
        if path.stem not in minutes:
            raise ValueError(f"the profile {REAL} has no {path.stem}; it has {', '.join(minutes)}.")
    profile = read_profile(profiles, REAL)
    settings = {}
    asked: dict[_Asked, None] = {}  # once, though many chapters ask the same
    for path in wanted:
        names = declared(path)
        settings[path] = _of_chapter(given, names, profile.get(path.stem, {}))
        asked |= dict.fromkeys(_asked(settle(path.stem, names, profile, {"PROFILE": REAL, **settings[path]})))
    _enough_questions(asked)
    left = {path.stem: minutes[path.stem] for path in wanted}
    say(f"{sum(left.values())} minutes by the profile, on two quiet cores; the bars are in {out}/*.log")

    def run_one(path: Path, threads: int | None) -> Path:
        executed = run_chapter(path, REAL, settings[path], out, threads, say)
        if not given:
            keep_results(out, kept_folder(), path.stem)
        del left[path.stem]
        say(f"left: {', '.join(f'{name} ({n} minutes)' for name, n in left.items()) or 'nothing'}")
        return executed

    model = given.get("MODEL", profile["all"]["MODEL"])
    needed = NEEDED + COPIES * SCORE * source_of(model, given.get("REVISION")).parameters
    return run_chapters(wanted, run_one, out, minutes, side_by_side(needed=needed), threads)


def _of_chapter(given: Mapping[str, Any], names: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What of `given` a chapter declares: its experts come from the MODEL, and ask what they learned."""
    told = {k: v for k, v in given.items() if k in names and not (k == "TASK" and k in own)}
    return {**told, "BASE": given["MODEL"]} if "BASE" in names and "MODEL" in given else told


def _asked(p: Mapping[str, Any]) -> Iterator[_Asked]:
    """The model, task and subjects that a chapter's questions are of, if it asks any."""
    if "TASK" not in p:
        return
    subjects = [*p.get("SUBJECTS", []), p.get("SUBJECT"), *chain(*p.get("DOMAINS", {}).values())]
    for subject in filter(None, subjects):
        yield p.get("MODEL", p.get("BASE")), p.get("REVISION"), p["TASK"], subject


def _enough_questions(asked: Iterable[_Asked]) -> None:
    """Raise ValueError where a model's tokenizer leaves fewer than `FEWEST` questions of a subject."""
    opened = cache(tokenizer_of)
    for model, revision, task, subject in asked:
        for split in ("val", "test"):
            found = len(load_task(task, subject, split, tokenizer=opened(model, revision)).examples)
            if found < FEWEST:
                raise ValueError(
                    f"the tokenizer of {model!r} leaves {found} {split} questions of {subject!r} whose "
                    f"options it tells apart; {FEWEST} are needed, so name another task (--task) or model."
                )
