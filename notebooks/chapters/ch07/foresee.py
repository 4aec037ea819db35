"""What chapter 07 takes of time and memory on a large model, from a few of its steps (method 4.4)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

from torch import Tensor

from fichapters.ch07 import lab
from fihelpers.evaluate.questions import Evaluator
from fihelpers.jobs.in_turn import fitting
from fihelpers.jobs.preflight import Estimate, place_and_free, scoring_of
from fihelpers.measures import MEASURES, find_measure
from fihelpers.models.generate import greedy
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import select, zeroed
from fihelpers.scores.pruning import METHODS

LARGE = 3e7  # linear weights; with fewer the chapter takes minutes
LOW, OWN, SCORED, KINDS = 2, 6, 3, 6  # measures and ways in the loops of the notebook
TOGETHER = 16  # contexts of texts in a batch
PRUNING = 2 / 3  # of a pass that scores: what the pruning methods take, with one gradient of three

Asks = Mapping[str, Evaluator]


def announce(p: SimpleNamespace, model: LanguageModel, linear: Sequence[str], asks: Asks) -> None:
    """Print what the chapter will take, of a large model. Raises MemoryError where it does not fit."""
    if sum(model.network.get_parameter(name).numel() for name in linear) > LARGE:
        print(foreseen(p, model, linear, asks).check())


def foreseen(p: SimpleNamespace, model: LanguageModel, linear: Sequence[str], asks: Asks) -> Estimate:
    """The memory that the largest step takes beside the open model, and the seconds of all together."""
    drawn = next(iter(lab.questions(p, "val", p.N_CALIBRATION, p.SEED, model).values()))
    together, working = fitting(model, drawn, [*map(find_measure, MEASURES)], linear)
    seconds = _scoring(p, model, linear, together) + _perturbing(p, model, linear, asks) + _writing(p, model)
    place, free = place_and_free(str(model.device))
    parts = {place: {"scores, and choosing by them": working}}
    what, size = "the rest of the chapter", model.network.num_parameters()
    return Estimate(what, size, parts, {place: free}, seconds=seconds)


def perturbed(p: SimpleNamespace) -> dict[str, int]:
    """How often each loop perturbs in a calibration set: zeroing each subject, pruning, text."""
    cuts = len(p.PRUNING["top"]) + 1 + len(p.PRUNING["bottom"]) + 2
    return {
        "zeroing": (len(MEASURES) + LOW) * len(p.RATES),
        "pruning": (OWN + len(METHODS)) * cuts,
        "text": KINDS * len(p.TEXT["rates"]),
    }


def _scoring(p: SimpleNamespace, model: LanguageModel, linear: Sequence[str], together: int) -> float:
    """Seconds of all passes that score questions, and the steps of sampled texts."""
    names = [*MEASURES][:together]
    drawn = lab.questions(p, "val", p.N_CALIBRATION, p.SEED, model).values()
    once = sum(scoring_of(model, examples, names, linear).seconds() or 0 for examples in drawn)
    passes = -(-len(MEASURES) // together)
    pruned = max(1, p.N_CALIBRATION // len(p.SUBJECTS)) / p.N_CALIBRATION  # the share of questions it draws
    texts = lab.instructions(model, p.TEXT, "val", p.TEXT["n_calibration"], p.SEED)
    first = scoring_of(model, texts, names[:SCORED], linear)
    contexts = 1 + (p.TEXT["horizon"] - 1) * p.TEXT["samples"]  # of a prompt, at most: the first is shared
    text = replace(first, lengths=[*first.lengths] * contexts, batch_size=TOGETHER).seconds() or 0
    shown = once * (1 + 1 / len(p.SUBJECTS))  # the first experiment, and where the score is
    return p.SEEDS * (once * (passes + pruned * (1 + PRUNING)) + text) + shown


def _perturbing(p: SimpleNamespace, model: LanguageModel, linear: Sequence[str], asks: Asks) -> float:
    """Seconds of all choosing, zeroing and asking, but for texts."""
    sizes = {name: model.network.get_parameter(name).detach().abs() for name in linear}
    few, many = p.HEADLINE_RATE, max(p.PRUNING["bottom"])
    one = next(iter(asks.values()))
    ask = _seconds(one) / len(one.examples)
    change = {rate: _seconds(_changed, model, sizes, rate) for rate in {few, many}}
    n = perturbed(p)
    zeroing = n["zeroing"] * len(p.SUBJECTS) * (change[few] + ask * p.N_TEST)
    pruning = n["pruning"] * (sum(change.values()) / len(change) + ask * p.PRUNING["test"] * len(p.SUBJECTS))
    return p.SEEDS * (zeroing + pruning + n["text"] * change[few])


def _writing(p: SimpleNamespace, model: LanguageModel) -> float:
    """Seconds of all texts that are written."""
    texts = lab.instructions(model, p.TEXT, "test", p.TEXT["n_test"], p.SEED)
    prompts = [example.prompt for example in texts]
    short, longer = (_seconds(greedy, model, prompts, n) for n in (1, 4))
    written = short + max(0, longer - short) / 3 * (p.TEXT["length"] - 1)
    return (2 + p.SEEDS * perturbed(p)["text"]) * (written + short)  # which the judge reads


def _changed(model: LanguageModel, scores: Mapping[str, Tensor], rate: float) -> None:
    with zeroed(model, select(scores, rate)):
        pass


def _seconds(work: Callable[..., object], *given: object) -> float:
    start = time.perf_counter()
    work(*given)
    return time.perf_counter() - start
