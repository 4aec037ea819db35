"""Ways to merge two models, as values that hold their conventions (method 4.6)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from os import PathLike
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fihelpers.extras import optional
from fihelpers.scores.store import Scores

with optional():
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

AnyScores = Scores | str | PathLike[str]
Pair = tuple[Tensor, Tensor]
Scope = Literal["global", "layer"]
Trim = Literal["global", "tensor"]
Elect = Literal["mean", "larger"]
Stages = Literal["I", "II", "I and II"]

FLOOR = 1e-6  # the least value of a Fisher diagonal


@dataclass(frozen=True, eq=False)
class Piece:
    """A flat piece of one tensor of the models, in float32 or float64.

    base, deltas: None where the method needs no base; deltas are after DARE's dropping; kept: what the trim
    leaves; protected: Theta_A and Theta_B; fishers: the Fisher diagonals of A and B.
    """

    base: Tensor | None
    a: Tensor
    b: Tensor
    deltas: Pair | None
    kept: Pair | None
    protected: Pair | None
    fishers: Pair | None
    protection: Protection | None


@dataclass(frozen=True)
class Method(ABC):
    """A way to merge, with its conventions.

    protects: how protection acts, by putting weights back ("revert") or in the stages of TIES; "" for a
    method for which method 4.6 defines none.
    """

    name: ClassVar[str]
    protects: ClassVar[str]  # "revert", "stages" or ""
    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not math.isfinite(getattr(self, "task_weight", 0.0)):
            raise ValueError(f"task_weight must be finite, not {getattr(self, 'task_weight', None)}.")

    def __str__(self) -> str:
        options = ", ".join(f"{f.name.replace('_', ' ')} {getattr(self, f.name)}" for f in fields(self))
        return f"{self.name} ({options})" if options else self.name

    @abstractmethod
    def merge(self, piece: Piece) -> Tensor:
        """The merged weights of a piece."""


@dataclass(frozen=True)
class Average(Method):
    """The mean of A and B (Wortsman et al. 2022)."""

    name = "average"
    protects = "revert"
    needs_base = False

    def merge(self, piece: Piece) -> Tensor:
        return _reverted(piece.a / 2 + piece.b / 2, piece)


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """theta_base + task_weight * (delta_A + delta_B) (Ilharco et al. 2023).

    task_weight: gamma of method 4.6; .4 is what its authors advise where there is nothing to tune it on.
    """

    name = "task arithmetic"
    protects = "revert"
    task_weight: float = 0.4

    def merge(self, piece: Piece) -> Tensor:
        return _reverted(_moved(piece, self.task_weight, sum(_deltas(piece))), piece)


@dataclass(frozen=True)
class Ties(Method):
    """Trim the displacements, elect a sign for each weight, and merge what agrees (Yadav et al. 2023).

    density: the share of each displacement that the trim keeps, the largest of the whole model (trim
    "global", as its authors do) or of each tensor ("tensor", as peft and mergekit do).
    elect: "mean" averages the entries that agree with the sign of their sum; "larger" keeps the larger entry
    alone (method 4.6).
    """

    name = "TIES"
    protects = "stages"
    task_weight: float = 1.0
    density: float = 0.2
    trim: Trim = "global"
    elect: Elect = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("density", self.density)
        check_choice("trim", self.trim, Trim)
        check_choice("elect", self.elect, Elect)

    def merge(self, piece: Piece) -> Tensor:
        return _moved(piece, self.task_weight, self._consensus(piece))

    def _consensus(self, piece: Piece) -> Tensor:
        entries = _trimmed(piece)
        chosen = _by_protection(self._elected(entries), piece)
        merged: Tensor = disjoint_merge(entries, chosen)
        return merged

    def _elected(self, voters: Tensor) -> Tensor:
        if self.elect == "mean":
            mask: Tensor = calculate_majority_sign_mask(voters)
            return mask
        first = voters[0].abs() >= voters[1].abs()
        return torch.stack([first, ~first])


@dataclass(frozen=True)
class Dare(TaskArithmetic):
    """Task arithmetic of displacements of which a random share is dropped (Yu et al. 2024).

    density: the share that is kept; .8, a drop rate of .2, is what its authors' code uses for language
    models. rescale: whether what is kept is divided by it, as in the paper (mergekit instead restores the
    sum of absolute values). seed: of the draw, which is another one for each tensor and each expert.
    """

    name = "DARE task"
    protects = ""
    task_weight: float = 1.0
    density: float = 0.8
    rescale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("density", self.density)
        if self.rescale and self.density == 0:
            raise ValueError("DARE with density 0 has nothing to rescale; choose a density above 0.")


@dataclass(frozen=True)
class DareTies(Ties):
    """TIES of displacements of which a random share is dropped (Yu et al. 2024), options as in `Dare`.

    density: of the trim that follows, as in its authors' code; 1 leaves it out, as peft and mergekit do.
    """

    name = "DARE TIES"
    protects = ""
    drop_density: float = 0.8
    rescale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("drop_density", self.drop_density)
        if self.rescale and self.drop_density == 0:
            raise ValueError("DARE with drop_density 0 has nothing to rescale; choose one above 0.")


@dataclass(frozen=True)
class FisherAverage(Method):
    """(F_A theta_A + F_B theta_B) / (F_A + F_B), with Fisher diagonals F (Matena and Raffel 2022).

    F is at least FLOOR, and divided by its norm over the model, as in its authors' code. Tensors without F
    are averaged.
    """

    name = "Fisher average"
    protects = "revert"
    needs_base = False

    def merge(self, piece: Piece) -> Tensor:
        if piece.fishers is None:
            return Average().merge(piece)
        f_a, f_b = piece.fishers
        return _reverted((f_a * piece.a + f_b * piece.b) / (f_a + f_b), piece)


@dataclass(frozen=True, eq=False)
class Protection:
    """Which weights of A and B are kept from the merge: Theta_A and Theta_B, the top `share` by their scores.

    share: k % is .01 k; of all scored weights together (scope "global") or of each tensor ("layer").
    scores_a, scores_b: Scores or a file of them; without scores, nothing of that expert is protected.
    displaced: multiply the scores (the squared score or the Fisher diagonal) by the squared displacement
    that the plain merge brings, theta_merged - theta_X (method 1b.4).
    stages: for TIES. I: protected entries are exempt from the trim. II: where one expert alone is
    protected its entry is elected, whatever the signs and sizes; `whole` takes it as it was before the trim.
    seed: of the draw among weights of equal score.

    Average and task arithmetic put weights back to theta_A in Theta_A without Theta_B, and the other way
    round. Raises ValueError for a share outside [0, 1], no scores, or an unknown scope or stage.
    """

    share: float
    scores_a: AnyScores | None = None
    scores_b: AnyScores | None = None
    scope: Scope = "global"
    displaced: bool = False
    stages: Stages = "I"
    whole: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("share", self.share, "k % is a hundredth of k")
        check_choice("scope", self.scope, Scope)
        check_choice("stages", self.stages, Stages)
        if self.scores_a is None and self.scores_b is None:
            raise ValueError("Protection needs scores of A, of B or of both.")


def _deltas(piece: Piece) -> Pair:
    assert piece.deltas is not None  # checked for every method that needs a base
    return piece.deltas


def _moved(piece: Piece, task_weight: float, delta: Tensor | float) -> Tensor:
    assert piece.base is not None
    return piece.base + task_weight * delta


def _alone(piece: Piece) -> Pair | None:
    """Masks of Theta_A without Theta_B, and of Theta_B without Theta_A."""
    if piece.protected is None:
        return None
    a, b = piece.protected
    return a & ~b, b & ~a


def _reverted(merged: Tensor, piece: Piece) -> Tensor:
    alone = _alone(piece)
    if alone is None:
        return merged
    return torch.where(alone[0], piece.a, torch.where(alone[1], piece.b, merged))


def _trimmed(piece: Piece) -> Tensor:
    """Displacements (2, size) after the trim, with what protection exempts from it."""
    assert piece.kept is not None
    kept, exempt, p = torch.stack(piece.kept), None, piece.protection
    alone = _alone(piece)
    if p is not None and piece.protected is not None and alone is not None:
        if "I" in p.stages.split(" and "):
            exempt = torch.stack(piece.protected)
        elif p.whole:
            exempt = torch.stack(alone)
    return torch.where(kept if exempt is None else kept | exempt, torch.stack(_deltas(piece)), 0)


def _by_protection(elected: Tensor, piece: Piece) -> Tensor:
    """The election (2, size), in which an entry that alone is protected wins (stage II)."""
    alone, p = _alone(piece), piece.protection
    if alone is None or p is None or "II" not in p.stages.split(" and "):
        return elected
    a, b = alone
    return torch.stack([(elected[0] & ~b) | a, (elected[1] & ~a) | b])


def check_share(name: str, value: float, hint: str = "") -> None:
    """Raises ValueError for a share that does not lie in [0, 1]; the hint is added to the message."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], not {value}{f' ({hint})' if hint else ''}.")


def check_choice(name: str, value: str, choices: object) -> None:
    """Raises ValueError for a value that is none of the Literal type `choices`."""
    known: tuple[str, ...] = choices.__args__  # type: ignore[attr-defined]
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}.")


METHODS: dict[str, Method] = {
    m.name: m for m in (Average(), TaskArithmetic(), Ties(), Dare(), DareTies(), FisherAverage())
}


def find_method(method: str | Method) -> Method:
    """A method by its name in METHODS; a Method is returned as is. Raises ValueError listing the names."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"Unknown merging method {method!r}; known: {', '.join(METHODS)}.")
    return METHODS[method]
