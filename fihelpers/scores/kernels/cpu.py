"""Measures of the weights of a linear layer on a CPU, tile by tile: no class gradient is ever written out.

A tile is a few rows of the weight, `ROWS`, and up to `COLUMNS` of its columns. Its class gradients of one
sample, the products g^T x, are formed in memory that stays in the first cache, turned into the moments of
`fihelpers.influence` and these into the measures, which are added to the running totals. Formed with one
product for each layer and combined afterwards, as `fihelpers.measures` does, they go through memory a dozen
times instead. The loops are compiled by Numba (the extra `fast`) at their first use, a few seconds once.
`fihelpers.scores.kernels.gpu` does the same on a GPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from fihelpers.scores.hooks import Factors
from fihelpers.scores.kernels.formulas import (
    CUT,
    DAMPED,
    LENGTH,
    METRIC,
    NORM,
    REMOVAL,
    SIGNS,
    SQUARE,
    Formula,
)

BYTES = 64 if get_host_cpu_features().get("avx512f") else 32  # of a vector; half as many registers there
VECTORS = 2  # as many columns as so many vectors hold,
ROWS = 4  # times so many rows: their sums stay in registers while token after token is added to them
STRIP = VECTORS * BYTES // 4  # the columns of such a strip, half of them in float64
COLUMNS = 512  # the tiles of the class gradients of 4 classes then take 24 KB
TOGETHER = 32  # rows whose totals stay in the second cache while sample after sample is added to them
# fused multiply-add, and sums in any order; NaN and infinity keep their meaning
FAST = {"contract", "reassoc"}

Array = NDArray[np.floating[Any]]


def add_measures(
    factors: Factors, value: Tensor, shares: Tensor, formulas: Sequence[Formula], totals: Tensor
) -> Tensor:
    """Add M measures of the weight of a linear layer, summed over B samples, to the totals.

    factors: their gradients are along `turned_classes` and, where a formula is SIGNS, one more along the sum
        of the other classes' log P. value: the weight (out, in), out at least `ROWS`.
    shares: with which the samples count (B,). totals: (M, out, in), in the order of the formulas, in float32
        or float64.

    Returns the sums over the weights of each sample's measures, (M, B) in float64; they are NaN or infinite
    where a gradient is.
    """
    kinds = np.array([kind for kind, _ in formulas], dtype=np.int64)
    sums = np.zeros((torch.get_num_threads(), len(formulas), len(factors.x)))
    grads = tuple(g.to(totals).contiguous().numpy() for g in factors.grads)
    x = factors.x.to(totals)
    x = pad(x, (STRIP - x.shape[-1], 0)) if x.shape[-1] < STRIP else x
    rest = (
        x.contiguous().numpy(),
        factors.start,
        value.to(totals).contiguous().numpy(),
        factors.ceiling.sqrt().to(totals).numpy(),
        shares.to(totals).numpy(),
        kinds,
        np.array([number for _, number in formulas], dtype=totals.numpy().dtype),
        len(grads) - (SIGNS in kinds),
    )
    _add(grads, rest, totals.numpy(), sums)
    return torch.from_numpy(sums.sum(0))


def _add(grads: Any, rest: Any, totals: Array, sums: Array) -> None:
    """Give each thread some rows. grads, rest: as made by `add_measures`; sums: (threads, M, B).

    The threads are Python's, which the compiled loops let run freely: those of OpenMP would be torch's own,
    whose number Numba sets for the whole process, and they spin while they wait.
    """
    threads, out = len(sums), totals.shape[1]
    step = math.ceil(out / threads / ROWS) * ROWS
    work = [(sums[i], start, min(start + step, out)) for i, start in enumerate(range(0, out, step))]
    if len(work) == 1:
        _add_rows(grads, rest, totals, *work[0])
        return
    # kept by nobody: to start threads takes far less time than a layer, and a forked process has none
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(_add_rows, grads, rest, totals, *part) for part in work]:
            done.result()


def _compiled() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        made = njit(nogil=True, fastmath=FAST, error_model="numpy")(function)
        with contextlib.suppress(RuntimeError):  # no folder may be written: compiled anew by each process
            made.enable_caching()
        return made

    return wrap


@_compiled()
def _add_rows(grads: Any, rest: Any, totals: Array, sums: Array, start: int, stop: int) -> None:
    """Tile after tile of some rows, sample after sample for the tiles of some columns: x stays in cache."""
    x, begin, value, roots, shares, kinds, numbers, turned = rest
    out, width = totals.shape[1:]
    narrow = x.shape[2] - width  # columns of zeros before those of a layer narrower than a strip
    tiles = np.empty((len(grads), ROWS, STRIP + COLUMNS), x.dtype)
    score, metric = np.empty(COLUMNS, x.dtype), np.empty(COLUMNS, x.dtype)
    for left in range(0, width, COLUMNS):
        right = min(left + COLUMNS, width)
        for top in range(start, stop, TOGETHER):
            end = min(top + TOGETHER, stop)
            for b in range(len(x)):
                for row in range(top, end, ROWS):
                    first = min(row, out - ROWS)  # the last tile reaches back over rows that are done
                    for d in range(len(grads)):
                        _product(grads[d][b], x[b], begin, first, narrow + left, narrow + right, tiles[d])
                    for r in range(row - first, min(end - first, ROWS)):
                        _moments(tiles, r, turned, roots[b], right - left, score, metric)
                        for m in range(len(kinds)):
                            sums[m, b] += shares[b] * _measure(
                                kinds[m],
                                numbers[m],
                                score,
                                metric,
                                tiles[-1, r, STRIP:],
                                value[first + r, left:right],
                                shares[b],
                                totals[m, first + r, left:right],
                            )


@_compiled()
def _product(g: Array, x: Array, begin: int, first: int, left: int, right: int, tile: Array) -> None:
    """The product of g (T, out) and x (T, in) for `ROWS` rows from `first` on and some columns.

    It is put into the tile from column `STRIP` on, strip by strip. The last one reaches back over columns
    that are done, or over some before the tile's own.
    """
    step = VECTORS * BYTES // x.itemsize
    for start in range(left, right, step):
        column = min(start, right - step)
        _strip(g, x, begin, first, column, tile, STRIP + column - left)  # type: ignore[call-arg]


@intrinsic
def _strip(_: Any, g: Any, x: Any, begin: Any, first: Any, column: Any, tile: Any, place: Any) -> Any:
    """tile[r, place + i] = the sum of g[t, first + r] * x[t, column + i] over t from `begin` on.

    r goes over `ROWS` rows and i over `VECTORS` vectors. Written in the words of LLVM: what Numba makes of
    such loops keeps the sums in memory instead of in registers: with vectors of 64 bytes half as long again.
    """

    def build(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        number, index = context.get_data_type(g.dtype), context.get_value_type(types.intp)
        size = context.get_abi_sizeof(number)
        vector = ir.VectorType(number, BYTES // size)
        arrays = {i: context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 1, 5)}

        def element(i: int, row: Any, column: Any) -> Any:
            return cgutils.get_item_pointer(context, builder, signature.args[i], arrays[i], (row, column))

        def vectors(i: int, row: Any, column: Any) -> list[Any]:
            start = builder.bitcast(element(i, row, column), vector.as_pointer())
            return [builder.gep(start, [index(v)]) for v in range(VECTORS)]

        def everywhere(one: Any) -> Any:
            lanes, empty = ir.VectorType(ir.IntType(32), vector.count), ir.Constant(vector, ir.Undefined)
            filled = builder.insert_element(empty, one, ir.IntType(32)(0))
            return builder.shuffle_vector(filled, empty, ir.Constant(lanes, None))

        zero = ir.Constant(vector, None)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(VECTORS)] for _ in range(ROWS)]
        tokens = cgutils.unpack_tuple(builder, arrays[1].shape)[0]
        with cgutils.for_range(builder, tokens, args[2]) as loop:
            inputs = [builder.load(p, align=size) for p in vectors(1, loop.index, args[4])]
            for r in range(ROWS):
                grad = everywhere(builder.load(element(0, loop.index, builder.add(args[3], index(r)))))
                for total, one in zip(sums[r], inputs, strict=True):
                    product = builder.fmul(grad, one, flags=["contract"])
                    builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
        for r in range(ROWS):
            for total, p in zip(sums[r], vectors(5, index(r), args[6]), strict=True):
                builder.store(builder.load(total), p, align=size)
        return context.get_dummy_value()

    return types.void(g, x, begin, first, column, tile, place), build


@_compiled()
def _moments(tiles: Array, r: int, turned: int, root: float, n: int, score: Array, metric: Array) -> None:
    """Scores and metric of a row, which begins at column `STRIP`, see `influence.moments_of_turned`."""
    first = tiles[0, r, STRIP:]
    for i in range(n):
        score[i] = first[i] * root
        metric[i] = first[i] * first[i]
    for d in range(1, turned):
        other = tiles[d, r, STRIP:]
        for i in range(n):
            metric[i] += other[i] * other[i]


@_compiled()
def _measure(
    kind: int,
    number: float,
    score: Array,
    metric: Array,
    others: Array,
    value: Array,
    share: float,
    total: Array,
) -> float:
    """Add one measure of a row to its total, and return its sum; the formulas are those of `measures`.

    Comparisons are such that NaN passes on to the sum.
    """
    n = len(total)
    found = score[0] * 0
    if kind == DAMPED:
        for i in range(n):
            f = score[i] * score[i] / (metric[i] + number)
            total[i] += share * f
            found += f
    elif kind == CUT:
        for i in range(n):
            # divided before it is squared: squares of tiny gradients would leave the range of float32
            f = score[i] * 0 if metric[i] <= number else score[i] / math.sqrt(metric[i])
            total[i] += share * f * f
            found += f * f
    elif kind == NORM:
        for i in range(n):
            f = abs(score[i])
            total[i] += share * f
            found += f
    elif kind == REMOVAL:
        for i in range(n):
            f = abs(score[i] * value[i])
            total[i] += share * f
            found += f
    elif kind == SQUARE:
        for i in range(n):
            f = score[i] * score[i]
            total[i] += share * f
            found += f
    elif kind == METRIC:
        for i in range(n):
            f = metric[i]
            total[i] += share * f
            found += f
    elif kind == LENGTH:
        for i in range(n):
            f = metric[i] * value[i] * value[i]
            total[i] += share * f
            found += f
    elif kind == SIGNS:
        for i in range(n):
            f = score[i] * 0 if score[i] >= 0 or others[i] <= 0 else -score[i] * others[i]
            total[i] += share * f
            found += f
    return found
