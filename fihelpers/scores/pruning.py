"""Scores of published pruning methods for the weights of linear layers, to set FI beside.

All are larger where a weight is judged more needed. Wanda and SparseGPT look at a layer's inputs alone,
Taylor at the gradient of a loss. Inputs and gradients are taken from the intact model by hooks, batch by
batch; positions of padding never count. Only the criteria are here: they rank weights and repair none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fihelpers.answers import Answers, usual_answers
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.models.linear import from_rows
from fihelpers.scores.hooks import Directions, class_grad_blocks, frozen, missed_by_hooks
from fihelpers.scores.store import Scores, provenance
from fihelpers.scores.watched import Layers, batch_size_for, layer_sums, linear_layers
from fihelpers.tasks import Example

METHODS = ("Wanda", "SparseGPT", "Taylor")
DAMPING = 0.01  # of the mean diagonal of X X^T, as in SparseGPT's published code
HELD = 2**29  # elements of X X^T held at once (2 GB in float32); layers beyond them wait for another pass


def score_pruning(
    model: LanguageModel,
    examples: Sequence[Example],
    methods: Sequence[str] = METHODS,
    *,
    answers: Answers | None = None,
    only: Collection[str] | None = None,
    batch_size: int = 16,
) -> dict[str, Scores]:
    """Score the weights W (out, in) of linear layers, whose inputs over a calibration set are X (in, tokens).

    Of fused experts each is a layer, and X what is sent to it.

    Wanda (Sun et al. 2024): |W_ij| * ||X_j||_2, the norm over all tokens of the set.
    SparseGPT (Frantar and Alistarh 2023): W_ij^2 / [(X X^T + lambda I)^-1]_jj, lambda being 1 % of the mean
        diagonal. This is the criterion alone: their code goes column by column, repairs the weights that
        remain and leaves the columns already passed out of the inverse. An input that is always 0 scores 0.
    Taylor (Molchanov et al. 2019, first order): (g_ij W_ij)^2, the mean over examples of the square, with g
        the gradient of -log P of the right class, or of the intact model's choice where none is right.

    answers: the classes for Taylor; by default letters, or the 8 likeliest tokens and the rest for text.
    only: names of the weights to score; by default those of all linear layers, but for an output head that
        is also the embedding, which has inputs of another kind.

    Returns {method: Scores}, in float32 or better. Raises ValueError for an empty calibration set, an unknown
    method or name, a weight that is not a linear layer's alone, or a layer whose inputs are asked for and
    that is never called, and FloatingPointError for NaN or infinite logits, inputs or gradients.
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise ValueError(f"Unknown pruning method {(*unknown, '')[0]!r}; known: {', '.join(METHODS)}.")
    if len(examples) == 0:
        raise ValueError("The calibration set is empty; choose n of at least 1.")
    layers = linear_layers(model.network, only)
    batches = model.batches([e.prompt for e in examples], batch_size_for(layers, batch_size))
    values = _by_inputs(model, batches, layers, [m for m in methods if m != "Taylor"])
    extra = {"Wanda": {}, "SparseGPT": {"damping": str(DAMPING)}}
    if "Taylor" in methods:
        classes = answers or usual_answers(model.tokenizer, examples)
        values["Taylor"] = _taylor(model, examples, batches, layers, classes)
        extra["Taylor"] = {"classes": str(classes)}
    about = provenance(model, examples)
    return {m: Scores(values[m], {**about, "measure": m, **extra[m]}) for m in methods}


def _by_inputs(
    model: LanguageModel, batches: Sequence[Batch], layers: Layers, methods: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Wanda's and SparseGPT's scores: one pass over the inputs, or several where X X^T is large."""
    values: dict[str, dict[str, Tensor]] = {m: {} for m in methods}
    products = "SparseGPT" in methods

    def summed(x: Tensor, _: Tensor) -> list[Tensor]:
        return [x.T @ x if products else x.square().sum(0)]

    for part in _portions(layers) if products else [layers] * bool(methods):
        for name, (total,) in layer_sums(model, batches, part, summed)[0].items():
            one = part[name]
            weight = one.rows.to(total.dtype).view(one.experts, -1, one.inputs)
            found = {}
            if "Wanda" in methods:
                squares = total.diagonal(dim1=1, dim2=2) if products else total
                found["Wanda"] = weight.abs() * squares.sqrt()[:, None]
            if products:
                found["SparseGPT"] = weight.square() * torch.stack([_obs_factor(t) for t in total])[:, None]
            for method, value in found.items():
                values[method][name] = from_rows(value.flatten(0, 1), one.weight.shape, one.turned)
    return values


def _portions(layers: Layers) -> Iterator[Layers]:
    """Layers in groups whose X X^T fit in memory together, at least one in each."""
    part: Layers = {}
    held = 0
    for name, one in layers.items():
        size = one.experts * one.inputs**2
        if part and held + size > HELD:
            yield part
            part, held = {}, 0
        part[name] = one
        held += size
    yield part


def _obs_factor(products: Tensor) -> Tensor:
    """1 / [(X X^T + lambda I)^-1]_jj for every input j (in,), 0 for an input that is always zero."""
    diagonal = products.diagonal().double()
    if not diagonal.any():
        return torch.zeros_like(products[0])
    damped = products.double() + torch.diag(DAMPING * diagonal.mean().expand_as(diagonal))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()
    return torch.where(diagonal > 0, 1 / inverse, 0).to(products.dtype)


def _taylor(
    model: LanguageModel,
    examples: Sequence[Example],
    batches: Sequence[Batch],
    layers: Layers,
    classes: Answers,
) -> dict[str, Tensor]:
    """Mean over examples of (g W)^2, from the gradients that `fihelpers.scores.hooks` streams."""
    parameters = {name: one.weight for name, one in layers.items()}
    totals = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in parameters.items()
    }
    with frozen(model.network):
        missed = missed_by_hooks(model, batches, classes, parameters)
        for batch in tqdm(batches, desc="scoring", unit="batch", leave=False, disable=len(batches) < 8):
            right = _right(model, examples, batch, classes)
            along: Directions = lambda *of, right=right: of[-1].gather(-1, right)  # noqa: E731
            for block in class_grad_blocks(model, batch, classes, parameters, missed, along):
                moved = block.grads[0] * parameters[block.name].detach()[block.rows]
                totals[block.name][block.rows] += moved.square().sum(0)
    return {name: total / len(examples) for name, total in totals.items()}


def _right(model: LanguageModel, examples: Sequence[Example], batch: Batch, classes: Answers) -> Tensor:
    """The right classes (B, 1) of a batch, the model's own choice where these classes hold none."""
    with torch.no_grad():
        chosen = classes.rows(batch.index).choice(model.last_logits(batch))
    right = classes.right([examples[place] for place in batch.index.tolist()]).to(chosen)
    return torch.where(right < 0, chosen, right)[:, None]
