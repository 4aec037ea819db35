"""What packed weights weigh, and a file of them: saved, and opened again (method 4.5)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fihelpers.data import write_atomically
from fihelpers.models.language import LanguageModel, brief
from fihelpers.perturb.quantize import STORED, Packed, Scheme, code_bytes

SIXTEEN, POSITION = 2, 4  # bytes of a kept weight, and of the place of a kept channel
ABOUT = "quantized"  # the entry of the file's metadata that says what it holds


@dataclass(frozen=True)
class SizeReport:
    """Bytes of quantized layers, without their biases.

    packed: as they are stored; unprotected: the same layers with nothing protected; sixteen_bit: the same
    layers not quantized.
    """

    packed: int
    unprotected: int
    sixteen_bit: int

    @property
    def bits_per_weight(self) -> float:
        return 16 * self.packed / self.sixteen_bit


def size_report(packed: Mapping[str, Packed]) -> SizeReport:
    """Measure quantized layers, such as those of `pack_model`."""
    if not packed:
        raise ValueError("There are no quantized layers to measure; name at least one.")
    return SizeReport(
        packed=sum(p.nbytes for p in packed.values()),
        unprotected=sum(packed_bytes(p.scheme, p.shape) for p in packed.values()),
        sixteen_bit=sum(SIXTEEN * p.shape[0] * p.shape[1] for p in packed.values()),
    )


def packed_bytes(scheme: Scheme, shape: tuple[int, int], kept_rows: int = 0) -> int:
    """Bytes of a matrix (out, in) of which some rows are kept, as `Packed.nbytes` of it."""
    rows, columns = shape[0] - kept_rows, shape[1]
    count = rows * columns
    scales = count // (scheme.group or columns)
    kept = kept_rows * (SIXTEEN * columns + POSITION)
    return code_bytes(scheme.bits, count) + scales * (3 if scheme.mapping == "asymmetric" else 2) + kept


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
