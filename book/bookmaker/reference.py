"""The book's reference: what the package offers, read from its source without importing it, and its pictures.

The Sphinx extension `fibook.pages` adds the two directives of this module to the book.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.domains.python import PyClasslike, PyFunction, PyMethod, PyProperty
from sphinx.util.docutils import SphinxDirective

from fibook.site import BRANCH, address

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "fihelpers": ROOT / "fihelpers",
    "fichapters": ROOT / "notebooks" / "chapters",
    "fibook": ROOT / "book" / "bookmaker",
    "fiminis": ROOT / "data" / "minis",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef
DIRECTIVES = {"class": PyClasslike, "function": PyFunction, "method": PyMethod, "property": PyProperty}
FIELDS_ARE_ARGUMENTS = {"dataclass", "NamedTuple"}
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
UNLIKE_AN_ARGUMENT = re.compile(r"[A-Z_.]")  # what else stands in backticks, such as `path`
CODE = re.compile(r"(`+)(.+?)\1")
ROLE = re.compile(r":[a-z]+:(?=`)")  # as in :func:`name`
ITEM = re.compile(r"(?m)^[-*] ")
ARGUMENT = re.compile(r"(?m)^(?=\*{0,2}[a-z_]\w*(?:, \w+)*: )")


@dataclass(frozen=True)
class Entry:
    """A public function, class, method or property: its kind, name in the module, signature and docstring."""

    kind: str
    name: str
    signature: str
    doc: str
    line: int
    members: tuple[Entry, ...] = ()

    def walk(self) -> Iterator[Entry]:
        """The entry and what belongs to it."""
        yield self
        for member in self.members:
            yield from member.walk()


@dataclass(frozen=True)
class Module:
    """A module of the package: its dotted name, docstring and public entries, in the order of the file."""

    name: str
    path: Path
    doc: str
    entries: tuple[Entry, ...]


def module_names(packages: Mapping[str, Path] = PACKAGES) -> list[str]:
    """Dotted names of all modules of the packages, without those that are empty."""
    return [
        _dotted(path, name, folder)
        for name, folder in packages.items()
        for path in sorted(folder.rglob("*.py"))
        if path.read_text("utf-8").strip()
    ]


def below(name: str) -> list[str]:
    """Names of a module, and of the modules in it where it is a folder; the package itself is one file."""
    if name in PACKAGES:
        return [name]
    return [found for found in module_names() if found == name or found.startswith(f"{name}.")]


def read_module(name: str, packages: Mapping[str, Path] = PACKAGES) -> Module:
    """What a module offers. Raises FileNotFoundError for a name that is no module of the packages."""
    package, *rest = name.split(".")
    place = packages[package].joinpath(*rest) if package in packages else Path(name)
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not path.is_file():
        raise FileNotFoundError(f"the packages have no module {name}")
    tree = ast.parse(path.read_text("utf-8"))
    return Module(name, path, inspect.cleandoc(ast.get_docstring(tree) or ""), tuple(_entries(tree.body)))


@cache
def known_names() -> dict[str, str]:
    """What a name in the prose may mean: the full names, and the last parts that one entry alone has."""
    full = [
        f"{name}.{entry.name}"
        for name in module_names()
        for top in read_module(name).entries
        for entry in top.walk()
    ]
    short: dict[str, list[str]] = {}
    for name in full:
        short.setdefault(name.split(".")[-1], []).append(name)
    lone = {last: names[0] for last, names in short.items() if len(names) == 1}
    return {**lone, **{name: name for name in full}}


@cache
def _imports(module: str) -> dict[str, str]:
    """Where the names that a module imports from the package come from."""
    tree = ast.parse(read_module(module).path.read_text("utf-8"))
    nodes_ = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        name.asname or name.name: f"{node.module}.{name.name}"
        for node in nodes_
        if (node.module or "").partition(".")[0] in PACKAGES
        for name in node.names
    }


def meaning(name: str, module: str, quoted: bool = False) -> str | None:
    """The full name of what a module calls so, or None for what is not the package's.

    quoted: the name stands in backticks, so that it may be one that the module does not import.
    """
    known, first = known_names(), name.partition(".")[0]
    imported = _imports(module).get(first)
    candidates = [f"{module}.{name}"]
    if imported:
        candidates += [imported + name.removeprefix(first), name.split(".")[-1]]
    if quoted and UNLIKE_AN_ARGUMENT.search(name):
        candidates.append(name)
    return next((known[candidate] for candidate in candidates if candidate in known), None)


def _dotted(path: Path, package: str, folder: Path) -> str:
    parts = (package, *path.relative_to(folder).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _entries(body: Iterable[ast.stmt], owner: str = "") -> Iterator[Entry]:
    """The public functions and classes of a module's body, or the methods of a class's."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{owner}.{node.name}" if owner else node.name
        doc = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            members = tuple(_entries(node.body, name))
            yield Entry("class", name, name + _class_arguments(node), doc, node.lineno, members)
        else:
            yield _function(node, name, doc, bool(owner))


def _function(node: Function, name: str, doc: str, method: bool) -> Entry:
    decorators = {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if decorators & {"property", "cached_property", "functools.cached_property"}:
        return Entry("property", name, name, doc, node.lineno)
    arguments = _without_first(node.args) if method and "staticmethod" not in decorators else node.args
    kind = "method" if method else "function"
    return Entry(kind, name, f"{name}({ast.unparse(arguments)}){returns}", doc, node.lineno)


def _without_first(arguments: ast.arguments) -> ast.arguments:
    """Arguments without self or cls."""
    first = [*arguments.posonlyargs, *arguments.args][:1]
    return ast.arguments(
        posonlyargs=[argument for argument in arguments.posonlyargs if argument not in first],
        args=[argument for argument in arguments.args if argument not in first],
        vararg=arguments.vararg,
        kwonlyargs=arguments.kwonlyargs,
        kw_defaults=arguments.kw_defaults,
        kwarg=arguments.kwarg,
        defaults=arguments.defaults,
    )


def _class_arguments(node: ast.ClassDef) -> str:
    """What a class is made from: the fields of a dataclass or named tuple, else what __init__ takes."""
    marks = {ast.unparse(mark).partition("(")[0] for mark in [*node.decorator_list, *node.bases]}
    if marks & FIELDS_ARE_ARGUMENTS:
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and _is_field(part)]
        return f"({', '.join(map(_field, fields))})"
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return f"({ast.unparse(_without_first(part.args))})"
    return ""


def _is_field(part: ast.AnnAssign) -> bool:
    return not ast.unparse(part.target).startswith("_") and "ClassVar" not in ast.unparse(part.annotation)


def _field(part: ast.AnnAssign) -> str:
    said = f"{ast.unparse(part.target)}: {ast.unparse(part.annotation)}"
    if part.value is None:
        return said
    default = ast.unparse(part.value)
    return f"{said} = {'...' if default.startswith('field(') else default}"


class ModulesDirective(SphinxDirective):
    """``{fi-modules}``, with names of modules, a line each: a section for each, and for those in its folder.

    A section has the module's docstring, its source, and its public functions and classes.
    """

    has_content = True
    option_spec: ClassVar[Any] = {}

    def run(self) -> list[nodes.Node]:
        """The sections; a name that belongs to no module is an error of the page."""
        self.where = address(Path(self.env.srcdir))
        sections: list[nodes.Node] = []
        for wanted in self.content:
            names = below(wanted)
            if not names:
                raise self.error(f"the package has no module {wanted}")
            sections += map(self._section, names)
        return sections

    def _section(self, name: str) -> nodes.section:
        self.module = read_module(name)
        self.env.ref_context["py:module"] = name
        section = nodes.section("", nodes.title("", "", nodes.literal(name, name)), names=[name])
        self.state.document.note_implicit_target(section, section)
        section += [*_paragraphs(self.module.doc, name), self._source()]
        for entry in self.module.entries:
            section += self._describe(entry)
        self.env.ref_context.pop("py:module")
        return section

    def _source(self) -> nodes.Node:
        """A link to the module's file, which the book carries with it."""
        place = self.module.path.relative_to(ROOT).as_posix()
        target = Path(os.path.relpath(self.module.path, self.env.srcdir)).as_posix()
        link = addnodes.download_reference("", "", reftarget=f"/{target}", refdoc=self.env.docname)
        link += nodes.literal(place, place)
        return nodes.paragraph("", "", nodes.Text("Source: "), link)

    def _describe(self, entry: Entry) -> list[nodes.Node]:
        """Sphinx's own description of a Python object, filled with the docstring and the members."""
        directive = DIRECTIVES[entry.kind](
            name=f"py:{entry.kind}",
            arguments=[" ".join(entry.signature.split())],
            options={"module": self.module.name},
            content=StringList(),
            lineno=self.lineno,
            content_offset=self.content_offset,
            block_text="",
            state=self.state,
            state_machine=self.state_machine,
        )
        made = directive.run()
        (content,) = [found for node in made for found in node.findall(addnodes.desc_content)]
        content += _paragraphs(entry.doc, self.module.name)
        content += [node for member in entry.members for node in self._describe(member)]
        signature = content.parent.children[0]
        assert isinstance(signature, nodes.Element)
        for xref in list(signature.findall(addnodes.pending_xref)):
            target = meaning(xref["reftarget"], self.module.name)
            if target:
                xref["reftarget"], xref["reftype"] = target, "obj"
            else:
                xref.replace_self(xref.children)
        signature += self._lines(entry)
        return made

    def _lines(self, entry: Entry) -> list[nodes.Node]:
        """A link to the entry's line, where it is known where the project lives."""
        if self.where is None:
            return []
        place = self.module.path.relative_to(ROOT).as_posix()
        uri = f"{self.where.repository}/blob/{BRANCH}/{place}#L{entry.line}"
        link = nodes.reference("", "[source]", internal=False, refuri=uri)
        return [addnodes.only("", nodes.inline("", " "), link, expr="html")]


def _paragraphs(doc: str, module: str) -> list[nodes.Node]:
    """A docstring as paragraphs, lists and, where it is indented, as it stands."""
    found: list[nodes.Node] = []
    for block in re.split(r"\n\s*\n", doc.strip("\n")):
        lines = block.splitlines()
        if all(line.startswith("  ") for line in lines):
            text = inspect.cleandoc("\n" + block)
            found += [nodes.literal_block(text, text, language="text")] if text else []
        elif _all_start_with(ITEM, lines):
            found.append(_list(ITEM.split(block)[1:], module))
        elif _all_start_with(ARGUMENT, lines):
            found.append(_list([item for item in ARGUMENT.split(block) if item], module))
        else:
            found.append(nodes.paragraph("", "", *_inline(block, module)))
    return found


def _all_start_with(pattern: re.Pattern[str], lines: list[str]) -> bool:
    """Whether each line does, but for those that go on with the line before and are therefore indented."""
    return all(pattern.match(line) or line.startswith(" ") for line in lines)


def _list(items: list[str], module: str) -> nodes.Node:
    parts = [nodes.list_item("", nodes.paragraph("", "", *_inline(item, module))) for item in items]
    return nodes.bullet_list("", *parts)


def _inline(text: str, module: str) -> list[nodes.Node]:
    """Words, with what stands in backticks as code; names of the package are links."""
    text = ROLE.sub("", " ".join(text.split())).replace("::", ":")
    found: list[nodes.Node] = []
    end = 0
    for code in CODE.finditer(text):
        found += [nodes.Text(text[end : code.start()]), _code(code[2], module)]
        end = code.end()
    return [*found, nodes.Text(text[end:])]


def _code(text: str, module: str) -> nodes.Node:
    literal = nodes.literal(text, text)
    target = meaning(text, module, quoted=True) if NAME.fullmatch(text) else None
    if target is None:
        return literal
    return addnodes.pending_xref("", literal, refdomain="py", reftype="obj", reftarget=target)


class PicturesDirective(SphinxDirective):
    """``{fi-pictures}``: all pictures of the chapters, each in a link, under their chapters' titles."""

    def run(self) -> list[nodes.Node]:
        """A place that `list_pictures` fills once all pages are read."""
        return [Pictures()]


class Pictures(nodes.General, nodes.Element):
    """Where the list of pictures will stand."""


def collect_pictures(app: Any, doctree: nodes.document) -> None:
    """Sphinx's `doctree-read`: keeps the chapter's sections that show pictures, and the pictures' words."""
    if not app.env.docname.startswith("chapters/"):
        return
    sections: dict[str, tuple[str, list[str]]] = {}
    for image in doctree.findall(nodes.image):
        section = image.parent
        while not isinstance(section, nodes.section):
            section = section.parent
        heading = section.next_node(nodes.title).astext()
        sections.setdefault(section["ids"][0], (heading, []))[1].append(image.get("alt", ""))
    pictures = app.env.__dict__.setdefault("fi_pictures", {})
    pictures[app.env.docname] = sections


def list_pictures(app: Any, doctree: nodes.document, page: str) -> None:
    """Sphinx's `doctree-resolved`: puts the list of pictures where the page asks for it."""
    for place in list(doctree.findall(Pictures)):
        found: list[nodes.Node] = []
        for chapter, sections in sorted(getattr(app.env, "fi_pictures", {}).items()):
            uri = app.builder.get_relative_uri(page, chapter)
            items = [_item(f"{uri}#{name}", *shown) for name, shown in sections.items()]
            if items:
                title = nodes.rubric("", app.env.titles[chapter].astext())
                found += [title, nodes.bullet_list("", *items)]
        place.replace_self(found)


def _item(uri: str, heading: str, texts: list[str]) -> nodes.Node:
    """A section's heading in a link to it, and what its pictures show."""
    link = nodes.reference("", heading, internal=True, refuri=uri)
    count = f" ({len(texts)} pictures)" if len(texts) > 1 else ""
    words = nodes.paragraph("", "", link, nodes.Text(count))
    described = [text for text in dict.fromkeys(texts) if " " in text.strip()]  # not only a file's name
    return nodes.list_item("", words, *[nodes.paragraph("", text) for text in described])
