"""Addresses, sizes, the status table, the citation and the workflows."""

import json
import re
import shlex
import struct
import tomllib
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import nbformat
import pytest
import yaml
from nbformat.v4 import new_notebook

from fibook import site as publish
from fibook.build import BOOK
from fibook.card import CARD, LANDING, draw
from fibook.site import Address, address, check_sizes, write_status
from fichapters.runs import chapters
from fihelpers import __version__
from fihelpers.__main__ import _parser

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def write_config(folder: Path, url: str) -> Path:
    (folder / "_config.yml").write_text(f'repository:\n  url: "{url}"\n')
    return folder


def test_the_address_is_one_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIHELPERS_REPOSITORY", raising=False)
    assert address(write_config(tmp_path, "")) is None
    monkeypatch.setenv("FIHELPERS_REPOSITORY", "https://github.com/a/b")
    assert address(tmp_path) == Address("a", "b")
    for written in ("https://github.com/c/d.e", "https://github.com/c/d.e/", "https://github.com/c/d.e.git"):
        assert address(write_config(tmp_path, written)) == Address("c", "d.e")
    for wrong in ("https://github.com/alone", "github.com/a/b", "https://elsewhere.org/a/b"):
        with pytest.raises(ValueError, match="must read https://"):
            address(write_config(tmp_path, wrong))


def test_the_pages_stand_where_github_puts_them() -> None:
    assert Address("Owner", "book").pages == "https://owner.github.io/book/"
    assert Address("Owner", "owner.github.io").pages == "https://owner.github.io/"


@pytest.mark.parametrize("chapter", [path.stem for path in chapters(ROOT / "notebooks")])
def test_binder_and_colab_links_are_well_formed(chapter: str) -> None:
    where = Address("owner", "name")
    binder, colab = urlsplit(where.binder(chapter)), urlsplit(where.colab(chapter))
    assert (binder.scheme, binder.netloc, binder.path) == ("https", "mybinder.org", "/v2/gh/owner/name/main")
    (opened,) = parse_qs(binder.query, strict_parsing=True)["labpath"]
    assert (colab.scheme, colab.netloc, colab.query) == ("https", "colab.research.google.com", "")
    place = colab.path.removeprefix("/github/owner/name/blob/main/")
    assert unquote(place) == opened and (ROOT / opened).is_file()
    assert (ROOT / "environment.yml").is_file()  # what Binder installs


def test_large_sites_and_pages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chapters").mkdir()
    (tmp_path / "a.png").write_bytes(bytes(500))
    (tmp_path / "chapters" / "one.html").write_text('<img alt="x" src="../a.png"><img src="../a.png">')
    assert check_sizes(tmp_path) == []
    monkeypatch.setattr(publish, "PAGE_LIMIT", 500)
    assert check_sizes(tmp_path) == ["chapters/one.html: 0.0 MB with its pictures, more than 0 MB"]
    monkeypatch.setattr(publish, "SITE_LIMIT", 500)
    assert check_sizes(tmp_path)[0].startswith("the site has 0.0 MB")


def test_the_status_says_what_a_run_took_and_came_from(tmp_path: Path) -> None:
    runs, book = tmp_path / "runs", tmp_path / "book"
    runs.mkdir()
    for name, seconds in (("01_a", 61.4), ("02_b", 8.6)):
        metadata = {"fihelpers": {"seconds": seconds}}
        nbformat.write(new_notebook(metadata=metadata), runs / f"{name}.ipynb")
        (runs / f"{name}.json").write_text(json.dumps({"profile": "embedded", "versions": {"torch": "2"}}))
        for table in ("a", "b"):
            (runs / f"{name}.{table}.csv").write_text("n\n1\n")
        (runs / f"{name}.key").write_text("0123456789abcdef")
    nbformat.write(new_notebook(), runs / "03_c.ipynb")
    write_status(runs, ["01_a", "02_b"], book)
    text = (book / "chapters" / publish.STATUS).read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "| [](chapters/01_a.ipynb) | 1 min 1 s | embedded | 2 | `0123456789ab` |" in text
    assert "| All chapters | 1 min 10 s | | 4 | |" in text
    assert "| torch | 2 |" in text and "| commit |" in text
    write_status(runs, ["03_c"], book)
    text = (book / "chapters" / publish.STATUS).read_text()
    assert (
        "| [](chapters/03_c.ipynb) | not recorded | not recorded | 0 |" in text and "All chapters" not in text
    )


def test_the_citation_agrees_with_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format demands
    assert str(citation["version"]) == __version__ and citation["license"] == project["license"]
    bibliography = (ROOT / "book" / "references.bib").read_text().replace("{", "").replace("}", "")
    for reference in citation["references"]:
        assert reference["title"] in bibliography
        assert all(author["family-names"] in bibliography for author in reference["authors"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_and_may_write_only_pages(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    steps = [step for job in content["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in used)
    assert set(content["permissions"].values()) <= {"read"} if content["permissions"] else True
    for name, job in content["jobs"].items():
        assert "timeout-minutes" in job
        allowed = {"pages": "write", "id-token": "write"} if name == "deploy" else {"contents": "read"}
        assert job.get("permissions", {}).items() <= allowed.items()
    makefile = (ROOT / "Makefile").read_text()
    targets = [step["run"].removeprefix("make ") for step in steps if step.get("run", "").startswith("make ")]
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_workflow_that_publishes_checks_the_pages_first() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())["jobs"]
    assert jobs["build"]["env"]["FIHELPERS_REQUIRE_BROWSER"] == "1"
    assert "FIHELPERS_REPOSITORY" in jobs["build"]["env"]
    assert jobs["deploy"]["needs"] == "build"
    recipe = (ROOT / "Makefile").read_text().split("\npublish:")[1].split("\n\n")[0]
    assert "--profile embedded --check" in recipe


def test_the_first_page_shows_the_numbers_that_are_kept(tmp_path: Path) -> None:
    for place in (LANDING, CARD):
        (tmp_path / place).parent.mkdir()
    draw(tmp_path)
    for place, size in ((LANDING, (900, 660)), (CARD, (1200, 630))):
        picture = (tmp_path / place).read_bytes()
        assert struct.unpack(">II", picture[16:24]) == size
        assert picture == (BOOK / place).read_bytes(), "draw both anew: build --keep-results"
    assert LANDING in (BOOK / "intro.md").read_text("utf-8")
    assert Path(CARD).name == publish.CARD


@pytest.mark.parametrize("page", ["book/intro.md", "README.md", "book/copies.md", "CONTRIBUTING.md"])
def test_the_commands_that_pages_show_are_real(page: str) -> None:
    text = (BOOK.parent / page).read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"(?m)(?:^ *|`)(?:torchrun .* |python )-m fihelpers ([^`\n]+)", text)
    assert commands
    for command in commands:
        _parser().parse_args(shlex.split(command))
