"""The ruler: how long a lesson is, how many numbers its prose holds, how much of its code is bookkeeping.

    python tools/ruler.py [--runs build/runs/embedded]

Of every notebook, before its exercises:

- words: of the Markdown, without code, math and link addresses;
- numbers in a hundred words: digits with a decimal point or a per cent sign, roles that show a number, and
  shares in words ("five per cent"), outside code, math, links, headings and tables. Markdown that code makes
  counts, too;
- code lines: without the parameters, imports, blank lines, comments, and calls of `run.keep`;
- bookkeeping: the share of lines that begin, record, keep, or name paths or caches, of all code lines but
  parameters and imports;
- roles: what JupyterLab shows as raw text, such as {glue} and {cite};
- long: lines of code beyond the page's width; printed: the most numbers that a cell prints outside a table
  (of executed notebooks, where --runs names their folder).
"""

import argparse
import ast
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = "## Exercises"
WIDTH = 80
ROLE = re.compile(r"\{[a-z][\w:.-]*\}`")
SHARES = "one|two|three|four|five|six|seven|eight|nine|ten|twenty|thirty|forty|fifty|ninety"
NUMBER = re.compile(rf"\{{glue|\d*\.\d+|\d+\s*(?:%|per ?cent)|\b(?:{SHARES})\s+(?:per ?cent|%)", re.I)
BOOKKEEPING = re.compile(
    r"\bbegin\(|\brun\.(record|table|keep|kept)\(|\bPath\(|\bcache|\bfolder\b|^p = run\.p"
)


@dataclass(frozen=True)
class Reading:
    """What the ruler reads of one notebook."""

    words: int
    numbers: float  # in a hundred words
    code: int
    bookkeeping: float
    roles: int
    long: int
    functions: int  # lines of the longest one defined
    cell: int  # lines of the longest cell


@dataclass(frozen=True)
class Bounds:
    """What a lesson keeps; the others are the same for all."""

    words: int = 2400
    code: int = 120
    numbers: float = 1.0
    bookkeeping: float = 0.10
    roles: int = 0
    long: int = 0
    functions: int = 25
    cell: int = 30


LESSONS = {  # chapters that are lessons, and have to stay so
    "01_first_look": Bounds(),
    "02_the_measure": Bounds(words=2900),
    "03_what_fi_can_say": Bounds(words=2900),
    "04_fragile_pixels": Bounds(),
    "05_prompts_and_pixels": Bounds(),
    "06_embedding_attacks": Bounds(),
    "07_sparsification": Bounds(words=2900, code=170),
    "08_quantization": Bounds(),
    "09_merging": Bounds(),
    "10_cost": Bounds(),
    "11_relatives": Bounds(),
    "12_claims": Bounds(),
    "13_a_real_model": Bounds(),
}


def read(notebook: Path) -> Reading:
    """Measure a notebook."""
    cells = nbformat.read(notebook, as_version=4).cells
    end = next((i for i, cell in enumerate(cells) if cell.source.startswith(EXERCISES)), len(cells))
    code = [c.source for c in cells[:end] if c.cell_type == "code" and "parameters" not in _tags(c)]
    texts = [cell.source for cell in cells[:end] if cell.cell_type == "markdown"]
    texts += [text for source in code for text in _made(source)]
    words = sum(len(_prose(text).split()) for text in texts)
    numbers = sum(len(NUMBER.findall(_plain(text))) for text in texts)
    lines = [line for source in code for line in _lines(source)]
    kept = [line for line in lines if ".keep(" not in line]
    booked = sum(bool(BOOKKEEPING.search(line)) for line in lines)
    return Reading(
        words=words,
        numbers=round(100 * numbers / max(1, words), 2),
        code=len(kept),
        bookkeeping=round(booked / max(1, len(lines)), 3),
        roles=sum(len(ROLE.findall(cell.source)) for cell in cells if cell.cell_type == "markdown"),
        long=sum(len(line) > WIDTH for source in code for line in source.splitlines()),
        functions=max((n.end_lineno - n.lineno + 1 for s in code for n in _functions(s)), default=0),
        cell=max((len(source.splitlines()) for source in code), default=0),
    )


def beyond(reading: Reading, bounds: Bounds) -> list[str]:
    """What of a reading is beyond its bounds, a sentence each."""
    found, wanted = asdict(reading), asdict(bounds)
    return [f"{name} is {found[name]}, at most {most}" for name, most in wanted.items() if found[name] > most]


def printed_numbers(notebook: Path) -> int:
    """The most numbers that a cell of an executed notebook prints outside a table."""
    most = 0
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout":
                most = max(most, len(re.findall(r"\d*\.\d+|\d+\s*%", output.text)))
    return most


def _tags(cell: Any) -> Sequence[str]:
    return cell.metadata.get("tags", [])


def _plain(text: str) -> str:
    """Prose without code, math, link addresses, headings and tables, but with its roles."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+(?:\n[^$\n]+)*\$", " ", text, flags=re.S)
    text = re.sub(r"(?<!\})`[^`\n]*`", " ", text)
    text = re.sub(r"\[[^\]]*\]\([^)]*\)", " ", text)
    return "\n".join(line for line in text.splitlines() if not re.match(r"\s*(#|\|)", line))


def _prose(text: str) -> str:
    """What counts as words: headings and tables, too."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+(?:\n[^$\n]+)*\$|`[^`\n]*`", " ", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)|\{[a-z][\w:.-]*\}", " ", text)
    return " ".join(word for word in text.split() if re.search(r"\w", word))


def _made(source: str) -> list[str]:
    """The texts that a cell shows as Markdown or HTML."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    shown = [c for c in calls if getattr(c.func, "id", getattr(c.func, "attr", "")) in ("Markdown", "HTML")]
    strings = [node for call in shown for node in ast.walk(call) if isinstance(node, ast.Constant)]
    return [node.value for node in strings if isinstance(node.value, str)]


def _lines(source: str) -> list[str]:
    """The lines of code of a cell, without imports, comments and blanks."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)  # type: ignore[operator]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def _functions(source: str) -> list[Any]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, help="a folder of executed notebooks")
    options = parser.parse_args()
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    readings = {path.stem: read(path) for path in notebooks}
    table = pd.DataFrame([asdict(r) for r in readings.values()], index=list(readings))
    if options.runs:
        table["printed"] = [printed_numbers(options.runs / path.name) for path in notebooks]
    print(table.assign(lesson=["yes" if name in LESSONS else "" for name in table.index]).to_string())
    wrong = [f"{name}: {what}" for name in LESSONS for what in beyond(readings[name], LESSONS[name])]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
