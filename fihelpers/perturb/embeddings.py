"""Move the dimensions of a prompt's token embeddings that a score names, against the prediction (method 4.3).

A budget is relative to the prompt it is spent on: it means the same for every model and every measure.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fihelpers.scores.inputs import EmbeddingBatch

Norm = Literal["l2", "linf"]
Direction = Literal["gradient", "random"]

STRIDE = 2.5  # of several steps, their summed length relative to the budget (Madry et al. 2018)


def top_dimensions(scores: Tensor, share: float, *, region: Tensor | None = None, seed: int = 0) -> Tensor:
    """Flat positions (token * hidden + dimension), ascending, of one prompt's highest-scored dimensions.

    scores: (T, hidden). share: of the dimensions of the region, rounded to whole ones, but at least one.
    region: (T,), boolean, the tokens to choose from; all by default. Ties at the border are settled by a
    seeded random draw. Raises ValueError for a share that is not above 0 and at most 1, scores that are not
    of two axes or not finite, and a region that is empty or does not fit them.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of dimensions must be above 0 and at most 1, not {share}.")
    if scores.dim() != 2 or not torch.isfinite(scores).all():
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} cannot be ranked; give finite ones, tokens x hidden."
        )
    allowed = torch.ones(len(scores), dtype=torch.bool) if region is None else region.cpu()
    if allowed.shape != scores.shape[:1] or allowed.dtype != torch.bool or not allowed.any():
        raise ValueError(
            f"a region of these {len(scores)} tokens is boolean and marks at least one of them, not "
            f"{allowed.dtype} of shape {tuple(allowed.shape)} with {int(allowed.sum())} marked."
        )
    pool = allowed[:, None].expand(scores.shape).flatten().nonzero()[:, 0]
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    order = scores.flatten().cpu()[pool].argsort(descending=True, stable=True)
    return pool[order[: max(1, round(share * len(pool)))]].sort().values


def attack(
    batch: EmbeddingBatch,
    positions: Sequence[Tensor],
    budget: float,
    *,
    norm: Norm = "l2",
    steps: int = 1,
    direction: Direction = "gradient",
    seed: int = 0,
) -> Tensor:
    """Move the chosen dimensions of every prompt against its prediction; perturbed embeddings (B, T, hidden).

    positions: of each prompt of the batch, as :func:`top_dimensions` gives them. No other dimension changes,
    nor does padding; a chosen one stays where its gradient is exactly zero.
    budget: "l2": the Euclidean norm of the change, relative to that of all the prompt's embeddings together
        (tokens x hidden, as the first layer gets them; protected tokens count, padding does not), so that the
        absolute size is the same for every choice of dimensions. "linf": the largest change of a dimension,
        relative to the root mean square of the same embeddings. 0 changes nothing, bit for bit.
    steps: 1 takes one step of the full budget along -grad log P(y_hat), with y_hat the class predicted from
        the intact embeddings: the gradient normalised for "l2", its sign for "linf". More go on from there by
        projected gradient steps of min(1, 2.5 / steps) of the budget each (Madry et al. 2018), and each
        prompt keeps the one where y_hat is least likely: more steps never do worse than the first.
    direction: "random" takes the step along normal noise ("l2") or random signs ("linf") on the same
        dimensions, which depend on `seed` and the example alone: the control.

    Rounded to the model's dtype. ``batch.log_probs`` of the result says what became of the answer. Raises
    ValueError for a budget that is negative, not finite or beyond the dtype's range, fewer than 1 step,
    several random ones, an unknown norm or direction, and positions that are not distinct ones of their
    prompt; FloatingPointError for logits or gradients that are NaN or infinite.
    """
    _check(budget, norm, steps, direction)
    mask = _mask(batch, positions)
    intact = batch.embeddings
    if budget == 0:
        return intact.clone()
    limit = budget * _size(batch, norm)
    if direction == "random":
        return _moved(intact, mask, _of_length(_random(batch, positions, mask, seed), limit, norm))
    return _moved(intact, mask, _guided(batch, mask, limit, norm, steps))


def _check(budget: float, norm: str, steps: int, direction: str) -> None:
    if not (budget >= 0 and math.isfinite(budget)):
        raise ValueError(f"the budget must be a finite number of at least 0, not {budget}.")
    if norm not in get_args(Norm):
        raise ValueError(f"unknown norm {norm!r}; use one of {', '.join(get_args(Norm))}.")
    if direction not in get_args(Direction):
        raise ValueError(f"unknown direction {direction!r}; use one of {', '.join(get_args(Direction))}.")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"an attack takes a whole number of steps, at least 1, not {steps}.")
    if direction == "random" and steps > 1:
        raise ValueError(f"a random direction is the same at every step; use 1 step, not {steps}.")


def _mask(batch: EmbeddingBatch, positions: Sequence[Tensor]) -> Tensor:
    """The chosen dimensions (B, T, hidden) of the padded batch."""
    if len(positions) != len(batch.index):
        raise ValueError(f"there are positions for {len(positions)} prompts of {len(batch.index)}.")
    _, length, hidden = batch.embeddings.shape
    mask = torch.zeros_like(batch.embeddings, dtype=torch.bool)
    for row, (start, chosen, example) in enumerate(
        zip(batch.padding, positions, batch.examples, strict=True)
    ):
        size = (length - start) * hidden
        flat = chosen.flatten().cpu()
        good = flat.dtype == torch.long and len(flat.unique()) == len(flat) > 0
        if not good or int(flat.min()) < 0 or int(flat.max()) >= size:
            raise ValueError(
                f"the positions to move in example {example.id!r} must be one or more distinct whole numbers "
                f"from 0 to {size - 1}, the dimensions of its {length - start} tokens."
            )
        mask[row].view(-1)[start * hidden + flat.to(mask.device)] = True
    return mask


def _size(batch: EmbeddingBatch, norm: Norm) -> Tensor:
    """What a budget is relative to (B, 1, 1): norm or root mean square of each prompt's embeddings."""
    of_prompts = zip(_working(batch.embeddings), batch.padding, strict=True)
    squares = [one[start:].square() for one, start in of_prompts]
    return torch.stack([x.sum() if norm == "l2" else x.mean() for x in squares]).sqrt()[:, None, None]


def _working(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _moved(intact: Tensor, mask: Tensor, change: Tensor) -> Tensor:
    """Add the change where the mask is; what it leaves alone stays bit for bit."""
    perturbed = torch.where(mask, (_working(intact) + change).to(intact.dtype), intact)
    if not torch.isfinite(perturbed).all():
        raise ValueError(f"the budget takes embeddings beyond the range of {intact.dtype}; lower it.")
    return perturbed


def _guided(batch: EmbeddingBatch, mask: Tensor, limit: Tensor, norm: Norm, steps: int) -> Tensor:
    """The change (B, T, hidden) by gradient steps: the first of the full budget, the others projected."""
    change = _of_length(_first_way(batch) * mask, limit, norm)
    if steps == 1:
        return change
    best, record = change, torch.full_like(limit, -torch.inf)
    stride = limit * min(1.0, STRIDE / steps)
    for _ in range(steps):
        odds, way = _odds_against(batch, _moved(batch.embeddings, mask, change))
        best = torch.where(odds > record, change, best)
        record = torch.maximum(odds, record)
        change = _projected(change + _of_length(way * mask, stride, norm), limit, norm)
    return best


def _first_way(batch: EmbeddingBatch) -> Tensor:
    """Along -grad log P(y_hat) at the intact embeddings, from the class gradients at hand (B, T, hidden).

    -s_y_hat is a sum over the other classes, here divided by 1 - P(y_hat), which leaves the direction and
    keeps its size in range where P(y_hat) is near 1.
    """
    grads = batch.grads
    others = grads.probs.scatter(0, grads.predicted[None], 0)
    if (others.sum(0) == 0).any():  # beyond the range of the dtype
        return _odds_against(batch, batch.embeddings)[1]
    weights = others / others.sum(0)
    return (weights[..., None, None] * grads.class_grads).sum(0)


def _odds_against(batch: EmbeddingBatch, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds (B, 1, 1) against the intact prediction, and their gradient, which goes along -grad log P."""
    x = embeddings.detach().requires_grad_()
    with torch.enable_grad():
        log_p = batch.log_probs(x)
        chosen = batch.grads.predicted[:, None]
        odds = log_p.scatter(1, chosen, -torch.inf).logsumexp(1) - log_p.gather(1, chosen)[:, 0]
    (way,) = torch.autograd.grad(odds.sum(), x)
    if not torch.isfinite(way).all():
        raise FloatingPointError("The gradients of an attack's step are NaN or infinite; lower the budget.")
    return odds.detach()[:, None, None], _working(way)


def _random(batch: EmbeddingBatch, positions: Sequence[Tensor], mask: Tensor, seed: int) -> Tensor:
    """Normal noise (B, T, hidden) at the chosen dimensions."""
    way = torch.zeros_like(mask, dtype=torch.float64)
    for row, example in enumerate(batch.examples):
        salt = zlib.crc32(f"direction {example.id}".encode())  # unlike that of the example's random scores
        generator = torch.Generator().manual_seed(seed * 1_000_003 + salt)
        noise = torch.randn(positions[row].numel(), generator=generator, dtype=torch.float64)
        way[row][mask[row]] = noise.to(way.device)
    return way


def _of_length(way: Tensor, length: Tensor, norm: Norm) -> Tensor:
    """A step of that length along `way` in each prompt; none where `way` is zero."""
    if norm == "linf":
        return length * way.sign().to(length.dtype)
    largest = way.abs().amax((1, 2), keepdim=True)
    scaled = way / torch.where(largest > 0, largest, 1)  # squares of tiny gradients would be zero
    size = scaled.square().sum((1, 2), keepdim=True).sqrt()
    return (length * scaled / torch.where(size > 0, size, 1)).to(length.dtype)


def _projected(change: Tensor, limit: Tensor, norm: Norm) -> Tensor:
    if norm == "linf":
        return torch.minimum(torch.maximum(change, -limit), limit)
    size = change.square().sum((1, 2), keepdim=True).sqrt()
    return change * torch.where(size > limit, limit / size, 1)
