"""What chapter 04 does not write out: drawing pictures, looks of maps, readings of trials (method 4.1)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

from fichapters import tables
from fichapters.attributions import ATTRIBUTIONS, GRAD_CAM, INTEGRATED_GRADIENTS
from fichapters.noises import NOISES, information_loss, noised
from fihelpers.answers import Top
from fihelpers.evaluate.questions import Outcome, answer_images
from fihelpers.evaluate.stats import wilson
from fihelpers.influence import SaturationWarning, ceiling, saturated
from fihelpers.measures import Measure, Random
from fihelpers.models.vision import VisionModel
from fihelpers.perturb.pixels import masked, top_pixels
from fihelpers.scores.pixels import Grouping, PixelBatch, pixel_batches
from fihelpers.tasks import Example, load_task
from fihelpers.trials import Trials, Values

INTACT, RANDOM = "intact", "random"
CLASSES = 8  # likeliest tokens that are classes of their own beside the rest
FI_TOP = f"FI exact, top {CLASSES}"
FI_SUMMED = "FI exact summed"
FI = ("FI exact", FI_TOP, FI_SUMMED, "FI damped 1e-06", "FI damped 0.0001")
OTHERS = ("Jacobian norm", "saliency", "SNIP", "information length", GRAD_CAM, INTEGRATED_GRADIENTS, RANDOM)
QUICK = tuple(m for m in (*FI, *OTHERS) if m not in (FI_TOP, INTEGRATED_GRADIENTS))  # few passes a picture
PAPER = ("Jacobian norm", "saliency", RANDOM)  # the measures that the paper compares FI with
GUIDED = (*FI, "Jacobian norm", "information length")  # set against random masks
PATCH = 14  # pixels, the side of a patch: that of the Qwen-VL family's vision towers
CASE_COUNTS = (0, 10, 20, 50, 100, 200, 400, 800)  # pixels masked on the dial
TOLERANCE = 8  # grey levels; what differs more from the border's colour is drawn
HIGHEST = 0.01  # the share of the pixels or patches whose part of the total is measured
SETTINGS: dict[str, tuple[str, Grouping]] = {  # a measure, which implies the classes, and a grouping
    "letters, pixels": ("FI exact", "pixel"),
    "letters, patches": ("FI exact", "patch"),
    "letters, single channels": ("FI exact", "channel"),
    "letters, channels summed": (FI_SUMMED, "pixel"),
    "letters, damped 1e-06": ("FI damped 1e-06", "pixel"),
    "letters, damped 0.0001": ("FI damped 0.0001", "pixel"),
    "top 8 + rest, pixels": (FI_TOP, "pixel"),
    "top 8 + rest, patches": (FI_TOP, "patch"),
    "Jacobian norm, pixels": ("Jacobian norm", "pixel"),
}


# --- pictures


@dataclass(frozen=True, eq=False)
class Pictures(PixelBatch):
    """Pictures of one size with their questions; that FI may rank nothing is measured, so nothing warns."""

    @cached_property
    def likeliest(self) -> Pictures:
        """The same pictures under the likeliest tokens and the rest as classes."""
        (batch,) = pixel_batches(self.model, self.examples, Top(CLASSES), len(self.examples))
        return Pictures(**vars(batch))

    @cached_property
    def attributed(self) -> Callable[[str], Tensor]:
        """Captum's map (N, H, W) by a measure of `ATTRIBUTIONS`, made once: patches are sums over pixels."""
        return cache(lambda measure: ATTRIBUTIONS[measure](self))

    def scores(self, *args: Any, **settings: Any) -> dict[str, Tensor]:
        """As of :class:`fihelpers.scores.pixels.PixelBatch`."""
        with warnings.catch_warnings(action="ignore", category=SaturationWarning):
            return super().scores(*args, **settings)


def batches_of(model: VisionModel, examples: Sequence[Example], size: int) -> Iterator[Pictures]:
    """The pictures in batches, as `pixel_batches` makes them; none of no examples."""
    for batch in pixel_batches(model, examples, None, size) if examples else ():
        yield Pictures(**vars(batch))


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


def typical(outcome: Outcome) -> int:
    """The place of the picture of median log P among those answered rightly; among all where none is."""
    right = outcome.correct if outcome.correct.any() else torch.ones_like(outcome.correct)
    places = right.nonzero()[:, 0]
    return int(places[outcome.log_prob[places].argsort(stable=True)[len(places) // 2]])


def patch_sums(maps: Tensor, patch: int = PATCH) -> Tensor:
    """Sums over squares of `patch` pixels: (N, H, W) to (N, rows, columns), smaller at the far edges."""
    return avg_pool2d(maps, patch, ceil_mode=True, divisor_override=1)


Score = Callable[[Pictures, str, Grouping], Tensor]  # maps (N, *groups) of a batch by a measure


# --- what the maps look like


def setting_maps(picture: Pictures, score: Score) -> dict[str, tuple[Tensor, float]]:
    """The map of every setting for one picture, with the ceiling of FI under its classes."""
    made = {}
    for name, (measure, over) in SETTINGS.items():
        grads = _classes(picture, measure).grads
        values = score(picture, measure, over)[0].cpu()
        made[name] = values, float(ceiling(grads.probs, grads.predicted)[0])
    return made


def describe(batches: Iterable[Pictures], score: Score) -> pd.DataFrame:
    """What the maps of every setting look like, one row for each setting and picture.

    Columns: setting, id; at_ceiling: share of the groups whose FI is the ceiling to one part in a thousand;
    held: share of the total that the highest hundredth of the groups holds; drawn and ground: mean score on
    drawn things, and beside them, over the mean of the map.
    """
    lines = []
    for batch in tqdm(batches, desc="maps", unit="batch"):
        things = [drawn_things(image) for image in batch.images.cpu()]
        for name, (measure, over) in SETTINGS.items():
            values = score(batch, measure, over).cpu().double()
            grads = _classes(batch, measure).grads
            full = saturated(values, grads.probs.cpu(), grads.predicted.cpu()).double().flatten(1).mean(1)
            if measure not in FI or measure == FI_SUMMED:
                full *= np.nan
            spread = _spread_out(values, over, things[0].shape)
            for i, example in enumerate(batch.examples):
                # a map of zeros ranks nothing
                level = spread[i] / spread[i].mean() if spread[i].mean() > 0 else torch.ones_like(spread[i])
                on, beside = float(level[things[i]].mean()), float(level[~things[i]].mean())
                lines.append((name, example.id, float(full[i]), _held(values[i]), on, beside))
    return pd.DataFrame(lines, columns=["setting", "id", "at_ceiling", "held", "drawn", "ground"])


def saturation(maps: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Means of at_ceiling and held over the pictures, with bootstrap intervals (*_low, *_high), and n.

    A row a setting of `describe`; what is no FI, or a sum of several, has no ceiling.
    """
    lines: dict[str, dict[str, float]] = {}
    for name, part in maps.groupby("setting", sort=False):
        line = lines.setdefault(str(name), {"n": len(part)})
        for column in ("held", "at_ceiling"):
            if part[column].notna().all():
                found = tables.average(part[column], seed)
                line |= dict(zip((column, f"{column}_low", f"{column}_high"), found, strict=True))
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("setting")


def on_things(maps: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean score on drawn things over that on the background, with a bootstrap interval over pictures.

    A row a setting: ratio, low, high, n. Pictures without background or without things are left out.
    """
    lines = {}
    for name, part in maps.dropna(subset=["drawn", "ground"]).groupby("setting", sort=False):
        draws = np.random.default_rng(seed).integers(len(part), size=(tables.RESAMPLES, len(part)))
        drawn, ground = part.drawn.to_numpy(), part.ground.to_numpy()
        ends = np.quantile(drawn[draws].mean(1) / ground[draws].mean(1), [0.025, 0.975])
        lines[str(name)] = (drawn.mean() / ground.mean(), *ends, len(part))
    columns = ["ratio", "low", "high", "n"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("setting")


def drawn_things(image: Tensor) -> Tensor:
    """Where a picture (3, H, W) differs from the commonest colour of its border, a boolean mask (H, W)."""
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1).T
    colours, counts = border.unique(dim=0, return_counts=True)
    ground = colours[counts.argmax()]
    return ((image - ground[:, None, None]).abs() > TOLERANCE).any(0)


def _classes(batch: Pictures, measure: str) -> Pictures:
    return batch.likeliest if measure == FI_TOP else batch


def _spread_out(values: Tensor, over: Grouping, size: Sequence[int]) -> Tensor:
    """A value for every pixel (N, H, W): of its patch, or the mean of its channels."""
    if over == "channel":
        return values.mean(1)
    if over == "patch":
        values = values.repeat_interleave(PATCH, -2).repeat_interleave(PATCH, -1)
    return values[..., : size[0], : size[1]]


def _held(values: Tensor) -> float:
    ordered = values.flatten().sort(descending=True).values
    total = ordered.sum()
    return float(ordered[: max(1, round(HIGHEST * len(ordered)))].sum() / total) if total > 0 else HIGHEST


# --- what masks do


def draws(measure: str, n: int, seed: int) -> list[str | Measure]:
    """What a measure is scored by: itself, n draws of random scores, or nothing for the untouched picture."""
    if measure == RANDOM:
        return [Random(seed + draw) for draw in range(n)]
    return [] if measure == INTACT else [measure]


def told(model: VisionModel, example: Example, shown: Mapping[str, Tensor]) -> dict[str, Values]:
    """What is answered to one picture under every change, its first being none: values of one picture each.

    Values: id, loss (information loss), correct, log_prob, P (of the right answer), changed (1 where the
    answer is no longer that to the first).
    """
    images = list(shown.values())
    outcome = answer_images(model, [example] * len(images), images=images)
    values = {
        "id": np.array([example.id] * len(images)),
        "loss": np.array([information_loss(images[0], image) for image in images]),
        "correct": outcome.correct.double().numpy(),
        "log_prob": outcome.log_prob.double().numpy(),
        "P": outcome.log_prob.double().exp().numpy(),
        "changed": (outcome.predicted != outcome.predicted[0]).double().numpy(),
    }
    return {change: {k: v[[i]] for k, v in values.items()} for i, change in enumerate(shown)}


def pooled(some: Trials, others: Trials) -> Trials:
    """The trials of different pictures together; a measure may have been tried on some of them alone."""
    return Trials([*some.intact, *others.intact], [*some.tried, *others.tried])


def by_category(trials: Trials, examples: Sequence[Example], seed: int) -> pd.DataFrame:
    """Accuracy under one mask and its difference from the untouched pictures, paired by picture.

    examples: those that were asked, with their subjects. Columns: measure, subject ("all" for all together),
    accuracy, difference, low, high, n.
    """
    right = trials.rows().pivot(index="id", columns="measure", values="correct")
    subjects = pd.Series({example.id: example.subject for example in examples})
    lines = []
    for measure in tables.measures_of(trials)[1:]:
        own = right[right[measure].notna()]
        groups = [*own.groupby(subjects.reindex(own.index)), ("all", own)]
        for subject, part in groups:
            found = tables.difference(part[measure], part[INTACT], seed)
            lines.append((measure, subject, part[measure].mean(), *found, len(part)))
    columns = ["measure", "subject", "accuracy", "difference", "low", "high", "n"]
    return pd.DataFrame(lines, columns=columns)


def duels(trials: Trials, seed: int) -> pd.DataFrame:
    """log P under one mask by each setting of FI minus by each other measure; below zero FI does more damage.

    Columns: fi, other, kind, amount, n, difference, low, high.
    """
    pairs = [(name, other) for other in OTHERS for name in FI]
    found = tables.compare(trials, pairs, "kind", "amount", seed=seed)
    columns = ["fi", "other", "kind", "amount", "n", "difference", "low", "high"]
    return found.rename(columns={"first": "fi", "minus": "other"})[columns]


def random_and_guided(trials: Sequence[Trials], seed: int) -> pd.DataFrame:
    """Random masks against the untouched picture, and guided masks against random ones: accuracy.

    trials: of one mask each. Each pair is compared on all pictures that were masked so by both. Columns:
    kind, amount, first, second, n, difference, low, high.
    """
    pairs = [(RANDOM, INTACT), *((name, RANDOM) for name in GUIDED)]
    lines = [tables.compare(one, pairs, "kind", "amount", seed=seed, value="accuracy") for one in trials]
    columns = ["kind", "amount", "first", "second", "n", "difference", "low", "high"]
    return pd.concat(lines, ignore_index=True).rename(columns={"minus": "second"})[columns]


def gains(trials: Trials, seed: int) -> pd.DataFrame:
    """Mean height of each measure's deletion curve of log P, less that of random masks, over the pictures.

    trials: of masks of one kind. The curve goes in straight lines from the untouched picture on. Columns:
    measure, n, difference, low, high (nats); below zero a measure finds what the answer rests on.
    """
    rows = trials.rows()
    start = rows[rows.measure == INTACT].groupby("id").log_prob.first()
    heights = {}
    for measure, part in rows[rows.measure != INTACT].groupby("measure", sort=False):
        curve = part.pivot(index="id", columns="amount", values="log_prob")
        curve.insert(0, 0.0, start)
        amounts = curve.columns.to_numpy(float)
        area = np.trapezoid(curve.to_numpy(), amounts, axis=1)
        heights[measure] = pd.Series(area / amounts[-1], curve.index)
    lines = [
        (name, len(own), *tables.difference(own, heights[RANDOM], seed))
        for name, own in heights.items()
        if name != RANDOM
    ]
    return pd.DataFrame(lines, columns=["measure", "n", "difference", "low", "high"])


def matched_noises(image: Tensor, loss: float, seed: int) -> dict[str, Tensor]:
    """Every kind of noise with that information loss; kinds that cannot destroy as much are left out."""
    made = {}
    for kind in NOISES:
        try:
            made[kind] = noised(image, kind, loss, seed)
        except ValueError:
            continue
    return made


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


# --- single pictures, for the dial


@dataclass(frozen=True, eq=False)
class Case:
    """One picture under a growing mask: `shown` (3, H, W) and `probs` (K,) by the number of black pixels."""

    example: Example
    measure: str
    scores: Tensor
    shown: dict[int, Tensor]
    probs: dict[int, Tensor]


def look_at(batches: Sequence[PixelBatch], name: str, measure: str, counts: Sequence[int], seed: int) -> Case:
    """The picture with this id under the masks of every count, by one measure."""
    batch, place = next((b, i) for b in batches for i, e in enumerate(b.examples) if e.id == name)
    example, image = batch.examples[place], batch.images[place].cpu()
    (maps,) = batch.scores([measure]).values()
    scores = maps[place].cpu()
    masks = {n: top_pixels(scores, min(n, scores.numel()), seed=seed) for n in counts}
    shown = {n: masked(image, mask) for n, mask in masks.items()}
    probs = answer_images(batch.model, [example] * len(shown), images=[*shown.values()]).log_probs.exp()
    return Case(example, measure, scores, shown, dict(zip(shown, probs, strict=True)))


def from_fragile(trials: Trials, measure: str) -> list[str]:
    """The ids of rightly answered pictures (of all, if none is), the one with the least P left first.

    trials: under one mask, by this measure among others, and those of the untouched pictures.
    """
    rows = trials.rows()
    right = rows[(rows.measure == INTACT) & (rows.correct == 1)].id
    left = rows[rows.measure == measure].sort_values(["log_prob", "id"])
    return [*(left[left.id.isin(right)] if len(right) else left).id]
