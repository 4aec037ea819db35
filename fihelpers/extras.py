"""Packages that only some work needs: which extra of the installation brings each of them."""

from collections.abc import Iterator
from contextlib import contextmanager

# the import names of what `pip install fihelpers` leaves out; what is not named here comes with `all`
EXTRAS = {
    "numba": "fast",
    "llvmlite": "fast",
    "gguf": "gguf",
    "captum": "pixels",
    "peft": "merge",
    "lm_eval": "harness",
    "datasets": "harness",
    "dask": "sweep",
    "distributed": "sweep",
}


def missing(package: str | None) -> str:
    """The sentence about a package that is not installed, by its import name."""
    name = str(package).partition(".")[0]
    return f"the package {name} is missing; run pip install 'fihelpers[{EXTRAS.get(name, 'all')}]'."


@contextmanager
def optional() -> Iterator[None]:
    """Imports of packages that may be missing; ModuleNotFoundError then names the extra that brings them."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing(error.name), name=error.name) from error
