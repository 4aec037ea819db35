"""The commands of the book: build it, print a chapter of it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from fichapters.commands import BOOKS_PROFILE, add_threads

NO_BROWSER = "no Chromium or Chrome was found, so no page was opened."


def add(commands: Any) -> None:
    """Add the commands to those of ``python -m fihelpers``."""
    _add_build(commands)
    pdf = commands.add_parser("pdf", help="print one chapter of the built book as PDF")
    pdf.add_argument("chapter", help="its number or name, such as 7 or 07_sparsification")
    pdf.add_argument("--out", type=Path, help="the file to write (build/pdf/CHAPTER.pdf)")
    pdf.set_defaults(command=_pdf)


def _add_build(commands: Any) -> None:
    build = commands.add_parser("build", help="run every chapter that changed and build the book")
    build.add_argument("--profile", default=BOOKS_PROFILE, help="a file of notebooks/profiles (%(default)s)")
    build.add_argument("--check", action="store_true", help="open every page in a browser, and check sizes")
    build.add_argument("--keep-results", action="store_true", help="copy the numbers to data/results")
    build.add_argument(
        "--jobs", type=int, help="chapters run at a time (as many as cores and free memory allow)"
    )
    add_threads(build)
    build.set_defaults(command=_build)


def _build(options: argparse.Namespace) -> None:
    from fibook.build import build_book
    from fichapters import runs
    from fichapters.schedule import run_all

    shown = options.profile == BOOKS_PROFILE
    if options.keep_results and not shown:
        raise ValueError(f"--keep-results keeps the numbers of {BOOKS_PROFILE}, not of {options.profile}.")
    folder = runs.notebooks_folder()
    root = folder.parent
    out = runs.runs_folder(folder, options.profile)
    run_all(folder, options.profile, out, options.jobs, options.threads)
    if options.keep_results:
        from fibook import card

        runs.keep_results(out, root / "data" / "results")
        card.draw(root / "book")
    pages = root / "book" / "_build" if shown else root / "build" / "book" / options.profile
    index = build_book(out, pages, root / "book")
    if options.check:
        _check_pages(index.parent)
    print(index)


def _check_pages(html: Path) -> None:
    """Open the pages in a browser; without one, say so, or fail where FIHELPERS_REQUIRE_BROWSER is set."""
    from fibook import browser, site

    findings = site.check_sizes(html)
    chromium = browser.find_browser()
    if chromium is not None:
        findings += browser.check_pages(html, chromium)
    elif os.environ.get("FIHELPERS_REQUIRE_BROWSER"):
        raise FileNotFoundError(f"{NO_BROWSER} FIHELPERS_REQUIRE_BROWSER asks for one; install Chromium.")
    else:
        print(f"SKIPPED: {NO_BROWSER}", file=sys.stderr)
    if findings:
        raise ValueError("\n".join(["the pages have faults:", *findings]))


def _pdf(options: argparse.Namespace) -> None:
    from fibook import browser
    from fichapters import runs

    folder = runs.notebooks_folder()
    chapter = runs.find_chapter(folder, options.chapter).stem
    chromium = browser.find_browser()
    if chromium is None:
        raise FileNotFoundError("no Chromium or Chrome was found to print with; install one.")
    pages = folder.parent / "book" / "_build" / "html"
    target = options.out or folder.parent / "build" / "pdf" / f"{chapter}.pdf"
    print(browser.print_pdf(pages, f"chapters/{chapter}.html", target, chromium))
