"""The prose of the book types no result: what it says in digits is listed here, with the reason."""

import re
from pathlib import Path

import nbformat
import pytest

from fichapters import papers as published
from fichapters.runs import chapters

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = chapters(ROOT / "notebooks")
PAGES = sorted((ROOT / "book").glob("*.md"))
NO_PROSE = re.compile(
    r"```.*?```|~~~.*?~~~"  # code
    r"|`[^`\n]*`"  # code, and {glue:text} with its name
    r"|https?://\S+|\]\([^)]*\)",  # addresses
    re.DOTALL,
)
TYPED = re.compile(r"(?<![\w.])\d*\.\d+|\d\s?\\?%")  # a number with a point, or a percentage

ALLOWED = {  # what may be typed, and why
    r"95 ?%": "the level of all intervals",
    r"GPT-3\.5|Qwen2\.5|Python 3\.11|Llama-?3\.\d": "names and versions",
    r"(?:section|appendix|Theorem|method)s? (?:[A-D]\.)?\d(?:\.\d)?[a-d]?(?:(?:, | and )\d\.\d)*": "places",
    r"top 0\.1 % of embedding": "figures: the paper's words for its table",
}
ALLOWED_PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in ALLOWED))


def prose_of(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def typed(text: str) -> list[str]:
    """Typed numbers with what stands around them."""
    bare = ALLOWED_PATTERN.sub("", NO_PROSE.sub("", text))
    return [bare[max(0, m.start() - 40) : m.end() + 20].replace("\n", " ") for m in TYPED.finditer(bare)]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda path: path.stem)
def test_no_result_is_typed_in_prose(path: Path) -> None:
    assert typed(prose_of(path)) == [], "show it in a figure or table, or list it above with its reason"


@pytest.mark.parametrize("pattern", ALLOWED)
def test_what_is_allowed_is_needed(pattern: str) -> None:
    everything = "\n".join(NO_PROSE.sub("", prose_of(path)) for path in [*NOTEBOOKS, *PAGES])
    assert re.search(pattern, everything), "nothing needs this any more; take it off the list"


def test_typed_numbers_are_found_and_code_is_passed_over() -> None:
    assert len(typed("a loss of 0.3, or 12 % ($.5$, 7\\%)")) == 4
    assert typed("`0.3` and {glue:text}`ch01_a:.3f`, 95 % of 3 cases\n```python\nx = 0.5\n```\n") == []


def test_published_figures_know_where_they_are_printed() -> None:
    figures = published._figures()
    assert all(
        figure.values and figure.what and figure.source and figure.place for figure in figures.values()
    )
    assert published.published("pixels_random").value == pytest.approx(10.335 / 12)
    assert published.published("rouge_fi").value == pytest.approx(0.39 / 5)
    assert "4.9 (earlier version, Figure 1)" in published.published("pixel_fi").as_text()
    with pytest.raises(KeyError, match="no figure 'nothing'"):
        published.published("nothing")
