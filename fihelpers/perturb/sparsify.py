"""Zero a share of the weights chosen by their scores (method 4.4), and put them back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, linear_names
from fihelpers.scores.store import Scores

__all__ = ["linear_names", "select", "zeroed"]

Which = Literal["top", "bottom", "random", "low half"]
Scope = Literal["global", "layer", "row"]
SAMPLED = 2**17  # values of which quantiles are taken, before those of all are


def select(
    scores: Scores | Mapping[str, Tensor],
    share: float,
    which: Which = "top",
    *,
    names: Collection[str] | None = None,
    scope: Scope = "global",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Flat positions of the chosen weights of each tensor.

    share: of all named weights (scope "global"), of each tensor's ("layer"), or of each of its rows, the
        weights of one output ("row", for "top" and "bottom"), rounded to a whole number of weights. `Scores`
        know which tensors lie turned (`fihelpers.models.linear`); in a mapping the last axis is the input.
    which: "top" and "bottom" by score, "random" over all, or "low half": a random draw from the lower
        half by score, the paper's FI-low.
    Ties at the border are settled by a seeded random draw among the tied weights (method 1b.5).

    Raises ValueError for a share outside [0, 1] (or above .5 for "low half"), an unknown name or scope, or
    scores that are NaN or infinite.
    """
    limit = 0.5 if which == "low half" else 1.0
    if not 0 <= share <= limit:
        raise ValueError(f"The share to zero must lie in [0, {limit:g}] for {which!r}, not {share}.")
    chosen = _named(scores, names)
    generator = torch.Generator().manual_seed(seed)
    if scope == "layer":
        return {n: _positions(v.flatten(), share, which, generator) for n, v in chosen.items()}
    if scope == "row":
        turned = scores.turned if isinstance(scores, Scores) else frozenset()
        return {n: _by_row(v, n in turned, share, which, generator) for n, v in chosen.items()}
    if scope != "global":
        raise ValueError(f"scope must be 'global', 'layer' or 'row', not {scope!r}.")
    sizes = [v.numel() for v in chosen.values()]
    flat = torch.cat([v.flatten() for v in chosen.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[_positions(flat, share, which, generator)] = True
    return {n: part.nonzero()[:, 0] for n, part in zip(chosen, mask.split(sizes), strict=True)}


@contextmanager
def changed(
    model: LanguageModel | nn.Module, positions: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]
) -> Iterator[nn.Module]:
    """The model's network with the weights at `positions` changed.

    positions: of each weight by its name, flat, as from `select`. change: returns new values (N,) for the
    chosen ones of a weight. On leaving they are as before, bit for bit. Raises ValueError for the name of a
    weight that the model has not.
    """
    network = model.network if isinstance(model, LanguageModel) else model
    weights = dict(network.named_parameters())
    unknown = sorted(set(positions) - set(weights))
    if unknown:
        raise ValueError(f"The model has no weight {unknown[0]!r}; the scores belong to another model.")
    kept = {name: _flat(weights[name])[index].clone() for name, index in positions.items()}
    try:
        for name, index in positions.items():
            _flat(weights[name])[index] = change(kept[name].clone())
        yield network
    finally:
        for name, index in positions.items():
            _flat(weights[name])[index] = kept[name]


def zeroed(
    model: LanguageModel | nn.Module, positions: Mapping[str, Tensor]
) -> AbstractContextManager[nn.Module]:
    """`changed` with zeros."""
    return changed(model, positions, torch.zeros_like)


def _flat(weight: nn.Parameter) -> Tensor:
    return weight.data.view(-1)


def _named(scores: Scores | Mapping[str, Tensor], names: Collection[str] | None) -> dict[str, Tensor]:
    values = scores.values if isinstance(scores, Scores) else scores
    chosen = {n: values[n] for n in (values if names is None else names) if n in values}
    missing = sorted(set(names or ()) - set(chosen))
    if missing or not chosen:
        raise ValueError(
            f"There are no scores for {missing[0] if missing else 'any weight'}; score it first."
        )
    bad = [n for n, v in chosen.items() if not torch.isfinite(v).all()]
    if bad:
        raise ValueError(f"The scores of {bad[0]} hold NaN or infinite values; score the model again.")
    return chosen


def _positions(flat: Tensor, share: float, which: Which, generator: torch.Generator) -> Tensor:
    count = round(share * len(flat))
    if which == "top":
        return _largest(flat, count, generator)
    if which == "bottom":
        return _largest(-flat, count, generator)
    pool = torch.arange(len(flat), device=flat.device)
    if which == "low half":
        pool = _largest(-flat, len(flat) // 2, generator)
    elif which != "random":
        raise ValueError(f"which must be 'top', 'bottom', 'random' or 'low half', not {which!r}.")
    order = torch.randperm(len(pool), generator=generator).to(pool.device)
    return pool[order[:count]]


def _by_row(weights: Tensor, turned: bool, share: float, which: Which, generator: torch.Generator) -> Tensor:
    """Flat positions of a share of each row of a matrix, or of those of fused experts."""
    if which not in ("top", "bottom") or weights.dim() not in (2, 3):
        raise ValueError(
            f"scope 'row' goes with 'top' and 'bottom' of a matrix, not with {which!r} of "
            f"{weights.dim()} dimensions."
        )
    values = as_rows(weights if which == "top" else -weights, turned)
    count, width = round(share * values.shape[1]), values.shape[1]
    if count == 0:
        return torch.zeros(0, dtype=torch.long, device=values.device)
    places = as_rows(torch.arange(weights.numel(), device=values.device).view_as(weights), turned)
    border = values.kthvalue(width - count + 1, 1, keepdim=True).values
    chosen = values >= border
    for row in (chosen.sum(1) > count).nonzero()[:, 0].tolist():  # more are tied at the border than fit
        chosen[row] = False
        chosen[row, _largest(values[row], count, generator)] = True
    return places[chosen].sort().values


def _largest(flat: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of the `count` largest values; among equal ones at the border, a random draw."""
    if count == 0:
        return torch.zeros(0, dtype=torch.long, device=flat.device)
    near = (flat >= _below_border(flat, count)).nonzero()[:, 0]
    if len(near) < count:
        near = torch.arange(len(flat), device=flat.device)
    values = flat[near]
    border = values.kthvalue(len(near) - count + 1).values
    above, tied = near[values > border], near[values == border]
    order = torch.randperm(len(tied), generator=generator).to(tied.device)
    return torch.cat([above, tied[order[: count - len(above)]]])


def _below_border(flat: Tensor, count: int) -> Tensor:
    """A value that a few more than `count` of many values reach, almost surely, from a sample of them.

    To compare all values with it is one pass, where a selection among all moves them about in memory.
    """
    sample = flat[:: max(1, len(flat) // SAMPLED)].sort(descending=True).values
    expected = count * len(sample) / len(flat)
    place = int(expected + 5 * math.sqrt(expected) + 10)
    return sample[place] if place < len(sample) else flat.min()
