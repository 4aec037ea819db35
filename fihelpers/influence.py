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

import warnings
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fihelpers.eigen import Problem, dot, group_fi, like, outer
from fihelpers.filters import EXACT, LEAST_DAMPING, Damped, Spectral

SATURATED_SHARE = 0.95
SATURATED_RTOL = 1e-3
PIECE = 2**20  # elements that are compared with a ceiling at a time: of a large matrix no copies are made


class SaturationWarning(UserWarning):
    """FI equals its ceiling nearly everywhere, so the map ranks nothing (method 1b.2)."""


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
    if axes:
        return _group_fi(class_grads, probs, axes, predicted, spectral, class_grads.dtype)
    m = moments(class_grads, probs, predicted)
    values = fi_of_moments(m, spectral)
    warn_if_saturated(values, m.ceiling)
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
    return outer(_grouped(class_grads.double(), axes))


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
    _check_finite(gram_matrix)
    # rows with these inner products are all that FI depends on, and have K dimensions in place of the group's
    sizes, along = torch.linalg.eigh(gram_matrix.double().movedim((0, 1), (-2, -1)))
    rows = (along * sizes.clamp(min=0).sqrt()[..., None, :]).movedim(-2, 0)
    return _group_fi(rows, probs, (rows.dim() - 2,), predicted, spectral, dtype)


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
    return _near(values, like(ceiling(probs, predicted), values.dim()))


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
    others, chosen = like(others, grads.dim()), like(chosen, grads.dim() - 1)
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
    top = like(top, grads.dim() - 1)
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
    row = like(torch.arange(k - 1, device=p.device), 1 + len(lead))
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


def _group_fi(
    class_grads: Tensor,
    probs: Tensor,
    axes: tuple[int, ...],
    predicted: int | Tensor | None,
    spectral: Spectral,
    dtype: torch.dtype,
) -> Tensor:
    """FI of groups that span these axes; dtype: in which the class gradients were computed."""
    turned, others, chosen = _turned(class_grads, probs, axes, predicted)
    top = like(others.sum(0) / chosen, turned.dim() - 2)
    values = group_fi(_small_problem(turned, others), chosen, top, spectral, dtype)
    warn_if_saturated(values, top, stacklevel=4)
    return values.to(_working(dtype))


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
    shift = dot(like(others / (chosen.sqrt() * (1 + chosen.sqrt())), rows.dim()), rows)
    return _grouped((rows + shift).mul_(like(others.sqrt(), rows.dim())), axes), others, chosen


def _small_problem(turned: Tensor, others: Tensor) -> Problem:
    root = like(others, turned.dim()).sqrt()
    if turned.shape[-1] < len(turned):
        along = (root * turned).sum(0).movedim(-1, 0)  # coordinates of sqrt(P) in the space of omega
        return Problem(outer(turned.transpose(0, -1)), along, of_metric=True)
    return Problem(outer(turned), root[..., 0].expand(turned.shape[:-1]), of_metric=False)


def _grouped(grads: Tensor, axes: tuple[int, ...]) -> Tensor:
    """(K, *shape) -> (K, *rest, p)."""
    moved = grads.movedim([a + 1 for a in axes], list(range(-len(axes), 0)))
    return moved.flatten(-len(axes))


def _near(values: Tensor, top: Tensor) -> Tensor:
    return (values - top).abs() <= SATURATED_RTOL * top


def warn_if_saturated(values: Tensor | Collection[Tensor], top: Tensor, stacklevel: int = 3) -> None:
    """Elements without any gradient have FI 0 and say nothing about saturation."""
    live = near = 0
    parts: Iterable[Tensor] = (values,) if isinstance(values, Tensor) else values
    if not top.dim():
        parts = chain.from_iterable(part.flatten().split(PIECE) for part in parts)
    for part in parts:
        some = part > 0
        live += int(some.sum())
        near += int((_near(part, like(top, part.dim())) & some).sum())
    if live < 2:
        return
    share = near / live
    if share >= SATURATED_SHARE:
        warnings.warn(
            f"FI equals its ceiling at {share:.1%} of the elements, so it ranks nothing: use more classes "
            "than dimensions per group, elementwise FI, or a filter other than exact (method 1b.2).",
            SaturationWarning,
            stacklevel=stacklevel,
        )
