"""The reference is complete: every module has its page, every function its words, every link its section."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import nbformat
import pytest

from fibook import reference
from fibook.build import BOOK
from fihelpers.data import PACKAGE


def test_a_docstring_is_said_in_the_markup_of_sphinx() -> None:
    importlib.import_module("fihelpers.scores.weights")
    doc = """See `score_weights`, :func:`Spectral`'s `rates` and ``a`b```: |x|_2 * 2.

    rates: shares [0, 1].
    others: more,
        and more.

    - one
    - two

      as it stands
    """
    found = reference.restructured(inspect.cleandoc(doc), "fihelpers.scores.weights")
    assert found.split("\n\n") == [
        r"See \ :py:obj:`score_weights <fihelpers.scores.weights.score_weights>`\ , "
        r"\ :py:obj:`Spectral <fihelpers.filters.Spectral>`\ 's "
        r"\ ``rates``\  and \ ``a`b```\ : \|x\|\_2 \* 2.",
        r"* rates: shares \[0, 1\].",
        "* others: more, and more.",
        "* one",
        "* two",
        ".. code-block:: text",
        "  as it stands",
    ]


def test_a_name_that_is_no_module_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"no module fihelpers\.none"):
        reference.file_of("fihelpers.none")
    with pytest.raises(FileNotFoundError, match=r"no module elsewhere"):
        reference.file_of("elsewhere")


def test_every_module_has_a_place_in_the_reference_and_only_one() -> None:
    shown: list[str] = []
    for page in sorted((BOOK / "api").glob("*.md")):
        for names in re.findall(r"```\{fi-modules\}\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            shown += [found for name in names.split() for found in reference.below(name)]
    assert sorted(shown) == sorted(reference.module_names()), "name the module in a page of book/api"


@pytest.mark.parametrize("module", reference.module_names())
def test_every_public_function_and_class_says_what_it_does(module: str) -> None:
    assert ast.get_docstring(ast.parse(reference.file_of(module).read_text("utf-8")))
    found = reference.definitions(module).items()
    bare = [name.removeprefix(f"{module}.") for name, node in found if not ast.get_docstring(node)]
    assert [name for name in bare if "." not in name] == []  # a method may be clear by its name


def test_a_name_means_what_the_module_means_by_it() -> None:
    for module in ("fihelpers.influence", "fihelpers.scores.weights"):
        importlib.import_module(module)
    assert reference.meaning("fi", "fihelpers.influence") == "fihelpers.influence.fi"
    assert reference.meaning("Spectral", "fihelpers.scores.weights") == "fihelpers.filters.Spectral"
    assert reference.meaning("Example", "fihelpers.scores.weights") == "fihelpers.tasks.base.Example"
    assert reference.meaning("Tensor", "fihelpers.influence") is None
    found = reference.meaning("score_weights", "fihelpers.influence")
    assert found == "fihelpers.scores.weights.score_weights"
    assert reference.meaning("others", "fihelpers.influence") is None  # an argument there


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
