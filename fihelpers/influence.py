"""First-order local influence (FI): class gradients and probabilities in, FI out.

Symbols, used with these meanings in the whole suite:

    s_y    class gradients, the derivative of log P(y) with respect to a perturbation omega, shape (p,)
    P      probabilities of the K classes, renormalised to sum to one
    y_hat  the predicted class, the argmax of P unless given
    G      the Fisher metric, sum_y P(y) s_y s_y^T, shape (p, p)
    mu     eigenvalues of G (equally of the K x K matrix M of method 1a)
    h      the spectral filter, a function of mu between 0 and 1

FI is the largest squared change of -log P(y_hat) per squared length of path, grad^T G^+ grad
(Dai et al. 2026, equation 2). It is computed in the spectral form of method 1a, which is bounded by
`ceiling` by construction: nothing here is ever clamped to the ceiling.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ROUNDING = 1e-14  # relative error of the small eigen-problems, which are solved in float64
CLEAR = 1e-9  # mu / mu_max (or lam / mu_max) above which rounding does not decide which directions count
MARGIN = 1.001  # by how much a bound on an eigenvalue clears a filter's cut, so that rounding cannot decide
IN_CACHE = 2**15  # groups whose eigenvalues are found at once: their hundred steps stay in the cache
UNROLLED = 8  # the largest problem that is written out, n^3 / 6 steps over all groups at once
LEAST_DAMPING = 1e-25  # lam from which scores whose squares leave the range of float32 have no FI to speak of
SATURATED_SHARE = 0.95
SATURATED_RTOL = 1e-3


class SaturationWarning(UserWarning):
    """FI equals its ceiling nearly everywhere, so the map ranks nothing (method 1b.2)."""


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


class Moments(NamedTuple):
    """What every elementwise measure (p = 1) is made of, each of shape *shape.

    `score` is s_y_hat, `metric` the Fisher metric sum_y P(y) s_y^2, `others` the sum of s_y over the
    other classes, and `ceiling` the largest FI possible.
    """

    score: Tensor
    metric: Tensor
    others: Tensor
    ceiling: Tensor


class Decomposition(NamedTuple):
    """change2 = fi * length2 for each element (method 1b.4)."""

    change2: Tensor
    fi: Tensor
    length2: Tensor


def fi(
    class_grads: Tensor,
    probs: Tensor,
    *,
    over: int | Sequence[int] = (),
    predicted: int | Tensor | None = None,
    spectral: Spectral = EXACT,
) -> Tensor:
    """First-order local influence (Dai et al. 2026, equation 2, in the form of method 1a).

    class_grads: (K, *shape), the class gradients d log P(y) / d omega. The row of the predicted class
        is never read: it follows from the others, and is mostly rounding where P(y_hat) is near 1.
    probs: (K,) or (K, *lead), where lead is the start of shape (a batch of questions, say).
    over: the axes of shape that together form one perturbation omega; () makes each element its own.
    predicted: y_hat, an int or a tensor of shape lead; None takes the argmax of probs.

    Returns FI, dimensionless, of shape *shape without the axes `over`, in float32 or better. It lies
    between 0 and `ceiling`. Warns `SaturationWarning` where a map of FI ranks nothing.
    Raises ValueError for shapes that do not fit and FloatingPointError for NaN or infinite input.
    """
    axes = axes_of(over, class_grads.dim() - 1)
    if not axes:
        m = moments(class_grads, probs, predicted)
        values = fi_of_moments(m, spectral)
        top = m.ceiling
    else:
        turned, others, chosen = _turned(class_grads, probs, axes, predicted)
        top = _like(others.sum(0) / chosen, turned.dim() - 2)
        values = _group_fi(_small_problem(turned, others), chosen, top, spectral, class_grads.dtype)
    warn_if_saturated(values, top)
    return values.to(_working(class_grads.dtype))


def gram(class_grads: Tensor, over: int | Sequence[int]) -> Tensor:
    """Inner products of the class gradients over a group, J J^T (method 1a).

    class_grads: (K, *shape); over: axes of shape. Returns (K, K, *rest) in float64. It is a sum over
    the group's dimensions, so a group too large to hold is accumulated: gram(a) + gram(b).
    """
    axes = axes_of(over, class_grads.dim() - 1)
    if not axes:
        raise ValueError("gram needs the axes of one group in `over`; for single elements use fi.")
    _check_finite(class_grads)
    return _outer(_grouped(class_grads.double(), axes))


def fi_from_gram(
    gram_matrix: Tensor,
    probs: Tensor,
    *,
    predicted: int | Tensor | None = None,
    spectral: Spectral = EXACT,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """FI of a group from its Gram matrix (method 1a).

    gram_matrix: (K, K, *rest); probs: (K,) or (K, *lead) with lead the start of rest. `dtype` is the
    precision in which the class gradients were computed; it sets the default rtol of `Exact`.
    Returns FI of shape *rest. Raises as `fi`.
    """
    if gram_matrix.dim() < 2 or gram_matrix.shape[0] != gram_matrix.shape[1]:
        raise ValueError(f"A Gram matrix has shape (K, K, ...), not {tuple(gram_matrix.shape)}.")
    problem, others, chosen = _problem_of_gram(gram_matrix, probs, predicted)
    top = _like(others.sum(0) / chosen, gram_matrix.dim() - 2)
    values = _group_fi(problem, chosen, top, spectral, dtype)
    warn_if_saturated(values, top)
    return values.to(_working(dtype))


def effective_rank(
    class_grads: Tensor,
    probs: Tensor,
    *,
    over: int | Sequence[int] = (),
    predicted: int | Tensor | None = None,
    spectral: Spectral = EXACT,
) -> Tensor:
    """How many directions the filter lets pass, sum_i h(mu_i) (method 1a). Arguments as in `fi`.

    For `Exact` it is the rank of the Fisher metric, at most min(p, K - 1).
    """
    axes = axes_of(over, class_grads.dim() - 1)
    if not axes:
        metric = moments(class_grads, probs, predicted).metric
        return spectral.gain(metric, metric, class_grads.dtype) * (metric > 0)
    turned, others, chosen = _turned(class_grads, probs, axes, predicted)
    return _spectrum(_small_problem(turned, others), chosen).gain(spectral, class_grads.dtype).sum(0)


def ceiling(probs: Tensor, predicted: int | Tensor | None = None) -> Tensor:
    """The largest FI possible, (1 - P(y_hat)) / P(y_hat): the odds against y_hat (method 1b.1).

    probs: (K, *lead). Returns shape lead. 1 - P(y_hat) is the sum of the others, never a difference.
    """
    _, others, chosen = _other_classes(probs, probs, predicted)
    return others.sum(0) / chosen


def saturated(values: Tensor, probs: Tensor, predicted: int | Tensor | None = None) -> Tensor:
    """Where FI equals its ceiling to one part in a thousand (method 1b.2).

    values: FI of shape (*lead, ...); probs: (K, *lead). Returns a boolean tensor like values.
    """
    return _near(values, _like(ceiling(probs, predicted), values.dim()))


def moments(class_grads: Tensor, probs: Tensor, predicted: int | Tensor | None = None) -> Moments:
    """The moments of the class gradients for single elements, p = 1 (method 1a). Arguments as in `fi`.

    s_y_hat is taken from the other classes, -sum_{y != y_hat} P(y) s_y / P(y_hat), so that
    s_y_hat^2 <= ceiling * metric holds by the inequality of Cauchy and Schwarz.
    """
    grads, others, chosen = _other_classes(class_grads, probs, predicted)
    _check_finite(grads)
    return moments_of_others(grads, others, chosen)


def moments_of_others(grads: Tensor, others: Tensor, chosen: Tensor) -> Moments:
    """`moments` from the K - 1 classes other than y_hat, already in order and float32 or better.

    grads: (K-1, *shape); others: their probabilities, (K-1, *lead); chosen: P(y_hat), shape lead.
    """
    others, chosen = _like(others, grads.dim()), _like(chosen, grads.dim() - 1)
    weighted = others * grads
    mean = weighted.sum(0)
    metric = (weighted * grads).sum(0) + mean * mean / chosen
    return Moments(-mean / chosen, metric, grads.sum(0), others.sum(0) / chosen)


def turned_classes(log_p: Tensor, others: Tensor, chosen: Tensor) -> Tensor:
    """Combinations of log P the squares of whose gradients w add up to the metric of a single element.

    log_p: log P of the classes other than y_hat, (B, K-1); others: their P, (K-1, B); chosen: P(y_hat), (B,).
    Returns (B, K-1). It is the Householder basis of method 1a, in which w_1 = s_y_hat / sqrt(ceiling).
    """
    log_p = log_p.sort(-1, descending=True).values  # the reflection loses no digits from the likeliest class
    root = log_p.detach().softmax(-1).sqrt()  # sqrt(P) of the other classes, of length 1
    u = root.clone()
    u[:, 0] += 1
    scaled = root * log_p
    first = -(root * scaled).sum(-1, keepdim=True) / chosen[:, None].sqrt()
    turned = scaled - u * (u * scaled).sum(-1, keepdim=True) / u[:, :1]
    return torch.cat([first, turned[:, 1:]], -1) * others.sum(0)[:, None].sqrt()


def moments_of_turned(grads: Tensor, top: Tensor, others: Tensor | None = None) -> Moments:
    """`moments` from the gradients (K-1, *shape) of `turned_classes`; top: the ceiling, of shape lead.

    others: the sum of s_y over the other classes, *shape, which does not follow from them; empty by default.
    The moments take the place of the gradients, which are overwritten: new memory for every block of
    weights costs more than the arithmetic.
    """
    top = _like(top, grads.dim() - 1)
    first, *rest = grads
    metric = rest.pop().square_() if rest else torch.zeros_like(first)
    for g in (first, *rest):
        metric.addcmul_(g, g)
    none = metric.new_empty(0)
    return Moments(first.mul_(top.sqrt()), metric, none if others is None else others, top)


def fi_of_moments(m: Moments, spectral: Spectral = EXACT) -> Tensor:
    """FI of single elements, h(G) s_y_hat^2 / G (method 1, p = 1). Where G = 0, FI = 0."""
    if isinstance(spectral, Damped) and spectral.lam >= LEAST_DAMPING:
        damped = m.metric + spectral.lam
        return torch.div(m.score, damped, out=damped).mul_(m.score)
    gain = spectral.gain(m.metric, m.metric, m.metric.dtype)
    # the score is divided by the root of the metric before it is squared: squares of tiny gradients
    # would leave the range of float32
    root = m.metric.sqrt()
    share = torch.where(root > 0, m.score / root, 0)
    return gain * share * share


def decompose(
    class_grads: Tensor, probs: Tensor, displacement: Tensor, predicted: int | Tensor | None = None
) -> Decomposition:
    """First-order change squared = FI x squared information length, per element (method 1b.4).

    displacement: delta, broadcastable to shape; -theta for the removal of a weight, which makes
    change2 the square of SNIP. It holds for one sample, not between averages.
    """
    m = moments(class_grads, probs, predicted)
    delta = displacement.to(m.score.dtype)
    return Decomposition((m.score * delta) ** 2, fi_of_moments(m), m.metric * delta * delta)


def _working(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def axes_of(over: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """`over` as sorted, non-negative axes of a shape with `dims` axes. Raises ValueError if it is none."""
    axes = (over,) if isinstance(over, int) else tuple(over)
    if any(not -dims <= a < dims for a in axes) or len({a % dims for a in axes}) < len(axes):
        raise ValueError(f"over={axes} does not name distinct axes of a shape with {dims} axes.")
    return tuple(sorted(a % dims for a in axes))


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass over them."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def _check_finite(values: Tensor) -> None:
    if not is_finite(values):
        raise FloatingPointError("Class gradients hold NaN or infinite values; check the model's logits.")


def _other_classes(
    class_grads: Tensor, probs: Tensor, predicted: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the classes other than y_hat: their gradients, their probabilities, and P(y_hat)."""
    k, lead = probs.shape[0], probs.shape[1:]
    if k < 2:
        raise ValueError(f"FI needs at least 2 classes, not {k}.")
    if class_grads.shape[0] != k or class_grads.shape[1 : 1 + len(lead)] != lead:
        raise ValueError(
            f"class_grads of shape {tuple(class_grads.shape)} does not start with the shape of probs, "
            f"{tuple(probs.shape)}."
        )
    p = probs.to(_working(probs.dtype)).to(torch.promote_types(_working(class_grads.dtype), torch.float32))
    if not torch.isfinite(p).all() or (p < 0).any():
        raise FloatingPointError("Probabilities must be finite and not negative; check the model's logits.")
    p = p / p.sum(0)
    y = p.argmax(0) if predicted is None else torch.as_tensor(predicted, device=p.device).expand(lead)
    if ((y < 0) | (y >= k)).any():
        raise ValueError(f"predicted must lie between 0 and {k - 1}, not {y.tolist()}.")
    row = _like(torch.arange(k - 1, device=p.device), 1 + len(lead))
    index = row + (row >= y)
    others, chosen = p.gather(0, index), p.gather(0, y[None])[0]
    if (chosen <= 0).any():
        raise ValueError("The predicted class has probability 0, so FI is not defined for it.")
    grads = class_grads.to(_working(class_grads.dtype))
    if not lead:
        return grads[index], others, chosen
    inputs = index * y.numel() + torch.arange(y.numel(), device=p.device).reshape(lead)
    rows = grads.flatten(0, len(lead)).index_select(0, inputs.flatten())
    return rows.unflatten(0, index.shape), others, chosen


def _like(values: Tensor, dims: int) -> Tensor:
    """Append axes of length 1 so that values broadcasts from the left."""
    return values.reshape(values.shape + (1,) * (dims - values.dim()))


class _Problem(NamedTuple):
    """The smaller of the two eigen-problems of each group: a symmetric `matrix` (n, n, *rest) and a vector.

    Of M, n = K-1, the `vector` (n, *rest) is sqrt(P) of the other classes; the square of its coordinate along
    an eigenvector is the leverage times P(y_hat). Of the metric G, n = p, it is the gradient times
    sqrt(P(y_hat)), and the square is also a factor mu too large (`of_metric`).
    """

    matrix: Tensor
    vector: Tensor
    of_metric: bool

    def part(self, which: Tensor) -> _Problem:
        """Some of the groups, by their numbers (m)."""
        n = len(self.matrix)
        matrix = self.matrix.reshape(n, n, -1)[:, :, which]
        return _Problem(matrix, self.vector.reshape(n, -1)[:, which], self.of_metric)


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvalues mu, (K-1 or p, *rest), in any order, and leverage U[y_hat, i]^2 / P(y_hat)."""

    mu: Tensor
    leverage: Tensor

    def gain(self, spectral: Spectral, dtype: torch.dtype) -> Tensor:
        # what the rounding of float64 makes of a zero eigenvalue is a zero, under every filter
        top = self.mu.amax(0, keepdim=True)
        return torch.where(self.mu > ROUNDING * top, spectral.gain(self.mu, top, dtype), 0)

    def filtered(self, spectral: Spectral, dtype: torch.dtype) -> Tensor:
        return (self.gain(spectral, dtype) * self.leverage).sum(0)


def _turned(
    class_grads: Tensor, probs: Tensor, axes: tuple[int, ...], predicted: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (K-1, *rest, p) of Q^T D^(1/2) J, Q being a Householder basis of the complement of sqrt(P).

    See method 1a. Also the probabilities of the other classes, (K-1, *lead), and P(y_hat), as float64.
    """
    grads, others, chosen = _other_classes(class_grads, probs, predicted)
    if others.dim() > 1 and axes[0] < others.dim() - 1:
        raise ValueError(f"over={axes} names an axis that probs shares; a group belongs to one distribution.")
    _check_finite(grads)
    rows, others, chosen = grads.double(), others.double(), chosen.double()
    shift = _dot(_like(others / (chosen.sqrt() * (1 + chosen.sqrt())), rows.dim()), rows)
    return _grouped((rows + shift).mul_(_like(others.sqrt(), rows.dim())), axes), others, chosen


def _small_problem(turned: Tensor, others: Tensor) -> _Problem:
    root = _like(others, turned.dim()).sqrt()
    if turned.shape[-1] < len(turned):
        along = (root * turned).sum(0).movedim(-1, 0)  # coordinates of sqrt(P) in the space of omega
        return _Problem(_outer(turned.transpose(0, -1)), along, of_metric=True)
    return _Problem(_outer(turned), root[..., 0].expand(turned.shape[:-1]), of_metric=False)


def _problem_of_gram(
    gram_matrix: Tensor, probs: Tensor, predicted: int | Tensor | None
) -> tuple[_Problem, Tensor, Tensor]:
    """The problem of M, the other classes' probabilities, and P(y_hat)."""
    rows, others, chosen = _other_classes(gram_matrix.movedim(1, -1), probs, predicted)
    both = _other_classes(rows.transpose(0, -1), probs, predicted)[0]
    g = both.movedim(-1, 1).double()
    others, chosen = others.double(), chosen.double()
    p, q = _like(others, g.dim() - 1), _like(chosen, g.dim() - 2)
    kappa = 1 / (q.sqrt() * (1 + q.sqrt()))
    mean = (p * g).sum(1) * kappa  # inner products of each row with the shift
    square = (p * mean).sum(0) * kappa
    root = p.sqrt()
    m = root[:, None] * root[None] * (g + mean[:, None] + mean[None] + square)
    return _Problem(m, root.expand(m.shape[1:]), of_metric=False), others, chosen


def _group_fi(
    problem: _Problem, chosen: Tensor, top: Tensor, spectral: Spectral, dtype: torch.dtype
) -> Tensor:
    """FI (*rest) of groups; `top` is its ceiling.

    Where a Cholesky factor shows beyond doubt what the filter does, nothing else is computed; the
    eigenvalues settle the other groups.
    """
    rest = problem.matrix.shape[2:]
    chosen, top = _like(chosen, len(rest)).expand(rest), _like(top, len(rest)).expand(rest)
    if spectral == Damped(0):
        spectral = EXACT
    if len(problem.matrix) > UNROLLED or not isinstance(spectral, (Exact, Cut, Damped)):
        return _spectrum(problem, chosen).filtered(spectral, dtype)
    if isinstance(spectral, Damped):
        values, settled = _damped(problem, spectral.lam)
        values = values / chosen
    else:
        values, settled = _all_or_none(problem, chosen, top, spectral, dtype)
    values = values.contiguous()
    left = (~settled).flatten().nonzero()[:, 0]
    for part in left.split(IN_CACHE) if len(left) else ():
        spectrum = _spectrum(problem.part(part), chosen.flatten()[part])
        values.view(-1)[part] = spectrum.filtered(spectral, dtype)
    return values


def _damped(problem: _Problem, lam: float) -> tuple[Tensor, Tensor]:
    """P(y_hat) FI, that is sqrt(P)^T M (M + lam I)^-1 sqrt(P), and where lam is far above the rounding of M.

    Only there no direction has to be declared dead.
    """
    matrix, vector, of_metric = problem
    factor = _cholesky(matrix, lam)
    half = _half_solved(factor, vector)
    other = half if of_metric else _half_solved(factor, [_dot(row, vector) for row in matrix])
    return _dot(half, other), lam > CLEAR * _trace(matrix)


def _all_or_none(
    problem: _Problem, chosen: Tensor, top: Tensor, spectral: Exact | Cut, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """FI where the filter lets all directions pass or none of them, and where that is certain.

    By bounds: no eigenvalue is above the trace, and none below 1 / tr(matrix^-1).
    """
    absolute = spectral.atol**2 if isinstance(spectral, Cut) else 0.0
    relative = 0.0 if isinstance(spectral, Cut) else spectral.relative(dtype)
    factor = _cholesky(problem.matrix, 0)
    trace = _trace(problem.matrix)
    least = (max(MARGIN * relative, CLEAR) * trace).clamp(min=MARGIN * absolute)
    every = _inverse_trace(factor) * least < 1  # false where rounding made the factor NaN
    none = MARGIN * trace <= absolute
    full = top
    if problem.of_metric:
        half = _half_solved(factor, problem.vector)
        full = _dot(half, half) / chosen
    return torch.where(every, full, 0), every | none


def _cholesky(m: Tensor, lam: float) -> list[list[Tensor]]:
    """Rows of the lower factor of m + lam I for symmetric m (n, n, *rest)."""
    factor: list[list[Tensor]] = []
    for i in range(len(m)):
        row: list[Tensor] = []
        for j, above in enumerate([*factor, row]):
            left = m[i, j] + lam if i == j else m[i, j]
            for a, b in zip(row, above, strict=False):
                left = left - a * b
            row.append(left.sqrt() if i == j else left / above[j])
        factor.append(row)
    return factor


def _half_solved(factor: list[list[Tensor]], vector: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """L^-1 vector for a lower factor L, vector (n, *rest)."""
    found: list[Tensor] = []
    for row, value in zip(factor, vector, strict=True):
        for a, b in zip(row, found, strict=False):
            value = value - a * b
        found.append(value / row[-1])
    return found


def _inverse_trace(factor: list[list[Tensor]]) -> Tensor:
    """tr((L L^T)^-1), the sum of the squares of L^-1, for a lower factor L."""
    total = torch.zeros_like(factor[0][0])
    for first, start in enumerate(factor):
        column = [1 / start[-1]]
        for row in factor[first + 1 :]:
            column.append(-_dot(row[first:-1], column) / row[-1])
        total += _dot(column, column)
    return total


def _dot(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor) -> Tensor:
    """The sum of a[i] * b[i] over the first axis, without a temporary for every product."""
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        total = total.addcmul_(x, y)
    return total


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal().sum(-1)


def _spectrum(problem: _Problem, chosen: Tensor) -> _Spectrum:
    """Solve (n, n, *rest) problems; chosen (*rest) is P(y_hat)."""
    mu, squares = _eigen(problem.matrix, problem.vector)
    if problem.of_metric:
        live = mu > ROUNDING * mu.amax(0)
        squares = torch.where(live, squares / mu, 0)
    return _Spectrum(mu, squares / chosen)


def _eigen(m: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of symmetric (n, n, *rest), squared coordinates of a vector (n, *rest) along them."""
    if m.shape[0] == 1:
        return m[0], vector.square()
    if m.shape[0] == 2:
        return _rotate(m[0, 0], m[1, 1], m[0, 1], vector[0], vector[1])
    if m.shape[0] == 3:
        return _closed_form(m, vector)
    values, vectors = torch.linalg.eigh(m.movedim((0, 1), (-2, -1)))
    squares = torch.einsum("...ji,j...->i...", vectors, vector).square()
    return values.movedim(-1, 0), squares


def _rotate(a: Tensor, b: Tensor, c: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Closed form of [[a, c], [c, b]]: its eigenvalues, squared coordinates of (x, y).

    One Jacobi rotation. The vector is rotated by it, so its length is kept whatever the rounding.
    """
    half = (b - a) / 2
    reach = half.abs() + torch.hypot(half, c)
    t = torch.where(reach > 0, c / reach, 0)  # tangent of the angle, at most 1
    t = torch.where(half < 0, -t, t)
    cosine = torch.rsqrt(1 + t * t)
    u, v = cosine * (x - t * y), cosine * (y + t * x)
    return torch.stack([a - t * c, b + t * c]), torch.stack([u * u, v * v])


def _closed_form(m: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Closed form of symmetric 3 x 3 problems (K = 4, or p = 3), m: (3, 3, *rest), root: (3, *rest).

    The best separated eigenvalue comes from the cubic and its vector from a row of the adjugate;
    a reflection takes that vector out, and the 2 x 2 rest is one rotation. Every step is orthogonal,
    so the leverages add up to |root|^2 and FI cannot pass its ceiling.
    """
    mean = _trace(m) / 3
    scale = m.abs().amax((0, 1))
    inverse = torch.where(scale > 0, 1 / scale, 1)
    a, b, c = ((m[i, i] - mean) * inverse for i in range(3))
    d, e, f = m[0, 1] * inverse, m[0, 2] * inverse, m[1, 2] * inverse
    spread = (_dot((a, b, c), (a, b, c)) / 6 + _dot((d, e, f), (d, e, f)) / 3).sqrt()
    half_det = (a * (b * c - f * f) - d * (d * c - e * f) + e * (d * f - b * e)) / 2
    ratio = torch.where(spread > 0, half_det / spread**3, 1)
    # arccos needs an argument in [-1, 1]; rounding of equal eigenvalues leaves it
    angle = torch.acos(ratio.clamp(-1, 1)) / 3
    lone = 2 * spread * torch.where(ratio >= 0, angle, angle + 2 * math.pi / 3).cos()
    return _deflate(m, root, _adjugate_direction(a - lone, b - lone, c - lone, d, e, f))


def _adjugate_direction(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> list[Tensor]:
    """Unit null vector (three times *rest) of the singular matrix [[a, d, e], [d, b, f], [e, f, c]].

    The adjugate is the null vector's outer product; its longest column is the best conditioned.
    """
    ab, ac, bc = d * f - b * e, d * e - a * f, e * f - c * d
    best = [b * c - f * f, bc, ab]
    length = _dot(best, best)
    for column in ([bc, a * c - e * e, ac], [ab, ac, a * b - d * d]):
        longer = (other := _dot(column, column)) > length
        best = [torch.where(longer, new, old) for new, old in zip(column, best, strict=True)]
        length = torch.where(longer, other, length)
    length = length.sqrt()
    found = length > 0
    return [torch.where(found, x / length, 1.0 if i == 0 else 0.0) for i, x in enumerate(best)]


def _deflate(m: Tensor, root: Tensor, n: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Spectrum of m with one eigenvector n known: reflect n onto the first axis, rotate the rest."""
    u = [n[0] + torch.where(n[0] < 0, -1.0, 1.0), n[1], n[2]]
    size = (2 / _dot(u, u)).sqrt()
    u = [x * size for x in u]
    along = _dot(u, root)
    x = [old - part * along for old, part in zip(root, u, strict=True)]
    image = [_dot(row, u) for row in m]
    half = _dot(u, image) / 2
    w = [old - part * half for old, part in zip(image, u, strict=True)]

    def turned(i: int, j: int) -> Tensor:
        return m[i, j] - u[i] * w[j] - w[i] * u[j]

    mu, leverage = _rotate(turned(1, 1), turned(2, 2), turned(1, 2), x[1], x[2])
    return torch.cat([turned(0, 0)[None], mu]), torch.cat([x[0].square()[None], leverage])


def _grouped(grads: Tensor, axes: tuple[int, ...]) -> Tensor:
    """(K, *shape) -> (K, *rest, p)."""
    moved = grads.movedim([a + 1 for a in axes], list(range(-len(axes), 0)))
    return moved.flatten(-len(axes))


def _outer(rows: Tensor) -> Tensor:
    """(K, *rest, p) -> (K, K, *rest), the inner products over the last axis."""
    if max(len(rows), rows.shape[-1]) > UNROLLED:
        return torch.einsum("i...p,j...p->ij...", rows, rows)
    # a product of two tiny matrices costs many times its arithmetic
    planes = [row.unbind(-1) for row in rows]
    found = rows.new_empty(len(rows), *rows.shape[:-1])
    for i, one in enumerate(planes):
        for j, other in enumerate(planes[: i + 1]):
            total = one[0] * other[0]
            for a, b in zip(one[1:], other[1:], strict=True):
                total.addcmul_(a, b)
            found[i, j] = total
            found[j, i] = total
    return found


def _near(values: Tensor, top: Tensor) -> Tensor:
    return (values - top).abs() <= SATURATED_RTOL * top


def warn_if_saturated(values: Tensor | Collection[Tensor], top: Tensor) -> None:
    """Elements without any gradient have FI 0 and say nothing about saturation."""
    live = near = 0
    for part in (values,) if isinstance(values, Tensor) else values:
        some = part > 0
        live += int(some.sum())
        near += int((_near(part, _like(top, part.dim())) & some).sum())
    if live < 2:
        return
    share = near / live
    if share >= SATURATED_SHARE:
        warnings.warn(
            f"FI equals its ceiling at {share:.1%} of the elements, so it ranks nothing: use more classes "
            "than dimensions per group, elementwise FI, or a filter other than exact (method 1b.2).",
            SaturationWarning,
            stacklevel=3,
        )
