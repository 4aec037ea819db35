"""A file of packed weights: saved, and opened again (method 4.5)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fihelpers.data import write_atomically
from fihelpers.models.language import LanguageModel, brief
from fihelpers.perturb.quantize import STORED, Packed, Scheme

ABOUT = "quantized"  # the entry of the file's metadata that says what it holds


def save_packed(path: Path, packed: Mapping[str, Packed], model: LanguageModel) -> None:
    """Write packed weights of a model as one safetensors file, with the model's name, revision and hash.

    What was there before is replaced once all is written. Raises ValueError for no packed weights.
    """
    if not packed:
        raise ValueError("There are no quantized layers to save; name at least one.")
    tensors = {f"{name}.{field}": t for name, one in packed.items() for field, t in one.tensors().items()}
    layers = {n: {**asdict(p.scheme), "shape": p.shape, "axis": p.axis} for n, p in packed.items()}
    about = {"name": model.name, "revision": model.revision, "sha256": model.sha256, "layers": layers}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, {"format": "pt", ABOUT: json.dumps(about)}))


def open_packed(path: Path, model: LanguageModel) -> dict[str, Packed]:
    """Read what `save_packed` wrote of this model, for `with quantized(model.network, …)`.

    Raises FileNotFoundError for an absent file, ValueError for a damaged one or one of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give one that save_packed wrote.")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[ABOUT])
        tensors = load_file(path, str(model.device))
        packed = {name: _packed(name, entry, tensors) for name, entry in about["layers"].items()}
        name, sha256 = about["name"], about["sha256"]
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the packed weights in {path.name} cannot be opened: {brief(error)}; save them again."
        ) from error
    if sha256 != model.sha256:
        raise ValueError(
            f"{path.name} is of another model ({name!r}, SHA-256 {sha256[:12]}…); open that one."
        )
    return packed


def _packed(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packed:
    """The packed weight of this name. Raises errors of several types where its tensors do not fit it."""
    scheme, (rows, columns) = Scheme(entry["bits"], entry["mapping"], entry["group"]), entry["shape"]
    stored: dict[str, Any] = {field: tensors.get(f"{name}.{field}") for field in STORED}
    packed = Packed(scheme, (rows, columns), entry["axis"], **stored)
    symmetric, kept = packed.zeros is None, packed.kept is not None
    if symmetric != (scheme.mapping == "symmetric") or kept != (packed.kept_values is not None):
        raise ValueError(f"tensors of {name} are missing or too many")
    packed.unpack()  # a wrong size shows here
    return packed
