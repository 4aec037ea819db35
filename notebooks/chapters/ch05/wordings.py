"""The wordings of the instructions that chapter 05 puts before its questions."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from fihelpers.data import check_file, data_folder

FILE = "prompts.yaml"


@dataclass(frozen=True)
class Wordings:
    """The wordings of one kind of instruction: those the bundled model was trained with, and others.

    ``v1`` is the one that the paper's earlier version prints, "" where it prints none (method 4.2).
    """

    trained: tuple[str, ...]
    unseen: tuple[str, ...]
    v1: str = ""


def load_wordings() -> dict[str, Wordings]:
    """Read ``data/prompts.yaml``, checked against the manifest: {"neutral", "aggressive", "safe": wordings}.

    Raises ValueError for a damaged file.
    """
    path = data_folder() / FILE
    check_file(path)
    kinds = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        kind: Wordings(tuple(entry["trained"]), tuple(entry["unseen"]), entry.get("v1", ""))
        for kind, entry in kinds.items()
    }
