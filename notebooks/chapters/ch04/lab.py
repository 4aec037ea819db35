"""Chapter 04: mask the pixels that a measure calls fragile; what becomes of the answer (method 4.1)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from fichapters import tables
from fichapters.attributions import ATTRIBUTIONS, GRAD_CAM, INTEGRATED_GRADIENTS
from fichapters.noises import NOISES, information_loss, noised
from fihelpers.answers import Top
from fihelpers.evaluate.questions import answer_images
from fihelpers.evaluate.stats import wilson
from fihelpers.filters import Damped, Exact, Spectral
from fihelpers.influence import SaturationWarning, ceiling, saturated
from fihelpers.measures import Influence, Measure, Random, find_measure
from fihelpers.models.vision import VisionModel
from fihelpers.perturb.pixels import Fill, masked, top_patches, top_pixels
from fihelpers.scores.pixels import Grouping, PixelBatch, image_of, pixel_batches
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Kept, Labels, Trials, Values, collect

CLASSES = 8  # likeliest tokens that are classes of their own beside the rest
FI_TOP = f"FI exact, top {CLASSES}"
FI_SUMMED = "FI exact summed"
RANDOM = "random"
INTACT = "intact"
FI_SETTINGS = ("FI exact", FI_TOP, FI_SUMMED, "FI damped 1e-06", "FI damped 0.0001")
OTHERS = (
    "Jacobian norm",
    "saliency",
    "SNIP",
    "information length",
    GRAD_CAM,
    INTEGRATED_GRADIENTS,
    RANDOM,
)
MEASURES = (*FI_SETTINGS, *OTHERS)
QUICK = tuple(m for m in MEASURES if m not in (INTEGRATED_GRADIENTS, FI_TOP))  # these take many passes
KEYS = {  # how the measures are called in the names of records
    "FI exact": "exact",
    FI_TOP: "top",
    FI_SUMMED: "summed",
    "FI damped 1e-06": "light",
    "FI damped 0.0001": "damped",
    "Jacobian norm": "jacobian",
    "saliency": "saliency",
    "SNIP": "snip",
    "information length": "length",
    GRAD_CAM: "gradcam",
    INTEGRATED_GRADIENTS: "path",
    RANDOM: "random",
}
TOP = 10  # pixels masked for the paper's first table
PATCH = 14  # pixels, the side of a patch: that of the Qwen-VL family's vision towers
SOME_PATCHES = 8  # masked where one number stands for the sweep
DAMPED = tuple(Influence(Damped(lam)) for lam in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0))
CASE = "FI damped 0.0001"  # the measure that chooses the case
NOISE_KEYS = {
    CASE: "mask",
    RANDOM: "random",
    "Poisson": "poisson",
    "salt & pepper": "salt",
    "speckle": "speckle",
    "random erasing": "erasing",
}
CASE_COUNTS = (10, 20, 50, 100, 200, 400, 800)  # pixels masked in it
FILLS: tuple[Fill, ...] = ("black", "mean", "blur", "noise")
STRICT = Exact(1e-12)  # drops hardly any direction for being small
PAPER_TOLERANCE = 8  # grey levels; what differs more from the border's colour is drawn
HIGHEST = 0.01  # the share of the pixels or patches whose part of the total is measured


class Setting(NamedTuple):
    """One way to score the groups of a picture: a measure (which implies the classes) and a grouping."""

    measure: str
    over: Grouping


SETTINGS: dict[str, Setting] = {
    "letters, pixels": Setting("FI exact", "pixel"),
    "letters, patches": Setting("FI exact", "patch"),
    "letters, single channels": Setting("FI exact", "channel"),
    "letters, channels summed": Setting(FI_SUMMED, "pixel"),
    "letters, damped 1e-06": Setting("FI damped 1e-06", "pixel"),
    "letters, damped 0.0001": Setting("FI damped 0.0001", "pixel"),
    "top 8 + rest, pixels": Setting(FI_TOP, "pixel"),
    "top 8 + rest, patches": Setting(FI_TOP, "patch"),
    "Jacobian norm, pixels": Setting("Jacobian norm", "pixel"),
}
SETTING_KEYS = dict(
    zip(SETTINGS, ("pixel", "patch", "channel", "summed", "light", "damped", "top", "toppatch", "jacobian"),
        strict=True)
)  # fmt: skip


class Mask(NamedTuple):
    """What is masked: so many pixels of highest score ("count"), that "share" of them, or so many "patches",
    and what comes in their place."""

    kind: str
    amount: float
    fill: Fill = "black"


@dataclass(frozen=True, eq=False)
class Scored:
    """Pictures of one size whose class gradients are made once for all measures, filters and groupings."""

    letters: PixelBatch

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.letters.examples

    @property
    def images(self) -> Tensor:
        return self.letters.images

    @cached_property
    def top(self) -> PixelBatch:
        """The same pictures under the likeliest tokens and the rest as classes."""
        (batch,) = pixel_batches(self.letters.model, self.examples, Top(CLASSES), len(self.examples))
        return batch

    @cached_property
    def _made(self) -> dict[tuple[str, Grouping, int], Tensor]:
        return {}

    def scores(self, measure: str | Measure, over: Grouping = "pixel", patch: int = PATCH) -> Tensor:
        """One value a group, (N, *groups). That FI may rank nothing is measured here, so nothing warns."""
        if isinstance(measure, Measure):
            return self._scores(measure, over, patch)
        key = (measure, over, patch if over == "patch" else 0)
        if key not in self._made:
            self._made[key] = self._scores(measure, over, patch)
        return self._made[key]

    def identity(self) -> list[object]:
        """What its answers depend on; see :mod:`fihelpers.identity`."""
        return [self.letters.model, self.examples]

    def untouched(self) -> Values:
        """The answers to the pictures as they are: see `ask`."""
        return self.ask([self.images])[0]

    def ask(self, images: Sequence[Tensor]) -> list[Values]:
        """Answers to changed pictures, each (N, 3, H, W): id, subject, correct and log_prob (nats), (N,)."""
        outcome = answer_images(
            self.letters.model, self.examples * len(images), images=list(torch.cat(list(images)))
        )
        names = {name: np.array([getattr(e, name) for e in self.examples]) for name in ("id", "subject")}
        correct, log_prob = (
            values.double().reshape(len(images), -1).numpy() for values in (outcome.correct, outcome.log_prob)
        )
        return [{**names, "correct": c, "log_prob": p} for c, p in zip(correct, log_prob, strict=True)]

    def _scores(self, measure: str | Measure, over: Grouping, patch: int) -> Tensor:
        if isinstance(measure, str) and measure in ATTRIBUTIONS:
            if over == "patch":  # a patch is worth the sum of its pixels
                return patch_sums(self.scores(measure), patch)
            return ATTRIBUTIONS[measure](self.letters).cpu()
        batch = self.top if measure == FI_TOP else self.letters
        name = "FI exact" if measure == FI_TOP else measure
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SaturationWarning)
            return next(iter(batch.scores([name], over, patch=patch).values())).cpu()


def load_pictures(
    task: str, subjects: Sequence[str], n: int | None, seed: int
) -> tuple[list[Example], list[str]]:
    """Test pictures of every subject (n of each, None takes all), and why rows were left out."""
    tasks = [load_task(task, subject, "test", n, seed) for subject in subjects]
    # a row too damaged to tell its subject is named by every task
    return [e for t in tasks for e in t], list(dict.fromkeys(reason for t in tasks for reason in t.skipped))


def draw_pictures(examples: Sequence[Example], n: int, seed: int) -> tuple[list[Example], list[Example]]:
    """n pictures of every subject, drawn with a seed, and those that are left, both in their order."""
    drawn: set[str] = set()
    for subject in dict.fromkeys(e.subject for e in examples):
        ids = [e.id for e in examples if e.subject == subject]
        drawn.update(random.Random(seed).sample(ids, min(n, len(ids))))
    return [e for e in examples if e.id in drawn], [e for e in examples if e.id not in drawn]


def scored(model: VisionModel, examples: Sequence[Example], batch_size: int) -> Iterator[Scored]:
    """The pictures in batches; keep them in a list to use their class gradients again."""
    if not examples:
        return
    yield from (Scored(batch) for batch in pixel_batches(model, examples, None, batch_size))


def patch_sums(maps: Tensor, patch: int) -> Tensor:
    """Sums over squares of `patch` pixels: (..., H, W) to (..., rows, columns), smaller at the far edges."""
    down, across = (-side % patch for side in maps.shape[-2:])
    whole = pad(maps, (0, across, 0, down))
    return whole.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch)).sum((-3, -1))


def masked_by(
    batches: Iterable[Scored],
    measures: Sequence[str | Measure],
    masks: Sequence[Mask],
    seed: int,
    kept: Kept | None = None,
    *,
    draws: int = 1,
    patch: int = PATCH,
    once: bool = False,
) -> Trials:
    """Mask every picture by every measure and ask again.

    Labels: measure ("intact" for the untouched picture) and the fields of the mask. Values: id, subject,
    correct, log_prob (of the right answer, nats), both the mean over `draws` of the random measure, and first
    (correct in its first draw). patch: side in pixels. once: do not keep the class gradients of a batch.
    Raises ValueError for an unknown measure or a share outside [0, 1].
    """
    for measure in measures:
        if measure not in MEASURES:
            find_measure(measure)

    def tries(batch: Scored) -> Iterator[tuple[Labels, Values]]:
        used = replace(batch, letters=replace(batch.letters)) if once else batch
        for measure in (INTACT, *measures):
            name = measure if isinstance(measure, str) else measure.name
            for mask, values in zip(masks, _answers(used, measure, masks, seed, draws, patch), strict=True):
                yield {"measure": name, **mask._asdict(), "amount": float(mask.amount)}, values

    return collect(Scored.untouched, tries, sets=list(batches), kept=kept)


def _answers(
    batch: Scored, measure: str | Measure, masks: Sequence[Mask], seed: int, draws: int, patch: int
) -> list[Values]:
    """Answers under every mask by one measure; under none for "intact"."""
    if measure == INTACT:
        untouched = batch.untouched()
        return [{**untouched, "first": untouched["correct"]}] * len(masks)
    found = []
    for draw in range(draws if measure == RANDOM else 1):
        used = Random(seed + draw) if measure == RANDOM else measure
        hidden = [(_hidden(batch, used, mask, seed, patch), mask.fill) for mask in masks]
        found.append(batch.ask([masked(batch.images, where, fill, seed) for where, fill in hidden]))
    return [
        {**each[0], "first": each[0]["correct"]}
        | {name: np.mean([values[name] for values in each], 0) for name in ("correct", "log_prob")}
        for each in zip(*found, strict=True)
    ]


def _hidden(batch: Scored, measure: str | Measure, mask: Mask, seed: int, patch: int) -> Tensor:
    """Which pixels (N, H, W) a mask hides."""
    height, width = batch.images.shape[-2:]
    scores = batch.scores(measure, "patch" if mask.kind == "patches" else "pixel", patch)
    if mask.kind == "share":
        hidden = top_pixels(scores, share=mask.amount, seed=seed)
    elif mask.kind == "count":
        hidden = top_pixels(scores, min(int(mask.amount), height * width), seed=seed)
    else:
        most = min(int(mask.amount), scores[0].numel())
        hidden = top_patches(scores, most, patch=patch, size=(height, width), seed=seed)
    return hidden.to(batch.images.device)


def pooled(some: Trials, others: Trials) -> Trials:
    """The trials of different pictures together; a measure may have been tried on some of them alone."""
    return Trials([*some.intact, *others.intact], [*some.tried, *others.tried])


def at(trials: Trials, mask: Mask) -> Trials:
    """The trials with one mask. Raises ValueError where there are none."""
    return trials.where(**mask._asdict())


def by_category(trials: Trials, value: str) -> pd.DataFrame:
    """Mean over the pictures of each category: a row a measure, a column a category, all together, and n."""
    rows = trials.rows()
    means = rows.pivot_table(index="measure", columns="subject", values=value)
    groups = rows.groupby("measure")[value]
    return means.assign(all=groups.mean(), n=groups.size()).loc[list(dict.fromkeys(rows.measure))]


def curves(trials: Trials, kind: str) -> pd.DataFrame:
    """Deletion curves: mean accuracy and log P for every measure and amount, from the untouched pictures on.

    Columns: measure, amount, accuracy, log_prob, n.
    """
    means = trials.where(kind=kind).table("measure", "amount")
    means = means[means.measure != INTACT]
    right, log_prob = trials.start(), trials.start("log_prob")
    start = pd.DataFrame({"measure": means.measure.unique()}).assign(
        amount=0.0, accuracy=right.mean(), log_prob=log_prob.mean(), n=len(right)
    )
    return pd.concat([start, means[start.columns]], ignore_index=True)


def areas(trials: Trials, kind: str, seed: int) -> pd.DataFrame:
    """Area under each measure's deletion curve, as the curve's mean height, and its difference from random.

    A row a measure, with intervals over the pictures (bootstrap): accuracy and log_prob with _low and _high,
    and the same names after "less_" for the difference, paired by picture; n.
    """
    lines: dict[str, dict[str, float]] = {}
    for value, name in (("correct", "accuracy"), ("log_prob", "log_prob")):
        heights = _heights(trials.where(kind=kind), value)
        for measure, own in heights.items():
            line = lines.setdefault(str(measure), {"n": len(own)})
            less = tables.difference(own, heights[RANDOM], seed)
            for key, found in ((name, tables.average(own, seed)), (f"less_{name}", less)):
                line |= dict(zip((key, f"{key}_low", f"{key}_high"), found, strict=True))
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("measure")


def _heights(trials: Trials, value: str) -> pd.DataFrame:
    """Mean height of each picture's deletion curve: a row a picture, a column a measure."""
    made = {}
    for measure, part in trials.rows().groupby("measure", sort=False):
        table = part.pivot(index="id", columns="amount", values=value)
        if measure == INTACT:
            start = table.iloc[:, 0]
            continue
        table.insert(0, 0.0, start)
        amounts = table.columns.to_numpy(float)
        made[measure] = pd.Series(np.trapezoid(table.to_numpy(), amounts, axis=1) / amounts[-1], table.index)
    return pd.DataFrame(made)


def duels(trials: Trials, mask: Mask, others: Sequence[str], seed: int) -> pd.DataFrame:
    """log P after masking by each setting of FI minus after masking by each other measure.

    Below zero FI does more damage. Columns: fi, other, kind, amount, n, difference, low, high.
    """
    known = tables.measures_of(trials)
    pairs = [(name, other) for other in others for name in FI_SETTINGS if name in known]
    found = tables.compare(at(trials, mask), pairs, "kind", "amount", seed=seed)
    columns = ["fi", "other", "kind", "amount", "n", "difference", "low", "high"]
    return found.rename(columns={"first": "fi", "minus": "other"})[columns]


def accuracies(model: VisionModel, examples: Sequence[Example]) -> pd.DataFrame:
    """Accuracy on the untouched pictures of each category and of all, with Wilson intervals.

    Columns: subject, n, accuracy, low, high, log_prob (of the right answer), confidence (median P(ŷ)).
    """
    outcome = answer_images(model, examples)
    each = pd.DataFrame(
        {
            "subject": [e.subject for e in examples],
            "correct": outcome.correct.double(),
            "log_prob": outcome.log_prob.double(),
            "confidence": outcome.log_probs.exp().amax(1).double(),
        }
    )
    lines = []
    for subject, part in [*each.groupby("subject", sort=False), ("all", each)]:
        low, high = wilson(round(part.correct.sum()), len(part))
        ends = (part.correct.mean(), low, high, part.log_prob.mean(), part.confidence.median())
        lines.append((subject, len(part), *ends))
    columns = ["subject", "n", "accuracy", "low", "high", "log_prob", "confidence"]
    return pd.DataFrame(lines, columns=columns)


def outcomes(trials: Trials, masks: Sequence[Mask], seed: int) -> pd.DataFrame:
    """Claim 10: random masks against the untouched picture, and guided masks against random ones.

    Each pair is compared on all pictures that were masked so by both. Columns: kind, amount, first, second,
    n, difference of accuracy, low, high.
    """
    lines = []
    for mask in masks:
        here = at(trials, mask)
        guided = [
            name
            for name in (*FI_SETTINGS, "Jacobian norm", "information length")
            if name in tables.measures_of(here)
        ]
        pairs = [(RANDOM, INTACT), *((name, RANDOM) for name in guided)]
        lines.append(tables.compare(here, pairs, "kind", "amount", seed=seed, value="accuracy"))
    columns = ["kind", "amount", "first", "second", "n", "difference", "low", "high"]
    return pd.concat(lines, ignore_index=True).rename(columns={"minus": "second"})[columns]


def damping_table(trials: Trials, seed: int) -> pd.DataFrame:
    """Damage for every filter of FI and for the Jacobian norm, with the difference of log P from its."""
    made = trials.table("measure").set_index("measure").drop(INTACT)[["n", "accuracy", "log_prob"]]
    less = tables.against(trials, "Jacobian norm", seed)
    names = {"log_prob": "minus_jacobian", "log_prob_low": "low", "log_prob_high": "high"}
    return made.join(less[list(names)].rename(columns=names))


# --- what the maps look like


def describe(batches: Iterable[Scored], patch: int, kept: Kept) -> pd.DataFrame:
    """What the maps of every setting look like, one row for each picture and setting.

    Columns: id, subject, setting; ceiling; at_ceiling: share of the groups whose FI is the ceiling to one
    part in a thousand; p5, p95: percentiles of the map over the ceiling; held: share of the total that the
    highest hundredth of the groups holds; area: share
    of the pixels that are drawn; drawn and paper: mean score there over the mean of the map; hit: share of
    the highest hundredth of the pixels that is drawn.
    """
    made = [kept.frame(_describe, b, patch) for b in tqdm(batches, desc="maps", unit="batch")]
    return pd.concat(made, ignore_index=True)


def drawn_things(image: Tensor) -> Tensor:
    """Where a picture (3, H, W) differs from the commonest colour of its border, a boolean mask (H, W)."""
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1).T
    colours, counts = border.unique(dim=0, return_counts=True)
    paper = colours[counts.argmax()]
    return ((image - paper[:, None, None]).abs() > PAPER_TOLERANCE).any(0)


def saturation(maps: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Means over the pictures of what `describe` says of each setting, a row a setting.

    at_ceiling and held have intervals, a bootstrap over pictures (columns *_low, *_high). p5 and p95 are for
    settings of FI.
    """
    lines = {}
    for name, part in maps.groupby("setting", sort=False):
        line: dict[str, float] = {"n": len(part)}
        for column in ("held", "at_ceiling"):
            if part[column].notna().all():
                found = tables.average(part[column], seed)
                line |= dict(zip((column, f"{column}_low", f"{column}_high"), found, strict=True))
        if SETTINGS[str(name)].measure in FI_SETTINGS:
            line |= {"p5": part.p5.mean(), "p95": part.p95.mean()}
        lines[str(name)] = line
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("setting")


def at_ceiling(batches: Iterable[Scored], spectral: Spectral = STRICT) -> float:
    """Mean share of the pixels at the ceiling for FI on letters under another filter."""
    shares = []
    for batch in batches:
        grads = batch.letters.grads
        full = saturated(batch.scores(Influence(spectral)), grads.probs.cpu(), grads.predicted.cpu())
        shares.append(full.double().flatten(1).mean(1))
    return float(torch.cat(shares).mean())


def on_things(maps: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean score on drawn things over that on the paper, with a bootstrap interval over pictures, and the
    share of the highest hundredth that lies on drawn things beside their share of the picture.

    A row a setting: ratio, low, high, hit, area, n. Pictures without paper or without things are left out.
    """
    lines = {}
    whole = maps[maps.drawn.notna() & maps.paper.notna()]
    for name, part in whole.groupby("setting", sort=False):
        draws = np.random.default_rng(seed).integers(len(part), size=(tables.RESAMPLES, len(part)))
        drawn, paper = part.drawn.to_numpy(), part.paper.to_numpy()
        low, high = np.quantile(drawn[draws].mean(1) / paper[draws].mean(1), [0.025, 0.975])
        lines[str(name)] = (
            drawn.mean() / paper.mean(),
            low,
            high,
            part.hit.mean(),
            part.area.mean(),
            len(part),
        )
    columns = ["ratio", "low", "high", "hit", "area", "n"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("setting")


def shown(model: VisionModel, examples: Sequence[Example], each: int) -> list[tuple[Tensor, Example, Tensor]]:
    """The first `each` pictures of every subject: image, example, P of the options."""
    subjects = dict.fromkeys(e.subject for e in examples)
    chosen = [e for s in subjects for e in [x for x in examples if x.subject == s][:each]]
    images = [image_of(e) for e in chosen]
    return [(i, e, probabilities(model, e, [i])[0]) for i, e in zip(images, chosen, strict=True)]


def setting_maps(batch: Scored, place: int, patch: int) -> dict[str, tuple[Tensor, float]]:
    """The map of every setting for one picture of a batch, with the ceiling of FI under its classes."""
    made = {}
    for name, setting in SETTINGS.items():
        classes = batch.top if setting.measure == FI_TOP else batch.letters
        top = float(ceiling(classes.grads.probs, classes.grads.predicted)[place])
        values = batch.scores(setting.measure, setting.over, patch)[place]
        made[name] = (values, top)
    return made


# --- one picture, and noise


@dataclass(frozen=True, eq=False)
class Case:
    """One picture under a growing mask: `probs` (K,) for every count of `masks` and for 0 (untouched)."""

    example: Example
    image: Tensor
    measure: str
    scores: Tensor
    masks: dict[int, Tensor]
    probs: dict[int, Tensor]
    flips_at: int | None

    @property
    def shown(self) -> int:
        """The count at which the answer flips, or the largest where it never does."""
        return self.flips_at or max(self.masks)


def flip_counts(trials: Trials) -> pd.DataFrame:
    """For every rightly answered picture, the smallest count of pixels that makes the answer wrong.

    trials: counts by one measure. Columns: id, flips_at (NaN: never), left: log P of the right answer at the
    largest count. Sorted: the case comes first (fewest pixels, then least left, then id).
    """
    rows = trials.rows()
    right = _right(rows)
    known = rows[(rows.measure != INTACT) & rows.id.isin(right if len(right) else rows.id)]
    wrong = known[known.correct == 0].groupby("id").amount.min().rename("flips_at")
    left = known[known.amount == known.amount.max()].set_index("id").log_prob.rename("left")
    return pd.concat([wrong, left], axis=1).reset_index().sort_values(["flips_at", "left", "id"])


def flipped(trials: Trials) -> pd.DataFrame:
    """Share of the rightly answered pictures that a mask makes wrong (Wilson intervals); a row a measure.

    trials: of one mask; of the random measure its first draw counts.
    """
    rows, lines = trials.rows(), {}
    known = rows[(rows.measure != INTACT) & rows.id.isin(_right(rows))]
    for measure, own in known.groupby("measure", sort=False):
        wrong = int((own["first"] == 0).sum())
        lines[str(measure)] = (wrong, len(own), wrong / len(own), *wilson(wrong, len(own)))
    columns = ["flipped", "n", "share", "low", "high"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("measure")


def _right(rows: pd.DataFrame) -> pd.Series:
    """The pictures that are answered rightly as they are."""
    return rows[(rows.measure == INTACT) & (rows.correct == 1)].id


def look_at(
    batches: Sequence[Scored], flips: pd.DataFrame, measure: str, counts: Sequence[int], seed: int
) -> Case:
    """The first picture of `flips` under the masks of every count."""
    first = flips.iloc[0]
    batch = next(b for b in batches if first.id in [e.id for e in b.examples])
    place = [e.id for e in batch.examples].index(first.id)
    example, image = batch.examples[place], batch.images[place].cpu()
    scores = batch.scores(measure)[place]
    masks = {n: top_pixels(scores, min(n, scores.numel()), seed=seed) for n in sorted(counts)}
    shown = [image, *(masked(image, mask) for mask in masks.values())]
    probs = probabilities(batch.letters.model, example, shown)
    at = None if np.isnan(first.flips_at) else int(first.flips_at)
    return Case(example, image, measure, scores, masks, dict(zip((0, *masks), probs, strict=True)), at)


def probabilities(model: VisionModel, example: Example, images: Sequence[Tensor]) -> Tensor:
    """P of the options (len(images), K) of one question about several pictures."""
    return answer_images(model, [example] * len(images), images=images).log_probs.exp()


def matched_noises(image: Tensor, loss: float, seed: int) -> dict[str, Tensor]:
    """Every kind of noise with that information loss; kinds that cannot destroy as much are left out."""
    made = {}
    for kind in NOISES:
        try:
            made[kind] = noised(image, kind, loss, seed)  # type: ignore[arg-type]
        except ValueError:
            continue
    return made


def noise_against_mask(
    batches: Iterable[Scored], measure: str, share: float, seed: int, kept: Kept | None = None
) -> Trials:
    """Mask the top share of the pixels, mask as many random ones, and add noises that destroy as much.

    Labels: change, "intact" for none. Values of each picture: id, subject, loss, correct, log_prob, and
    changed (1 where the answer is no longer the untouched picture's).
    """

    def tries(batch: Scored) -> Iterator[tuple[Labels, Values]]:
        chosen = top_pixels(batch.scores(measure), share=share, seed=seed)
        drawn = top_pixels(batch.scores(Random(seed)), share=share, seed=seed)
        for place, example in enumerate(batch.examples):
            image = batch.images[place].cpu()
            guided = masked(image, chosen[place])
            made = {INTACT: image, measure: guided, RANDOM: masked(image, drawn[place])}
            made |= matched_noises(image, information_loss(image, guided), seed)
            yield from _changed(batch.letters.model, example, made)

    return collect(Scored.untouched, tries, sets=list(batches), kept=kept)


def _changed(
    model: VisionModel, example: Example, made: Mapping[str, Tensor]
) -> Iterator[tuple[Labels, Values]]:
    """Answers to one picture under every change; noises differ in what they can destroy of a picture."""
    outcome = answer_images(model, [example] * len(made), images=list(made.values()))
    lost = outcome.log_prob.double().numpy()
    for i, (change, picture) in enumerate(made.items()):
        values = {
            "loss": information_loss(made[INTACT], picture),
            "correct": float(outcome.correct[i]),
            "log_prob": lost[i],
            "changed": float(outcome.predicted[i] != outcome.predicted[0]),
        }
        named = {"id": example.id, "subject": example.subject, **values}
        yield {"change": change}, {name: np.array([value]) for name, value in named.items()}


def noise_table(trials: Trials, guided: str, seed: int) -> pd.DataFrame:
    """Each change: mean loss, accuracy, share of answers changed (Wilson), and log P after the guided mask
    minus after this change (paired bootstrap over the pictures). A row a change."""
    rows, lines = trials.rows(), {}
    guided_values = rows[rows.change == guided].set_index("id").log_prob
    for change, part in rows.groupby("change", sort=False):
        own = part.set_index("id").log_prob
        found = tables.difference(guided_values.reindex(own.index), own, seed)
        low, high = wilson(round(part.changed.sum()), len(part))
        lines[str(change)] = {
            "n": len(part), "loss": part.loss.mean(), "accuracy": part.correct.mean(),
            "changed": part.changed.mean(), "changed_low": low, "changed_high": high,
            "mask_minus_this": found[0], "low": found[1], "high": found[2],
        }  # fmt: skip
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("change")


# --- one batch


def _describe(batch: Scored, patch: int) -> pd.DataFrame:
    lines = []
    things = torch.stack([drawn_things(image.cpu()) for image in batch.images])
    for name, setting in SETTINGS.items():
        values = batch.scores(setting.measure, setting.over, patch).double()
        grads = (batch.top if setting.measure == FI_TOP else batch.letters).grads
        probs, predicted = grads.probs.cpu(), grads.predicted.cpu()
        judged = setting.measure in FI_SETTINGS and setting.measure != FI_SUMMED
        full = saturated(values, probs, predicted).double().flatten(1).mean(1) if judged else None
        tops = ceiling(probs, predicted)
        spread = _spread_out(values, setting.over, patch, things.shape[-2:])
        for i, example in enumerate(batch.examples):
            at = float(full[i]) if full is not None else np.nan
            line = {"id": example.id, "subject": example.subject, "setting": name, "ceiling": float(tops[i])}
            ends = values[i].quantile(values.new_tensor([0.05, 0.95])) / tops[i]
            line |= {"at_ceiling": at, "held": _held(values[i]), "p5": float(ends[0]), "p95": float(ends[1])}
            lines.append(line | _on_things(spread[i], things[i]))
    return pd.DataFrame(lines)


def _spread_out(values: Tensor, over: Grouping, patch: int, size: Sequence[int]) -> Tensor:
    """A value for every pixel (N, H, W): of its patch, or the mean of its channels."""
    if over == "channel":
        return values.mean(1)
    if over == "patch":
        values = values.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    return values[..., : size[0], : size[1]]


def _held(values: Tensor) -> float:
    ordered = values.flatten().sort(descending=True).values
    total = ordered.sum()
    return float(ordered[: max(1, round(HIGHEST * len(ordered)))].sum() / total) if total > 0 else HIGHEST


def _on_things(values: Tensor, things: Tensor) -> dict[str, float]:
    area = float(things.double().mean())
    if not 0 < area < 1:
        return {"area": area, "drawn": np.nan, "paper": np.nan, "hit": np.nan}
    mean = float(values.mean())
    level = values / mean if mean > 0 else torch.ones_like(values)  # a map of zeros ranks nothing
    hit = things[top_pixels(values, share=HIGHEST)].double().mean()
    return {
        "area": area,
        "drawn": float(level[things].mean()),
        "paper": float(level[~things].mean()),
        "hit": float(hit),
    }
