"""The reference is complete: every module has its page, every function its words, every link its section."""

import re
from pathlib import Path

import nbformat
import pytest

from fibook import reference
from fibook.build import BOOK
from fihelpers.data import PACKAGE

MODULES = [reference.read_module(name) for name in reference.module_names()]
SOURCE = '''"""A module."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Pair:
    """Two."""
    left: int
    right: int = 2

    @property
    def sum(self) -> int:
        """Both."""
        return self.left + self.right

    @classmethod
    def of(cls, *values: int, **more: str) -> "Pair":
        return cls(*values)

    def _hidden(self) -> None: ...

def first(pair: Pair, /, *, times: int = 1) -> int:
    """The `Pair`'s first."""
    return pair.left * times

def _hidden() -> None: ...
'''


def test_a_module_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "pairs.py").write_text(SOURCE)
    assert reference.module_names(tmp_path / "package") == ["package.pairs"]
    module = reference.read_module("package.pairs", tmp_path / "package")
    entries = [entry for top in module.entries for entry in top.walk()]
    assert module.doc == "A module."
    assert [(entry.kind, entry.signature) for entry in entries] == [
        ("class", "Pair(left: int, right: int = 2)"),
        ("property", "Pair.sum"),
        ("method", "Pair.of(*values: int, **more: str) -> 'Pair'"),
        ("function", "first(pair: Pair, /, *, times: int=1) -> int"),
    ]
    assert SOURCE.splitlines()[entries[-1].line - 1].startswith("def first(")
    with pytest.raises(FileNotFoundError, match=r"no module package\.none"):
        reference.read_module("package.none", tmp_path / "package")


def test_every_module_has_a_place_in_the_reference_and_only_one() -> None:
    shown: list[str] = []
    for page in sorted((BOOK / "api").glob("*.md")):
        for names in re.findall(r"```\{fi-modules\}\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            shown += [found for name in names.split() for found in reference.below(name)]
    assert sorted(shown) == reference.module_names(), "name the module in a page of book/api"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_every_public_function_and_class_says_what_it_does(module: reference.Module) -> None:
    assert module.doc
    assert [entry.name for entry in module.entries if not entry.doc] == []


def test_a_name_means_what_the_module_means_by_it() -> None:
    assert reference.meaning("fi", "fihelpers.influence") == "fihelpers.influence.fi"
    assert reference.meaning("Spectral", "fihelpers.scores.weights") == "fihelpers.filters.Spectral"
    assert reference.meaning("Example", "fihelpers.scores.weights") == "fihelpers.tasks.base.Example"
    assert reference.meaning("Tensor", "fihelpers.influence") is None
    assert reference.meaning("score_weights", "fihelpers.influence") is None
    quoted = reference.meaning("score_weights", "fihelpers.influence", quoted=True)
    assert quoted == "fihelpers.scores.weights.score_weights"
    assert reference.meaning("others", "fihelpers.influence", quoted=True) is None  # an argument there


def test_links_from_the_pages_to_sections_of_chapters_exist() -> None:
    notebooks = PACKAGE.parent / "notebooks"
    links = [
        (page.name, chapter, anchor)
        for page in sorted(BOOK.glob("*.md"))
        for chapter, anchor in re.findall(r"\(chapters/([\w.]+)#([\w-]+)\)", page.read_text("utf-8"))
    ]
    assert len(links) > 40
    sections = {chapter: _sections(notebooks / chapter) for _, chapter, _ in links}
    assert [link for link in links if link[2] not in sections[link[1]]] == []


def _sections(notebook: Path) -> set[str]:
    """Names of the sections of a chapter, as links call them."""
    text = "\n\n".join(
        cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "markdown"
    )
    headings = re.findall(r"(?m)^#{1,3} (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
