"""Chapter 11: parts of a language model, and the relatives of FI that look at a part as a whole.

A component is an attention head or a few neurons of an MLP: the columns of the matrix that reads them.
Setting these weights to zero takes the component out of the model, so that scores of weights, scores of
whole components and published attributions can be held against one and the same damage.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import r2_score
from torch import Tensor
from tqdm import tqdm

from fichapters.ch03.lab import questions, unwarned
from fihelpers.evaluate.questions import Evaluator
from fihelpers.filters import Damped, Exact, Spectral
from fihelpers.influence import fi, fi_from_gram, gram
from fihelpers.measures import Random
from fihelpers.models.language import LanguageModel
from fihelpers.tasks import Example

READERS = {"o_proj": "head", "down_proj": "neurons"}  # the matrix that reads a component, and its kind
JOINT, JOINT_DAMPED = "joint FI exact", "joint FI damped 0.0001"
FILTERS: dict[str, Spectral] = {JOINT: Exact(1e-6), JOINT_DAMPED: Damped(1e-4)}
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
    weights = [model.network.get_parameter(c.weight).detach()[:, c.columns] for c in parts]
    found: dict[str, list[Tensor]] = {name: [] for name in (*FILTERS, GATE_FI)}
    for q in questions(model, examples, list(dict.fromkeys(c.weight for c in parts))):
        grads = [q.grads[c.weight][..., c.columns] for c in parts]
        gates = [(s * w).sum((1, 2), dtype=torch.float64) for s, w in zip(grads, weights, strict=True)]
        found[GATE_FI].append(fi(torch.stack(gates, 1), q.probs))
        products = torch.stack([gram(s, (0, 1)) for s in grads], -1)
        with unwarned():
            for name, spectral in FILTERS.items():
                found[name].append(fi_from_gram(products, q.probs, spectral=spectral))
    return {name: torch.stack(each).mean(0) for name, each in found.items()}


def sharpness(
    model: LanguageModel, examples: Sequence[Example], parts: Sequence[Component], radius: float
) -> Tensor:
    """How much the mean loss rises (components,) one step of this length uphill (SAM, Foret et al. 2021).

    Only the component's weights move. The loss is -log P of the right answer.
    """
    ask = Evaluator(model, examples)
    base = ask()
    weights = {c.weight: model.network.get_parameter(c.weight).data for c in parts}
    uphill = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for q, right in zip(questions(model, examples, list(weights)), base.answer.tolist(), strict=True):
        for name, grads in q.grads.items():
            uphill[name] -= grads[right]
    found = []
    for c in parts:
        columns = weights[c.weight][:, c.columns]
        kept, step = columns.clone(), uphill[c.weight][:, c.columns]
        columns += radius * step / step.norm().clamp(min=1e-30)
        found.append(base.log_prob.double().mean() - ask().log_prob.double().mean())
        columns.copy_(kept)
    return torch.stack(found)


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
    asked = []
    for row in tqdm(gone, desc="ablations", leave=False, delay=3):
        with removed(model, itertools.compress(parts, row)):
            asked.append(ask().log_prob.double())
    log_p, design = torch.stack(asked).numpy(), np.column_stack([np.ones(m), gone])
    slopes = np.linalg.lstsq(design[:ablations], log_p[:ablations], rcond=None)[0]
    r2 = r2_score(log_p[ablations:], design[ablations:] @ slopes, multioutput="raw_values")
    return -torch.tensor(slopes[1:].mean(1)), r2
