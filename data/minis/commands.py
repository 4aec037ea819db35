"""The commands of the bundled models: train them again, list the hashes of the data."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]


def add(commands: Any) -> None:
    """Add the commands to those of ``python -m fihelpers``."""
    minis = commands.add_parser("train-minis", help="make the bundled models again")
    minis.add_argument("which", choices=["lm", "vlm", "experts"])
    minis.set_defaults(command=_train_minis)
    manifest = commands.add_parser("manifest", help="list the SHA-256 of every file in data/ again")
    manifest.set_defaults(command=_manifest)


def _train_minis(options: argparse.Namespace) -> None:
    from fiminis import experts, lm, vlm

    make: dict[str, Callable[[Path], None]] = {"lm": lm.main, "vlm": vlm.main, "experts": experts.main}
    make[options.which](_data_folder())


def _manifest(options: argparse.Namespace) -> None:
    from fiminis.manifest import write_manifest

    print(write_manifest(_data_folder()))


def _data_folder() -> Path:
    """The folder to make data in; unlike the one to read from, it may lack its manifest."""
    folder = Path(os.environ.get("FIHELPERS_DATA") or CHECKOUT / "data")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the data folder {folder} is missing; run from a checkout or set FIHELPERS_DATA."
        )
    return folder
