"""The book's reference: what the packages offer, by Sphinx's autodoc, and the pictures of the chapters.

The Sphinx extension `fibook.pages` adds the two directives of this module to the book. Docstrings are plain
words with names in backticks; :func:`restructured` says the same in the markup that autodoc reads.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Iterator
from functools import cache, reduce
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from docutils import nodes
from docutils.parsers.rst import Parser
from docutils.utils import new_document
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

from fibook.site import BRANCH, Address

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "fihelpers": ROOT / "fihelpers",
    "fichapters": ROOT / "notebooks" / "chapters",
    "fibook": ROOT / "book" / "bookmaker",
    "fiminis": ROOT / "data" / "minis",
}
Definition = ast.FunctionDef | ast.ClassDef
SETTINGS = {  # of autodoc
    "autodoc_default_options": {"members": True, "member-order": "bysource", "ignore-module-all": True},
    "autodoc_preserve_defaults": True,
    "autodoc_typehints_format": "short",
    "nitpick_ignore_regex": [("py:class", ".*")],  # types in signatures, of which many are other packages'
}
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
UNLIKE_AN_ARGUMENT = re.compile(r"[A-Z_.]")  # what else stands in backticks, such as `path`
CODE = re.compile(r"(`+)(.+?)\1(?!`)")
MARKUP = re.compile(r"([\\*_|<>\[\]`])")
ROLE = re.compile(r":[a-z]+:(?=`)")  # as in :func:`name`
ITEM = re.compile(r"(?m)^[-*] ")
ARGUMENT = re.compile(r"(?m)^(?=\*{0,2}[a-z_]\w*(?:, \w+)*: )")


def module_names() -> list[str]:
    """Dotted names of all modules of the packages, without those that are empty."""
    found = []
    for name, folder in PACKAGES.items():
        paths = [path for path in sorted(folder.rglob("*.py")) if path.read_text("utf-8").strip()]
        found += [".".join((name, *path.relative_to(folder).with_suffix("").parts)) for path in paths]
    return [name.removesuffix(".__init__") for name in found]


def below(name: str) -> list[str]:
    """Names of a module, and of the modules in it where it is a folder; the package itself is one file."""
    if name in PACKAGES:
        return [name]
    return [found for found in module_names() if found == name or found.startswith(f"{name}.")]


def file_of(name: str) -> Path:
    """The file of a module. Raises FileNotFoundError for a name that is no module of the packages."""
    package, *rest = name.split(".")
    place = PACKAGES[package].joinpath(*rest) if package in PACKAGES else Path(name)
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not path.is_file():
        raise FileNotFoundError(f"the packages have no module {name}")
    return path


@cache
def definitions(name: str) -> dict[str, Definition]:
    """A module's public functions and classes, and the public methods of these, by their full names."""
    tree = ast.parse(file_of(name).read_text("utf-8"))
    return {f"{name}.{place}": node for place, node in _definitions(tree)}


@cache
def known_names() -> dict[str, str]:
    """What a name in the prose may mean: the full names, and the last parts that one of them alone has."""
    full = [found for name in module_names() for found in definitions(name)]
    short: dict[str, list[str]] = {}
    for name in full:
        short.setdefault(name.split(".")[-1], []).append(name)
    lone = {last: names[0] for last, names in short.items() if len(names) == 1}
    return {**lone, **{name: name for name in full}}


def meaning(name: str, module: str) -> str | None:
    """The full name of what a docstring of an imported module calls so, or None for what is not ours.

    What the module neither defines nor imports may be an argument, unless it looks otherwise.
    """
    try:
        found = reduce(getattr, name.split("."), sys.modules[module])
        candidates = [f"{found.__module__}.{found.__qualname__}"]
    except AttributeError:
        candidates = [name] if UNLIKE_AN_ARGUMENT.search(name) else []
    known = known_names()
    return next((known[candidate] for candidate in candidates if candidate in known), None)


def restructured(doc: str, module: str) -> str:
    """A docstring in reStructuredText: paragraphs, lists and, where it is indented, as it stands."""
    found = []
    for block in re.split(r"\n\s*\n", doc.strip("\n")):
        lines = block.splitlines()
        if all(line.startswith("  ") for line in lines):
            found.append(".. code-block:: text\n\n" + block if lines else "")
        elif _all_start_with(ITEM, lines):
            found += [f"* {_inline(item, module)}" for item in ITEM.split(block)[1:]]
        elif _all_start_with(ARGUMENT, lines):
            found += [f"* {_inline(item, module)}" for item in ARGUMENT.split(block) if item]
        else:
            found.append(_inline(block, module))
    return "\n\n".join(found)


def convert_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Autodoc's `autodoc-process-docstring`."""
    module = name
    while module not in sys.modules:
        module = module.rpartition(".")[0]
    lines[:] = [*restructured("\n".join(lines), module).splitlines(), ""]


def choose_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Autodoc's `autodoc-skip-member`: every public method, and no field, which stands in the signature."""
    if type(obj).__name__ == "_tuplegetter":
        return True
    return False if inspect.isroutine(obj) and not name.startswith("_") else None


def resolve_fields(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Autodoc's `autodoc-process-signature`: what it does not know or cannot read.

    Types of a named tuple are text to it; a default that a factory makes, "<factory>", is no Python, and
    would leave the whole signature as it stands.
    """
    if "<factory>" in (signature or ""):
        return signature.replace("<factory>", "..."), returns
    if not hasattr(obj, "_fields"):
        return None
    types, found = get_type_hints(obj), inspect.signature(obj)
    fields = [field.replace(annotation=types[field.name]) for field in found.parameters.values()]
    return stringify_signature(found.replace(parameters=fields), unqualified_typehints=True), returns


def source_line(where: Address | None, module: str, name: str) -> str | None:
    """Where an object stands on GitHub, if it is known where the project lives."""
    if where is None:
        return None
    found = definitions(module).get(f"{module}.{name}")
    if found is None:  # a value
        return None
    place = file_of(module).relative_to(ROOT).as_posix()
    return f"{where.repository}/blob/{BRANCH}/{place}#L{found.lineno}"


def _definitions(tree: Any, owner: str = "") -> Iterator[tuple[str, Definition]]:
    """The public functions and classes of a module's tree, or the methods of a class's, by their names."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield owner + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{owner}{node.name}.")


def _all_start_with(pattern: re.Pattern[str], lines: list[str]) -> bool:
    """Whether each line does, but for those that go on with the line before and are therefore indented."""
    return all(pattern.match(line) or line.startswith(" ") for line in lines)


def _inline(text: str, module: str) -> str:
    """Words in one line, with what stands in backticks as code; names of the packages are links."""
    text = ROLE.sub("", " ".join(text.split())).replace("::", ":")
    found, end = "", 0
    for code in CODE.finditer(text):
        found += MARKUP.sub(r"\\\1", text[end : code.start()]) + _code(code[2], module)
        end = code.end()
    return found + MARKUP.sub(r"\\\1", text[end:])


def _code(text: str, module: str) -> str:
    target = meaning(text, module) if NAME.fullmatch(text) else None
    return f"\\ :py:obj:`{text} <{target}>`\\ " if target else f"\\ ``{text}``\\ "


class ModulesDirective(SphinxDirective):
    """``{fi-modules}``, with names of modules, a line each: a section for each, and for those in its folder.

    A section has the module's file, which the book carries with it, and what autodoc says of the module.
    """

    has_content = True
    option_spec: ClassVar[Any] = {}

    def run(self) -> list[nodes.Node]:
        """The sections; a name that belongs to no module is an error of the page."""
        sections: list[nodes.Node] = []
        for wanted in self.content:
            names = below(wanted)
            if not names:
                raise self.error(f"the package has no module {wanted}")
            sections += map(self._section, names)
        return sections

    def _section(self, name: str) -> nodes.section:
        section = nodes.section("", nodes.title("", "", nodes.literal(name, name)), names=[name])
        self.state.document.note_implicit_target(section, section)
        path = file_of(name)
        target = Path(os.path.relpath(path, self.env.srcdir)).as_posix()
        source = f"Source: :download:`{path.relative_to(ROOT).as_posix()} </{target}>`"
        section += self._parsed(f"{source}\n\n{self._described(name)}")
        return section

    def _described(self, name: str) -> str:
        """What autodoc is asked; where a library is missing, the module's own words."""
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] in PACKAGES:
                raise
            doc = ast.get_docstring(ast.parse(file_of(name).read_text("utf-8"))) or ""
            need = f"Its functions are listed where the package `{error.name}` is installed."
            return restructured(f"{doc}\n\n{need}", __name__)
        return f".. automodule:: {name}"

    def _parsed(self, text: str) -> list[nodes.Node]:
        """Nodes of reStructuredText, which a page in Markdown does not parse."""
        document = new_document(f"<{self.env.docname}>", self.state.document.settings)
        document.reporter = self.state.document.reporter
        Parser().parse(text, document)
        return document.children


class PicturesDirective(SphinxDirective):
    """``{fi-pictures}``: all pictures of the chapters, each in a link, under their chapters' titles."""

    def run(self) -> list[nodes.Node]:
        """A place that `list_pictures` fills once all pages are read."""
        return [Pictures()]


class Pictures(nodes.General, nodes.Element):
    """Where the list of pictures will stand."""


def list_pictures(app: Any, doctree: nodes.document, page: str) -> None:
    """Sphinx's `doctree-resolved`: puts the list of pictures where the page asks for it."""
    for place in list(doctree.findall(Pictures)):
        found: list[nodes.Node] = []
        for chapter in sorted(name for name in app.env.found_docs if name.startswith("chapters/")):
            uri = app.builder.get_relative_uri(page, chapter)
            sections = _sections(app.env.get_doctree(chapter))
            items = [_item(f"{uri}#{name}", *shown) for name, shown in sections.items()]
            if items:
                title = nodes.rubric("", app.env.titles[chapter].astext())
                found += [title, nodes.bullet_list("", *items)]
        place.replace_self(found)


def _sections(chapter: nodes.document) -> dict[str, tuple[str, list[str]]]:
    """The sections of a chapter that show pictures, by their anchors: heading, and the pictures' words."""
    sections: dict[str, tuple[str, list[str]]] = {}
    for image in chapter.findall(nodes.image):
        section = image.parent
        while not isinstance(section, nodes.section):
            section = section.parent
        heading = section.next_node(nodes.title).astext()
        sections.setdefault(section["ids"][0], (heading, []))[1].append(image.get("alt", ""))
    return sections


def _item(uri: str, heading: str, texts: list[str]) -> nodes.Node:
    """A section's heading in a link to it, and what its pictures show."""
    link = nodes.reference("", heading, internal=True, refuri=uri)
    count = f" ({len(texts)} pictures)" if len(texts) > 1 else ""
    words = nodes.paragraph("", "", link, nodes.Text(count))
    described = [text for text in dict.fromkeys(texts) if " " in text.strip()]  # not only a file's name
    return nodes.list_item("", words, *[nodes.paragraph("", text) for text in described])
