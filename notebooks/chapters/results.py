"""Numbers of a chapter: one record each, on disk for other programs and glued into the page for its prose."""

import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat

from IPython import get_ipython
from torch import nn
from transformers import PreTrainedModel

from fichapters.parameters import executed, profiles_folder, read_profile, settle
from fihelpers import __version__
from fihelpers.data import (
    MANIFEST,
    data_folder,
    file_sha256,
    package_sha256,
    write_atomically,
)
from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import linear_names
from fihelpers.models.vision import VisionModel
from fihelpers.threads import use_threads
from fihelpers.trials import Kept

if TYPE_CHECKING:
    import pandas as pd

SHARED = ("chapter", "profile", "versions")  # what all records of one file have in common
KEPT = "results"  # in the data folder: the results of the book's own run
RAW = ".raw.csv"  # how the names of tables end that are not kept


class Model(Protocol):
    """What a record keeps of a model: its name, its revision on the hub, and the SHA-256 of its weights."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Record:
    """One number of one chapter.

    `value` has the interval [`low`, `high`] where there is one, was formed over `n` things, and is measured
    in `unit` ("" for a pure number). `spectral` names the filter, `versions` the packages and the machine.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    seed: int
    spectral: str | None
    model: str | None
    model_revision: str | None
    model_sha256: str | None
    chapter: str
    profile: str
    versions: Mapping[str, str]


class Chapter:
    """A running chapter: `p` holds its settled parameters, `record` and `table` keep its numbers."""

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        self.name = name
        self.p = SimpleNamespace(**settings)
        self._folder = folder
        self._versions = versions()
        self._records: dict[str, Record] = {}
        self._models: dict[str, dict[str, Any]] = {}
        self._save()

    @property
    def folder(self) -> Path:
        """Where this chapter's own records and tables lie while it runs."""
        return self._folder

    @property
    def run_folder(self) -> Path:
        """Where the results of the same run's other chapters lie, as far as they were run."""
        return Path(os.environ.get("FIHELPERS_RUN") or self._folder)

    @property
    def records(self) -> Mapping[str, Record]:
        """The numbers recorded so far, by name."""
        return MappingProxyType(self._records)

    def record(
        self,
        name: str,
        value: SupportsFloat,
        low: SupportsFloat | None = None,
        high: SupportsFloat | None = None,
        *,
        n: int,
        unit: str = "",
        spectral: object = None,
        model: Model | None = None,
    ) -> Record:
        """Write one number to the chapter's file at once, and glue it for ``{glue:text}`name:.3f```.

        Glued are `name`, `name_n`, and `name_low` and `name_high` where they are given. A name recorded again
        replaces the earlier number. Of each model the file says, too, which share of its matrices "all linear
        layers" are (`linear_share`). Raises ValueError for a number that is not
        finite, lies outside its interval or was formed over nothing, and for a name of other than letters,
        digits, ``_.-``.
        """
        record = Record(
            name=_name(name),
            value=_finite(name, value),
            low=None if low is None else _finite(name, low),
            high=None if high is None else _finite(name, high),
            n=int(n),
            unit=unit,
            seed=self.p.SEED,
            spectral=None if spectral is None else str(spectral),
            model=None if model is None else model.name,
            model_revision=None if model is None else model.revision,
            model_sha256=None if model is None else model.sha256,
            chapter=self.name,
            profile=self.p.PROFILE,
            versions=self._versions,
        )
        _check(record)
        self._note(model)
        self._records[name] = record
        self._save()
        _glue(record)
        return record

    def _note(self, model: Model | None) -> None:
        """Say of a model which one it is, and which share of its matrices "all linear layers" are."""
        if model is None or model.name in self._models or not hasattr(model, "network"):
            return
        share = round(linear_share(model.network), 6)
        about = {"revision": model.revision, "sha256": model.sha256, "linear_share": share}
        self._models[model.name] = about

    def kept(self, name: str) -> Kept:
        """Where the trials of an experiment are kept, for :func:`fihelpers.trials.collect`.

        They are made again where the library, the chapter's `lab` with what it imports, the data, the settled
        parameters or a package changed, beside the loop itself and what it reads; not where a figure, a check
        or a sentence did.
        """
        folder = os.environ.get("FIHELPERS_CACHE") or self._folder / "cache"
        name_of_lab = f"{__package__}.ch{self.name[:2]}.lab"
        lab = import_module(name_of_lab) if find_spec(name_of_lab) else None
        packages = [sys.version, *(version(package) for package in ("torch", "transformers", "numpy"))]
        about = [package_sha256(), lab, file_sha256(data_folder() / MANIFEST), self.p, packages]
        return Kept(Path(folder), f"{self.name}.{_name(name)}", about)

    def keep(self, name: str, frame: "pd.DataFrame") -> None:
        """Keep a table as ``{chapter}.{name}.csv``, for the book's results, its claims and other programs.

        The chapter's file says which models the notebook has open then.
        """
        for value in getattr(get_ipython(), "user_ns", {}).values():
            if isinstance(value, LanguageModel | VisionModel):
                self._note(value)
        self.table(name, frame)
        self._save()

    def table(self, name: str, frame: "pd.DataFrame", *, raw: bool = False) -> None:
        """Write a whole table as ``{chapter}.{name}.csv`` beside the records, its index too if named.

        A raw table (a row for every answer, say) is ``{chapter}.{name}.raw.csv``: it stays with the run and
        is not among the results that are kept.
        """
        named = any(level is not None for level in frame.index.names)
        text = frame.to_csv(index=named, lineterminator="\n")
        write_atomically(self._folder / f"{self.name}.{_name(name)}{RAW if raw else '.csv'}", text.encode())

    def _save(self) -> None:
        records = [asdict(record) for record in self._records.values()]
        content = {
            "chapter": self.name,
            "profile": self.p.PROFILE,
            "parameters": vars(self.p),
            "versions": self._versions,
            "models": self._models,
            "records": [{k: v for k, v in record.items() if k not in SHARED} for record in records],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(self._folder / f"{self.name}.json", text.encode())


def begin(chapter: str) -> Chapter:
    """Settle the parameters of the running notebook; its first cell after the parameters calls this.

    The notebook's defaults and the caller's values are read from the kernel's history, the profile from
    :func:`fichapters.parameters.profiles_folder`. Records go to the folder ``FIHELPERS_RESULTS``, else to
    ``results/{profile}`` in the working directory. Raises ValueError for a parameter that the chapter does
    not declare, as papermill only warns of it, and FileNotFoundError for an unknown profile.
    """
    shell = get_ipython()
    if shell is None:
        raise ValueError(f"begin({chapter!r}) was called outside a notebook.")
    defaults, given = executed(shell.history_manager.input_hist_parsed)
    if "SEED" not in defaults:
        raise ValueError(f"{chapter} must declare SEED beside PROFILE in its parameters cell.")
    profile = given.get("PROFILE", defaults["PROFILE"])
    settings = settle(chapter, defaults, read_profile(profiles_folder(), profile), given)
    folder = os.environ.get("FIHELPERS_RESULTS") or f"results/{profile}"
    use_threads()
    return Chapter(chapter, settings, Path(folder))


def versions() -> dict[str, str]:
    """Return the versions that numbers depend on: Python, the packages, and the kind of machine."""
    import torch

    cpu = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.system()} {platform.machine()} {cpu}, {torch.get_num_threads()} threads"
    packages = {package: version(package) for package in ("torch", "transformers")}
    return {"python": platform.python_version(), "fihelpers": __version__, **packages, "machine": machine}


def load_results(folder: Path) -> dict[tuple[str, str], Record]:
    """Read the records of every chapter in a folder, by chapter and name."""
    records = {}
    for path in sorted(Path(folder).glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        shared = {key: content[key] for key in SHARED}
        for fields in content["records"]:
            records[content["chapter"], fields["name"]] = Record(**fields, **shared)
    return records


def results_beside(folder: Path, pattern: str) -> dict[str, Path]:
    """Files of results by name: those of a run's folder, and for the rest those kept in the data folder."""
    folders = (data_folder() / KEPT, Path(folder))  # a later one replaces an earlier one
    return {path.name: path for place in folders for path in sorted(place.glob(pattern))}


def _name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"the name {name!r} must consist of letters, digits, '_', '.' and '-'.")
    return name


def _finite(name: str, value: Any) -> float:
    number = value.item() if hasattr(value, "item") else value  # a tensor or array of one element
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"the record {name} needs a finite number, not {number!r}.")
    return number


def _check(record: Record) -> None:
    low = record.value if record.low is None else record.low
    high = record.value if record.high is None else record.high
    if not low <= record.value <= high:
        raise ValueError(
            f"the record {record.name}: {record.value} lies outside its interval [{low}, {high}]."
        )
    if record.n < 1:
        raise ValueError(
            f"the record {record.name} was formed over n = {record.n} things; it needs at least 1."
        )


def _glue(record: Record) -> None:
    from myst_nb import glue

    for suffix, value in (("", record.value), ("_low", record.low), ("_high", record.high), ("_n", record.n)):
        if value is not None:
            glue(f"{record.name}{suffix}", value, display=False)


def linear_share(network: PreTrainedModel) -> float:
    """The share of the weights in matrices that `linear_names` covers, embeddings and output head aside."""
    ends = (network.get_input_embeddings(), network.get_output_embeddings())
    aside = {p for module in ends if module is not None for p in module.parameters()}
    aside |= {p for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    named = {
        name: p
        for name, p in network.named_parameters()
        if p not in aside
        and p.dim() > 1
        and min(p.shape) > 1
        and not name.endswith("bias")  # those of fused experts are a table
    }
    whole = sum(p.numel() for p in named.values())
    return sum(named[name].numel() for name in linear_names(network) if name in named) / max(whole, 1)
