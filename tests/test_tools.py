"""The ruler and the golden numbers read what they say they read."""

from pathlib import Path

import golden
import nbformat
import pandas as pd
import pytest
import ruler
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

TEXT = """# A heading of 4.5 words

Accuracy falls to .42, by 5 % or by five per cent; see [chapter 3.1](a_4.2.ipynb), `1.5` and $x = 0.7$.

| a table | 0.25 |
|---|---|
"""
CODE = """import os

def f(x):
    # a comment

    return x


run.keep("a", f(1))
table = run.kept("b")
"""


def write(path: Path, *cells: nbformat.NotebookNode) -> Path:
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


def test_the_ruler_counts_prose_numbers_code_and_bookkeeping(tmp_path: Path) -> None:
    parameters = new_code_cell("PROFILE = 'x'")
    parameters.metadata["tags"] = ["parameters"]
    after = [new_markdown_cell("## Exercises\n\nmore 1.5 words {cite}`x`"), new_code_cell("a = 1")]
    notebook = write(tmp_path / "a.ipynb", new_markdown_cell(TEXT), parameters, new_code_cell(CODE), *after)
    found = ruler.read(notebook)
    assert found.words == len(["A", "heading", "of", "4.5", "words"]) + 15 + len(["a", "table", "0.25"])
    assert found.numbers == round(100 * 3 / found.words, 2)  # .42, 5 % and five per cent
    assert (found.code, found.functions, found.cell, found.roles) == (3, 4, 10, 1)
    assert found.bookkeeping == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda cells: cells[0].update(source="word " * 2500), "words is 2500, at most 2400"),
        (lambda cells: cells[0].update(source="Half is .5, not .4 or .3."), "numbers is"),
        (lambda cells: cells[0].update(source="{glue:text}`a:.2f` and more"), "roles is 1, at most 0"),
        (lambda cells: cells[1].update(source="x = 1  # " + "y" * 80), "long is 1, at most 0"),
        (lambda cells: cells[1].update(source="x = 1\n" * 130), "code is 130, at most 120"),
        (lambda cells: cells[1].update(source="run.keep('a', b)\nx = 1"), "bookkeeping is 0.5"),
    ],
)
def test_what_goes_beyond_a_bound_is_named(change, said: str, tmp_path: Path) -> None:
    cells = [new_markdown_cell("Some words."), new_code_cell("x = 1")]
    assert ruler.beyond(ruler.read(write(tmp_path / "a.ipynb", *cells)), ruler.Bounds()) == []
    change(cells)
    assert said in "; ".join(ruler.beyond(ruler.read(write(tmp_path / "a.ipynb", *cells)), ruler.Bounds()))


def kept(folder: Path, table: pd.DataFrame) -> Path:
    folder.mkdir()
    table.to_csv(folder / "02_x.a.csv", index=False)
    return folder


TABLE = pd.DataFrame(
    {"said": ["holds", "undecided"], "n": [3, 4], "value": [0.5, 0.25], "seconds": [1.0, 2.0]}
)


@pytest.mark.parametrize(
    ("column", "new", "found"),
    [
        ("value", 0.25 * (1 + 1e-7), None),
        ("seconds", 9.0, None),  # timings are left out
        ("value", 0.2501, "02_x.a.csv: value, 1 of 2 rows (values): row 1: "),
        ("n", 5, "02_x.a.csv: n, 1 of 2 rows (a tie may have flipped)"),
        (
            "said",
            "holds",
            "02_x.a.csv: said, 1 of 2 rows (a tie may have flipped): row 1: 'undecided' → 'holds'",
        ),
    ],
)
def test_golden_numbers_are_equal_or_named(
    column: str, new: object, found: str | None, tmp_path: Path
) -> None:
    old = kept(tmp_path / "old", TABLE)
    changed = TABLE.copy()
    changed.loc[1, column] = new
    said = list(golden.differences(old, kept(tmp_path / "new", changed)))
    assert said == [] if found is None else len(said) == 1 and said[0].startswith(found)


def test_a_column_or_a_table_that_went_is_named(tmp_path: Path) -> None:
    old, new = kept(tmp_path / "old", TABLE), kept(tmp_path / "new", TABLE.drop(columns="n"))
    (new / "02_x.b.csv").write_text("a\n1\n")
    assert list(golden.differences(old, new)) == [
        "02_x.a.csv: columns that went ['n'], that came []",
        "02_x.b.csv: was not there before",
    ]
