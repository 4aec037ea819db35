"""The spectral filters of FI: how much of each eigen-direction of the Fisher metric counts (method 1a)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LEAST_DAMPING = 1e-25  # lam from which scores whose squares leave the range of float32 have no FI to speak of


def _require_non_negative(name: str, value: float | None) -> None:
    if value is not None and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number of at least 0, not {value}.")


class Spectral(Protocol):
    """A filter h: how much of each eigen-direction of the Fisher metric counts."""

    def gain(self, mu: Tensor, mu_max: Tensor, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Exact:
    """h = 1 where mu > rtol * mu_max of the same group, else 0: the pseudo-inverse (method 1a).

    `rtol` is relative and acts on mu, an eigenvalue of G. The default follows the precision of the
    class gradients: 1e-12 for float64, 1e-6 for float32 and below.
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        _require_non_negative("rtol", self.rtol)

    def gain(self, mu: Tensor, mu_max: Tensor, dtype: torch.dtype) -> Tensor:
        return (mu > self.relative(dtype) * mu_max).to(mu.dtype)

    def relative(self, dtype: torch.dtype) -> float:
        """`rtol`, or its default for class gradients of this precision."""
        return self.rtol if self.rtol is not None else (1e-12 if dtype == torch.float64 else 1e-6)

    def __str__(self) -> str:
        return "exact" if self.rtol is None else f"exact {self.rtol:g}"


@dataclass(frozen=True)
class Cut:
    """h = 1 where sqrt(mu) > atol, else 0: an absolute rank cut on singular values (method 1a).

    `atol` acts on sqrt(mu), a singular value, in units of 1 / omega. FI's ancestor cuts at 1e-3.
    """

    atol: float = 1e-3

    def __post_init__(self) -> None:
        _require_non_negative("atol", self.atol)

    def gain(self, mu: Tensor, mu_max: Tensor, dtype: torch.dtype) -> Tensor:
        return (mu > self.atol**2).to(mu.dtype)

    def __str__(self) -> str:
        return f"cut {self.atol:g}"


@dataclass(frozen=True)
class Damped:
    """h = mu / (mu + lam): grad^T (G + lam I)^-1 grad (method 1a).

    `lam` acts on mu, in units of 1 / omega^2. lam -> 0 is `Exact`; for large lam, lam * FI tends to
    the squared Jacobian norm.
    """

    lam: float = 1e-4

    def __post_init__(self) -> None:
        _require_non_negative("lam", self.lam)

    def gain(self, mu: Tensor, mu_max: Tensor, dtype: torch.dtype) -> Tensor:
        if self.lam == 0:
            return Exact().gain(mu, mu_max, dtype)
        return mu / (mu + self.lam)

    def __str__(self) -> str:
        return f"damped {self.lam:g}"


EXACT = Exact()


def spectral_of(text: str) -> Spectral:
    """The filter that prints as this text: "exact", "cut 0.001", "damped 1e-4". Raises ValueError."""
    kinds: dict[str, Callable[..., Spectral]] = {"exact": Exact, "cut": Cut, "damped": Damped}
    kind, _, number = text.partition(" ")
    try:
        return kinds[kind](*(float(part) for part in number.split()))
    except (KeyError, TypeError, ValueError):
        forms = "exact, 'cut 0.001' or 'damped 0.0001', with any number of at least 0"
        raise ValueError(f"unknown filter {text!r}; write {forms}.") from None
