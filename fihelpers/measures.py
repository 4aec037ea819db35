"""The measures that FI is compared with, behind one call and in one registry (method 3).

    measure(class_grads, probs, *, over=(), predicted=None, value=None)

All are larger where a piece is judged more fragile. Shapes as in `fihelpers.influence.fi`. Over a group a
measure is the Euclidean norm over the group's elements unless its docstring says otherwise; over a data
set it is the mean of the per-sample values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fihelpers.filters import EXACT, Cut, Damped, Exact, Spectral, spectral_of
from fihelpers.influence import Moments, axes_of, fi, fi_of_moments, moments

Formula = Callable[[Moments, Tensor], Tensor]
Over = int | Sequence[int]
Predicted = int | Tensor | None
Scored = TypeVar("Scored")


class Measure(ABC):
    """What experiments loop over: called on class gradients, it gives one value for each perturbation.

    `needs_value` says whether it cannot do without the perturbed values; `reads_others`, whether its formula
    reads `Moments.others`; `reduce`, "norm" or "sum", how single elements are joined over a group.
    """

    name: str
    needs_value: bool
    reads_others: bool = False
    reduce: str = "norm"

    def __call__(
        self,
        class_grads: Tensor,
        probs: Tensor,
        *,
        over: Over = (),
        predicted: Predicted = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """The measure of every perturbation; shapes and errors as in `fihelpers.influence.fi`.

        value: the perturbed values themselves (weights, pixels), of shape *shape. Raises ValueError where
        they are needed and missing.
        """
        return self.of_groups(class_grads, probs, over, predicted, self.given(value))

    def given(self, value: Tensor | None) -> Tensor:
        """The perturbed values, or an empty tensor for a measure that needs none."""
        if not self.needs_value:
            return torch.empty(0)
        if value is None:
            raise ValueError(f"The measure {self.name!r} needs a value: pass value=…")
        return value

    @abstractmethod
    def of_moments(self, m: Moments, given: Tensor) -> Tensor:
        """The elementwise measure (p = 1) from the moments of the class gradients."""

    def of_groups(
        self, class_grads: Tensor, probs: Tensor, over: Over, predicted: Predicted, given: Tensor
    ) -> Tensor:
        """The measure of each group of elements that `over` joins."""
        values = self.of_moments(moments(class_grads, probs, predicted), given)
        axes = axes_of(over, values.dim())
        if not axes:
            return values
        return values.sum(axes) if self.reduce == "sum" else torch.linalg.vector_norm(values, dim=axes)


@dataclass(frozen=True)
class Influence(Measure):
    """FI under one spectral filter (method 1a). Over a group it is the joint FI, not a norm."""

    spectral: Spectral = EXACT
    needs_value: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"FI {self.spectral}"

    def of_moments(self, m: Moments, given: Tensor) -> Tensor:
        return fi_of_moments(m, self.spectral)

    def of_groups(
        self, class_grads: Tensor, probs: Tensor, over: Over, predicted: Predicted, given: Tensor
    ) -> Tensor:
        return fi(class_grads, probs, over=over, predicted=predicted, spectral=self.spectral)


@dataclass(frozen=True)
class Elementwise(Measure):
    """A formula in the moments of each element."""

    name: str
    formula: Formula
    needs_value: bool = False
    reduce: str = "norm"
    reads_others: bool = False

    def of_moments(self, m: Moments, given: Tensor) -> Tensor:
        return self.formula(m, given)


@dataclass(frozen=True)
class InformationLength(Measure):
    """Squared information length of the removal of a value, delta^T G delta (method 1b.4), dimensionless.

    Over a group it is the quadratic form of the whole displacement delta = -value, which is
    sum_y P(y) (s_y . delta)^2, not a norm of single elements.
    """

    name: str = "information length"
    needs_value: bool = True

    def of_moments(self, m: Moments, given: Tensor) -> Tensor:
        return m.metric * given * given

    def of_groups(
        self, class_grads: Tensor, probs: Tensor, over: Over, predicted: Predicted, given: Tensor
    ) -> Tensor:
        axes = [a + 1 for a in axes_of(over, class_grads.dim() - 1)]
        if not axes:
            return self.of_moments(moments(class_grads, probs, predicted), given)
        along = (class_grads * given).sum(axes, keepdim=True)
        return moments(along, probs, predicted).metric.squeeze([a - 1 for a in axes])


class DataFree(Measure):
    """A measure that looks at the values alone and needs no gradient."""

    @abstractmethod
    def of_value(self, value: Tensor, salt: int = 0) -> Tensor:
        """Scores for a tensor of values; `salt` separates the tensors of one model."""

    def of_moments(self, m: Moments, given: Tensor) -> Tensor:
        return self.of_value(given.expand_as(m.score) if given.numel() else m.score)


@dataclass(frozen=True)
class Random(DataFree):
    """Uniform random scores, the same for the same seed and shape: the baseline of every experiment."""

    seed: int = 0
    name: str = "random"
    needs_value: bool = False

    def of_value(self, value: Tensor, salt: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + salt)
        return torch.rand(value.shape, generator=generator).to(value.device)

    def of_groups(
        self, class_grads: Tensor, probs: Tensor, over: Over, predicted: Predicted, given: Tensor
    ) -> Tensor:
        axes = axes_of(over, class_grads.dim() - 1)
        return self.of_value(class_grads[0] if not axes else class_grads[0].amax(axes))


@dataclass(frozen=True)
class Magnitude(DataFree):
    """Absolute value of the weight or input itself, in its own units (method 3)."""

    name: str = "magnitude"
    needs_value: bool = True

    def of_value(self, value: Tensor, salt: int = 0) -> Tensor:
        return value.abs()


def _saliency(m: Moments, given: Tensor) -> Tensor:
    """With f(y) = -log P(y): -df(y_hat) * sum of df(y) over the others, where the signs agree (method 3)."""
    own, others = -m.score, -m.others
    return torch.where((own < 0) | (others > 0), 0, -own * others)


JACOBIAN = Elementwise("Jacobian norm", lambda m, _: m.score.abs())
SNIP = Elementwise("SNIP", lambda m, v: (m.score * v).abs(), needs_value=True)
SALIENCY = Elementwise("saliency", _saliency, reads_others=True)
FISHER = Elementwise("Fisher diagonal", lambda m, _: m.metric, reduce="sum")
SQUARED_SCORE = Elementwise("squared score", lambda m, _: m.score.square(), reduce="sum")
INFORMATION_LENGTH = InformationLength()
MAGNITUDE = Magnitude()
RANDOM = Random()

FILTERS: tuple[Spectral, ...] = (Exact(), Cut(1e-3), Cut(1e-2), Damped(1e-6), Damped(1e-4))

MEASURES: dict[str, Measure] = {
    m.name: m
    for m in (
        *(Influence(s) for s in FILTERS),
        JACOBIAN,
        SNIP,
        SALIENCY,
        FISHER,
        INFORMATION_LENGTH,
        MAGNITUDE,
        RANDOM,
    )
}


class ByMeasure(dict[str, Scored]):
    """What was found for each measure, under its name or any other that `find_measure` reads as the same."""

    def __missing__(self, name: str) -> Scored:
        usual = find_measure(name).name
        if usual in self:
            return self[usual]
        raise KeyError(f"{name!r} was not asked for; there are {', '.join(self)}.")


def find_measure(measure: str | Measure, spectral: Spectral = EXACT) -> Measure:
    """A measure by its name: a registered one, "FI" with the filter `spectral`, or FI as any filter prints.

    That is "FI" and what `spectral_of` reads, such as "FI damped 0.01". "squared score", the mean of
    s_y_hat^2, is known but not registered: it is a part of other scores (method 1b.4). A measure is returned
    as is. Raises ValueError that lists the known names.
    """
    if not isinstance(measure, str):
        return measure
    if measure == "FI":
        return Influence(spectral)
    known = {**MEASURES, SQUARED_SCORE.name: SQUARED_SCORE}
    if measure in known:
        return known[measure]
    kind, _, filter_ = measure.partition(" ")
    if kind != "FI":
        names = f"FI, {', '.join(known)}"
        raise ValueError(f"Unknown measure {measure!r}; known: {names}, and FI with other filters.")
    try:
        return Influence(spectral_of(filter_))
    except ValueError as error:
        raise ValueError(f"Unknown measure {measure!r}: {error}") from None
