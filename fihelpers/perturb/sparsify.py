"""Zero a share of the weights chosen by their scores (method 4.4), and put them back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, linear_names
from fihelpers.scores.store import Scores

__all__ = ["linear_names", "select", "zeroed"]

Which = Literal["top", "bottom", "random", "low half"]
Scope = Literal["global", "layer", "row"]
SAMPLED = 2**15  # values of which quantiles are taken, before those of all are
FEW = 1 / 16  # of all values, of which the others are not looked at twice
MANY = 2**24  # places of which not all are listed, or put in a random order, to draw a few


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
        found = [_positions([v.flatten()], share, which, generator)[0] for v in chosen.values()]
        return dict(zip(chosen, found, strict=True))
    if scope == "row":
        turned = scores.turned if isinstance(scores, Scores) else frozenset()
        return {n: _by_row(v, n in turned, share, which, generator) for n, v in chosen.items()}
    if scope != "global":
        raise ValueError(f"scope must be 'global', 'layer' or 'row', not {scope!r}.")
    found = _positions([v.flatten() for v in chosen.values()], share, which, generator)
    return dict(zip(chosen, found, strict=True))


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
    bad = [n for n, v in chosen.items() if v.numel() and not all(map(torch.isfinite, v.aminmax()))]
    if bad:
        raise ValueError(f"The scores of {bad[0]} hold NaN or infinite values; score the model again.")
    return chosen


def _positions(
    pieces: Sequence[Tensor], share: float, which: Which, generator: torch.Generator
) -> list[Tensor]:
    """Positions in each of some flat tensors of a share of them all, in ascending order."""
    total = sum(map(len, pieces))
    count = round(share * total)
    if which == "top":
        return _largest(pieces, count, generator)
    if which == "bottom":
        return _largest([-piece for piece in pieces], count, generator)
    if which == "low half":
        drawn = _of_lowest(torch.cat([*pieces]), total // 2, count, generator)
    elif which == "random":
        drawn = _drawn(total, count, generator).to(pieces[0].device)
    else:
        raise ValueError(f"which must be 'top', 'bottom', 'random' or 'low half', not {which!r}.")
    ends = torch.tensor([len(piece) for piece in pieces], device=drawn.device).cumsum(0)
    drawn = drawn.sort().values
    parts = drawn.tensor_split(torch.searchsorted(drawn, ends).tolist()[:-1])
    return [part - end + len(piece) for part, end, piece in zip(parts, ends, pieces, strict=True)]


def _of_lowest(flat: Tensor, half: int, count: int, generator: torch.Generator) -> Tensor:
    """Positions of a random draw from the `half` lowest values, which are never listed: only its own are."""
    flat = flat.neg_()
    if not half:
        return torch.zeros(0, dtype=torch.long, device=flat.device)
    border = _border([flat], half)
    low, tied = flat > border, _where(flat == border)
    below = int(low.count_nonzero())
    tied = tied[torch.randperm(len(tied), generator=generator)[: half - below].to(tied.device)]
    places = _drawn(half, count, generator).to(flat.device)
    found, seen = [tied[places[places >= below] - below]], 0
    places = places[places < below].sort().values
    for number, part in enumerate(low.split(MANY)):
        here = seen + int(part.count_nonzero())
        wanted = places[(places >= seen) & (places < here)]
        found.append(_where(part)[wanted - seen] + number * MANY)
        seen = here
    return torch.cat(found)


def _drawn(n: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different places below n, in random order. A few of very many are drawn until they differ."""
    if n < MANY or count > n // 10:
        return torch.randperm(n, generator=generator)[:count]
    drawn = np.unique(torch.randint(n, (2 * count,), generator=generator).numpy(), return_index=True)
    return torch.from_numpy(drawn[0][drawn[1].argsort()][:count])


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
        chosen[row, _largest([values[row]], count, generator)[0]] = True
    return places[chosen].sort().values


def _largest(pieces: Sequence[Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
    """Positions in each piece of the `count` largest of all values, as of `_top`.

    Of few most values lie below a border that a sample shows, and only the others are looked at again.
    """
    if count < FEW * sum(map(len, pieces)):
        low, _ = _around(pieces, count)
        near = [_where(piece >= low) for piece in pieces]
        if sum(map(len, near)) >= count:
            values = [piece[places] for piece, places in zip(pieces, near, strict=True)]
            found = _top(values, count, generator)
            return [places[at] for places, at in zip(near, found, strict=True)]
    return _top(pieces, count, generator)


def _top(pieces: Sequence[Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
    """Positions in each piece of the values above the border, and of a random draw of those at it, ascending.

    The border is the `count`-th largest of all values.
    """
    if count == 0:
        return [torch.zeros(0, dtype=torch.long, device=piece.device) for piece in pieces]
    border = _border(pieces, count)
    tied = [_where(piece == border) for piece in pieces]
    chosen = [piece > border for piece in pieces]
    left = count - sum(int(mask.count_nonzero()) for mask in chosen)
    drawn = torch.zeros(sum(map(len, tied)), dtype=torch.bool)
    drawn[torch.randperm(len(drawn), generator=generator)[:left]] = True
    for mask, places, some in zip(chosen, tied, drawn.split([*map(len, tied)]), strict=True):
        mask[places[some.to(places.device)]] = True
    return [_where(mask) for mask in chosen]


def _border(pieces: Sequence[Tensor], count: int) -> float:
    """The `count`-th largest of many values.

    To compare all with two of a sample is a pass each; a selection among all moves them about in memory.
    """
    low, high = _around(pieces, count)
    between = torch.cat([piece[(piece >= low) & (piece <= high)] for piece in pieces])
    left = count - sum(int((piece > high).count_nonzero()) for piece in pieces)
    if not 0 < left <= len(between):
        between, left = torch.cat([*pieces]), count
    return float(between.kthvalue(len(between) - left + 1).values)


def _around(pieces: Sequence[Tensor], count: int) -> tuple[float, float]:
    """Two values between which the `count`-th largest of all lies, almost surely, from a sample of them.

    numpy sorts it in a tenth of torch's time or less.
    """
    total = sum(map(len, pieces))
    drawn = torch.cat([piece[:: max(1, total // SAMPLED)] for piece in pieces])
    sample = np.sort(drawn.detach().cpu().double().numpy())[::-1]
    expected = count * len(sample) / max(1, total)
    wide = 5 * expected**0.5 + 10
    low, high = int(expected + wide), int(expected - wide)
    return (
        float(sample[low]) if low < len(sample) else -np.inf,
        float(sample[high]) if high > 0 else np.inf,
    )


def _where(mask: Tensor) -> Tensor:
    """The positions of what is true in a flat mask; numpy finds them in a fourth of torch's time."""
    return torch.from_numpy(np.flatnonzero(mask.cpu().numpy())).to(mask.device)
