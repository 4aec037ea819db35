"""The joint FI of whole channels of weight matrices W (out, in), all weights of one at once (method 1b.2).

The rows of fused experts are those of all experts, one after the other, and their columns are shared.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fihelpers.answers import Answers, usual_answers
from fihelpers.filters import EXACT, Spectral
from fihelpers.influence import SATURATED_RTOL, SATURATED_SHARE, SaturationWarning, fi_from_gram, gram
from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, turned_names
from fihelpers.scores.channels import Axis, along_of, has_channels
from fihelpers.scores.hooks import Block, class_grad_blocks, frozen, missed_by_hooks, named_parameters
from fihelpers.scores.store import Scores, provenance
from fihelpers.tasks import Example

JOINT = "joint FI"


def score_channels(
    model: LanguageModel,
    examples: Sequence[Example],
    spectral: Spectral = EXACT,
    *,
    axis: Axis = "rows",
    answers: Answers | None = None,
    only: Collection[str] | None = None,
    batch_size: int = 16,
) -> Scores:
    """Mean over a calibration set of each channel's joint FI, all its weights being one omega (method 1a).

    The Gram matrices of the class gradients are summed up block by block, so that no class gradient of a
    whole channel is ever held. With exact FI and four classes every channel reaches the ceiling (but for the
    rows of the last block, whose class gradients are multiples of one another), which ranks nothing (method
    1b.2): that warns `SaturationWarning`; use more classes or damping. Metadata `ceiling` is its mean.

    answers, only and errors as in `score_weights`; without `only` all matrices are scored.
    """
    if len(examples) == 0:
        raise ValueError("The calibration set is empty; choose n of at least 1.")
    along = along_of(axis)
    classes = answers or usual_answers(model.tokenizer, lettered=bool(examples[0].options))
    parameters = _parameters(model, only)
    turned = turned_names(model.network)
    shapes = {name: as_rows(p, name in turned).shape for name, p in parameters.items()}
    zeros = torch.zeros(0, device=model.device, dtype=torch.float64)
    totals = {name: zeros.new_zeros(shape[1 - along]) for name, shape in shapes.items()}
    ceilings: list[Tensor] = []
    batches = model.batches([e.prompt for e in examples], batch_size)
    with frozen(model.network):
        missed = missed_by_hooks(model, batches, classes, parameters)
        for batch in tqdm(batches, desc="scoring", unit="batch", leave=False, disable=len(batches) < 8):
            blocks = class_grad_blocks(model, batch, classes, parameters, missed)
            for block, channels, grams in _channel_grams(blocks, parameters, along, turned):
                totals[block.name][channels] += _joint(grams, block, spectral).sum(0)
                ceilings.append(block.others.sum(0) / block.chosen)
    means = {name: (total / len(examples)).float() for name, total in totals.items()}
    top = float(torch.cat(ceilings).mean())
    _warn_if_saturated(means, top)
    about = {"measure": JOINT, "spectral": str(spectral), "classes": str(classes), "ceiling": f"{top:.6g}"}
    return Scores(means, {**provenance(model, examples), **about, "axis": axis})


def _parameters(model: LanguageModel, only: Collection[str] | None) -> dict[str, torch.nn.Parameter]:
    """The matrices among the model's parameters. Raises ValueError where `only` names something else."""
    named = named_parameters(model.network, only)
    flat = [n for n, p in named.items() if not has_channels(p)]
    if not named or (only is not None and flat):
        raise ValueError(f"{(*flat, 'nothing')[0]!r} is no matrix, so it has no channels; name a matrix.")
    return {n: p for n, p in named.items() if n not in flat}


def _channel_grams(
    blocks: Iterator[Block], parameters: Mapping[str, Tensor], along: int, turned: Collection[str]
) -> Iterator[tuple[Block, slice, Tensor]]:
    """Gram matrices (K-1, K-1, B, channels) of samples, each with its block and which channels these are.

    A channel along the last axis lies within one block of the first; another's matrix is summed up over all.
    """
    begun: dict[tuple[str, int], Tensor] = {}
    for block in blocks:
        grads, size = block.grads, len(parameters[block.name])
        start, stop, _ = block.rows.indices(size)
        if grads.dim() == 5:  # of fused experts
            grads = (grads.transpose(-1, -2) if block.name in turned else grads).flatten(2, 3)
            each = grads.shape[2] // (stop - start)
            start, stop, size, within = start * each, stop * each, size * each, along == 1
        else:
            within = (along == 1) != (block.name in turned)
        part = gram(grads, 2 if within else 1)
        if within:
            yield block, slice(start, stop), part
            continue
        place = (block.name, block.samples.start or 0)
        begun[place] = begun[place] + part if place in begun else part
        if stop == size:
            yield block, slice(None), begun.pop(place)


def _joint(grams: Tensor, block: Block, spectral: Spectral) -> Tensor:
    """Joint FI (B, channels) from the Gram matrices of the classes other than y_hat, put in as class 0."""
    others = len(grams)
    whole = grams.new_zeros(others + 1, others + 1, *grams.shape[2:])
    whole[1:, 1:] = grams
    probs = torch.cat([block.chosen[None], block.others])
    predicted = torch.zeros(len(block.chosen), dtype=torch.long, device=probs.device)
    with warnings.catch_warnings():  # of the whole map, not of each block
        warnings.simplefilter("ignore", SaturationWarning)
        return fi_from_gram(whole, probs, predicted=predicted, spectral=spectral, dtype=block.grads.dtype)


def _warn_if_saturated(means: Mapping[str, Tensor], top: float) -> None:
    """Matrix by matrix: channels are compared within one, and the last block's may hide the others."""
    near = {n: ((v - top).abs() <= SATURATED_RTOL * top).double().mean() for n, v in means.items()}
    flat = [n for n, v in means.items() if len(v) > 1 and near[n] >= SATURATED_SHARE]
    if flat:
        warnings.warn(
            f"Joint FI equals its ceiling in the channels of {len(flat)} of {len(means)} matrices, {flat[0]} "
            "first, so it ranks nothing there: use more classes than weights a channel, elementwise FI "
            "summed over the channel, or a filter other than exact (method 1b.2).",
            SaturationWarning,
            stacklevel=3,
        )
