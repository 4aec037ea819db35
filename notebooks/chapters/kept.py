"""Where results are kept: those of the book's own run, and those that it made on a real model."""

from pathlib import Path

from fihelpers.data import data_folder

KEPT = "results"  # in the data folder: the results of the book's own run
REAL = "real"  # the profile of the real model


def kept_folder() -> Path:
    """Where the tables of the project's own run of a real model lie."""
    return data_folder() / KEPT / REAL


def results_beside(folder: Path, pattern: str) -> dict[str, Path]:
    """Files of results by name: those of a run's folder, and for the rest those kept in the data folder."""
    folders = (data_folder() / KEPT, Path(folder))  # a later one replaces an earlier one
    return {path.name: path for place in folders for path in sorted(place.glob(pattern))}
