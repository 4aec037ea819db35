"""Chapter 05: does the instruction before a question move the influence of pixels? (method 4.2)"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import DegenerateDataWarning, pearsonr, rankdata
from torch import Tensor, nn

from fichapters import tables
from fichapters.attributions import feature_maps
from fichapters.ch05.wordings import load_wordings
from fichapters.noises import information_loss
from fihelpers.answers import Top
from fihelpers.evaluate.questions import answer_images
from fihelpers.evaluate.stats import paired_difference, wilson
from fihelpers.filters import Damped
from fihelpers.influence import SaturationWarning, ceiling
from fihelpers.measures import FISHER, INFORMATION_LENGTH, Influence
from fihelpers.models.vision import VisionModel
from fihelpers.perturb.pixels import masked, top_patches, top_pixels
from fihelpers.scores.pixels import PixelBatch, image_of, pixel_batches
from fihelpers.tasks import Example, image_prompt, load_task, with_instruction
from fihelpers.trials import Kept, Labels, Trials, Values, collect

NONE = "no instruction"
NEUTRAL, AGGRESSIVE, SAFE, CONTROL = "neutral", "aggressive", "safe", "control"
TRAINED, UNSEEN, FIRST = "trained", "unseen", "first"
COMPARED = (NEUTRAL, AGGRESSIVE, SAFE)
FIRSTS = tuple(f"{kind} 1" for kind in COMPARED)
UNRELATED = "Please remember to water all the plants"  # as many words as the first aggressive wording
TOP_CLASSES = 8
PATCH = 14  # pixels; a quarter of what one image token of the bundled model sees
FEWEST = 2  # pixels, or patches, that are masked, see claim 14
FAR = 10  # a pixel this many times above its picture's mean is called an outlier
STATS = {"median": 0.5, "q90": 0.9, "q99": 0.99}
LOWEST, HIGHEST, BINS = -12, 2, 140  # of log10 FI, for the distributions
RESAMPLES = 20_000  # tails of corrected intervals need many
INTACT, PATCHES, SALT = "intact", "masked patches", "salt & pepper"
LABELS = {  # of the statistics of claim 13, in the order of the figure
    "ceiling": "odds (ceiling)",
    "damped mean": "damped FI, mean",
    "damped max": "damped FI, max",
    "damped share mean": "damped FI / ceiling, mean",
    "damped share max": "damped FI / ceiling, max",
    "slope mean": "slope, mean",
    "slope max": "slope, max",
    "top mean": "FI, top 8 + rest, mean",
    "top max": "FI, top 8 + rest, max",
    "top share mean": "the same / ceiling, mean",
    "top share max": "the same / ceiling, max",
}
TOP_MAIN = tuple(name for name in LABELS if name.startswith("top"))
MAIN = tuple(name for name in LABELS if name not in TOP_MAIN)
BATCH = 50  # pictures
SMALLEST = 1e-30  # below every value met; keeps the logarithm of a pixel without gradient finite


@dataclass(frozen=True)
class Prompt:
    """An instruction and where it stands: before the hint and the question, or after the question."""

    name: str
    kind: str
    group: str
    text: str
    after: bool = False

    @property
    def labels(self) -> dict[str, str]:
        """What its trials are called by."""
        return {"prompt": self.name, "kind": self.kind, "group": self.group}

    def ask(self, example: Example) -> Example:
        """The example under this instruction."""
        if not self.after:
            return with_instruction(example, self.text)
        prompt = image_prompt(f"{example.question}\n{self.text}", example.options, example.hint)
        return replace(example, prompt=prompt, instruction=self.text)


class Pictures(NamedTuple):
    """Examples, and one line for each row of the task that was left out."""

    examples: list[Example]
    skipped: list[str]


class Scan(NamedTuple):
    """Statistics of the pixel maps, a row for each picture and prompt, and counts of pixels by log10 FI."""

    pictures: pd.DataFrame
    bins: pd.DataFrame


def load_pictures(task: str, subjects: Sequence[str], n_each: int, seed: int) -> Pictures:
    """Draw `n_each` pictures of each subject's test split, subjects taking turns."""
    tasks = [load_task(task, subject, "test", n_each, seed) for subject in subjects]
    examples = [example for turn in zip(*tasks, strict=True) for example in turn]
    # a row too damaged to tell its subject is named by every task
    return Pictures(examples, list(dict.fromkeys(line for t in tasks for line in t.skipped)))


def prompts() -> list[Prompt]:
    """No instruction, the wordings of each kind, and controls.

    The first aggressive and the first safe wording are those of the paper's earlier version, verbatim.
    """
    found = [Prompt(NONE, CONTROL, CONTROL, "")]
    for kind, known in load_wordings().items():
        trained = dict.fromkeys((known.v1, *known.trained)) if known.v1 else known.trained
        found += [Prompt(f"{kind} {i}", kind, TRAINED, text) for i, text in enumerate(trained, 1)]
        found += [Prompt(f"{kind} new {i}", kind, UNSEEN, text) for i, text in enumerate(known.unseen, 1)]
    return found + _controls(found)


def _controls(known: Sequence[Prompt]) -> list[Prompt]:
    """An unrelated sentence; the first aggressive and safe wordings backwards, and after the question."""
    first = {kind: next(p.text for p in known if p.kind == kind) for kind in (AGGRESSIVE, SAFE)}
    backwards = {kind: " ".join(reversed(text.split())) for kind, text in first.items()}
    return [
        Prompt("unrelated", CONTROL, CONTROL, UNRELATED),
        *(Prompt(f"{kind} backwards", CONTROL, CONTROL, text) for kind, text in backwards.items()),
        *(Prompt(f"{kind} after", CONTROL, CONTROL, text, after=True) for kind, text in first.items()),
    ]


def firsts(known: Iterable[Prompt]) -> list[Prompt]:
    """The first wording of each kind: v1's aggressive and safe one, and a neutral one."""
    return [p for p in known if p.name in FIRSTS]


def prompt_table(model: VisionModel, known: Sequence[Prompt]) -> pd.DataFrame:
    """The prompts with their kind, group, number of tokens and text."""
    lines = [
        (p.name, p.kind, p.group, len(model.tokenizer(p.text)["input_ids"]) if p.text else 0, p.text)
        for p in known
    ]
    return pd.DataFrame(lines, columns=["prompt", "kind", "group", "tokens", "text"])


# Answers


def asked(
    model: VisionModel,
    examples: Sequence[Example],
    known: Sequence[Prompt],
    kept: Kept | None = None,
    conditions: Mapping[str, float] | None = None,
    seed: int = 0,
    batch: int = BATCH,
) -> Trials:
    """Answer every question under every prompt, with the pictures intact or corrupted.

    conditions: {name from :func:`conditions_of`: amount}, None for the intact pictures alone; each corrupts
    every picture in the same way under all prompts. Labels: prompt, kind, group, condition. Values: picture,
    correct (0 or 1), log_prob (of the right answer), log_chosen (log P(y_hat)).
    """
    changes = {INTACT: 0.0} if conditions is None else conditions

    def tries(prompt: Prompt) -> Iterator[tuple[Labels, Values]]:
        questions = [prompt.ask(e) for e in examples]
        intact = [image_of(e) for e in examples]
        for name, amount in changes.items():
            shown = [corrupted(x, name, amount, seed + i) for i, x in enumerate(intact)]
            outcome = answer_images(model, questions, images=shown, batch_size=batch)
            chosen = outcome.log_probs.gather(1, outcome.predicted[:, None])[:, 0]
            yield (
                {**prompt.labels, "condition": name},
                {
                    "picture": np.array([e.id for e in examples]),
                    "correct": outcome.correct.int().numpy(),
                    "log_prob": outcome.log_prob.double().numpy(),
                    "log_chosen": chosen.double().numpy(),
                },
            )

    return collect(None, tries, sets=known, kept=kept)


def corrupted(image: Tensor, condition: str, amount: float, seed: int) -> Tensor:
    """A picture (3, H, W) with `amount` black patches, or a share of its pixels black or white, or as it is.

    Both are of the sort that the bundled model met after safe instructions, at seeded random places.
    """
    if condition == INTACT:
        return image
    generator = torch.Generator().manual_seed(seed)
    height, width = image.shape[-2:]
    if condition.startswith(PATCHES):
        draw = torch.rand(-(-height // PATCH), -(-width // PATCH), generator=generator)
        return masked(image, top_patches(draw, int(amount), patch=PATCH, size=(height, width)))
    mask = top_pixels(torch.rand(height, width, generator=generator), share=amount)
    white = mask & (torch.rand(height, width, generator=generator) < 0.5)
    return masked(image, mask).masked_fill(white, 255.0)


def conditions_of(patches: Sequence[int], shares: Sequence[float]) -> dict[str, float]:
    """Names and amounts of the conditions: intact, numbers of masked patches, shares of pixels."""
    named = {INTACT: 0.0} | {f"{PATCHES} {k}": float(k) for k in patches}
    return named | {f"{SALT} {share:.0%}": share for share in shares}


def loss_table(examples: Sequence[Example], conditions: Mapping[str, float], seed: int) -> pd.DataFrame:
    """Mean information loss of each condition (see :func:`fichapters.noises.information_loss`)."""
    images = [image_of(e) for e in examples]
    lines = []
    for name, amount in conditions.items():
        losses = [information_loss(x, corrupted(x, name, amount, seed + i)) for i, x in enumerate(images)]
        lines.append((name, float(np.mean(losses)), len(losses)))
    return pd.DataFrame(lines, columns=["condition", "information_loss", "n"])


def accuracies(trials: Trials, seed: int) -> pd.DataFrame:
    """Accuracy with Wilson's interval, and log P(right) and log P(y_hat) against no instruction, paired.

    A row for each prompt; differences in nats with bootstrap intervals over pictures (columns *_low, *_high).
    """
    table = trials.table("prompt", "kind", "group").drop(columns=["log_prob", "sets"])
    chosen = [trials.where(prompt=name).answers("log_chosen") for name in table.prompt]
    table["median_p"] = [float(np.exp(np.median(values))) for values in chosen]
    pairs = [(name, NONE) for name in table.prompt]
    for column in ("log_prob", "log_chosen"):
        found = trials.compare(pairs, label="prompt", value=column, seed=seed)
        table[[column, f"{column}_low", f"{column}_high"]] = found[["difference", "low", "high"]]
    return table


def by_kind(rows: pd.DataFrame, column: str, group: str = TRAINED) -> pd.DataFrame:
    """Mean over the wordings of each kind, a row for each (condition, picture), a column for each kind."""
    part = rows[(rows.group == group) | (rows.prompt == NONE)]
    kinds = part.kind.where(part.prompt != NONE, NONE)
    wide = part.assign(kind=kinds).pivot_table(index=["condition", "picture"], columns="kind", values=column)
    return wide[[k for k in (NONE, NEUTRAL, AGGRESSIVE, SAFE) if k in wide]]


def by_condition(rows: pd.DataFrame, column: str, seed: int) -> pd.DataFrame:
    """Mean over the pictures of each kind in every condition, with bootstrap intervals over pictures.

    Columns: condition, kind, n, value, low, high.
    """
    wide = by_kind(rows, column)
    lines = []
    for condition in rows.condition.unique():  # in the order in which they were asked
        for kind, values in wide.loc[condition].items():
            lines.append((condition, kind, len(values), *tables.average(values, seed)))
    return pd.DataFrame(lines, columns=["condition", "kind", "n", "value", "low", "high"])


def protection(rows: pd.DataFrame, column: str, seed: int) -> pd.DataFrame:
    """What an aggressive and a safe instruction do against the neutral one, in every condition.

    Columns: condition, kind, difference, low, high (kind minus neutral, paired over pictures), extra,
    extra_low, extra_high (the same less what it is on the intact pictures: the protection), n.
    """
    wide = by_kind(rows, column)
    start = wide.loc[INTACT]
    lines = []
    for condition in dict.fromkeys(wide.index.get_level_values(0)):
        part = wide.loc[condition].loc[start.index]
        for kind in (AGGRESSIVE, SAFE):
            here = (part[kind] - part[NEUTRAL]).to_numpy()
            before = (start[kind] - start[NEUTRAL]).to_numpy()
            plain = paired_difference(here, 0 * here, seed=seed)
            lines.append((condition, kind, *plain, *paired_difference(here, before, seed=seed), len(part)))
    names = ["condition", "kind", "difference", "low", "high", "extra", "extra_low", "extra_high", "n"]
    return pd.DataFrame(lines, columns=names)


def extra_protection(rows: pd.DataFrame, column: str, kind: str, seed: int) -> tuple[float, float, float]:
    """Kind minus neutral, mean over the corrupted conditions, less the same on the intact pictures.

    (value, low, high) with a bootstrap interval over pictures.
    """
    wide = by_kind(rows, column)
    difference = wide[kind] - wide[NEUTRAL]
    intact = difference.loc[INTACT]
    corrupt = difference.drop(INTACT, level="condition").groupby(level="picture").mean()
    return paired_difference(corrupt.loc[intact.index], intact, seed=seed)


# Maps


def scan_letters(
    model: VisionModel,
    examples: Sequence[Example],
    known: Sequence[Prompt],
    damping: float,
    kept: Kept | None = None,
    batch: int = BATCH,
) -> Scan:
    """Pixel maps under the options' letters: "damped" FI, information "length", and "slope".

    Under the first wordings "exact" FI as well, which is saturated (method 1b.2).

    The slope is the mean squared gradient of the difference of two logits, 2 tr G / (1 - sum P^2), which does
    not know how sure the model is but for the weights of the pairs.
    """
    return _scan(model, examples, known, f"letters {damping:g}", kept, batch)


def scan_top(
    model: VisionModel,
    examples: Sequence[Example],
    known: Sequence[Prompt],
    kept: Kept | None = None,
    batch: int = BATCH,
) -> Scan:
    """Pixel maps of exact FI under the 8 likeliest tokens and the rest ("top")."""
    return _scan(model, examples, known, "top", kept, batch)


def _scan(
    model: VisionModel,
    examples: Sequence[Example],
    known: Sequence[Prompt],
    way: str,
    kept: Kept | None,
    batch_size: int,
) -> Scan:
    edges = np.linspace(LOWEST, HIGHEST, BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2

    def tries(prompt: Prompt) -> Iterator[tuple[Labels, Values]]:
        asked = [prompt.ask(e) for e in examples]
        rows: dict[str, list[np.ndarray]] = {}
        counts: dict[str, np.ndarray] = {}
        exact = prompt.name in FIRSTS
        for batch in pixel_batches(model, asked, Top(TOP_CLASSES) if way == "top" else None, batch_size):
            maps = {name: v.flatten(1).double().cpu() for name, v in _maps(batch, way, exact).items()}
            for name, values in (_answered(batch) | _described(maps)).items():
                rows.setdefault(name, []).append(values)
            for measure, flat in maps.items():
                logs = flat.clamp(10.0**LOWEST, 10.0**HIGHEST).log10().numpy()
                # bins given by their number are counted without sorting
                counts[measure] = counts.get(measure, 0) + np.histogram(logs, BINS, (LOWEST, HIGHEST))[0]
        yield prompt.labels, {name: np.concatenate(values) for name, values in rows.items()}
        for measure, count in counts.items():
            yield {**prompt.labels, "measure": measure}, {"log10": middles, "count": count}

    trials = collect(None, tries, sets=known, kept=kept)
    bins = [trial for trial in trials.tried if "measure" in trial.labels]
    pictures = [trial for trial in trials.tried if "measure" not in trial.labels]
    return Scan(*(Trials([], part).rows().drop(columns="set") for part in (pictures, bins)))


def _answered(batch: PixelBatch) -> dict[str, np.ndarray]:
    """The pictures of a batch, P(y_hat), and the ceiling of FI."""
    probs, predicted = batch.grads.probs, batch.grads.predicted
    return {
        "picture": np.array([e.id for e in batch.examples]),
        "p_hat": probs.gather(0, predicted[None])[0].double().cpu().numpy(),
        "ceiling": ceiling(probs, predicted).double().cpu().numpy(),
    }


def _described(maps: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Statistics (N,) of N maps of every measure, each map with its pixels in a row."""
    return {
        f"{measure} {stat}": values.numpy()
        for measure, flat in maps.items()
        for stat, values in _statistics(flat).items()
    }


def _maps(batch: PixelBatch, way: str, exact: bool) -> dict[str, Tensor]:
    """Maps (N, H, W) of this batch, {short name: values}; way: "top", or "letters" and the damping."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)  # the chapter shows the saturation itself
        name = "top" if way == "top" else "exact"
        maps = {name: batch.scores(["FI exact"])["FI exact"]} if exact else {}
        if way == "top":
            return maps
        damped = Influence(Damped(float(way.split()[1])))
        found = batch.scores([damped, INFORMATION_LENGTH, FISHER])
    classes = len(batch.grads.probs)
    first, second = torch.triu_indices(classes, classes, offset=1)
    pairs = (batch.grads.probs[first] * batch.grads.probs[second]).sum(0)
    slope = found[FISHER.name] / pairs[:, None, None]
    return maps | {"damped": found[damped.name], "length": found[INFORMATION_LENGTH.name], "slope": slope}


def _statistics(flat: Tensor) -> dict[str, Tensor]:
    """Statistics (N,) of N maps, each with its pixels in a row."""
    levels = flat.quantile(torch.tensor(list(STATS.values()), dtype=flat.dtype), dim=1)
    mean, largest = flat.mean(1), flat.amax(1)
    few = max(1, round(flat.shape[1] / 100))
    held = flat.topk(few, 1).values.sum(1) / flat.sum(1).clamp(min=SMALLEST)
    outliers = (flat > FAR * mean[:, None]).double().mean(1)
    quantiles = dict(zip(STATS, levels, strict=True))
    return {
        "mean": mean,
        **quantiles,
        "max": largest,
        "least": flat.amin(1),
        "held": held,
        "outliers": outliers,
    }


def with_shares(pictures: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Add the statistics of FI / ceiling, as "{measure} share ...": what is left without the odds."""
    stats = ("mean", *STATS, "max")
    more = {f"{measure} share {s}": pictures[f"{measure} {s}"] / pictures.ceiling for s in stats}
    return pictures.assign(**more)


def log_change(pictures: pd.DataFrame, column: str, kind: str, group: str = TRAINED) -> pd.Series:
    """Mean log of a column under a kind's wordings less that under the neutral ones, for each picture.

    group: "trained", "unseen", or "first", the first wording of each kind alone.
    """
    part = pictures[pictures.prompt.isin(FIRSTS) if group == FIRST else pictures.group == group]
    logs = np.log(part[column].clip(lower=SMALLEST))
    wide = part.assign(log=logs).pivot_table(index="picture", columns="kind", values="log")
    return wide[kind] - wide[NEUTRAL]


def main_contrasts(letters: pd.DataFrame, top: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Claim 13: mean and maximum, for every measure and group of wordings; one family of comparisons.

    letters, top: pictures of :func:`scan_letters` and :func:`scan_top`. Columns as in :func:`contrasts`.
    """
    wanted = [
        (letters, MAIN, TRAINED),
        (letters, MAIN, UNSEEN),
        (letters, MAIN, FIRST),
        (top, TOP_MAIN, FIRST),
    ]
    family = 2 * sum(len(columns) for _, columns, _ in wanted)
    parts = [contrasts(pictures, columns, seed, family, group) for pictures, columns, group in wanted]
    return pd.concat(parts, ignore_index=True)


def contrasts(
    pictures: pd.DataFrame, columns: Sequence[str], seed: int, family: int, group: str = TRAINED
) -> pd.DataFrame:
    """How many times larger each statistic is under aggressive and safe instructions than under neutral ones.

    The factor is the geometric mean over pictures of the ratio, its interval a bootstrap over pictures at the
    level 1 - 0.05 / family (Bonferroni). `rises` is the share of pictures where the statistic grows.
    """
    lines = []
    for kind in (AGGRESSIVE, SAFE):
        for column in columns:
            change = log_change(pictures, column, kind, group).to_numpy()
            values = _factor(change, seed, 1 - 0.05 / family)
            lines.append((kind, group, column, *values, float((change > 0).mean()), len(change), family))
    names = ["kind", "group", "statistic", "factor", "low", "high", "rises", "n", "family"]
    return pd.DataFrame(lines, columns=names)


def sides(table: pd.DataFrame) -> tuple[int, int]:
    """How many intervals lie wholly on the side that claim 13 says, and how many on the other side."""
    up, down = table.low > 1, table.high < 1
    aggressive, safe = table.kind == AGGRESSIVE, table.kind == SAFE
    claimed = int(((aggressive & up) | (safe & down)).sum())
    return claimed, int(((aggressive & down) | (safe & up)).sum())


def with_interval(table: pd.DataFrame) -> pd.Series:
    """Factor and its interval as text, for a table to read."""
    return table.apply(lambda r: f"{r.factor:.3f} [{r.low:.3f}, {r.high:.3f}]", axis=1)


def against_none(pictures: pd.DataFrame, columns: Sequence[str], seed: int) -> pd.DataFrame:
    """Factor of each statistic under every prompt against no instruction, corrected for their number.

    Columns: prompt, kind, group, statistic, factor, low, high, n.
    """
    named = pictures[["prompt", "kind", "group"]].drop_duplicates()
    named = named[named.prompt != NONE]
    level = 1 - 0.05 / (len(named) * len(columns))
    lines = []
    for column in columns:
        wide = np.log(pictures.pivot(index="picture", columns="prompt", values=column).clip(lower=SMALLEST))
        for p in named.itertuples():
            change = (wide[p.prompt] - wide[NONE]).to_numpy()
            lines.append((p.prompt, p.kind, p.group, column, *_factor(change, seed, level), len(change)))
    names = ["prompt", "kind", "group", "statistic", "factor", "low", "high", "n"]
    return pd.DataFrame(lines, columns=names)


def _factor(change: np.ndarray, seed: int, level: float) -> np.ndarray:
    """The factor that a mean change of logs is, low, high: a bootstrap over pictures at that level."""
    return np.exp(paired_difference(change, 0 * change, seed=seed, resamples=RESAMPLES, level=level))


# Masking the top pixels


class Mask(NamedTuple):
    """One way to choose what is masked: its name, what it chooses (pixels or patches), and how many."""

    way: str
    unit: str
    number: int


def masks_of(counts: Sequence[int]) -> list[Mask]:
    """The top pixels by damped and exact FI and random ones, each count of them, and two patches.

    Two pixels are always among them: claim 14 is about these.
    """
    ways = ("FI damped", "FI exact", "random")
    pixels = [Mask(way, "pixels", count) for count in dict.fromkeys((FEWEST, *counts)) for way in ways]
    return pixels + [Mask(way, "patches", FEWEST) for way in ("FI damped", "random")]


def mask_top(
    model: VisionModel,
    examples: Sequence[Example],
    prompt: Prompt,
    damping: float,
    counts: Sequence[int],
    seed: int,
    kept: Kept | None = None,
    batch: int = BATCH,
) -> Trials:
    """Mask the pixels of highest FI under one prompt (black), and answer again.

    Labels: way, unit, number. Values: picture, before, after (the answer chosen), p_before, p_after
    (probability of the answer chosen before), flipped (0 or 1), right (whether the first answer was right).
    """

    def tries(asked: Sequence[Example]) -> Iterator[tuple[Labels, Values]]:
        images = [image_of(e) for e in asked]
        before = answer_images(model, asked, batch_size=batch)
        scores = _rankings(model, asked, damping, seed, batch)
        for mask in masks_of(counts):
            chosen = scores[mask.way, mask.unit]
            shown = [hidden(x, s, mask, seed) for x, s in zip(images, chosen, strict=True)]
            after = answer_images(model, asked, images=shown, reference=before, batch_size=batch)
            said = before.predicted[:, None]
            yield (
                mask._asdict(),
                {
                    "picture": np.array([e.id for e in asked]),
                    "before": before.predicted.numpy(),
                    "after": after.predicted.numpy(),
                    "p_before": before.log_probs.gather(1, said)[:, 0].double().exp().numpy(),
                    "p_after": after.log_probs.gather(1, said)[:, 0].double().exp().numpy(),
                    "flipped": (before.predicted != after.predicted).int().numpy(),
                    "right": before.correct.int().numpy(),
                },
            )

    return collect(None, tries, sets=[[prompt.ask(e) for e in examples]], kept=kept)


def hidden(image: Tensor, scores: Tensor, mask: Mask, seed: int = 0) -> Tensor:
    """The picture with the highest pixels or patches of a map of scores in black."""
    if mask.unit == "pixels":
        return masked(image, top_pixels(scores, mask.number, seed=seed))
    size = (image.shape[-2], image.shape[-1])
    return masked(image, top_patches(scores, mask.number, patch=PATCH, size=size, seed=seed))


def _rankings(
    model: VisionModel, asked: Sequence[Example], damping: float, seed: int, batch_size: int
) -> dict[tuple[str, str], list[Tensor]]:
    """Maps that rank pixels (H, W) and patches (rows, columns), a list over the pictures for each way."""
    damped = Influence(Damped(damping))
    found: dict[tuple[str, str], dict[int, Tensor]] = {}
    for batch in pixel_batches(model, asked, batch_size=batch_size):
        pixels = _maps(batch, f"letters {damping:g}", exact=True)
        maps = {(f"FI {way}", "pixels"): pixels[way].cpu() for way in ("damped", "exact")}
        patches = batch.scores([damped], "patch", patch=PATCH)[damped.name].cpu()
        maps["FI damped", "patches"] = patches
        for at, i in enumerate(batch.index):
            for key, values in maps.items():
                found.setdefault(key, {})[i] = values[at]
            generator = torch.Generator().manual_seed(seed + i)
            for unit, like in (("pixels", batch.images[at, 0]), ("patches", patches[at])):
                found.setdefault(("random", unit), {})[i] = torch.rand(like.shape, generator=generator)
    return {key: [of[i] for i in range(len(asked))] for key, of in found.items()}


def flip_table(trials: Trials, seed: int) -> pd.DataFrame:
    """Share of answers that flip (Wilson) and change of the chosen answer's probability (bootstrap)."""
    lines = []
    for trial in trials.tried:
        n, flips = len(trial.values["flipped"]), int(trial.values["flipped"].sum())
        change = paired_difference(trial.values["p_after"], trial.values["p_before"], seed=seed)
        lines.append((*trial.labels.values(), n, flips, flips / n, *wilson(flips, n), *change))
    names = ["n", "flips", "share", "low", "high", "change", "change_low", "change_high"]
    return pd.DataFrame(lines, columns=[*Mask._fields, *names])


def flip_difference(trials: Trials, unit: str, count: int, seed: int) -> tuple[float, float, float]:
    """Share of answers that flip by damped FI less that at random, paired: (value, low, high)."""
    rows = trials.where(unit=unit, number=count).rows()
    wide = rows.pivot(index="picture", columns="way", values="flipped")
    return paired_difference(wide["FI damped"], wide["random"], seed=seed)


class Case(NamedTuple):
    """One picture before and after its top pixels were masked; `row` is its line of :func:`mask_top`."""

    row: pd.Series
    example: Example
    image: Tensor
    scores: Tensor
    shown: Tensor
    before: list[float]
    after: list[float]


def case(
    model: VisionModel,
    examples: Sequence[Example],
    prompt: Prompt,
    trials: Trials,
    damping: float,
    seed: int,
) -> Case:
    """The picture, answered rightly before, whose answer loses most probability to the top-2 mask."""
    part = trials.where(way="FI damped", unit="pixels", number=FEWEST).rows()
    part = part[part.right == 1] if part.right.any() else part
    row = part.loc[(part.p_after - part.p_before).idxmin()]
    example = prompt.ask(next(e for e in examples if e.id == row.picture))
    image, scores = image_of(example), damped_map(model, example, damping)
    shown = hidden(image, scores, Mask("FI damped", "pixels", int(row["number"])), seed)
    outcomes = [answer_images(model, [example], images=[x]).log_probs[0].exp() for x in (image, shown)]
    return Case(row, example, image, scores, shown, outcomes[0].tolist(), outcomes[1].tolist())


def damped_map(model: VisionModel, example: Example, damping: float) -> Tensor:
    """Damped FI (H, W) of one picture under its prompt."""
    damped = Influence(Damped(damping))
    return next(pixel_batches(model, [example])).scores([damped])[damped.name][0].cpu()


def maps_under(
    model: VisionModel, example: Example, known: Sequence[Prompt], damping: float
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Damped FI (H, W) of one picture under every prompt, and a common range for the colours (log10)."""
    maps = {p.name: damped_map(model, p.ask(example), damping) for p in known}
    logs = torch.stack(list(maps.values())).clamp(min=10.0**LOWEST).log10()
    return maps, (float(logs.quantile(0.02)), float(logs.max()))


def middle_picture(pictures: pd.DataFrame) -> str:
    """The picture of median confidence without instruction."""
    alone = pictures[pictures.prompt == NONE].sort_values(["p_hat", "picture"])
    return str(alone.picture.iloc[len(alone) // 2])


# Closeness


def closeness(model: VisionModel, examples: Sequence[Example], known: Sequence[Prompt]) -> pd.DataFrame:
    """Cosine between a picture and the text before the options, within the model (ours; no CLIP here).

    The picture is the mean of its image tokens' features as the language model gets them, the text (the
    instruction and the question) the mean of its tokens' embeddings. Columns: prompt, picture, closeness.
    """
    embed = model.network.get_input_embeddings()
    seen = _image_features(model, examples)
    lines = []
    for prompt in known:
        for example, feature in zip(examples, seen, strict=True):
            order = (example.question, prompt.text) if prompt.after else (prompt.text, example.question)
            ids = model.tokenizer("\n".join(filter(None, order)), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                text = embed(ids.to(model.device))[0].float().mean(0)
            lines.append((prompt.name, example.id, float(nn.functional.cosine_similarity(feature, text, 0))))
    return pd.DataFrame(lines, columns=["prompt", "picture", "closeness"])


def _image_features(model: VisionModel, examples: Sequence[Example]) -> list[Tensor]:
    """Mean feature (C,) of each picture's image tokens."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        found.append(output[0].float().mean((1, 2)))

    for example in examples:
        image = image_of(example)
        with feature_maps(model, model.layout(*image.shape[-2:])) as maps, torch.no_grad():
            maps.register_forward_hook(keep)
            model.last_logits([image], [example.prompt])
    return found


def closeness_changes(close: pd.DataFrame, pictures: pd.DataFrame, column: str) -> pd.DataFrame:
    """Change of the closeness and of the log of a statistic under every instruction, against none.

    Columns: picture, prompt, kind, closer, change.
    """
    values = pictures.pivot(index="picture", columns="prompt", values=column).clip(lower=SMALLEST)
    log = np.log(values)
    near = close.pivot(index="picture", columns="prompt", values="closeness").loc[log.index]
    parts = []
    for name, kind in pictures[["prompt", "kind"]].drop_duplicates().itertuples(index=False):
        if name != NONE:
            moved = {"closer": near[name] - near[NONE], "change": log[name] - log[NONE]}
            parts.append(pd.DataFrame(moved).reset_index().assign(prompt=name, kind=kind))
    return pd.concat(parts, ignore_index=True)


def closeness_correlations(changes: pd.DataFrame, seed: int, resamples: int = 1000) -> pd.DataFrame:
    """Spearman's correlation of closeness and change, with bootstrap intervals over pictures.

    Over all pairs of picture and wording; over wordings within a picture (mean over pictures); and over
    pictures within a wording (mean over wordings). Columns: over, correlation, low, high, n.
    """
    wide = {
        c: changes.pivot(index="picture", columns="prompt", values=c).to_numpy() for c in ("closer", "change")
    }
    x, y = wide["closer"], wide["change"]
    forms: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "all pairs": lambda a, b: float(_spearman(a.reshape(1, -1), b.reshape(1, -1))[0]),
        "wordings within a picture": lambda a, b: _mean(_spearman(a, b)),
        "pictures within a wording": lambda a, b: _mean(_spearman(a.T, b.T)),
    }
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(x), size=(resamples, len(x)))
    lines = []
    for over, form in forms.items():
        low, high = np.nanquantile([form(x[d], y[d]) for d in draws], [0.025, 0.975])
        lines.append((over, form(x, y), low, high, x.size))
    return pd.DataFrame(lines, columns=["over", "correlation", "low", "high", "n"])


def odds_correlation(pictures: pd.DataFrame, column: str, kind: str, seed: int) -> tuple[float, float, float]:
    """Spearman's correlation over pictures of the change of the log odds and of a statistic's log.

    (value, low, high) with a bootstrap interval over pictures; kind against neutral, trained wordings.
    """
    x = log_change(pictures, "ceiling", kind).to_numpy()
    y = log_change(pictures, column, kind).to_numpy()
    draws = np.random.default_rng(seed).integers(len(x), size=(1000, len(x)))
    low, high = np.nanquantile(_spearman(x[draws], y[draws]), [0.025, 0.975])
    return float(_spearman(x[None], y[None])[0]), float(low), float(high)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of x with that row of y; NaN for a row without spread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        return pearsonr(rankdata(x, axis=1), rankdata(y, axis=1), axis=1).statistic


def _mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN of nothing, without a warning."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else float("nan")
