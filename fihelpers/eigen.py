"""The small eigen-problems behind FI of a group: at most K - 1 or p directions each, solved in float64.

Each group of dimensions has one problem of its own, and there may be millions of groups: problems of up to
three directions are solved in closed form and those of up to eight by a Cholesky factor where it settles what
the filter does, all groups at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fihelpers.filters import EXACT, Cut, Damped, Exact, Spectral

ROUNDING = 1e-14  # relative error of the small eigen-problems, which are solved in float64
CLEAR = 1e-9  # mu / mu_max (or lam / mu_max) above which rounding does not decide which directions count
MARGIN = 1.001  # by how much a bound on an eigenvalue clears a filter's cut, so that rounding cannot decide
IN_CACHE = 2**15  # groups whose eigenvalues are found at once: their hundred steps stay in the cache
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
    spread = (dot((a, b, c), (a, b, c)) / 6 + dot((d, e, f), (d, e, f)) / 3).sqrt()
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
    length = dot(best, best)
    for column in ([bc, a * c - e * e, ac], [ab, ac, a * b - d * d]):
        longer = (other := dot(column, column)) > length
        best = [torch.where(longer, new, old) for new, old in zip(column, best, strict=True)]
        length = torch.where(longer, other, length)
    length = length.sqrt()
    found = length > 0
    return [torch.where(found, x / length, 1.0 if i == 0 else 0.0) for i, x in enumerate(best)]


def _deflate(m: Tensor, root: Tensor, n: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Spectrum of m with one eigenvector n known: reflect n onto the first axis, rotate the rest."""
    u = [n[0] + torch.where(n[0] < 0, -1.0, 1.0), n[1], n[2]]
    size = (2 / dot(u, u)).sqrt()
    u = [x * size for x in u]
    along = dot(u, root)
    x = [old - part * along for old, part in zip(root, u, strict=True)]
    image = [dot(row, u) for row in m]
    half = dot(u, image) / 2
    w = [old - part * half for old, part in zip(image, u, strict=True)]

    def turned(i: int, j: int) -> Tensor:
        return m[i, j] - u[i] * w[j] - w[i] * u[j]

    mu, leverage = _rotate(turned(1, 1), turned(2, 2), turned(1, 2), x[1], x[2])
    return torch.cat([turned(0, 0)[None], mu]), torch.cat([x[0].square()[None], leverage])


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
