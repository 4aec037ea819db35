"""What chapter 05 does not write out: wordings, pictures, readings of its trials (method 4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fichapters.ch04 import lab as pixels
from fichapters.tables import average
from fihelpers.data import check_file, data_folder
from fihelpers.evaluate.stats import paired_difference, spearman, wilson
from fihelpers.models.vision import VisionModel
from fihelpers.scores.pixels import Grouping, image_of
from fihelpers.tasks import Example, image_prompt, with_instruction
from fihelpers.trials import Trials

FILE = "prompts.yaml"
NONE = "no instruction"
NEUTRAL, AGGRESSIVE, SAFE, CONTROL, OWN = "neutral", "aggressive", "safe", "control", "your own"
TRAINED, UNSEEN, FIRST = "trained", "unseen", "first"
COMPARED = (NEUTRAL, AGGRESSIVE, SAFE)
FIRSTS = tuple(f"{kind} 1" for kind in COMPARED)
UNRELATED = "Please remember to water all the plants"  # as many words as the first aggressive wording
LETTERS = "letters"  # as classes of an answer
STATISTICS = (  # of claim 13, under the letters
    "ceiling", "damped mean", "damped max", "damped share mean", "damped share max",
    "slope mean", "slope max",
)  # fmt: skip
TOP_STATISTICS = ("top mean", "top max", "top share mean", "top share max")
LOWEST, HIGHEST, BINS = -12, 2, 140  # of log10 FI, for the distributions
RESAMPLES = 20_000  # tails of corrected intervals need many
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


# --- pictures and prompts


def load_pictures(
    task: str, subjects: Sequence[str], n_each: int, seed: int
) -> tuple[list[Example], list[str]]:
    """As of chapter 04, with subjects taking turns."""
    examples, skipped = pixels.load_pictures(task, subjects, n_each, seed)
    return [example for place in range(n_each) for example in examples[place::n_each]], skipped


def check(p: SimpleNamespace, pictures: Sequence[Example]) -> None:
    """Refuse parameters that the pictures cannot serve, before a model is opened. Raises ValueError."""
    if p.N_MAPS > p.N_ASKED:
        raise ValueError(f"N_MAPS is {p.N_MAPS}, more than the {p.N_ASKED} pictures of N_ASKED; lower it.")
    fewest = min(image_of(example)[0].numel() for example in pictures)
    if max(p.MASKED) > fewest:
        raise ValueError(f"MASKED holds {max(p.MASKED)}, but the smallest picture has {fewest} pixels.")


def prompts(own: str = "") -> list[Prompt]:
    """No instruction, the wordings of each kind, controls, and the reader's own, if there is one.

    The first aggressive and the first safe wording are those of the paper's earlier version, verbatim ("v1"
    in ``data/prompts.yaml``). Controls are an unrelated sentence, and these two backwards and after the
    question. Raises ValueError for a damaged file.
    """
    path = data_folder() / FILE
    check_file(path)
    found = [Prompt(NONE, CONTROL, CONTROL, "")]
    for kind, texts in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        trained = dict.fromkeys([*filter(None, [texts.get("v1")]), *texts["trained"]])
        found += [Prompt(f"{kind} {i}", kind, TRAINED, text) for i, text in enumerate(trained, 1)]
        found += [Prompt(f"{kind} new {i}", kind, UNSEEN, text) for i, text in enumerate(texts["unseen"], 1)]
    named = {prompt.name: prompt.text for prompt in found}
    found.append(Prompt("unrelated", CONTROL, CONTROL, UNRELATED))
    first = {kind: named[f"{kind} 1"] for kind in (AGGRESSIVE, SAFE)}
    for kind, text in first.items():
        found.append(Prompt(f"{kind} backwards", CONTROL, CONTROL, " ".join(reversed(text.split()))))
    found += [Prompt(f"{kind} after", CONTROL, CONTROL, text, after=True) for kind, text in first.items()]
    return [*found, Prompt(OWN, OWN, UNSEEN, own)] if own else found


# --- what a map is like


def histogram(maps: Mapping[str, Iterable[Tensor]]) -> dict[str, np.ndarray]:
    """Counts of pixels by the log10 of their score, for each measure: measure, log10 (middles), count."""
    edges = np.linspace(LOWEST, HIGHEST, BINS + 1)
    counts = []
    for scores in maps.values():
        flat = torch.cat([one.flatten() for one in scores]).double()
        logs = flat.clamp(10.0**LOWEST, 10.0**HIGHEST).log10().cpu().numpy()
        counts.append(np.histogram(logs, BINS, (LOWEST, HIGHEST))[0])
    return {
        "measure": np.repeat([*maps], BINS),
        "log10": np.tile((edges[1:] + edges[:-1]) / 2, len(counts)),
        "count": np.concatenate(counts),
    }


def numbers(trials: Trials) -> pd.DataFrame:
    """A row for each prompt and picture: the statistics under the letters, and those of exact FI under the
    likeliest tokens and the rest, as "top …", where these were taken.

    "… share" is a statistic over its ceiling: what is left without the odds.
    """
    rows = trials.where(of="pictures").rows()
    found = rows[rows.classes == LETTERS]
    wide = rows[rows.classes != LETTERS].set_index(["prompt", "id"])
    wide = wide.filter(regex="^(ceiling|exact )").rename(columns=lambda c: f"top {c.removeprefix('exact ')}")
    found = found.join(wide, on=["prompt", "id"])
    shares = {
        f"{name} share {stat}": found[f"{name} {stat}"] / found[ceiling]
        for name, ceiling in (("exact", "ceiling"), ("damped", "ceiling"), ("top", "top ceiling"))
        for stat in ("mean", "median", "max")
    }
    return found.assign(**shares)


# --- the paired shift


def contrasts(found: pd.DataFrame, seed: int) -> pd.DataFrame:
    """How many times larger each statistic is under aggressive and safe instructions than under neutral ones.

    found: of `numbers`. The factor is the geometric mean over pictures of the ratio, its interval a bootstrap
    over pictures at the level 1 - 0.05 / family (Bonferroni): all comparisons are one family. `rises` is the
    share of pictures where the statistic grows. Columns: kind, group, statistic, factor, low, high, rises, n,
    family.
    """
    wanted = [(group, STATISTICS) for group in (TRAINED, UNSEEN, FIRST)] + [(FIRST, TOP_STATISTICS)]
    rows = [(kind, group, s) for group, names in wanted for kind in (AGGRESSIVE, SAFE) for s in names]
    lines = []
    for kind, group, statistic in rows:
        # of each picture the mean over a kind's wordings, or the first wording of each kind alone
        chosen = found.prompt.isin(FIRSTS) if group == FIRST else found.group == group
        logs = _logs(found[chosen], statistic, "kind")
        change = (logs[kind] - logs[NEUTRAL]).to_numpy()
        values = _factor(change, seed, len(rows))
        lines.append((kind, group, statistic, *values, (change > 0).mean(), len(change), len(rows)))
    names = ["kind", "group", "statistic", "factor", "low", "high", "rises", "n", "family"]
    return pd.DataFrame(lines, columns=names)


def against_none(found: pd.DataFrame, statistics: Sequence[str], seed: int) -> pd.DataFrame:
    """Factor of each statistic under every prompt against no instruction, corrected for their number.

    Columns: prompt, kind, group, statistic, factor, low, high, n.
    """
    named = found[["prompt", "kind", "group"]].drop_duplicates()
    named = named[named.prompt != NONE]
    lines = []
    for statistic in statistics:
        logs = _logs(found, statistic, "prompt")
        for prompt in named.itertuples(index=False):
            change = (logs[prompt.prompt] - logs[NONE]).to_numpy()
            values = _factor(change, seed, len(named) * len(statistics))
            lines.append((*prompt, statistic, *values, len(change)))
    names = ["prompt", "kind", "group", "statistic", "factor", "low", "high", "n"]
    return pd.DataFrame(lines, columns=names)


def _logs(found: pd.DataFrame, statistic: str, by: str) -> pd.DataFrame:
    """The log of a statistic, a row a picture, a column for each prompt, or the mean of each kind's."""
    logs = np.log(found[statistic].clip(lower=SMALLEST))
    return found.assign(log=logs).pivot_table(index="id", columns=by, values="log")


def _factor(change: np.ndarray, seed: int, family: int) -> np.ndarray:
    """The factor that a mean change of logs is, low, high: a bootstrap over pictures, for one of a family."""
    level = 1 - 0.05 / family
    return np.exp(paired_difference(change, 0 * change, seed=seed, resamples=RESAMPLES, level=level))


# --- closeness


@torch.no_grad()
def closeness(model: VisionModel, examples: Sequence[Example], known: Sequence[Prompt]) -> pd.DataFrame:
    """Cosine between a picture and the text before the options, within the model (ours; no CLIP here).

    The picture is the mean of its image tokens' features as the language model gets them, the text (the
    instruction and the question) the mean of its tokens' embeddings. A row a picture, a column a prompt.
    """
    embed = model.network.get_input_embeddings()
    near: dict[str, list[float]] = {prompt.name: [] for prompt in known}
    for example in examples:
        inputs = model.preprocess([image_of(example).to(model.device)])
        inputs["pixel_values"] = inputs["pixel_values"].to(model.network.dtype)
        (tokens,) = model.network.model.get_image_features(**inputs).pooler_output
        feature = tokens.float().mean(0)
        for prompt in known:
            order = (example.question, prompt.text) if prompt.after else (prompt.text, example.question)
            ids = model.tokenizer("\n".join(filter(None, order)), return_tensors="pt")["input_ids"]
            text = embed(ids.to(model.device))[0].float().mean(0)
            near[prompt.name].append(float(cosine_similarity(feature, text, 0)))
    return pd.DataFrame(near, index=[example.id for example in examples])


def closeness_correlations(
    near: pd.DataFrame, found: pd.DataFrame, statistic: str, seed: int, resamples: int = 1000
) -> pd.DataFrame:
    """Spearman's correlation of the changes of closeness and of a statistic's log, against no instruction.

    near: of `closeness`; found: of `numbers`. Over all pairs of picture and wording; over wordings within a
    picture (mean over pictures); and over pictures within a wording (mean over wordings), with bootstrap
    intervals over pictures. Columns: over, value, low, high, n.
    """
    logs = _logs(found, statistic, "prompt")
    names = [name for name in near if name != NONE]
    x, y = ((t[names].sub(t[NONE], axis=0)).loc[logs.index].to_numpy() for t in (near, logs))
    forms = {  # pandas leaves out a picture or a wording whose values are all alike
        "all pairs": lambda a, b: float(spearman(a.ravel(), b.ravel())),
        "wordings within a picture": lambda a, b: pd.Series(spearman(a, b)).mean(),
        "pictures within a wording": lambda a, b: pd.Series(spearman(a.T, b.T)).mean(),
    }
    draws = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    lines = []
    for over, form in forms.items():
        low, high = np.nanquantile([form(x[d], y[d]) for d in draws], [0.025, 0.975])
        lines.append((over, form(x, y), low, high, x.size))
    return pd.DataFrame(lines, columns=["over", "value", "low", "high", "n"])


# --- masks


def random_scores(images: Sequence[Tensor], over: Grouping, patch: int, seed: int) -> list[Tensor]:
    """A random score for each pixel, or each patch, of each picture, seeded by the picture's place."""
    found = []
    for i, image in enumerate(images):
        generator = torch.Generator().manual_seed(seed + i)
        height, width = image.shape[-2:]
        pixels = torch.rand(height, width, generator=generator)
        patches = torch.rand(-(-height // patch), -(-width // patch), generator=generator)
        found.append(pixels if over == "pixel" else patches)
    return found


def flip_table(trials: Trials) -> pd.DataFrame:
    """Share of answers that flip under every mask, with Wilson's interval: its labels, n, flips, share, …"""
    lines = []
    for trial in trials.tried:
        flipped = trial.values["flipped"]
        n, flips = len(flipped), int(flipped.sum())
        lines.append((*trial.labels.values(), n, flips, flips / n, *wilson(flips, n)))
    return pd.DataFrame(lines, columns=[*trial.labels, "n", "flips", "share", "low", "high"])


def readings(found: pd.DataFrame, moved: pd.DataFrame, damped: str, seed: int) -> pd.DataFrame:
    """What the maps are like, in a few numbers: reading, measure, value, low, high, n.

    found: of `numbers`; moved: of `against_none`; damped: the name of damped FI. The median over the ceiling
    has the least and the largest picture in place of an interval, outliers have Wilson's, means a bootstrap.
    """
    median = found[found.prompt.isin(FIRSTS)]["exact share median"]
    lines: list[tuple[Any, ...]] = [
        ("median pixel over the ceiling", "FI exact", median.mean(), median.min(), median.max(), len(median))
    ]
    safe = found[found.prompt == f"{SAFE} 1"]
    for measure, name in ((damped, "damped"), ("FI exact", "exact")):
        count = int((safe[f"{name} outliers"] > 0).sum())
        share = (count / len(safe), *wilson(count, len(safe)))
        lines.append(("pictures with outliers", measure, *share, len(safe)))
    for measure, held in ((damped, safe["damped held"]), ("FI exact, top 8", safe["top held"])):
        lines.append(("held by the highest hundredth", measure, *average(held, seed), len(held)))
    missed = float(((moved.low > 1) | (moved.high < 1)).sum())
    lines.append(("prompts and statistics that moved", damped, missed, missed, missed, len(moved)))
    return pd.DataFrame(lines, columns=["reading", "measure", "value", "low", "high", "n"])
