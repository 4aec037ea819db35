"""Chapter 11: parts of a language model, and the relatives of FI that look at a part as a whole.

A component is an attention head or a few neurons of an MLP: the columns of the matrix that reads them.
Setting these weights to zero takes the component out of the model, so that scores of weights, scores of
whole components and published attributions can be held against one and the same damage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fihelpers.answers import usual_answers
from fihelpers.evaluate.questions import Evaluator
from fihelpers.filters import Damped, Exact
from fihelpers.influence import SaturationWarning, fi_from_gram, gram, moments_of_others
from fihelpers.measures import Random
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.scores.hooks import class_grad_blocks, frozen, missed_by_hooks, named_parameters
from fihelpers.tasks import Example

READERS = {"o_proj": "head", "down_proj": "neurons"}  # the matrix that reads a component, and its kind
JOINT, JOINT_DAMPED = "joint FI exact", "joint FI damped 0.0001"
GATE_FI = "FI of the gate"
ROWS = 128  # prompts answered at once


@dataclass(frozen=True)
class Component:
    """Columns `start` to `stop` of the matrix `weight`, which read one head or one group of neurons."""

    kind: str
    layer: int
    weight: str
    start: int
    stop: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.stop)

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.kind} {self.start}-{self.stop - 1}"


def find_components(model: LanguageModel, neurons: int) -> list[Component]:
    """All heads of a model, and its MLPs' neurons in groups of `neurons`, in the model's order.

    Raises ValueError for a model without matrices named o_proj and down_proj, or a group of no neurons.
    """
    if neurons < 1:
        raise ValueError(f"A group holds at least 1 neuron, not {neurons}.")
    config = model.network.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = []
    for name, weight in model.network.named_parameters():
        kind = READERS.get(name.split(".")[-2]) if name.endswith(".weight") else None
        if kind is not None:
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            width = head if kind == "head" else neurons
            starts = range(0, weight.shape[1], width)
            found += [Component(kind, layer, name, s, min(s + width, weight.shape[1])) for s in starts]
    if not found:
        raise ValueError(
            f"Model {model.name!r} has no matrices named {' or '.join(READERS)}; use a model of the Llama "
            "or Qwen family."
        )
    return found


def random_scores(model: LanguageModel, names: Collection[str], seed: int) -> dict[str, Tensor]:
    """A random number for every weight of the named matrices, the same for the same seed."""
    weight = model.network.get_parameter
    return {n: Random(seed).of_value(weight(n), 10_000 * i) for i, n in enumerate(sorted(names))}


def whole_scores(
    model: LanguageModel, examples: Sequence[Example], parts: Sequence[Component]
) -> dict[str, Tensor]:
    """FI of each component as one perturbation (components,), the mean over examples (method 1 and 1a).

    "joint FI" takes all weights of a component together, exact and damped. The gate is one number, by which
    the component is multiplied: 1 is intact, 0 is removal.
    """
    classes = usual_answers(model.tokenizer, examples)
    parameters = named_parameters(model.network, {c.weight for c in parts})
    n, k = len(examples), classes.size - 1
    grams, gates = (torch.zeros(*shape, n, len(parts)).double() for shape in ((k, k), (k,)))
    others, chosen = torch.zeros(k, n).double(), torch.zeros(n).double()
    with frozen(model.network):
        batches = model.batches([e.prompt for e in examples], 16)
        missed = missed_by_hooks(model, batches, classes, parameters)
        for batch in batches:
            for block in class_grad_blocks(model, batch, classes, parameters, missed):
                closing = block.grads * parameters[block.name].detach()[block.rows]
                for c in (c for c, part in enumerate(parts) if part.weight == block.name):
                    columns = parts[c].columns
                    grams[:, :, block.index, c] += gram(block.grads[..., columns], (1, 2)).cpu()
                    gates[:, block.index, c] += closing[..., columns].sum((-1, -2)).double().cpu()
                others[:, block.index] = block.others.double().cpu()
                chosen[block.index] = block.chosen.double().cpu()
    m = moments_of_others(gates, others, chosen)
    of_gates = torch.where(m.metric > 0, m.score.square() / m.metric, 0)
    return {**_joint(grams, others, chosen), GATE_FI: of_gates.mean(0)}


def _joint(grams: Tensor, others: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Joint FI (components,) from the Gram matrices (K-1, K-1, n, components) of the other classes."""
    whole = grams.new_zeros(len(grams) + 1, len(grams) + 1, *grams.shape[2:])
    whole[1:, 1:] = grams  # the predicted class is class 0, whose row follows from the others
    probs = torch.cat([chosen[None], others])
    first = torch.zeros(len(chosen), dtype=torch.long)
    with warnings.catch_warnings():  # that it saturates is what the chapter shows
        warnings.simplefilter("ignore", SaturationWarning)
        return {
            name: fi_from_gram(whole, probs, predicted=first, spectral=spectral).mean(0)
            for name, spectral in ((JOINT, Exact(1e-6)), (JOINT_DAMPED, Damped(1e-4)))
        }


def sharpness(
    model: LanguageModel, examples: Sequence[Example], parts: Sequence[Component], radius: float
) -> Tensor:
    """How much the mean loss rises (components,) one step of this length uphill (SAM, Foret et al. 2021).

    Only the component's weights move. The loss is -log P of the right answer.
    """
    ask = Evaluator(model, examples)
    base = ask()
    grads = _loss_gradients(model, examples, {c.weight for c in parts}, base.answer)
    found = []
    for c in parts:
        weight = model.network.get_parameter(c.weight)
        kept, uphill = weight.data[:, c.columns].clone(), grads[c.weight][:, c.columns]
        weight.data[:, c.columns] = kept + radius * uphill / uphill.norm().clamp(min=1e-30)
        found.append(base.log_prob.double().mean() - ask().log_prob.double().mean())
        weight.data[:, c.columns] = kept
    return torch.stack(found)


def _loss_gradients(
    model: LanguageModel, examples: Sequence[Example], names: Collection[str], right: Tensor
) -> Mapping[str, Tensor]:
    """Gradients of the mean of -log P of the classes `right` (N,), for each named weight."""
    classes = usual_answers(model.tokenizer, examples)
    parameters = named_parameters(model.network, names)
    with frozen(model.network):
        for p in parameters.values():
            p.requires_grad_(True)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for batch in model.batches([e.prompt for e in examples]):
            log_p = classes.rows(batch.index).log_probs(model.last_logits(batch))
            loss = -log_p.gather(1, right[batch.index].to(log_p.device)[:, None]).sum() / len(examples)
            for name, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                total[name] += g
    return total


@contextmanager
def gated(model: LanguageModel, parts: Sequence[Component], gates: Tensor) -> Iterator[None]:
    """Multiply each component by its gate: gates (B, components), a row for each prompt of the batch."""
    modules = dict(model.network.named_modules())
    factors = {
        name: gates.new_ones(len(gates), 1, model.network.get_parameter(name).shape[1])
        for name in dict.fromkeys(c.weight for c in parts)
    }
    for gate, c in zip(gates.T, parts, strict=True):
        factors[c.weight][:, 0, c.columns] = gate[:, None]

    def times(factor: Tensor) -> Callable[..., Any]:
        return lambda _, inputs: (inputs[0] * factor, *inputs[1:])

    handles = [
        modules[name.removesuffix(".weight")].register_forward_pre_hook(times(factor))
        for name, factor in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answers_under(
    model: LanguageModel, example: Example, parts: Sequence[Component], gates: Tensor
) -> Tensor:
    """Log-probabilities (M, K) of the answers to one question under M settings of the gates (M, parts)."""
    classes = usual_answers(model.tokenizer, [example])
    (one,) = model.batches([example.prompt], 1)
    found = []
    for some in gates.split(ROWS):
        first = torch.zeros(len(some), dtype=torch.long)
        same = [x.expand(len(some), -1) for x in (one.input_ids, one.attention_mask, one.position_ids)]
        with torch.no_grad(), gated(model, parts, some.to(model.device, model.network.dtype)):
            logits = model.last_logits(Batch(torch.arange(len(some)), *same))
            found.append(classes.rows(first).log_probs(logits).double().cpu())
    return torch.cat(found)


def attribution(
    model: LanguageModel,
    examples: Sequence[Example],
    parts: Sequence[Component],
    seed: int,
    *,
    ablated: float,
    ablations: int,
    held: int,
    attributed: int,
) -> tuple[Tensor, pd.DataFrame]:
    """Component attribution (COAR, Shah et al. 2024): a linear model of what random ablations do.

    For each of the first `attributed` questions, log P of the right answer is regressed on which components
    are out: a share `ablated` of them in each of `ablations` forward passes; `held` more judge the fit.
    Returns the mean over questions of each component's coefficient (components,), its sign turned so that
    more means more needed, and for each question how the fit does on what was held out (`linear_fit`).
    """
    rng = np.random.default_rng(seed)
    m, out = ablations + held, max(1, round(ablated * len(parts)))
    gone = np.argsort(rng.random((m, len(parts))), axis=1) < out
    gates = torch.cat([torch.ones(1, len(parts)).double(), torch.tensor(~gone, dtype=torch.float64)])
    coefficients, fits = [], []
    for example in tqdm(examples[:attributed], desc="ablations", leave=False, delay=3):
        log_p = answers_under(model, example, parts, gates)
        right = int(log_p[0].argmax()) if example.answer is None else example.answer
        slopes, fit = linear_fit(gone, log_p[1:, right].numpy(), held)
        coefficients.append(-slopes)
        fits.append(fit)
    return torch.tensor(np.mean(coefficients, axis=0)), pd.DataFrame(fits)


def linear_fit(gone: np.ndarray, outcome: np.ndarray, held: int) -> tuple[np.ndarray, dict[str, float]]:
    """Least squares of outcome (M,) on what is gone (M, parts); the last `held` rows judge the fit.

    Returns a slope for each part, and the share of the variance that is told (r2) and the correlation of told
    and true outcomes in the rows held out.
    """
    design = np.column_stack([np.ones(len(gone)), gone])
    train, test = slice(None, len(gone) - held), slice(len(gone) - held, None)
    found = np.linalg.lstsq(design[train], outcome[train], rcond=None)[0]
    told, truth = design[test] @ found, outcome[test]
    missed = ((truth - told) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    return found[1:], {"r2": float(1 - missed), "correlation": float(np.corrcoef(told, truth)[0, 1])}
