"""What a published book has beside its pages: addresses, status, a sitemap, an offline copy."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml

from fihelpers.data import package_sha256, write_atomically

ADDRESS_PATTERN = re.compile(r"https://github\.com/(?P<owner>[\w-]+)/(?P<name>[\w.-]+?)(?:\.git)?/?")
BRANCH = "main"
OFFLINE = "fihelpers-book.zip"
ONLINE_ONLY = re.compile(r'<div class="online-only[^"]*">.*?</div>', re.DOTALL)  # such as the zip's own link
CARD = "social-card.png"  # among the files that pages share
STATUS = "status.txt"  # in book/chapters, beside the runs that it describes; book/status.md shows it
NOT_STORED = (".map",)  # for developers of the theme; no page loads them
SITE_LIMIT = 60e6  # bytes
PAGE_LIMIT = 3e6  # bytes of a page and its pictures; scripts and fonts are shared by all pages
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # so that the same pages make the same zip
PACKAGES = ("jupyter-book", "Sphinx", "myst-nb")


@dataclass(frozen=True)
class Address:
    """Where the project lives on GitHub, and what follows from it."""

    owner: str
    name: str

    @property
    def repository(self) -> str:
        """The repository's own address."""
        return f"https://github.com/{self.owner}/{self.name}"

    @property
    def pages(self) -> str:
        """Where GitHub Pages shows the book, with a closing slash."""
        host = f"{self.owner.lower()}.github.io"
        return f"https://{host}/" if self.name.lower() == host else f"https://{host}/{self.name}/"

    def binder(self, chapter: str) -> str:
        """Opens the chapter's notebook in an environment that Binder makes from environment.yml."""
        place = f"notebooks%2F{chapter}.ipynb"
        return f"https://mybinder.org/v2/gh/{self.owner}/{self.name}/{BRANCH}?labpath={place}"

    def colab(self, chapter: str) -> str:
        """Opens the chapter's notebook in Colab, which has nothing of this project installed."""
        place = f"{self.owner}/{self.name}/blob/{BRANCH}/notebooks/{chapter}.ipynb"
        return f"https://colab.research.google.com/github/{place}"


def address(book: Path) -> Address | None:
    """The project's address: `repository: url` of book/_config.yml, else FIHELPERS_REPOSITORY, else none.

    Raises ValueError for an address that is not one of a GitHub repository.
    """
    config = yaml.safe_load((book / "_config.yml").read_text("utf-8"))
    url = (config.get("repository") or {}).get("url") or os.environ.get("FIHELPERS_REPOSITORY")
    if not url:
        return None
    found = ADDRESS_PATTERN.fullmatch(url)
    if found is None:
        raise ValueError(f"the repository's address {url!r} must read https://github.com/OWNER/NAME")
    return Address(found["owner"], found["name"])


def write_status(runs: Path, chapters: list[str], book: Path) -> None:
    """Writes book/chapters/status.txt: what each chapter's run took and came from, as Markdown tables."""
    rows = [_status(runs, name) for name in chapters]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    lines = ["| Chapter | Run time | Profile | Tables kept | Hash of the run |", "|---|---|---|---|---|"]
    lines += [
        f"| [](chapters/{row['chapter']}.ipynb) | {_duration(row['seconds'])} | {row['profile']} "
        f"| {row['tables']} | `{row['key'][:12]}` |"
        for row in rows
    ]
    if rows and len(seconds) == len(rows):
        lines.append(
            f"| All chapters | {_duration(sum(seconds))} | | {sum(row['tables'] for row in rows)} | |"
        )
    lines += ["", "| What | Version |", "|---|---|"]
    lines += [f"| {what} | {value} |" for what, value in _versions(rows, book).items()]
    write_atomically(book / "chapters" / STATUS, ("\n".join(lines) + "\n").encode())


def finish(html: Path, where: Address | None) -> None:
    """Makes what Sphinx does not: the sitemap where the address is known, and the offline copy."""
    for path in html.rglob("*"):
        if path.suffix in NOT_STORED:
            path.unlink()
    if where:
        write_atomically(html / "sitemap.xml", _sitemap(html, where).encode())
    write_offline_copy(html, html / OFFLINE)


def write_offline_copy(html: Path, target: Path) -> None:
    """Packs the pages into a zip that works from the disk, in a folder of its own.

    What stands in a ``<div class="online-only">`` is left out, and so is what only a web server needs.
    """
    folder = target.stem
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(html.rglob("*")):
            place = path.relative_to(html).as_posix()
            if path.is_dir() or path == target or place in (".key", ".buildinfo", "sitemap.xml"):
                continue
            content = path.read_bytes()
            if path.suffix == ".html":
                content = ONLINE_ONLY.sub("", content.decode()).encode()
            entry = zipfile.ZipInfo(f"{folder}/{place}", LONG_AGO)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)


def check_sizes(html: Path) -> list[str]:
    """What is too large, one finding a line: the whole site, or a page with the pictures that it shows."""
    findings = []
    site = sum(path.stat().st_size for path in html.rglob("*") if path.is_file())
    if site > SITE_LIMIT:
        findings.append(f"the site has {site / 1e6:.1f} MB, more than {SITE_LIMIT / 1e6:.0f} MB")
    for page in sorted(html.rglob("*.html")):
        text = page.read_text("utf-8")
        sources = set(re.findall(r'<img\b[^>]*?\ssrc="([^":]+)"', text))
        pictures = [picture for source in sources if (picture := page.parent / source).is_file()]
        size = page.stat().st_size + sum(picture.stat().st_size for picture in pictures)
        if size > PAGE_LIMIT:
            name = page.relative_to(html).as_posix()
            findings.append(
                f"{name}: {size / 1e6:.1f} MB with its pictures, more than {PAGE_LIMIT / 1e6:.0f} MB"
            )
    return findings


def _status(runs: Path, chapter: str) -> dict[str, Any]:
    """What is known of one run; a notebook that was run otherwise has no key and no time."""
    about, key = runs / f"{chapter}.json", runs / f"{chapter}.key"
    content = json.loads(about.read_text("utf-8")) if about.is_file() else {}
    metadata = json.loads((runs / f"{chapter}.ipynb").read_text("utf-8"))["metadata"]
    return {
        "chapter": chapter,
        "seconds": metadata.get("fihelpers", {}).get("seconds"),
        "profile": content.get("profile", "not recorded"),
        "tables": len(list(runs.glob(f"{chapter}.*.csv"))),
        "versions": content.get("versions", {}),
        "key": key.read_text("utf-8") if key.is_file() else "not recorded",
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    minutes, rest = divmod(round(seconds), 60)
    text = f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _versions(rows: list[dict[str, Any]], book: Path) -> dict[str, str]:
    """Versions of what the chapters ran on (several where they differ) and of what built the pages."""
    ran: dict[str, dict[str, None]] = {}
    for row in rows:
        for what, value in row["versions"].items():
            ran.setdefault(what, {})[value] = None
    built = {name: version(name) for name in PACKAGES}
    own = {"commit": _commit(book), "hash of the package's files": f"`{package_sha256()[:12]}`"}
    return {**{what: "; ".join(values) for what, values in ran.items()}, **built, **own}


def _commit(book: Path) -> str:
    """The commit that the pages are made from, and whether anything was changed since."""
    git = shutil.which("git")

    def ask(*words: str) -> str | None:
        done = subprocess.run([str(git), "-C", str(book), *words], capture_output=True, text=True)
        return None if done.returncode else done.stdout.strip()

    commit = ask("rev-parse", "HEAD") if git else None
    if not commit:
        return "not recorded"
    return f"`{commit[:12]}`" + (", with later changes" if ask("status", "--porcelain") else "")


def _sitemap(html: Path, where: Address) -> str:
    pages = [path.relative_to(html).as_posix() for path in sorted(html.rglob("*.html"))]
    skipped = ("index.html", "search.html", "genindex.html")
    shown = [page for page in pages if page not in skipped and not page.startswith("_static/")]
    entries = "".join(f"  <url><loc>{escape(where.pages + page)}</loc></url>\n" for page in shown)
    space = "http://www.sitemaps.org/schemas/sitemap/0.9"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="{space}">\n{entries}</urlset>\n'
