"""Scores of every weight, from the class gradients that `fihelpers.scores.hooks` streams layer by layer."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fihelpers.answers import Answers, usual_answers
from fihelpers.extras import EXTRAS, missing
from fihelpers.filters import EXACT, Spectral
from fihelpers.influence import moments_of_turned, turned_classes, warn_if_saturated
from fihelpers.measures import MEASURES, ByMeasure, DataFree, Influence, Measure, find_measure
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.scores.hooks import (
    Block,
    Factors,
    class_grad_blocks,
    frozen,
    missed_by_hooks,
    named_parameters,
    not_finite,
)
from fihelpers.scores.kernels.formulas import Formula, formula
from fihelpers.scores.store import Scores, provenance
from fihelpers.tasks import Example

Adder = Callable[[Factors, Tensor, Tensor, Sequence[Formula], Tensor], Tensor]

TILED = frozenset({"cpu", "cuda"})  # types of devices on which linear layers are scored tile by tile
SLOWER = "a tenth to a quarter"  # more time; on the bundled model and on one of 25 million weights


def score_weights(
    model: LanguageModel,
    examples: Sequence[Example],
    measures: Sequence[str | Measure] | None = None,
    spectral: Spectral = EXACT,
    *,
    answers: Answers | None = None,
    only: Collection[str] | None = None,
    batch_size: int = 16,
    save_memory: bool = False,
) -> dict[str, Scores]:
    """Mean over a calibration set of each measure of every weight (method 1, 1b.4 and 3).

    measures: names that `find_measure` knows or Measure objects, by default all of the registry; "FI" takes
        the filter `spectral`.
    answers: the answer classes; by default letters, or the 8 likeliest tokens and the rest for plain text.
    only: names of the parameters to score; all by default.
    save_memory: keep the activations of one transformer block at a time, at the cost of one more forward
        pass. With batch_size=1 little more is held than the weights and the scores.

    Returns {measure name: Scores}, which finds any spelling of a name. Metadata `per_example` is the JSON
    list of the measure's mean over the weights, one for each example. Raises ValueError for an empty
    calibration set, an unknown name, or memory to be saved on a model without a list of transformer blocks,
    and FloatingPointError for NaN or infinite logits or gradients.
    """
    if len(examples) == 0:
        raise ValueError("The calibration set is empty; choose n of at least 1.")
    classes = answers or usual_answers(model.tokenizer, examples)
    batches = model.batches([e.prompt for e in examples], batch_size)
    contexts = [(batch, torch.ones(len(batch.index))) for batch in batches]
    return score_contexts(
        model, contexts, examples, measures, spectral, classes, only, save_memory=save_memory
    )


def score_contexts(
    model: LanguageModel,
    contexts: Sequence[tuple[Batch, Tensor]],
    examples: Sequence[Example],
    measures: Sequence[str | Measure] | None,
    spectral: Spectral,
    classes: Answers,
    only: Collection[str] | None = None,
    *,
    save_memory: bool = False,
) -> dict[str, Scores]:
    """`score_weights` for given batches of contexts, of which an example may have several.

    contexts: each batch, whose index holds the places of its contexts' examples, with the shares (B,) with
    which they count in the scores of their examples; the shares of an example add up to 1.
    """
    chosen = {m.name: m for m in (find_measure(m, spectral) for m in measures or MEASURES)}
    totals = Totals(chosen, named_parameters(model.network, only), len(examples))
    steps = accumulate(model, contexts, totals, classes, save_memory=save_memory)
    short = len(contexts) < 8
    for _ in tqdm(steps, desc="scoring", total=len(contexts), unit="batch", leave=False, disable=short):
        pass
    return totals.scores(provenance(model, examples) | {"classes": str(classes)})


def accumulate(
    model: LanguageModel,
    contexts: Sequence[tuple[Batch, Tensor]],
    totals: Totals,
    classes: Answers,
    start: int = 0,
    *,
    save_memory: bool = False,
) -> Iterator[int]:
    """Add the contexts from number `start` on to the running totals; yields how many are in, batch by batch.

    Totals kept at one of these points and taken up again at it end as if there had been no stop. There are
    none of these points where no measure needs data.
    """
    if not totals.grown:
        return
    parameters = totals.parameters
    with frozen(model.network):
        batches = [batch for batch, _ in contexts]
        missed = missed_by_hooks(model, batches, classes, parameters, save_memory)
        for done, (batch, shares) in enumerate(contexts[start:], start + 1):
            take = functools.partial(totals.take, shares=shares)
            for block in class_grad_blocks(
                model, batch, classes, parameters, missed, totals.directions, save_memory, take
            ):
                totals.add(block, shares[block.samples])
            totals.settle()
            yield done


class Totals:
    """Running sums of every measure for every weight."""

    def __init__(self, chosen: dict[str, Measure], parameters: dict[str, nn.Parameter], n: int) -> None:
        self.n = n
        self.measures = chosen
        self.parameters = parameters
        self.grown = {name: m for name, m in chosen.items() if not isinstance(m, DataFree)}
        self.per_example = {name: torch.zeros(n, dtype=torch.float64) for name in self.grown}
        self.values = {name: p.detach() for name, p in parameters.items()}
        self.weights = sum(p.numel() for p in parameters.values())
        self.tops = torch.zeros(2, dtype=torch.float64)  # sums of the ceilings and of the shares they count
        self.others = any(m.reads_others for m in chosen.values())
        self.taken: list[tuple[str, Tensor, Tensor, Tensor, Tensor]] = []
        self.formulas = [formula(m) for m in self.grown.values()]

    @functools.cached_property
    def sums(self) -> dict[str, Tensor]:
        """The running totals of each parameter (measures, *shape), most of what is held.

        They are made when first needed: before, hooks are compared with autograd, which needs room as well.
        """
        return {
            name: torch.zeros(len(self.grown), *p.shape, dtype=_working(p), device=p.device)
            for name, p in self.parameters.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """All that grows with the samples, to be kept, taken up again or added to those of other processes.

        They are the running totals themselves, not copies.
        """
        sums = {f"sums/{name}": total for name, total in self.sums.items()}
        return {
            **sums,
            **{f"per example/{m}": total for m, total in self.per_example.items()},
            "tops": self.tops,
        }

    def directions(self, log_p: Tensor, others: Tensor, chosen: Tensor, _: Tensor) -> Tensor:
        """What to differentiate: see `turned_classes`, and the sum of log P where a measure reads it."""
        turned = turned_classes(log_p, others, chosen)
        return torch.cat([turned, log_p.sum(-1, keepdim=True)], -1) if self.others else turned

    def take(self, factors: Factors, shares: Tensor) -> bool:
        """Add a linear layer tile by tile, where that can be done; each sample counts with its share (B,).

        What the samples added is booked by `settle`, since a GPU is still at work on it.
        """
        name, known = factors.name, tuple(one for one in self.formulas if one is not None)
        add = _in_tiles(factors, self.sums[name], known) if len(known) == len(self.formulas) else None
        if add is None:
            return False
        found = add(factors, self.values[name], shares, known, self.sums[name])
        self.taken.append((name, factors.index, factors.ceiling, shares, found))
        return True

    def settle(self) -> None:
        """Book what the samples of a batch added to the layers that were taken.

        Raises FloatingPointError for NaN or infinite gradients.
        """
        for name, index, top, shares, found in self.taken:
            if not torch.isfinite(found).all():
                raise not_finite(name)
            self._count(top, shares)
            for total, of_each in zip(self.per_example.values(), found.cpu(), strict=True):
                total.index_add_(0, index, of_each)
        self.taken.clear()

    def add(self, block: Block, shares: Tensor) -> None:
        """Add a block of gradients along the directions, of which each sample counts with its share (B,)."""
        grads, top = block.grads, block.ceiling.to(block.grads)
        shares = shares.to(top)
        m = moments_of_turned(grads[: len(block.others)], top, grads[-1] if self.others else None)
        if not block.rows.start:
            self._count(top, shares)
        value = self.values[block.name][block.rows].to(m.score.dtype)
        for total, (name, measure) in zip(self.sums[block.name], self.grown.items(), strict=True):
            values = measure.of_moments(m, measure.given(value)).flatten(1)
            rows = total[block.rows].view(-1)
            if len(values) == 1:
                rows.add_(values[0], alpha=float(shares))
            else:
                rows.addmv_(values.T, shares)
            of_each = (values.sum(1) * shares).double().cpu()
            self.per_example[name].index_add_(0, block.index, of_each)

    def _count(self, top: Tensor, shares: Tensor) -> None:
        self.tops[0] += float(shares.to(top) @ top)
        self.tops[1] += float(shares.sum())

    def scores(self, metadata: dict[str, str]) -> dict[str, Scores]:
        """Their means over the samples; the totals themselves become the scores."""
        means = {name: total.div_(self.n) for name, total in self.sums.items()}
        places = {name: place for place, name in enumerate(self.grown)}
        made: ByMeasure[Scores] = ByMeasure()
        for name, measure in self.measures.items():
            if isinstance(measure, DataFree):
                values, of_each = self._free_of_data(measure)
            else:
                values = {key: mean[places[name]] for key, mean in means.items()}
                of_each = self.per_example[name]
            filtered = {"spectral": str(measure.spectral)} if isinstance(measure, Influence) else {}
            shares = json.dumps([float(f"{x / self.weights:.6g}") for x in of_each])
            made[name] = Scores(values, {**metadata, "measure": name, **filtered, "per_example": shares})
            if isinstance(measure, Influence):
                ceiling, counted = self.tops.tolist()
                warn_if_saturated(values.values(), torch.tensor(ceiling / (counted or 1)))
        return made

    def _free_of_data(self, measure: DataFree) -> tuple[dict[str, Tensor], Tensor]:
        """Its values of every weight, and zeros, as no example adds to it."""
        found = {
            name: measure.of_value(p.detach(), number).to(_working(p))
            for number, (name, p) in enumerate(self.parameters.items())
        }
        return found, torch.zeros(self.n)


def _in_tiles(factors: Factors, totals: Tensor, formulas: tuple[Formula, ...]) -> Adder | None:
    """What adds the measures of a linear layer to the totals tile by tile, None where nothing can."""
    device = totals.device
    if device.type not in TILED:
        return None
    if device.type == "cpu":
        loops = _loops()
        return loops.add_measures if loops and totals.shape[1] >= loops.ROWS else None
    return _kernel(device, factors.x.dtype, formulas) if totals.dtype == torch.float32 else None


@functools.cache
def _loops() -> ModuleType | None:
    """The compiled loops of a CPU, None (and a warning, once) where Numba is missing."""
    try:
        from fihelpers.scores.kernels import cpu
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        warnings.warn(
            f"{missing(error.name)} Until then weights are scored by single operations of torch, which takes "
            f"{SLOWER} longer.",
            stacklevel=2,
        )
        return None
    return cpu


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype, formulas: tuple[Formula, ...]) -> Adder | None:
    """The kernel of a GPU, None (and a warning) where it does not do what a CPU does: it is tried once."""
    try:
        from fihelpers.scores.kernels import (
            gpu,  # Triton is there where torch is made for GPUs, and only there
        )

        gpu.check(device, dtype, formulas)
    except Exception as error:  # Triton, the compiler that it calls and the driver raise errors of many types
        warnings.warn(
            "Linear layers are scored by single operations of torch, which takes longer: the kernel does not "
            f"work on {device} ({type(error).__name__}: {error}).",
            stacklevel=2,
        )
        return None
    return gpu.add_measures


def _working(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
