"""A chapter's cells up to the one that opens its first model: what they refuse is refused before that."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from fichapters import results
from fichapters.ch09 import lab as merging
from fichapters.parameters import declared, read_profile, settle
from fichapters.runs import chapters
from fihelpers.models import language as models
from fihelpers.models import vision

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {path.stem: path for path in chapters(ROOT / "notebooks")}


class Opened(Exception):
    """A model would have been opened."""


class Running(SimpleNamespace):
    """Stands for a running chapter that keeps nothing."""

    def keep(self, *_: Any, **__: Any) -> None: ...


def settled(chapter: str, given: dict[str, Any], profile: str = "embedded") -> dict[str, Any]:
    """The parameters of a chapter under one of the project's profiles."""
    path = NOTEBOOKS[chapter]
    sections = read_profile(path.parent / "profiles", profile)
    return settle(chapter, declared(path), sections, {"PROFILE": profile, **given})


def run_until_opened(
    chapter: str, settings: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the cells of a chapter one after the other; raises `Opened` in place of opening a model."""

    def refuse(*_: Any, **__: Any) -> None:
        raise Opened

    running = Running(p=SimpleNamespace(**settings), cache=cache, name=chapter)
    monkeypatch.setattr(results, "begin", lambda name: running)
    monkeypatch.setattr("fihelpers.open_model", refuse)  # first, lest the package keep the next ones
    for module in (models, merging):
        monkeypatch.setattr(module, "open_model", refuse)
    monkeypatch.setattr(vision, "open_vision_model", refuse)
    names: dict[str, Any] = {}
    for cell in nbformat.read(NOTEBOOKS[chapter], as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and not any(tag.startswith(("param", "exercise")) for tag in tags):
            exec(compile(cell.source, chapter, "exec"), names)
