"""The small eigen-problems behind FI of a group: at most K - 1 or p directions each, solved in float64.

Each group of dimensions has one problem of its own, and there may be millions of groups: those of up to eight
directions are solved by a Cholesky factor where it settles what the filter does, all groups at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fihelpers.filters import EXACT, Cut, Damped, Exact, Spectral

ROUNDING = 1e-14  # relative error of the small eigen-problems, which are solved in float64
CLEAR = 1e-9  # mu / mu_max (or lam / mu_max) above which rounding does not decide which directions count
MARGIN = 1.001  # by how much a bound on an eigenvalue clears a filter's cut, so that rounding cannot decide
IN_CACHE = 2**15  # groups whose eigenvalues are found at once: what is made of them stays in the cache
UNROLLED = 8  # the largest problem that is written out, n^3 / 6 steps over all groups at once


class Problem(NamedTuple):
    """The smaller of the two eigen-problems of each group: a symmetric `matrix` (n, n, *rest) and a vector.

    Of M, n = K-1, the `vector` (n, *rest) is sqrt(P) of the other classes; the square of its coordinate along
    an eigenvector is the leverage times P(y_hat). Of the metric G, n = p, it is the gradient times
    sqrt(P(y_hat)), and the square is also a factor mu too large (`of_metric`).
    """

    matrix: Tensor
    vector: Tensor
    of_metric: bool

    def part(self, which: Tensor) -> Problem:
        """Some of the groups, by their numbers (m)."""
        n = len(self.matrix)
        matrix = self.matrix.reshape(n, n, -1)[:, :, which]
        return Problem(matrix, self.vector.reshape(n, -1)[:, which], self.of_metric)


def group_fi(problem: Problem, chosen: Tensor, top: Tensor, spectral: Spectral, dtype: torch.dtype) -> Tensor:
    """FI (*rest) of groups; `top` is its ceiling.

    Where a Cholesky factor shows beyond doubt what the filter does, nothing else is computed; the
    eigenvalues settle the other groups.
    """
    rest = problem.matrix.shape[2:]
    chosen, top = like(chosen, len(rest)).expand(rest), like(top, len(rest)).expand(rest)
    if spectral == Damped(0):
        spectral = EXACT
    if len(problem.matrix) > UNROLLED or not isinstance(spectral, (Exact, Cut, Damped)):
        return by_eigenvalues(problem, chosen, spectral, dtype)
    if isinstance(spectral, Damped):
        values, settled = _damped(problem, spectral.lam)
        values = values / chosen
    else:
        values, settled = _all_or_none(problem, chosen, top, spectral, dtype)
    values = values.contiguous()
    left = (~settled).flatten().nonzero()[:, 0]
    for part in left.split(IN_CACHE) if len(left) else ():
        values.view(-1)[part] = by_eigenvalues(problem.part(part), chosen.flatten()[part], spectral, dtype)
    return values


def _damped(problem: Problem, lam: float) -> tuple[Tensor, Tensor]:
    """P(y_hat) FI, that is sqrt(P)^T M (M + lam I)^-1 sqrt(P), and where lam is far above the rounding of M.

    Only there no direction has to be declared dead.
    """
    matrix, vector, of_metric = problem
    factor = _cholesky(matrix, lam)
    half = _half_solved(factor, vector)
    other = half if of_metric else _half_solved(factor, [dot(row, vector) for row in matrix])
    return dot(half, other), lam > CLEAR * _trace(matrix)


def _all_or_none(
    problem: Problem, chosen: Tensor, top: Tensor, spectral: Exact | Cut, dtype: torch.dtype
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
        full = dot(half, half) / chosen
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
            column.append(-dot(row[first:-1], column) / row[-1])
        total += dot(column, column)
    return total


def dot(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor) -> Tensor:
    """The sum of a[i] * b[i] over the first axis, without a temporary for every product."""
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        total = total.addcmul_(x, y)
    return total


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal().sum(-1)


def by_eigenvalues(problem: Problem, chosen: Tensor, spectral: Spectral, dtype: torch.dtype) -> Tensor:
    """FI (*rest) of groups with chosen = P(y_hat) (*rest): the filter's share h of each direction's leverage.

    The leverage of the eigenvector U_i is U[y_hat, i]^2 / P(y_hat).
    """
    mu, squares = _eigen(problem.matrix, problem.vector)
    top = mu.amax(0, keepdim=True)
    live = mu > ROUNDING * top  # what the rounding of float64 makes of a zero is a zero, under every filter
    if problem.of_metric:
        squares = torch.where(live, squares / mu, 0)
    return (torch.where(live, spectral.gain(mu, top, dtype), 0) * (squares / chosen)).sum(0)


def _eigen(m: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of symmetric (n, n, *rest), squared coordinates of a vector (n, *rest) along them."""
    values, vectors = torch.linalg.eigh(m.movedim((0, 1), (-2, -1)))
    squares = torch.einsum("...ji,j...->i...", vectors, vector).square()
    return values.movedim(-1, 0), squares


def outer(rows: Tensor) -> Tensor:
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


def like(values: Tensor, dims: int) -> Tensor:
    """Append axes of length 1 so that values broadcasts from the left."""
    return values.reshape(values.shape + (1,) * (dims - values.dim()))
