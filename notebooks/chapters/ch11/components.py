"""Chapter 11: parts of a language model, and the relatives of FI that look at a part as a whole.

A component is an attention head or a few neurons of an MLP: the columns of the matrix that reads them.
Setting these weights to zero takes the component out of the model, so that scores of weights, scores of
whole components and published attributions can be held against one and the same damage.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fihelpers.answers import usual_answers
from fihelpers.evaluate.questions import Evaluator
from fihelpers.filters import Damped, Exact
from fihelpers.influence import SaturationWarning, fi_from_gram, fi_of_moments, gram, moments_of_others
from fihelpers.measures import Random
from fihelpers.models.language import LanguageModel
from fihelpers.scores.hooks import class_grad_blocks, frozen, missed_by_hooks, named_parameters
from fihelpers.tasks import Example

READERS = {"o_proj": "head", "down_proj": "neurons"}  # the matrix that reads a component, and its kind
JOINT, JOINT_DAMPED = "joint FI exact", "joint FI damped 0.0001"
GATE_FI = "FI of the gate"


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


@contextmanager
def removed(model: LanguageModel, parts: Iterable[Component]) -> Iterator[None]:
    """The model without some components: the weights that read them are zero, and as before afterwards."""
    columns = [model.network.get_parameter(c.weight).data[:, c.columns] for c in parts]
    kept = [weights.clone() for weights in columns]
    try:
        for weights in columns:
            weights.zero_()
        yield
    finally:
        for weights, values in zip(columns, kept, strict=True):
            weights.copy_(values)


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
    of_gates = fi_of_moments(moments_of_others(gates, others, chosen))
    return {**_joint(grams, others, chosen), GATE_FI: of_gates.mean(0)}


def _joint(grams: Tensor, others: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Joint FI (components,) from the Gram matrices (K-1, K-1, n, components) of the other classes."""
    whole = grams.new_zeros(len(grams) + 1, len(grams) + 1, *grams.shape[2:])
    whole[1:, 1:] = grams  # the predicted class is class 0, whose row follows from the others
    probs = torch.cat([chosen[None], others])
    first = torch.zeros(len(chosen), dtype=torch.long)
    # that it saturates is what the chapter shows
    with warnings.catch_warnings(action="ignore", category=SaturationWarning):
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
) -> tuple[Tensor, np.ndarray]:
    """Component attribution (COAR, Shah et al. 2024): a linear model of what random ablations do.

    For each of the first `attributed` questions, log P of the right answer is regressed on which components
    are out: a share `ablated` of them in each of `ablations` removals; `held` more judge the fit.
    Returns the mean over questions of each component's coefficient (components,), its sign turned so that
    more means more needed, and R2 of the fit on what was held out, for each question.
    """
    rng = np.random.default_rng(seed)
    m, out = ablations + held, max(1, round(ablated * len(parts)))
    gone = np.argsort(rng.random((m, len(parts))), axis=1) < out
    ask = Evaluator(model, examples[:attributed])
    ask()  # the intact model, whose choice counts where no answer is right
    log_p = []
    for row in tqdm(gone, desc="ablations", leave=False, delay=3):
        with removed(model, itertools.compress(parts, row)):
            log_p.append(ask().log_prob.double())
    fits = [linear_fit(gone, of.numpy(), held) for of in torch.stack(log_p, 1)]
    slopes, r2 = zip(*fits, strict=True)
    return -torch.tensor(np.mean(slopes, axis=0)), np.array(r2)


def linear_fit(gone: np.ndarray, outcome: np.ndarray, held: int) -> tuple[np.ndarray, float]:
    """Least squares of outcome (M,) on what is gone (M, parts); the last `held` rows judge the fit.

    Returns a slope for each part, and R2 in the rows held out, the share of their variance that is told.
    """
    design = np.column_stack([np.ones(len(gone)), gone])
    train, test = slice(None, len(gone) - held), slice(len(gone) - held, None)
    found = np.linalg.lstsq(design[train], outcome[train], rcond=None)[0]
    missed = outcome[test] - design[test] @ found
    return found[1:], float(1 - (missed**2).sum() / ((outcome[test] - outcome[test].mean()) ** 2).sum())
