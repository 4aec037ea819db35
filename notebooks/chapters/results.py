"""What a chapter keeps: its tables, beside the parameters, versions and models that they come from."""

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from IPython import get_ipython

import fihelpers
from fichapters.parameters import executed, profiles_folder, read_profile, settle
from fihelpers.data import (
    MANIFEST,
    data_folder,
    file_sha256,
    package_sha256,
    write_atomically,
)
from fihelpers.threads import use_threads

if TYPE_CHECKING:
    import pandas as pd

    import fihelpers.trials
    from fihelpers.models.language import LanguageModel
    from fihelpers.models.vision import VisionModel

MODELS = {"fihelpers.models.language": "LanguageModel", "fihelpers.models.vision": "VisionModel"}


class Chapter:
    """A running chapter: `p` holds its settled parameters, `kept` its trials and `keep` its tables.

    Its tables lie in `folder` while it runs, beside ``{chapter}.json``, which says from the start which
    parameters and versions it runs with.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        self.name = name
        self.p = SimpleNamespace(**settings)
        self.folder = folder
        self._versions = versions()
        self._models: dict[str, dict[str, Any]] = {}
        self._save()

    @property
    def run_folder(self) -> Path:
        """Where the results of the same run's other chapters lie, as far as they were run."""
        return Path(os.environ.get("FIHELPERS_RUN") or self.folder)

    def kept(self, name: str) -> "fihelpers.trials.Kept":
        """Where the trials of an experiment are kept, for :func:`fihelpers.trials.collect`.

        They are made again where the library, the chapter's `lab` with what it imports, the data, the settled
        parameters or a package changed, beside the loop itself and what it reads; not where a figure, a check
        or a sentence did.
        """
        folder = os.environ.get("FIHELPERS_CACHE") or self.folder / "cache"
        name_of_lab = f"{__package__}.ch{self.name[:2]}.lab"
        lab = import_module(name_of_lab) if find_spec(name_of_lab) else None
        packages = [sys.version, *(version(package) for package in ("torch", "transformers", "numpy"))]
        about = [package_sha256(), lab, file_sha256(data_folder() / MANIFEST), self.p, packages]
        return fihelpers.Kept(Path(folder), f"{self.name}.{_name(name)}", about)

    def keep(self, name: str, frame: "pd.DataFrame") -> None:
        """Keep a table as ``{chapter}.{name}.csv``, for the book's results, its claims and other programs.

        Its index is a column where it has a name. The chapter's file says which models the notebook has open
        then. Raises ValueError for a name of other than letters, digits, ``_.-``.
        """
        named = any(level is not None for level in frame.index.names)
        text = frame.to_csv(index=named, lineterminator="\n")
        write_atomically(self.folder / f"{self.name}.{_name(name)}.csv", text.encode())
        for model in _open_models():
            weights = sum(tensor.numel() for tensor in model.network.parameters())
            about = {"revision": model.revision, "sha256": model.sha256, "weights": weights}
            self._models.setdefault(model.name, about)  # the one that was opened, before its copies
        self._save()

    def _save(self) -> None:
        content = {
            "chapter": self.name,
            "profile": self.p.PROFILE,
            "parameters": vars(self.p),
            "versions": self._versions,
            "models": self._models,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(self.folder / f"{self.name}.json", text.encode())


def begin(chapter: str) -> Chapter:
    """Settle the parameters of the running notebook; its first cell after the parameters calls this.

    The notebook's defaults and the caller's values are read from the kernel's history, the profile from
    :func:`fichapters.parameters.profiles_folder`. Tables go to the folder ``FIHELPERS_RESULTS``, else to
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
    return {
        "python": platform.python_version(),
        "fihelpers": fihelpers.__version__,
        **packages,
        "machine": machine,
    }


def _open_models() -> "list[LanguageModel | VisionModel]":
    """The models that the notebook has open; none while their modules, slow to import, are not there."""
    kinds = tuple(getattr(sys.modules[name], kind) for name, kind in MODELS.items() if name in sys.modules)
    return [value for value in getattr(get_ipython(), "user_ns", {}).values() if isinstance(value, kinds)]


def _name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"the name {name!r} must consist of letters, digits, '_', '.' and '-'.")
    return name
