"""Measures of the weights of a linear layer on a GPU, in one kernel: no class gradient is ever written out.

The counterpart of `fihelpers.scores.kernels.cpu`, in Triton. Each program holds one tile of the weight
in registers: sample after sample it forms the class gradients g^T x one direction after the other, turns them
into the moments of `fihelpers.influence` and these into the measures, and adds them to the running totals.
Products of bfloat16 or float16 factors are exact and summed in float32; those of float32 ones are formed in
three parts of lower precision, which comes close to float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fihelpers.scores.hooks import Factors
from fihelpers.scores.kernels import formulas as kinds_of
from fihelpers.scores.kernels.formulas import Formula, add_by_torch

ROWS, COLUMNS, STEPS = 64, 128, 32  # of a tile, and the tokens of one product; in registers: three tiles
WARPS = 8
TOLERANCE = 1e-3  # of the largest score of a layer (method 1b.8)

# Triton reads no numbers of a module but its own constants.
DAMPED = tl.constexpr(kinds_of.DAMPED)
CUT = tl.constexpr(kinds_of.CUT)
NORM = tl.constexpr(kinds_of.NORM)
REMOVAL = tl.constexpr(kinds_of.REMOVAL)
SQUARE = tl.constexpr(kinds_of.SQUARE)
METRIC = tl.constexpr(kinds_of.METRIC)
LENGTH = tl.constexpr(kinds_of.LENGTH)
SIGNS = tl.constexpr(kinds_of.SIGNS)


def add_measures(
    factors: Factors, value: Tensor, shares: Tensor, formulas: Sequence[Formula], totals: Tensor
) -> Tensor:
    """As `add_measures` of a CPU, on the GPU that holds the totals (M, out, in), which are float32.

    The layer may be of any size, and its factors in any precision of at most 32 bits.
    Returns the sums (M, B) in float64 on the GPU, which is not waited for.
    """
    grads, x = torch.stack(list(factors.grads)), factors.x.contiguous()
    directions, samples, tokens, out = grads.shape
    kinds, numbers = zip(*formulas, strict=True)
    sums = totals.new_zeros(len(formulas), samples, dtype=torch.float64)
    with torch.cuda.device_of(totals):
        _add[triton.cdiv(value.shape[1], COLUMNS), triton.cdiv(out, ROWS)](
            grads,
            x,
            value.contiguous(),
            factors.ceiling.sqrt().to(totals),
            shares.to(totals, non_blocking=True),
            totals,
            sums,
            samples,
            tokens,
            factors.start,
            out,
            value.shape[1],
            directions=directions,
            turned=directions - (kinds_of.SIGNS in kinds),
            kinds=kinds,
            numbers=numbers,
            rows=ROWS,
            columns=COLUMNS,
            steps=STEPS,
            num_warps=WARPS,
        )
    return sums


def check(device: torch.device, dtype: torch.dtype, formulas: Sequence[Formula]) -> None:
    """Compare the kernel with plain operations in float64, for a small layer in this precision.

    Raises RuntimeError where they differ, and what Triton raises where it cannot run.
    """
    random = torch.Generator().manual_seed(0)
    g, x, value, tops = (
        torch.randn(*s, generator=random) for s in ((4, 2, 37, 70), (2, 37, 130), (70, 130), (2,))
    )
    g[:, :, :2] = 0  # the positions before the first that has a gradient
    shares, index = torch.tensor([0.5, 1.0]), torch.arange(2)
    found = []
    ways = ((add_measures, device, dtype), (add_by_torch, torch.device("cpu"), torch.float64))
    for add, place, working in ways:
        grads, inputs, weight = (t.to(dtype).to(place, working) for t in (g, x, value))
        factors = Factors("", list(grads), inputs, 2, tops.abs().to(place), index)
        totals = torch.zeros(len(formulas), *value.shape, device=place)
        add(factors, weight, shares, formulas, totals)
        found.append(totals.flatten(1).cpu())
    apart = (found[0] - found[1]).abs().amax(1) / found[1].amax(1)
    if not (apart < TOLERANCE).all():
        raise RuntimeError(
            f"its scores differ from those of plain operations by {apart.max():.0e} of the largest"
        )


@triton.jit(do_not_specialize=["samples", "tokens", "start"])
def _add(
    grads,
    x,
    value,
    roots,
    shares,
    totals,
    sums,
    samples,
    tokens,
    start,
    out,
    width,
    directions: tl.constexpr,
    turned: tl.constexpr,
    kinds: tl.constexpr,
    numbers: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    steps: tl.constexpr,
):
    """One tile of the weight, sample after sample.

    grads (D, B, T, out); x (B, T, in); value (out, in); roots, shares (B,); totals (M, out, in);
    sums (M, B). kinds, numbers: the formulas of M measures.
    """
    top, left = tl.program_id(1) * rows, tl.program_id(0) * columns
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    inside = (row < out - top)[:, None] & (column < width - left)[None, :]
    far = tl.full((), 1, tl.int64)  # a tile may lie beyond 2^31 elements
    corner = far * top * width + left
    place = row[:, None] * width + column[None, :]
    for b in range(samples):
        score = _product(grads, x, 0, b, samples, tokens, start, out, width, top, left, rows, columns, steps)
        metric = score * score
        for d in range(1, turned):
            other = _product(
                grads, x, d, b, samples, tokens, start, out, width, top, left, rows, columns, steps
            )
            metric += other * other
        others = score
        if turned < directions:
            others = _product(
                grads, x, turned, b, samples, tokens, start, out, width, top, left, rows, columns, steps
            )
        score *= tl.load(roots + b)
        share = tl.load(shares + b)
        for m in tl.static_range(len(kinds)):
            given = value + corner + place
            found = share * _measure(kinds[m], numbers[m], score, metric, others, given, inside)
            total = totals + (far * m * out * width + corner) + place
            tl.store(total, tl.load(total, inside, 0) + found, inside)
            tl.atomic_add(sums + m * samples + b, tl.sum(found).to(tl.float64))


@triton.jit
def _product(
    grads,
    x,
    d,
    b,
    samples,
    tokens,
    start,
    out,
    width,
    top,
    left,
    rows: tl.constexpr,
    columns: tl.constexpr,
    steps: tl.constexpr,
):
    """The tile (rows, columns) of the product of g (T, out) along direction d and x (T, in), of sample b."""
    far = tl.full((), 1, tl.int64)
    grad = grads + far * (d * samples + b) * tokens * out + top
    given = x + far * b * tokens * width + left
    row, column, step = tl.arange(0, rows), tl.arange(0, columns), tl.arange(0, steps)
    total = tl.zeros((rows, columns), tl.float32)
    for t in range(start, tokens, steps):
        there = step < tokens - t
        of_g = (row < out - top)[:, None] & there[None, :]
        of_x = there[:, None] & (column < width - left)[None, :]
        g = tl.load(grad + (t + step)[None, :] * out + row[:, None], of_g, 0)
        u = tl.load(given + (t + step)[:, None] * width + column[None, :], of_x, 0)
        total = tl.dot(g, u, total, input_precision="tf32x3")
    return total


@triton.jit
def _measure(kind: tl.constexpr, number: tl.constexpr, score, metric, others, value, inside):
    """One measure of a tile, by the formulas of `measures`. Comparisons are such that NaN passes on."""
    if kind == DAMPED:
        found = score * score / (metric + number)
    elif kind == CUT:
        # divided before it is squared: squares of tiny gradients would leave the range of float32
        root = tl.sqrt(tl.where(metric <= number, 1, metric))
        share = tl.where(metric <= number, score * 0, score) / root
        found = share * share
    elif kind == NORM:
        found = tl.abs(score)
    elif kind == REMOVAL:
        found = tl.abs(score * tl.load(value, inside, 0).to(tl.float32))
    elif kind == SQUARE:
        found = score * score
    elif kind == METRIC:
        found = metric
    elif kind == LENGTH:
        removed = tl.load(value, inside, 0).to(tl.float32)
        found = metric * removed * removed
    else:
        tl.static_assert(kind == SIGNS)
        found = tl.where((score >= 0) | (others <= 0), score * 0, -score * others)
    return found
