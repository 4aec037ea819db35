"""Numbers that others published, from ``data/published.yaml``: the book quotes them and never types them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean
from typing import Any

import yaml

from fihelpers.data import check_file, data_folder

FILE = "published.yaml"


@dataclass(frozen=True)
class Figure:
    """One published number (or a few, such as a distribution), with where it is printed."""

    values: tuple[float, ...]
    unit: str
    what: str
    source: str
    place: str

    @property
    def value(self) -> float:
        """The number. Raises ValueError where there are several."""
        (value,) = self.values
        return value

    def as_text(self) -> str:
        """What it is, the number with its unit, and where it stands."""
        numbers = ", ".join(f"{value:.3g}" for value in self.values)
        return f"{self.what}: {numbers}{' ' if self.unit else ''}{self.unit} ({self.source}, {self.place})"


def published(key: str) -> Figure:
    """Return a published figure by its key in the data file. Raises KeyError for an unknown one."""
    found = _figures()
    if key not in found:
        raise KeyError(f"{FILE} has no figure {key!r}; add it there, with its source.")
    return found[key]


@lru_cache(maxsize=1)
def _figures() -> dict[str, Figure]:
    path = data_folder() / FILE
    check_file(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {key: _figure(given, content) for key, given in content["figures"].items()}


def _figure(given: Mapping[str, Any], content: Mapping[str, Any]) -> Figure:
    if "mean_of" in given:
        name, measure = given["mean_of"]
        origin = content["tables"][name]
        values = (mean(_cells(origin, measure, given.get("column"), given.get("models"))),)
    else:
        origin = given
        values = tuple(given["values"]) if "values" in given else (given["value"],)
    source = content["sources"][origin["source"]]["short"]
    return Figure(values, given.get("unit", ""), given["what"], source, origin["place"])


def _cells(
    table: Mapping[str, Any], measure: str, column: str | None, models: list[str] | None
) -> list[float]:
    """The numbers of a measure, of all columns and models or of those that are named."""
    rows = {name: row for name, row in table["rows"].items() if models is None or name in models}
    if models is not None and len(rows) < len(models):
        raise KeyError(f"a row of {models} is missing in {table['place']}.")
    places = range(len(table["columns"])) if column is None else [table["columns"].index(column)]
    return [row[measure][place] for row in rows.values() if measure in row for place in places]
