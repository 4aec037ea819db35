"""Chapter 11: parts of a language model as FI and its relatives see them, and what their loss really costs.

A component is an attention head or a few neurons of an MLP: the columns of the matrix that reads them.
Setting these weights to zero takes the component out of the model, so that scores of weights, scores of
whole components and published attributions can be held against one and the same damage.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fichapters.pruning import score_pruning
from fihelpers.answers import Answers, usual_answers
from fihelpers.evaluate.questions import Evaluator
from fihelpers.filters import Damped, Exact, Spectral
from fihelpers.influence import SaturationWarning, fi_from_gram, gram, moments, moments_of_others
from fihelpers.measures import MEASURES, SQUARED_SCORE, Measure, Random
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.perturb.sparsify import zeroed
from fihelpers.scores.channels import MEAN_INPUT, score_activations
from fihelpers.scores.hooks import Block, class_grad_blocks, frozen, missed_by_hooks, named_parameters
from fihelpers.tasks import Example

READERS = {"o_proj": "head", "down_proj": "neurons"}  # the matrix that reads a component, and its kind
ELEMENTWISE = (  # measures of single weights, summed over the component
    "FI exact",
    "FI damped 0.0001",
    "Jacobian norm",
    "saliency",
    "Fisher diagonal",
    "information length",
    "SNIP",
    "magnitude",
)
SQUARED = "squared gradient"
INPUTS = "mean input"
JOINT, JOINT_DAMPED = "joint FI exact", "joint FI damped 0.0001"
GATE_FI, GATE_CHANGE, GATE_LENGTH = "FI of the gate", "predicted change", "length of removal"
COOK, SAM, COAR = "Cook's curvature", "SAM sharpness", "COAR"
GATE_STEP = 0.1  # of a gate, for second differences
ROWS = 128  # prompts answered at once
RESCALING = 3  # neurons are rescaled by powers of two up to 2 to this power


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


@dataclass(frozen=True)
class Coordinates:
    """In which coordinates phi the weights theta are written: theta itself, or theta = unit * sinh(phi)."""

    unit: float | None = None

    def of(self, theta: Tensor) -> Tensor:
        return theta if self.unit is None else torch.asinh(theta / self.unit)

    def back(self, phi: Tensor) -> Tensor:
        return phi if self.unit is None else self.unit * torch.sinh(phi)

    def slope(self, theta: Tensor) -> Tensor:
        """d theta / d phi."""
        return torch.ones_like(theta) if self.unit is None else (theta.square() + self.unit**2).sqrt()


@dataclass(frozen=True)
class Settings:
    """How the costlier relatives are computed.

    radius: of SAM's step, in the weights' units. ablated: the share of components that a random ablation of
    COAR takes out; ablations: how many are fitted, held: how many are kept for judging the fit. curved,
    attributed: questions for Cook's curvature and for COAR, of all that the scores are computed on.
    """

    radius: float = 0.05
    ablated: float = 0.1
    ablations: int = 192
    held: int = 48
    curved: int = 8
    attributed: int = 16
    seed: int = 0


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


def score_components(
    model: LanguageModel,
    examples: Sequence[Example],
    parts: Sequence[Component],
    settings: Settings,
    coordinates: Coordinates | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of every component by FI and its relatives, larger where one is judged more fragile.

    coordinates: those in which the weights are written; gates are then rescaled too (`curvature`). Returns
    the table (a row a component, a column a relative), and how well COAR fits (see `attribution`).
    """
    written = coordinates or Coordinates()
    by_gradients = gradient_scores(model, examples, parts, written, settings.seed)
    of_layers = layer_scores(model, examples, parts, written)
    coefficients, fit = attribution(model, examples[: settings.attributed], parts, settings)
    whole = {
        COOK: curvature(model, examples[: settings.curved], parts, stretched=coordinates is not None),
        SAM: sharpness(model, examples, parts, settings.radius, written),
        COAR: coefficients,
    }
    return pd.concat([by_gradients, of_layers, pd.DataFrame(whole)], axis=1), fit


def gradient_scores(
    model: LanguageModel,
    examples: Sequence[Example],
    parts: Sequence[Component],
    coordinates: Coordinates,
    seed: int,
) -> pd.DataFrame:
    """What follows from the class gradients of one pass, the mean over examples (method 1, 1a, 1b.4 and 3).

    Elementwise measures are summed over a component's weights. "joint FI" takes all its weights as one
    perturbation. The gate multiplies the component (1 is intact, 0 is removal): its FI, the squared change
    that it predicts, and the squared information length of closing it.
    """
    classes = usual_answers(model.tokenizer, lettered=bool(examples[0].options))
    passed = _Pass(model, parts, len(examples), classes.size, coordinates, seed)
    with frozen(model.network):
        batches = model.batches([e.prompt for e in examples], 16)
        missed = missed_by_hooks(model, batches, classes, passed.parameters)
        for batch in batches:
            for block in class_grad_blocks(model, batch, classes, passed.parameters, missed):
                passed.add(block)
    return passed.table()


class _Pass:
    """Running sums over the blocks of class gradients of all matrices that read components."""

    def __init__(
        self,
        model: LanguageModel,
        parts: Sequence[Component],
        n: int,
        classes: int,
        coordinates: Coordinates,
        seed: int,
    ) -> None:
        self.parts = parts
        self.parameters = named_parameters(model.network, {c.weight for c in parts})
        self.coordinates = coordinates
        self.measures: list[Measure] = [
            *(MEASURES[name] for name in ELEMENTWISE),
            SQUARED_SCORE,
            Random(seed),
        ]
        self.sums = {
            m.name: {name: p.new_zeros(p.shape[1]) for name, p in self.parameters.items()}
            for m in self.measures
        }
        others = classes - 1
        self.grams = torch.zeros(others, others, n, len(parts), dtype=torch.float64)
        self.gates = torch.zeros(others, n, len(parts), dtype=torch.float64)
        self.others = torch.zeros(others, n, dtype=torch.float64)
        self.chosen = torch.zeros(n, dtype=torch.float64)

    def add(self, block: Block) -> None:
        theta = self.parameters[block.name].detach()[block.rows]
        along = block.grads * theta  # towards removal, whatever the coordinates
        grads = block.grads * self.coordinates.slope(theta)
        m = moments_of_others(grads, block.others, block.chosen)
        value = self.coordinates.of(theta)
        for measure in self.measures:
            salt = sorted(self.parameters).index(block.name) * 10_000 + (block.rows.start or 0)
            found = (
                measure.of_value(value, salt)[None]
                if isinstance(measure, Random)
                else measure.of_moments(m, measure.given(value))
            )
            self.sums[measure.name][block.name] += found.expand_as(m.score).sum((0, 1))
        for c, part in enumerate(self.parts):
            if part.weight == block.name:
                self.grams[:, :, block.index, c] += gram(grads[..., part.columns], (1, 2))
                self.gates[:, block.index, c] += along[..., part.columns].sum((-1, -2)).double()
        self.others[:, block.index] = block.others.double()
        self.chosen[block.index] = block.chosen.double()

    def table(self) -> pd.DataFrame:
        n = len(self.chosen)
        made = {
            SQUARED if name == SQUARED_SCORE.name else name: [
                float(of[c.weight][c.columns].sum()) / n for c in self.parts
            ]
            for name, of in self.sums.items()
        }
        made[JOINT] = self._joint(Exact(1e-6)).mean(0).tolist()
        made[JOINT_DAMPED] = self._joint(Damped(1e-4)).mean(0).tolist()
        m = moments_of_others(self.gates, self.others, self.chosen)
        fi = torch.where(m.metric > 0, m.score.square() / m.metric, 0)
        made[GATE_FI] = fi.mean(0).tolist()
        made[GATE_CHANGE] = m.score.square().mean(0).tolist()
        made[GATE_LENGTH] = m.metric.mean(0).tolist()
        return pd.DataFrame(made)

    def _joint(self, spectral: Spectral) -> Tensor:
        """Joint FI (n, components), with the predicted class put in as class 0."""
        whole = self.grams.new_zeros(len(self.grams) + 1, len(self.grams) + 1, *self.grams.shape[2:])
        whole[1:, 1:] = self.grams
        probs = torch.cat([self.chosen[None], self.others])
        first = torch.zeros(len(self.chosen), dtype=torch.long)
        with warnings.catch_warnings():  # that it saturates is what the chapter shows
            warnings.simplefilter("ignore", SaturationWarning)
            return fi_from_gram(whole, probs, predicted=first, spectral=spectral)


def layer_scores(
    model: LanguageModel, examples: Sequence[Example], parts: Sequence[Component], coordinates: Coordinates
) -> pd.DataFrame:
    """Taylor, Wanda, and AWQ's mean input, summed or averaged over each component's columns.

    In other coordinates Wanda multiplies the coordinate by the input, and Taylor's gradient has the slope.
    """
    names = sorted({c.weight for c in parts})
    pruning = score_pruning(model, examples, ["Wanda", "Taylor"], only=names)
    inputs = score_activations(model, examples, only=names)[MEAN_INPUT]
    factors = {}
    for name in names:
        theta = model.network.get_parameter(name).detach()
        ratio = torch.where(theta == 0, 0, coordinates.of(theta) / theta)
        factors[name] = {"Wanda": ratio.abs(), "Taylor": (ratio * coordinates.slope(theta)).square()}
    made = {
        method: [float((scores[c.weight] * factors[c.weight][method])[:, c.columns].sum()) for c in parts]
        for method, scores in pruning.items()
    }
    return pd.DataFrame(made | {INPUTS: [float(inputs[c.weight][c.columns].mean()) for c in parts]})


def sharpness(
    model: LanguageModel,
    examples: Sequence[Example],
    parts: Sequence[Component],
    radius: float,
    coordinates: Coordinates,
) -> list[float]:
    """How much the mean loss rises at SAM's point, one step of this length uphill (Foret et al. 2021).

    Only the component's weights move. The loss is -log P of the right answer.
    """
    classes = usual_answers(model.tokenizer, lettered=bool(examples[0].options))
    ask = Evaluator(model, examples, classes)
    base = -float(ask().log_prob.double().mean())
    grads = _loss_gradients(model, examples, parts, classes, ask)
    found = []
    for c in parts:
        weight = model.network.get_parameter(c.weight)
        kept = weight.data[:, c.columns].clone()
        uphill = grads[c.weight][:, c.columns] * coordinates.slope(kept)
        moved = coordinates.of(kept) + radius * uphill / uphill.norm().clamp(min=1e-30)
        weight.data[:, c.columns] = coordinates.back(moved)
        found.append(-float(ask().log_prob.double().mean()) - base)
        weight.data[:, c.columns] = kept
    return found


def _loss_gradients(
    model: LanguageModel,
    examples: Sequence[Example],
    parts: Sequence[Component],
    classes: Answers,
    ask: Evaluator,
) -> dict[str, Tensor]:
    parameters = named_parameters(model.network, {c.weight for c in parts})
    right = ask().answer
    with frozen(model.network):
        for p in parameters.values():
            p.requires_grad_(True)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for batch in model.batches([e.prompt for e in examples]):
            log_p = classes.log_probs(model.last_logits(batch))
            loss = -log_p.gather(1, right[batch.index][:, None]).sum() / len(examples)
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
    classes = usual_answers(model.tokenizer, lettered=bool(example.options))
    (one,) = model.batches([example.prompt], 1)
    found = []
    for some in gates.split(ROWS):
        m = len(some)
        batch = Batch(
            torch.arange(m),
            one.input_ids.expand(m, -1),
            one.attention_mask.expand(m, -1),
            one.position_ids.expand(m, -1),
        )
        with torch.no_grad(), gated(model, parts, some.to(model.device, model.network.dtype)):
            found.append(classes.log_probs(model.last_logits(batch)).double().cpu())
    return torch.cat(found)


def curvature(
    model: LanguageModel, examples: Sequence[Example], parts: Sequence[Component], *, stretched: bool = False
) -> list[float]:
    """Cook's normal curvature of -log P(y_hat) along each gate (Cook 1986), the mean over the examples.

    |f''| / (1 + f'^2)^(3/2), from second differences. `stretched` writes a gate as exp(2 b).
    """
    one = torch.eye(len(parts), dtype=torch.float64)
    gates = torch.cat([torch.ones(1, len(parts)).double(), 1 + GATE_STEP * one, 1 - GATE_STEP * one])
    slope, bend = (2, 4) if stretched else (1, 0)
    total = torch.zeros(len(parts), dtype=torch.float64)
    for example in tqdm(examples, desc="curvature", leave=False, delay=3):
        log_p = answers_under(model, example, parts, gates)
        f = -log_p[:, int(log_p[0].argmax())]
        up, down = f[1:].chunk(2)
        first, second = (up - down) / (2 * GATE_STEP), (up + down - 2 * f[0]) / GATE_STEP**2
        first, second = slope * first, slope**2 * second + bend * first
        total += second.abs() / (1 + first.square()) ** 1.5
    return (total / len(examples)).tolist()


def attribution(
    model: LanguageModel, examples: Sequence[Example], parts: Sequence[Component], settings: Settings
) -> tuple[list[float], pd.DataFrame]:
    """Component attribution (Shah, Ilyas and Madry 2024): a linear model of what random ablations do.

    For each question, log P of the right answer is regressed on which components are out. Returns the mean
    over questions of each component's coefficient, its sign turned so that more means more needed, and for
    each question how the fit does on ablations held out: columns r2 and correlation.
    """
    rng = np.random.default_rng(settings.seed)
    m, out = settings.ablations + settings.held, max(1, round(settings.ablated * len(parts)))
    gone = np.argsort(rng.random((m, len(parts))), axis=1) < out
    gates = torch.tensor(~gone, dtype=torch.float64)
    coefficients, fits = [], []
    for example in tqdm(examples, desc="ablations", leave=False, delay=3):
        log_p = answers_under(model, example, parts, torch.cat([torch.ones(1, len(parts)).double(), gates]))
        right = int(log_p[0].argmax()) if example.answer is None else example.answer
        slopes, fit = linear_fit(gone, log_p[1:, right].numpy(), settings.held)
        coefficients.append(-slopes)
        fits.append(fit)
    return np.mean(coefficients, axis=0).tolist(), pd.DataFrame(fits)


def linear_fit(gone: np.ndarray, outcome: np.ndarray, held: int) -> tuple[np.ndarray, dict[str, float]]:
    """Least squares of outcome (M,) on what is gone (M, parts); the last `held` rows judge the fit."""
    design = np.column_stack([np.ones(len(gone)), gone])
    train, test = slice(None, len(gone) - held), slice(len(gone) - held, None)
    found = np.linalg.lstsq(design[train], outcome[train], rcond=None)[0]
    told, truth = design[test] @ found, outcome[test]
    missed = ((truth - told) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    return found[1:], {"r2": float(1 - missed), "correlation": float(np.corrcoef(told, truth)[0, 1])}


def damage(model: LanguageModel, examples: Sequence[Example], parts: Sequence[Component]) -> np.ndarray:
    """How much log P of the right answer falls when a component is zeroed, (parts, examples)."""
    ask = Evaluator(model, examples, usual_answers(model.tokenizer, lettered=bool(examples[0].options)))
    intact = ask().log_prob.double()
    falls = []
    for c in tqdm(parts, desc="zeroing", unit="component", leave=False, delay=3):
        shape = model.network.get_parameter(c.weight).shape
        flat = torch.arange(shape.numel()).view(shape)[:, c.columns].flatten()
        with zeroed(model.network, {c.weight: flat}):
            falls.append(intact - ask().log_prob.double())
    return torch.stack(falls).numpy()


def rescaled(model: LanguageModel, seed: int) -> LanguageModel:
    """A copy that answers the same, with every MLP neuron's input weights times k and output weights over k.

    k is a power of two, drawn for each neuron, so that not even rounding differs. Raises ValueError for a
    model without MLPs in which one matrix, up_proj, feeds another, down_proj, in proportion.
    """
    network = copy.deepcopy(model.network)
    generator = torch.Generator().manual_seed(seed)
    ups = [name for name, _ in network.named_parameters() if name.endswith("up_proj.weight")]
    if not ups:
        raise ValueError(f"Model {model.name!r} has no gated MLPs whose neurons can be rescaled.")
    for name in ups:
        up = network.get_parameter(name)
        down = network.get_parameter(name.replace("up_proj", "down_proj"))
        power = torch.randint(-RESCALING, RESCALING + 1, (up.shape[0],), generator=generator)
        k = (2.0**power).to(up)
        up.data *= k[:, None]
        down.data /= k
    return replace(model, network=network)


def gate_moments(class_grads: Tensor, probs: Tensor) -> pd.DataFrame:
    """Scores of gates from their class gradients (K, n, parts) and P (K, n), the mean over n."""
    m = moments(class_grads, probs)
    fi = torch.where(m.metric > 0, m.score.square() / m.metric, 0)
    made = {GATE_FI: fi, GATE_CHANGE: m.score.square(), GATE_LENGTH: m.metric}
    return pd.DataFrame({name: values.mean(0).double().numpy() for name, values in made.items()})
