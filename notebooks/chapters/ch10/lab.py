"""Chapter 10: what FI costs. Operations counted by hand, seconds and bytes measured, larger models reckoned.

One multiplication with the addition that follows it counts as 2 operations. N is the number of weights in
linear layers, T the tokens of a prompt, K the number of classes (method 4.7).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from scipy.stats import linregress, quantile_test
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fichapters.bench import (
    FILTER,
    Questions,
    Size,
    fi_by_stored_gradients,
    fi_by_vmap,
    fi_of_weights,
    jacobian_norm,
    resident,
)
from fichapters.bench_pixels import FILTERS, captum_saliency, plain_jacobian
from fichapters.ch03.lab import draw
from fichapters.papers import published
from fichapters.timed import Work, in_turn
from fihelpers.answers import Groups
from fihelpers.evaluate.stats import mean_interval
from fihelpers.influence import SaturationWarning, fi
from fihelpers.jobs.preflight import estimate_scores
from fihelpers.models.language import LanguageModel
from fihelpers.models.vision import VisionModel
from fihelpers.perturb.sparsify import linear_names
from fihelpers.perturb.topshare import BINS, CHUNK, TopShare
from fihelpers.scores import hooks
from fihelpers.scores import weights as scores_of_weights
from fihelpers.scores.inputs import class_grads_of_inputs
from fihelpers.scores.kernels import cpu as tiles
from fihelpers.scores.pixels import image_of, option_letters, score_pixels
from fihelpers.scores.weights import frozen, score_contexts
from fihelpers.tasks import Example

FORWARD, JACOBIAN, FI, STORED = "forward pass", "Jacobian norm", "FI", "K backward passes, .grad kept"
WORKS = (FORWARD, JACOBIAN, FI, STORED)
PRODUCT, WRITTEN, ONE_BY_ONE, VMAP = (
    "matrix product",
    "FI, gradients written out",
    "FI, one by one",
    "torch.func vmap",
)
PIXEL_JACOBIAN, SALIENCY, GRADIENTS = "Jacobian norm", "Captum saliency", "class gradients alone"
SCORE_BYTES = 4  # of a score and of a class gradient, float32
SWEEPS = ("classes", "tokens", "prompts")  # the growths that lines are fitted to


# --- counting by hand


def check(p: SimpleNamespace) -> None:
    """Raise ValueError for settings that cannot be run; the chapter calls it before anything is timed.

    And what `load_task` raises.
    """
    for name in ("SIZE", "SWEPT"):
        size = Size(**getattr(p, name))
        if size.layers < 1 or size.heads < 2 or size.heads % 2 or size.hidden % size.heads:
            raise ValueError(
                f"{name} needs layers, and an even number of heads that divides `hidden`: {size}."
            )
    for name, values in {**{f"GROWTH.{n}": p.GROWTH[n] for n in SWEEPS}, "SIZES": p.SIZES}.items():
        if len(values) < 2:
            raise ValueError(f"{name} needs at least two values, as a line is fitted to them, not {values}.")
    for pair in p.SIZES:
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"SIZES holds pairs of a hidden size and a number of layers, not {pair}.")
    for device, peaks in p.LARGE["hardware"].items():
        if not isinstance(peaks, list) or len(peaks) != 3 or not all(peak > 0 for peak in peaks):
            needed = "three numbers, 10^12 operations/s, GB/s and GB"
            raise ValueError(f"LARGE.hardware needs of {device!r} {needed}, not {peaks}.")
    draw(p.PRECISION["task"], p.PRECISION["subjects"], "val", p.PRECISION["n"], p.SEED)


@dataclass(frozen=True)
class Shape:
    """The sizes of a network of the Llama or Qwen2 family that decide what it costs.

    Biases and norms are left out: they are less than a thousandth of the weights.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True

    @classmethod
    def of(cls, model: LanguageModel) -> Shape:
        c = model.network.config
        return cls(
            c.hidden_size,
            c.intermediate_size,
            c.num_hidden_layers,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.vocab_size,
            c.tie_word_embeddings,
        )

    @property
    def block(self) -> dict[str, int]:
        """The weights of each linear layer of one transformer block."""
        keys = self.hidden * (self.hidden * self.kv_heads // self.heads)
        square, wide = self.hidden**2, self.hidden * self.inner
        return {"q": square, "k": keys, "v": keys, "o": square, "gate": wide, "up": wide, "down": wide}

    @property
    def linear(self) -> int:
        return self.layers * sum(self.block.values())

    @property
    def parameters(self) -> int:
        return self.linear + (1 if self.tied else 2) * self.vocabulary * self.hidden


def passes(work: str, classes: int = 4) -> tuple[int, int]:
    """How often a work pulls gradients back to the inputs of the layers, and to their weights."""
    times = {FORWARD: 0, JACOBIAN: 1, FI: classes - 1, STORED: classes}[work]
    return times, times


def units(work: str, classes: int = 4) -> int:
    """The work in units of 2NT, one forward pass through the linear layers: 1, 3, 2K - 1 or 2K + 1."""
    return 1 + sum(passes(work, classes))


def operations(shape: Shape, tokens: int, work: str, classes: int = 4) -> dict[str, int]:
    """All operations in matrix products that one prompt costs, by part.

    Nothing is pulled back to the input of the first block's q, k and v. FI forms no products of positions
    without a gradient: in the last block only the last position has one, but for k and v, and elsewhere the
    first position's query has none, since it attends to itself alone.
    """
    back, formed = passes(work, classes)
    b, unit = shape.block, 2 * shape.linear * tokens
    begin = 2 * tokens * (b["q"] + b["k"] + b["v"])
    late = 2 * (tokens - 1) * (sum(b.values()) - b["k"] - b["v"])
    spared = late + 2 * (shape.layers - 1) * b["q"] if work == FI else 0
    return {
        "forward": unit,
        "back to the inputs": back * (unit - begin),
        "back to the weights": formed * (unit - spared),
        "attention": (1 + 2 * back) * 4 * tokens**2 * shape.hidden * shape.layers,
        "output head": (1 + back) * 2 * shape.hidden * shape.vocabulary,
    }


def combination(classes: int = 4) -> int:
    """Operations a weight and prompt that turn K - 1 class gradients into damped FI and add it up.

    The metric takes 1 + 2 (K - 2), the score 1, its square, the damping and the ratio 3, the sums 3.
    """
    return 1 + 2 * (classes - 2) + 1 + 3 + 3


def written_out(shape: Shape, classes: int = 4) -> int:
    """Bytes of the class gradients of all linear weights, were they all written out: (K - 1) 4 N."""
    return (classes - 1) * SCORE_BYTES * shape.linear


def tile_bytes(classes: int = 4) -> int:
    """Bytes of the class gradients that a thread holds at a time, in float32."""
    return (classes - 1) * SCORE_BYTES * tiles.ROWS * tiles.COLUMNS


def matrix_bytes(shape: Shape, classes: int = 4) -> int:
    """Bytes of the class gradients of the largest matrix, were they formed all at once."""
    return (classes - 1) * SCORE_BYTES * max(shape.block.values())


def stream_bytes() -> int:
    """Bytes that exact selection works with: a piece as keys, digits and masks (8 bytes each), and counts."""
    return 8 * (4 * CHUNK + BINS)


def count_table(shape: Shape, tokens: int, classes: int = 4) -> pd.DataFrame:
    """The parts of every work in units of one forward pass (2NT), with their sum and the leading term."""
    unit = 2 * shape.linear * tokens
    lines = {w: {k: v / unit for k, v in operations(shape, tokens, w, classes).items()} for w in WORKS}
    table = pd.DataFrame(lines).T.rename_axis("work")
    return table.assign(together=table.sum(axis=1), leading=[units(w, classes) for w in table.index])


def paper_ratio() -> float:
    """FI over Jacobian norm, one image, as the paper's Table 4 has it."""
    return published("cost_fi").value / published("cost_jacobian").value


def counted_by_torch(work: Work) -> int:
    """Operations of the matrix products that really run, attention's two among them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


def check_count(model: LanguageModel, tokens: int) -> pd.DataFrame:
    """The count by hand beside torch's own counter, one prompt of random tokens, K = 4.

    FI first compares its hooks with autograd on a short prompt, once; what a second prompt adds is counted.
    The products of its tiles are none of torch's: the counter sees them where gradients are written out.
    """
    shape = Shape.of(model)
    one, two = (Questions.draw(model, tokens, n) for n in (1, 2))
    runs: dict[str, int] = {
        FORWARD: counted_by_torch(lambda: _forward(one)),
        JACOBIAN: counted_by_torch(lambda: jacobian_norm(one)),
        FI: counted_by_torch(lambda: fi_written_out(two)) - counted_by_torch(lambda: fi_written_out(one)),
        STORED: counted_by_torch(lambda: fi_by_stored_gradients(one)),
    }
    lines = [(w, sum(operations(shape, tokens, w).values()), runs[w]) for w in WORKS]
    table = pd.DataFrame(lines, columns=["work", "by hand", "by torch"]).set_index("work")
    return table.assign(ratio=table["by torch"] / table["by hand"])


def fi_written_out(questions: Questions) -> dict[str, Tensor]:
    """FI of weights whose class gradients are written out, a matrix at a time and by torch, not in tiles."""
    tiled = mock.patch.object(scores_of_weights, "TILED", frozenset[str]())
    with tiled, mock.patch.object(hooks, "BLOCK", 2**40):
        return fi_of_weights(questions, 1)


def _forward(questions: Questions) -> None:
    with torch.no_grad():
        for batch in questions.batches(1):
            questions.model.last_logits(batch)


# --- seconds of weight scores


def fi_of(
    questions: Questions,
    batch_size: int,
    classes: int = 4,
    measures: Sequence[str] = ("FI",),
    save_memory: bool = False,
) -> None:
    """Mean damped FI of every linear weight, for any number of classes."""
    names, tokens = [str(k) for k in range(classes)], [(k + 1,) for k in range(classes)]
    model = questions.model
    contexts = [(b, torch.ones(len(b.index))) for b in questions.batches(batch_size)]
    examples = [Example(str(i), "random", "", tuple(names), None, "") for i in range(len(questions.ids))]
    answers, linear = Groups(tuple(names), tuple(tokens)), linear_names(model.network)
    score_contexts(
        model,
        contexts,
        examples,
        measures,
        FILTER,
        answers,
        linear,
        save_memory=save_memory,
    )


def long_prompts(size: Size, tokens: int, prompts: int, rounds: int) -> pd.DataFrame:
    """Seconds a prompt of FI one prompt at a time, of the works beside it, and of bare matrix products.

    The products are those of one forward pass, with weights of their own in memory: their time for 2NT
    operations is what this machine needs at the least in such shapes. Columns work, round, seconds.
    """
    model = size.model()
    questions = Questions.draw(model, tokens, prompts)
    pairs = [(torch.randn(tokens, w.shape[1]), w.detach()) for w in _matrices(model)]
    works: dict[str, Work] = {
        PRODUCT: lambda: [x @ w.T for _ in range(prompts) for x, w in pairs],
        FORWARD: lambda: _forward(questions),
        JACOBIAN: lambda: jacobian_norm(questions),
        FI: lambda: fi_of_weights(questions, 1),
        WRITTEN: lambda: fi_written_out(questions),
        STORED: lambda: fi_by_stored_gradients(questions),
    }
    return _frame(in_turn(works, dict.fromkeys(works, prompts), rounds))


def short_prompts(size: Size, tokens: int, prompts: int, rounds: int) -> pd.DataFrame:
    """Seconds a prompt of FI in one batch, and of simpler ways that take prompts one by one, or by vmap."""
    model = size.model()
    questions, few, pair = (Questions.draw(model, tokens, n) for n in (prompts, max(1, prompts // 8), 2))
    works: dict[str, Work] = {
        JACOBIAN: lambda: jacobian_norm(few),
        FI: lambda: fi_of_weights(questions, prompts),
        ONE_BY_ONE: lambda: fi_of_weights(few, 1),
        STORED: lambda: fi_by_stored_gradients(few),
        VMAP: lambda: fi_by_vmap(pair),  # it holds K gradients of each sample at once
    }
    counts = dict.fromkeys(works, len(few.ids)) | {FI: prompts, VMAP: 2}
    return _frame(in_turn(works, counts, rounds))


def _matrices(model: LanguageModel) -> list[Tensor]:
    return [model.network.get_parameter(name) for name in linear_names(model.network)]


def _frame(seconds: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    lines = [(work, i, s) for work, found in seconds.items() for i, s in enumerate(found)]
    return pd.DataFrame(lines, columns=["work", "round", "seconds"])


def ratios(timings: pd.DataFrame, of: str, to: str) -> tuple[float, float, float]:
    """Seconds of one work over those of another in the same round: `middle` over the rounds."""
    wide = timings.pivot(index="round", columns="work", values="seconds")
    return middle((wide[of] / wide[to]).tolist())


def middle(found: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the interval of order statistics that holds the median of such rounds at 95 %.

    It asks nothing of the distribution, and a single interruption does not move it where there are nine
    rounds or more. Fewer than six rounds give no such interval: then it is their range.
    """
    ends = quantile_test(found, p=0.5).confidence_interval(0.95)
    if math.isnan(ends.low):
        return statistics.median(found), min(found), max(found)
    return statistics.median(found), float(ends.low), float(ends.high)


def ratio_table(timings: pd.DataFrame, to: str) -> pd.DataFrame:
    """Median seconds of every work, and `ratios` to one of them; n is the number of rounds."""
    lines = []
    for work, part in timings.groupby("work", sort=False):
        lines.append((work, part.seconds.median(), *ratios(timings, str(work), to), len(part)))
    columns = ["work", "seconds", "ratio", "low", "high", "n"]
    return pd.DataFrame(lines, columns=columns).set_index("work")


def over_floor(timings: pd.DataFrame, shape: Shape, tokens: int) -> pd.DataFrame:
    """Every work's time over its floor: its operations at the rate of the matrix products of its round."""
    unit = 2 * shape.linear * tokens
    table = ratio_table(timings, PRODUCT).drop(index=PRODUCT)
    works = [FI if work == WRITTEN else str(work) for work in table.index]
    floor = [sum(operations(shape, tokens, work).values()) / unit for work in works]
    return table[["ratio", "low", "high"]].div(floor, axis=0).assign(floor=floor, n=table.n)


# --- how seconds grow


Timed = dict[tuple[str, int], tuple[Work, int]]  # (work, value): what to call, and its prompts


def sweep(works: Timed, of: str, rounds: int) -> pd.DataFrame:
    """Seconds a prompt of works at several values of one setting, all of them in turn in every round.

    Columns of, work, value, round, seconds.
    """
    named = {f"{work}|{value}": call for (work, value), (call, _) in works.items()}
    counts = {f"{work}|{value}": n for (work, value), (_, n) in works.items()}
    frame = _frame(in_turn(named, counts, rounds))
    split = frame.work.str.split("|", expand=True)
    return frame.assign(of=of, work=split[0], value=split[1].astype(int))


def _both(drawn: Mapping[int, Questions], prompts: int) -> Timed:
    """FI and the Jacobian norm of every weight, one prompt at a time, at each value."""
    works: Timed = {}
    for value, questions in drawn.items():
        works[FI, value] = (partial(fi_of_weights, questions, 1), prompts)
        works[JACOBIAN, value] = (partial(jacobian_norm, questions), prompts)
    return works


def sweep_classes(size: Size, classes: Sequence[int], tokens: int, prompts: int, rounds: int) -> pd.DataFrame:
    """Seconds of FI of every weight against the number of classes, a row each (method 4.7)."""
    questions = Questions.draw(size.model(), tokens, prompts)
    works: Timed = {(FI, k): (partial(fi_of, questions, 1, k), prompts) for k in classes}
    return sweep(works, "classes K", rounds)


def sweep_tokens(size: Size, lengths: Sequence[int], prompts: int, rounds: int) -> pd.DataFrame:
    """Seconds of FI and of the Jacobian norm against the number of tokens of a prompt (method 4.7)."""
    model = size.model()
    drawn = {length: Questions.draw(model, length, prompts) for length in lengths}
    return sweep(_both(drawn, prompts), "tokens T", rounds)


def sweep_prompts(size: Size, counts: Sequence[int], tokens: int, rounds: int) -> pd.DataFrame:
    """Seconds of the whole set, not of a prompt."""
    model = size.model()
    drawn = {count: Questions.draw(model, tokens, count) for count in counts}
    return sweep(_both(drawn, 1), "prompts n", rounds)


def sweep_batches(size: Size, batches: Sequence[int], tokens: int, rounds: int) -> pd.DataFrame:
    """The same prompts, as many as the largest batch holds, in batches of several sizes."""
    prompts = max(batches)
    questions = Questions.draw(size.model(), tokens, prompts)
    works: Timed = {(FI, b): (partial(fi_of_weights, questions, b), prompts) for b in batches}
    return sweep(works, "prompts in a batch", rounds)


def sweep_sizes(sizes: Sequence[Sequence[int]], tokens: int, prompts: int, rounds: int) -> pd.DataFrame:
    """sizes: (hidden size, layers) of models with 64 dimensions a head (at least 2 heads); the value is N."""
    models = [Size(hidden, 3 * hidden, layers, max(2, hidden // 64)).model() for hidden, layers in sizes]
    drawn = {Shape.of(model).linear: Questions.draw(model, tokens, prompts) for model in models}
    return sweep(_both(drawn, prompts), "linear weights N", rounds)


def exponent(swept: pd.DataFrame, work: str) -> tuple[float, float, float]:
    """The slope of log seconds over log value: mean over the rounds and its 95 % t interval.

    One line is fitted to each round, so that the interval knows how the rounds differ.
    """
    rounds = swept[swept.work == work].groupby("round")
    return mean_interval([linregress(np.log(one.value), np.log(one.seconds)).slope for _, one in rounds])


def straight(swept: pd.DataFrame, work: str = FI) -> dict[str, float]:
    """A straight line through the medians over the value: intercept, slope and R squared."""
    part = swept[swept.work == work].groupby("value").seconds.median()
    line = linregress(part.index, part)
    return {"intercept": line.intercept, "slope": line.slope, "r2": line.rvalue**2}


def sweep_table(swept: pd.DataFrame) -> pd.DataFrame:
    """Median, smallest and largest seconds, a row for each sweep, work and value; n is the rounds."""
    keys = ["of", "work", "value"]
    return (
        swept.groupby(keys, sort=False)
        .seconds.agg(seconds="median", low="min", high="max", n="size")
        .reset_index()
    )


def between(swept: pd.DataFrame, first: int, last: int) -> tuple[float, float, float]:
    """FI's seconds at one value over those at another, in the same round: `middle` over the rounds."""
    wide = swept[swept.work == FI].pivot(index="round", columns="value", values="seconds")
    return middle((wide[first] / wide[last]).tolist())


# --- pixels


def time_pixels(
    model: VisionModel, examples: Sequence[Example], batches: Sequence[int], rounds: Sequence[int]
) -> pd.DataFrame:
    """Seconds a batch of FI of every pixel by each filter, and of the works beside it.

    rounds: for each batch size. Columns batch, work, round, seconds.

    Raises ValueError for fewer examples than the largest batch.
    """
    if len(examples) < max(batches):
        raise ValueError(f"{max(batches)} pictures are needed for the largest batch, not {len(examples)}.")
    parts = []
    for batch, turns in zip(batches, rounds, strict=True):
        with frozen(model.network), warnings.catch_warnings():
            warnings.simplefilter("ignore", SaturationWarning)  # exact FI of pixels is (chapter 03)
            works = _pixel_works(model, examples[:batch])
            parts.append(_frame(in_turn(works, dict.fromkeys(works, 1), turns)).assign(batch=batch))
    return pd.concat(parts, ignore_index=True)


def _pixel_works(model: VisionModel, examples: Sequence[Example]) -> dict[str, Work]:
    images = torch.stack([image_of(example) for example in examples]).to(model.device)
    prompts = [example.prompt for example in examples]
    count = len(examples[0].options)
    ask = _pixel_log_probs(model, prompts, count)
    works: dict[str, Work] = {
        PIXEL_JACOBIAN: lambda: plain_jacobian(model, images, prompts, count),
        SALIENCY: lambda: captum_saliency(model, images, prompts, count),
        GRADIENTS: lambda: class_grads_of_inputs(ask, images / 255),
    }
    for spectral in FILTERS:
        works[f"FI {spectral}"] = partial(
            score_pixels, model, examples, ["FI"], spectral, batch_size=len(examples)
        )
    return works


def _pixel_log_probs(model: VisionModel, prompts: Sequence[str], count: int) -> Callable[[Tensor], Tensor]:
    """From images in [0, 1] to log-probabilities of the letters; one prompt serves any number of images."""
    answers = option_letters(model.tokenizer, count)

    def log_probs(x: Tensor) -> Tensor:
        asked = list(prompts) if len(prompts) == len(x) else [prompts[0]] * len(x)
        return answers.log_probs(model.last_logits(x * 255, asked))

    return log_probs


def count_pixels(model: VisionModel, example: Example) -> dict[str, int]:
    """Operations in matrix products, by torch's counter, of one image: forward, Jacobian norm and FI."""
    images, count = image_of(example)[None], len(example.options)
    ask = _pixel_log_probs(model, [example.prompt], count)
    with frozen(model.network):
        with torch.no_grad():
            forward = counted_by_torch(lambda: ask(images / 255))
        return {
            FORWARD: forward,
            JACOBIAN: counted_by_torch(lambda: plain_jacobian(model, images, [example.prompt], count)),
            FI: counted_by_torch(lambda: class_grads_of_inputs(ask, images / 255)),
        }


def by_differences(model: VisionModel, example: Example, pixels: int, levels: Sequence[int]) -> pd.DataFrame:
    """FI of some pixels from log-probabilities alone, beside FI from gradients.

    Central differences of so many grey levels: two forward passes for each channel of a pixel give the
    derivatives of all classes. The pixels lie evenly over the ranking by FI, the highest among them.
    Columns levels, worst (largest difference, relative to the highest FI), pixels, passes (used) and
    passes_all (that all pixels of the image would take).
    """
    image = (image_of(example)[None] / 255).to(model.network.dtype)
    ask = _pixel_log_probs(model, [example.prompt], len(example.options))
    with frozen(model.network):
        grads, probs, predicted = class_grads_of_inputs(ask, image)
    probs, chosen = probs[:, 0], int(predicted[0])
    truth = fi(grads[:, 0].flatten(2), probs, over=0, predicted=chosen, spectral=FILTER)
    ranked = truth.argsort(descending=True)
    places = ranked[torch.linspace(0, len(ranked) - 1, pixels).long()]
    lines = []
    for level in levels:
        slopes = _slopes(ask, image, places, level / 255).to(probs)
        made = fi(slopes, probs, over=0, predicted=chosen, spectral=FILTER)
        worst = float((made - truth[places]).abs().max() / truth.max())
        lines.append((level, worst, pixels, 6 * pixels, 2 * image.numel()))
    return pd.DataFrame(lines, columns=["levels", "worst", "pixels", "passes", "passes_all"])


@torch.no_grad()
def _slopes(ask: Callable[[Tensor], Tensor], image: Tensor, places: Tensor, step: float) -> Tensor:
    """Central differences (K, 3, pixels) of the log-probabilities in the channels of some pixels."""
    moved = image.repeat(6 * len(places), 1, 1, 1).view(len(places), 3, 2, *image.shape[1:])
    for i, place in enumerate(places.tolist()):
        for c in range(3):
            moved[i, c, 0, c].view(-1)[place] += step
            moved[i, c, 1, c].view(-1)[place] -= step
    log_p = torch.cat([ask(part) for part in moved.flatten(0, 2).split(24)]).view(len(places), 3, 2, -1)
    slopes: Tensor = ((log_p[:, :, 0] - log_p[:, :, 1]) / (2 * step)).permute(2, 1, 0)
    return slopes


# --- predicted before it starts

MOMENTS = ["FI", "squared score", "Fisher diagonal"]
RUNS: dict[str, dict[str, Any]] = {  # what `score_weights` is asked for
    "FI, at once": {"measures": ["FI"], "save_memory": False},
    "FI, block by block": {"measures": ["FI"], "save_memory": True},
    "FI and two moments": {"measures": MOMENTS, "save_memory": False},
}


def foreseen(size: Size, tokens: int, prompts: int) -> pd.DataFrame:
    """Bytes and seconds of every one of RUNS, as preflight predicts and as a fresh process measures them.

    Rows by run and "memory, MB" or "time, s"; columns predicted, measured, ratio (measured / predicted)
    and, of memory, over_least: the peak over weights and results, which no way of computing can do without.

    Raises RuntimeError where the process fails, with its last line.
    """
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    code = (
        "import torch; from fichapters.bench import Size; from fichapters.ch10.lab import print_runs; "
        f"torch.set_num_threads({torch.get_num_threads()}); print_runs({size!r}, {tokens}, {prompts})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise RuntimeError(f"memory and time could not be measured: {last}")
    found = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))
    return found.assign(ratio=found.measured / found.predicted).set_index(["run", "what"])


def print_runs(size: Size, tokens: int, prompts: int) -> None:
    """Print what `foreseen` returns, as JSON, but for the ratios; in a process that does nothing else."""
    model = size.model()
    shape, questions = Shape.of(model), Questions.draw(model, tokens, prompts)
    fi_of(Questions.draw(Size(64, 128, 2, 2).model(), 8, 1), 1, measures=MOMENTS, save_memory=True)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model.network.save_pretrained(folder)
        for run, asked in RUNS.items():
            peak, seconds = _taken(questions, asked)
            estimate = estimate_scores(
                folder,
                batch_size=1,
                lengths=[tokens] * prompts,
                out=folder,
                **asked,
            )
            held = SCORE_BYTES * shape.parameters
            least = held + len(asked["measures"]) * SCORE_BYTES * shape.linear
            memory = {"predicted": estimate.memory_bytes / 1e6, "measured": (held + peak) / 1e6}
            memory["over_least"] = (held + peak) / least
            lines.append({"run": run, "what": "memory, MB", **memory})
            lines.append({"run": run, "what": "time, s", "predicted": estimate.seconds, "measured": seconds})
    print(json.dumps(lines))


def _taken(questions: Questions, asked: Mapping[str, Any]) -> tuple[int, float]:
    """Peak bytes beyond what this process held before (the model), and seconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    _forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    fi_of(questions, 1, **asked)
    seconds = time.perf_counter() - start
    return resident("VmHWM") - before, seconds


def _forget_peak() -> None:
    """The highest use of memory so far starts from what is used now. Linux alone offers it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise RuntimeError("this system does not tell a process's peak memory; use Linux.") from error


# --- the top share


def pick_top(count: int, share: float, rounds: int, seed: int) -> tuple[pd.DataFrame, bool, int]:
    """Choose the top share of `count` scores with many ties: by streaming, by `topk` and by a full sort.

    Returns the seconds, whether the streamed choice was that of a full sort, and the number of scores that
    are equal to the lowest one chosen.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, generator=generator).abs_().mul_(64).round_().div_(64)  # a few hundred values
    take = max(1, round(share * count))
    masks: list[Tensor] = []

    def stream() -> None:
        masks[:] = [TopShare(["all"], lambda name: iter(scores.split(CHUNK)), take).mask("all")]

    works: dict[str, Work] = {
        "two passes": stream,
        "topk": lambda: scores.topk(take, sorted=False),
        "full sort": lambda: scores.sort(descending=True),
    }
    timings = _frame(in_turn(works, dict.fromkeys(works, 1), rounds))
    border = float(scores.sort(descending=True).values[take - 1])
    mask = masks[0]
    exact = int(mask.sum()) == take and bool(mask[scores > border].all()) and not mask[scores < border].any()
    return timings, exact, int((scores == border).sum())


# --- what larger models would take


LARGE = {
    "Llama-2-7B": Shape(4096, 11008, 32, 32, 32, 32000, tied=False),
    "Qwen2-7B": Shape(3584, 18944, 28, 28, 4, 152064, tied=False),
    "Llama-2-13B": Shape(5120, 13824, 40, 40, 40, 32000, tied=False),
    "Llama-2-70B": Shape(8192, 28672, 80, 64, 8, 32000, tied=False),
}


def large_models(
    hardware: Mapping[str, Sequence[float]], share: float, tokens: int, classes: int = 4
) -> pd.DataFrame:
    """Seconds and gigabytes that FI of every linear weight would take: reckoned, not measured.

    hardware: {name: [peak rate in 10^12 operations/s, GB/s of its memory, GB of its memory]};
    share: of the peak rate that matrix products reach. bfloat16 weights (2 bytes), float32 result.
    Columns: model, hardware, linear (10^9), operations (10^12), seconds (of the products), traffic (seconds
    to read and write the float32 result once), gradients (seconds to write and read the class gradients,
    were they not combined on the spot), gigabytes, over (what is missing; 0 if it fits) and devices.
    """
    lines = []
    for name, shape in LARGE.items():
        count = sum(operations(shape, tokens, FI, classes).values())
        held = (2 * shape.parameters + SCORE_BYTES * shape.linear) / 1e9
        for device, (tflops, gb_per_s, gigabytes) in hardware.items():
            rate = gb_per_s * 1e9
            lines.append(
                {
                    "model": name,
                    "hardware": device,
                    "linear": shape.linear / 1e9,
                    "operations": count / 1e12,
                    "seconds": count / (share * tflops * 1e12),
                    "traffic": 2 * SCORE_BYTES * shape.linear / rate,
                    "gradients": 2 * written_out(shape, classes) / rate,
                    "gigabytes": held,
                    "over": max(0.0, held - gigabytes),
                    "devices": math.ceil(held / gigabytes),
                }
            )
    return pd.DataFrame(lines)


def readable_large(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `large_models` with its units, by model and device."""
    titles = {
        "linear": "linear weights, 10⁹",
        "operations": "operations, 10¹²",
        "seconds": "products, s",
        "traffic": "result read and written, s",
        "gradients": "class gradients written out, s more",
        "gigabytes": "weights and result, GB",
        "over": "missing on one device, GB",
    }
    digits = dict.fromkeys(table.columns[2:], 1) | dict.fromkeys(["seconds", "traffic", "gradients"], 3)
    return table.set_index(["model", "hardware"]).round(digits).rename(columns=titles)


# --- what the claims rest on


Interval = tuple[float, float, float]


def claimed_ratios(
    weights: Mapping[str, tuple[Interval, int]],
    pixels: Mapping[tuple[str, str], tuple[Interval, int]],
    counted: Mapping[str, float],
    differences: pd.DataFrame,
    cost: Mapping[str, tuple[Interval, int]],
) -> pd.DataFrame:
    """What claims 24 and 25 and the question R10 rest on: of, measure, setting, n, value, low, high.

    weights, pixels: FI over Jacobian norm by setting (pixels: by measure and setting), from `ratios`, with
    the rounds. counted: the same of operations. differences: from `by_differences`; its value is the median
    over the steps, with their range. cost: what is answered to R10, each with its n.
    """
    worst, n = differences.worst, int(differences.pixels.iloc[0])
    blind = (float(worst.median()), float(worst.min()), float(worst.max()))
    lines = [
        *(("pixels", *place, n, *found) for place, (found, n) in pixels.items()),
        *(("weights", "", setting, n, *found) for setting, (found, n) in weights.items()),
        *(("operations", "", setting, 1, *(value,) * 3) for setting, value in counted.items()),
        ("differences", "", "FI of pixels by central differences", n, *blind),
        *(("cost", "", setting, n, *found) for setting, (found, n) in cost.items()),
    ]
    return pd.DataFrame(lines, columns=["of", "measure", "setting", "n", "value", "low", "high"])


def machine_now() -> dict[str, Any]:
    """Cores, threads and load, without which no second means anything."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return {"cores": os.cpu_count() or 1, "threads": torch.get_num_threads(), "load": round(load, 2)}
