"""A real model beside the miniatures: the tables that its runs keep, as lessons draw them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from fichapters.kept import REAL, kept_folder
from fichapters.results import Chapter

KEPT_MARK = ", kept"  # after the name of a model whose table was kept


def table(chapter: Chapter, name: str) -> pd.DataFrame:
    """A table of a running chapter as it was kept on a real model; under the profile ``real`` its own.

    Raises FileNotFoundError where none is kept.
    """
    folder = chapter.folder if chapter.p.PROFILE == REAL else kept_folder()
    path = folder / f"{chapter.name}.{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"no table {path.name} of a real model is kept; run make real.")
    return pd.read_csv(path)


def beside(chapter: Chapter, name: str, own: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A running chapter's table, which it keeps, and the one kept of a real model, by the models' names."""
    chapter.keep(name, own)
    asked = _asked(vars(chapter.p))
    if chapter.p.PROFILE == REAL:
        return {asked: own}
    kept = table(chapter, name)
    return {asked: own, _asked(_record(chapter)["parameters"]) + KEPT_MARK: kept}


def both(chapter: Chapter, name: str, own: pd.DataFrame) -> pd.DataFrame:
    """The tables of `beside` one below the other; the column model names it, and says what was kept."""
    tables = beside(chapter, name, own)
    about = _record(chapter)["models"].get(next(reversed(tables)).removesuffix(KEPT_MARK))
    size = f"\n{about['weights']:,} weights, {about['sha256'][:8]}…" if about else ""
    titles = [title + size * title.endswith(KEPT_MARK) for title in tables]
    return pd.concat(list(tables.values()), keys=titles, names=["model"]).reset_index("model")


def models(chapter: Chapter) -> str:
    """The models of a chapter's kept run, in words: name, weights, first digits of the SHA-256."""
    return "\n".join(
        f"{name}: {about['weights']:,} weights, SHA-256 {about['sha256'][:16]}…"
        for name, about in _record(chapter)["models"].items()
    )


def _asked(parameters: Mapping[str, Any]) -> str:
    """The model that a chapter is about; one about a network's size alone needs none."""
    return str(parameters.get("MODEL") or parameters.get("BASE") or "random weights")


def _record(chapter: Chapter) -> dict[str, Any]:
    """What the kept run had open, by name, and its parameters; nothing yet in the first such run."""
    path = kept_folder() / f"{chapter.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"models": {}}
