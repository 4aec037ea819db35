"""What chapter 13 does not write out: where MLPs end, other weights for a while, readings of its trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fichapters.ch07.lab import questions
from fihelpers.evaluate.stats import wilson
from fihelpers.models.files import ModelWeights
from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, linear_names, turned_names
from fihelpers.scores import watched
from fihelpers.scores.store import Scores
from fihelpers.scores.watched import Layers, linear_layers
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Trials

FOUND = "activation spikes"
NOTHING = "nothing"


# --- before anything runs


def check(p: SimpleNamespace) -> None:
    """Draw once whatever the chapter will draw, so that a bad parameter is refused before a model is opened.

    Raises what `load_task` raises, and ValueError for another number of domains than two.
    """
    questions(p, "val", p.N_CALIBRATION, p.SEED)
    questions(p, "test", p.N_TEST, p.SEED)
    if len(p.EXPERT_SUBJECTS) != 2:
        raise ValueError(
            f"EXPERT_SUBJECTS names a subject for each of the two experts, not {len(p.EXPERT_SUBJECTS)}."
        )
    for domain in p.EXPERT_SUBJECTS:
        load_task(p.EXPERTS, domain)


def together(p: SimpleNamespace, split: str, n: int, seed: int, model: LanguageModel) -> list[Example]:
    """Examples of all SUBJECTS, n altogether."""
    each = max(1, n // len(p.SUBJECTS))
    return [*chain(*questions(p, split, each, seed, model).values())]


# --- inside the model


def ends_of_mlps(network: PreTrainedModel) -> Layers:
    """The layers that lead out of the blocks' MLPs, by the names of their weights, in the blocks' order.

    They are known by their shape, since each architecture has its own names: of all linear layers that write
    as many numbers as the model is wide, those that read most. Raises ValueError where none reads more than
    it writes, as where experts are fused.
    """
    wide, linear = network.config.hidden_size, linear_layers(network, linear_names(network))
    reading = {name: one.inputs for name, one in linear.items() if len(one.rows) == wide}
    most = max(reading.values(), default=0)
    if most <= wide:
        raise ValueError(
            f"no linear layer of this model reads more than the {wide} numbers that it writes, so the ends "
            "of its MLPs cannot be told; take a model whose experts are not fused."
        )
    return {name: linear[name] for name, width in reading.items() if width == most}


def watching(
    model: LanguageModel, seen: Callable[[str, Tensor, Tensor], None]
) -> AbstractContextManager[None]:
    """Call `seen` for the end of each MLP, as the model reads a prompt.

    It gets the name of the weight, the layer's inputs (tokens, in) and its outputs (tokens, out).
    """

    def see(name: str, _: int, inputs: Tensor, outputs: Tensor) -> None:
        seen(name, inputs.flatten(0, -2), outputs.flatten(0, -2))

    return watched.watching(model.network, ends_of_mlps(model.network), see)


def place(model: LanguageModel, name: str, row: int, column: int) -> int:
    """The flat position of one entry of W (out, in) in the weight, however the model keeps it."""
    weight = model.network.get_parameter(name)
    numbers = torch.arange(weight.numel()).view(weight.shape)
    return int(as_rows(numbers, name in turned_names(model.network))[row, column])


@contextmanager
def holding(model: LanguageModel, values: Mapping[str, Tensor]) -> Iterator[LanguageModel]:
    """The model with other values in some of its weights; on leaving they are as before, bit for bit."""
    own = {name: model.network.get_parameter(name).data for name in values}
    kept = {name: weight.clone() for name, weight in own.items()}
    try:
        for name, weight in own.items():
            weight.copy_(values[name])
        yield model
    finally:
        for name, weight in own.items():
            weight.copy_(kept[name])


def average(
    base: ModelWeights, experts: Sequence[ModelWeights], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The mean of two experts by tensors' names, with the base's values at the flat positions `kept`."""
    merged = {}
    for name in base.layouts:
        first, second = (expert.read(name) for expert in experts)
        merged[name] = (first + second) / 2
        if name in kept:
            merged[name].view(-1)[kept[name]] = base.read(name).flatten()[kept[name]]
    return merged


# --- readings of the trials


def ranks(scores: Scores, chosen: pd.DataFrame) -> np.ndarray:
    """The rank (N,) of each of the chosen weights, rows with name and place, among all: 1 is the highest.

    Weights with equal scores share the mean of their ranks.
    """
    found = []
    for row in chosen.itertuples():
        own = scores[str(row.name)].flatten()[int(row.place)]
        above = sum(int((values > own).sum()) for values in scores.values.values())
        tied = sum(int((values == own).sum()) for values in scores.values.values())
        found.append(above + (tied + 1) / 2)
    return np.array(found)


def rank_table(trials: Trials) -> pd.DataFrame:
    """The median rank of each spike's weight by each measure, with the extremes over sets and subjects.

    Columns: weight (1 is the largest spike's), measure, rank, low, high, n (how many rankings).
    """
    rows = Trials((), [trial for trial in trials.tried if "rank" in trial.values]).rows()
    rows["weight"] = rows.groupby(["set", "subject", "measure"]).cumcount() + 1
    found = rows.groupby(["measure", "weight"], sort=False)["rank"].agg(["median", "min", "max", "size"])
    found = found.set_axis(["rank", "low", "high", "n"], axis=1).reset_index()
    return found[["weight", "measure", "rank", "low", "high", "n"]]


def fewest(table: pd.DataFrame, chance: float) -> pd.DataFrame:
    """For each measure the fewest zeroed weights, of the counts tried, that leave no more than guessing.

    That is where Wilson's interval of the accuracy, over the questions, reaches down to chance; where none
    does, count is NaN and the accuracy that after the largest. table: of measures and counts.
    Columns: measure, count, accuracy, low, high, n.
    """
    lines = []
    for measure, part in table.sort_values("count").groupby("measure", sort=False):
        for row in part.itertuples():
            low, high = wilson(round(row.accuracy * row.n), row.n)
            if low <= chance:
                break
        lines.append((measure, row.count if low <= chance else np.nan, row.accuracy, low, high, row.n))
    found = pd.DataFrame(lines, columns=["measure", "count", "accuracy", "low", "high", "n"])
    return found.sort_values("count", ignore_index=True)


def gains(trials: Trials, seed: int) -> pd.DataFrame:
    """Accuracy with some weights kept minus that with none, question by question, for each number of bits.

    Columns: by, kept (how many), bits, difference, low, high, n, verdict.
    """
    ways = [(trial.labels["by"], trial.labels["kept"]) for trial in trials.tried]
    named = [replace(t, labels={**t.labels, "way": way}) for t, way in zip(trials.tried, ways, strict=True)]
    pairs = [(way, (NOTHING, 0)) for way in dict.fromkeys(ways) if way[0] != NOTHING]
    found = Trials(trials.intact, named).compare(pairs, "bits", label="way", seed=seed)
    found[["by", "kept"]] = found["first"].tolist()
    columns = ["by", "kept", "bits", "difference", "low", "high", "n", "verdict"]
    return found.sort_values("bits", kind="stable", ignore_index=True)[columns]


def moved(
    base: ModelWeights, experts: Sequence[ModelWeights], linear: Sequence[str], chosen: pd.DataFrame
) -> pd.DataFrame:
    """How far training moved the spikes' weights and a typical one, in parts of their own sizes.

    Columns: expert, spikes (the largest of theirs), typical (the median of all linear weights), n.
    """
    lines = []
    for expert in experts:
        shares = {
            n: ((expert.read(n) - base.read(n)).abs() / base.read(n).abs().clamp(min=1e-12)) for n in linear
        }
        own = [float(shares[str(row.name)].flatten()[row.place]) for row in chosen.itertuples()]
        typical = float(np.median(torch.cat([share.flatten() for share in shares.values()]).numpy()))
        lines.append((expert.label, max(own), typical, len(own)))
    return pd.DataFrame(lines, columns=["expert", "spikes", "typical", "n"])
