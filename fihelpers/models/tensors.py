"""Named tensors of which one is read at a time, from memory or from a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fihelpers.models.language import brief

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def layout(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape and type without values."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


class Tensors(Protocol):
    """Named tensors of which one is read at a time."""

    @property
    def layouts(self) -> Mapping[str, Tensor]:
        """Each without its values: a tensor on the meta device."""

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """The tensor, or the first `rows` of its rows."""


class TensorDict:
    """Tensors in memory."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values
        self.layouts = {name: value.detach().to("meta") for name, value in values.items()}

    def read(self, name: str, rows: int | None = None) -> Tensor:
        return self.values[name].detach()[slice(rows) if rows else ...].cpu()


class TensorFile:
    """Tensors of a safetensors file.

    Each read opens the file anew: pages of a file that stays mapped would count as memory of this process.
    Raises ValueError for a damaged or cut-off file, or a type of tensor that is not one of DTYPES.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        self.layouts: dict[str, Tensor] = {}
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                for name in file.keys():  # noqa: SIM118
                    piece = file.get_slice(name)
                    self.layouts[name] = layout(piece.get_shape(), self._dtype(name, piece))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path.name} of {label!r} is damaged or cut off ({brief(error)}); fetch it again."
            ) from error

    def read(self, name: str, rows: int | None = None) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[:rows] if rows else file.get_tensor(name)
            return tensor

    def _dtype(self, name: str, piece: Any) -> torch.dtype:
        code = str(piece.get_dtype())
        if code not in DTYPES:
            raise ValueError(f"{name} of {self.label!r} is stored as {code}; convert the model to bfloat16.")
        return DTYPES[code]


class TensorGroup:
    """The tensors of several sources, under names of their own, or of these names alone."""

    def __init__(self, sources: Sequence[Tensors], only: Collection[str] | None = None) -> None:
        self._source = {
            name: source for source in sources for name in source.layouts if only is None or name in only
        }
        self.layouts = {name: source.layouts[name] for name, source in self._source.items()}

    def read(self, name: str, rows: int | None = None) -> Tensor:
        return self._source[name].read(name, rows)
