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

from fihelpers.answers import Answers, Groups, usual_answers
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.models.linear import as_rows, from_rows
from fihelpers.scores.hooks import not_finite, requiring
from fihelpers.scores.store import Scores, provenance
from fihelpers.scores.watched import Layers, batch_size_for, layer_sums, linear_layers, watching
from fihelpers.tasks import Example

METHODS = ("Wanda", "SparseGPT", "Taylor")
DAMPING = 0.01  # of the mean diagonal of X X^T, as in SparseGPT's published code
HELD = 2**29  # elements of X X^T held at once (2 GB in float32); layers beyond them wait for another pass
BLOCK = 2**19  # elements of per-sample gradients formed at a time, to stay in cache


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
    method or name, a weight that is not a linear layer's alone, or a layer that is never called, and
    FloatingPointError for NaN or infinite logits, inputs or gradients.
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
        classes = answers or usual_answers(model.tokenizer, lettered=bool(examples[0].options))
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
    """Mean over examples of (g W)^2, from one backward pass a batch."""
    weights = {name: one.rows for name, one in layers.items()}
    totals = {name: torch.zeros_like(w, dtype=_working(w)) for name, w in weights.items()}
    right = torch.tensor([_right(e, classes) for e in examples])
    for batch in tqdm(batches, desc="scoring", unit="batch", leave=False, disable=len(batches) < 8):
        for name, rows, grads in _sample_grads(model, batch, classes, layers, right[batch.index]):
            squares = (grads * weights[name][rows].to(grads.dtype)).square().sum(0)
            if not torch.isfinite(squares).all():
                raise not_finite(name)
            totals[name][rows] += squares
    means = {name: total / len(examples) for name, total in totals.items()}
    return {n: from_rows(mean, layers[n].weight.shape, layers[n].turned) for n, mean in means.items()}


def _right(example: Example, classes: Answers) -> int:
    """The right class, or -1 where there is none among these classes."""
    lettered = isinstance(classes, Groups) and len(example.options) == classes.size
    return example.answer if lettered and example.answer is not None else -1


def _sample_grads(
    model: LanguageModel, batch: Batch, classes: Answers, layers: Layers, right: Tensor
) -> Iterator[tuple[str, slice, Tensor]]:
    """Blocks of rows of each weight with the loss gradients (B, rows, in) of a batch's samples."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    within = {
        name: one.weight for name, one in layers.items() if not one.modules
    }  # then a batch is one sample

    def see(name: str, expert: int, x: Tensor, out: Tensor) -> None:
        if not out.requires_grad:
            out.requires_grad_(True)
        calls.append((name, x.detach(), out))

    hooked = {name: one for name, one in layers.items() if one.modules}
    with torch.enable_grad(), watching(model.network, hooked, see), requiring(within.values()):
        logits = model.last_logits(batch)
        chosen = torch.where(right >= 0, right, classes.choice(logits.detach()).cpu()).to(logits.device)
        loss = -classes.log_probs(logits).gather(-1, chosen[:, None]).sum()
        ends = [*(out for _, _, out in calls), *within.values()]
        grads = list(torch.autograd.grad(loss, ends, materialize_grads=True))
    for name, grad in zip(within, grads[len(calls) :], strict=True):
        yield name, slice(None), as_rows(grad, layers[name].turned)[None]
    for name, one in hooked.items():
        uses = [(x, g) for (seen, x, _), g in zip(calls, grads, strict=False) if seen == name]
        if not uses:
            raise ValueError(f"The layer of {name} is never called; leave its weight out.")
        step = max(1, BLOCK // (len(right) * one.inputs))
        for start in range(0, len(one.rows), step):
            rows = slice(start, start + step)
            yield name, rows, torch.stack([_of_rows(x, g[..., rows]) for x, g in uses]).sum(0)


def _of_rows(x: Tensor, g: Tensor) -> Tensor:
    """Gradients (B, rows, in) of some rows: the sum over positions of g (B, ..., rows) by x (B, ..., in)."""
    dtype = _working(x)
    return torch.einsum("bto,bti->boi", *(t.reshape(len(t), -1, t.shape[-1]).to(dtype) for t in (g, x)))


def _working(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
