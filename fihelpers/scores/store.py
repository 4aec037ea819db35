"""Scores as a value on disk: one tensor for each tensor of the model, and what they are scores of."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, turned_names
from fihelpers.tasks import Example

TURNED = "turned"  # the metadata's list of weights whose last axis is the output


@dataclass(frozen=True, eq=False)
class Scores:
    """The score of every weight: `values[name]` has the shape of the model's tensor of that name.

    `metadata` (strings only) records measure, filter, model, its hash, data and number of samples.
    """

    values: Mapping[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def rows(self, name: str) -> Tensor:
        """The scores of a weight as rows (rows, in), one an output; see `fihelpers.models.linear`."""
        return as_rows(self.values[name], name in self.turned)

    @property
    def turned(self) -> frozenset[str]:
        """The names of the weights whose last axis is the output."""
        return frozenset(json.loads(self.metadata.get(TURNED, "[]")))

    def numel(self) -> int:
        return sum(v.numel() for v in self.values.values())

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically. Raises OSError, in one sentence, where that fails."""
        save_tensors(path, self.values, self.metadata)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read a file written by `save`. Raises FileNotFoundError, or ValueError for a damaged file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There are no scores at {path}; make them with score_weights.")
        try:
            with safe_open(path, framework="pt") as file:
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return cls(values, dict(file.metadata() or {}))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file beside `path` and rename it, without a second copy of the tensors in memory.

    Raises OSError, in one sentence, where it cannot be written; an earlier file is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder) / path.name
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata=metadata)
            with open(part, "rb") as file:
                os.fsync(file.fileno())  # a name that outlives a power cut has to stand for all the bytes
            part.chmod(0o644)
            os.replace(part, path)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{path} could not be written ({error}); make room or choose another place."
            ) from error


def provenance(model: LanguageModel, examples: Sequence[Example]) -> dict[str, str]:
    """The metadata that all scores share: the model, its hash, the examples, which weights lie turned."""
    turned = sorted(turned_names(model.network))
    return {
        "model": model.name,
        "revision": model.revision or "",
        "sha256": model.sha256,
        "n": str(len(examples)),
        "examples": json.dumps([e.id for e in examples]),
        **({TURNED: json.dumps(turned)} if turned else {}),
    }
