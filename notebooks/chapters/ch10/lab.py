"""Chapter 10: what the lesson about cost leaves out of its cells: the full count, peers, bytes, large models.

One multiplication with the addition that follows it counts as 2 operations. N is the number of weights in
linear layers, T the tokens of a prompt, K the number of classes (method 4.7).
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pandas as pd
import torch
from scipy.stats import quantile_test
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PreTrainedConfig

from fichapters import peers
from fichapters.papers import published
from fichapters.peers import FI, FILTER, FILTERS, FORWARD, JACOBIAN, LLAMA, STORED, Questions, Size
from fihelpers.influence import fi
from fihelpers.jobs.preflight import Estimate, estimate_scores
from fihelpers.models.language import WEIGHTS, LanguageModel, bundled_models
from fihelpers.models.vision import VisionModel
from fihelpers.scores import hooks
from fihelpers.scores import weights as scores_of_weights
from fihelpers.scores.hooks import frozen
from fihelpers.scores.inputs import class_grads_of_inputs
from fihelpers.scores.pixels import PixelBatch, pixel_batches
from fihelpers.tasks import Example, load_task

WORKS = (FORWARD, JACOBIAN, FI, STORED)
PRODUCT, GRADIENTS = "matrix product", "class gradients alone"


def check(p: SimpleNamespace) -> None:
    """Raise ValueError for settings that cannot be run; the chapter calls it before anything is timed."""
    for name in ("SIZE", "SWEPT"):
        size = Size(**getattr(p, name))
        if size.layers < 1 or size.heads < 2 or size.heads % 2 or size.hidden % size.heads:
            raise ValueError(
                f"{name} needs layers, and an even number of heads that divides `hidden`: {size}."
            )
    if len(p.BATCHES) != len(p.BATCH_ROUNDS):
        raise ValueError(
            f"BATCH_ROUNDS needs a number for each of BATCHES {p.BATCHES}, not {p.BATCH_ROUNDS}."
        )
    pictures(p)
    if p.LARGE not in LARGE:
        raise ValueError(f"LARGE knows no {p.LARGE!r}, but {', '.join(LARGE)}.")
    for device, rates in p.HARDWARE.items():
        if not isinstance(rates, list) or len(rates) != 3 or not all(rate > 0 for rate in rates):
            needed = "three numbers, 10^12 operations/s, GB/s and GB"
            raise ValueError(f"HARDWARE needs of {device!r} {needed}, not {rates}.")


def pictures(p: SimpleNamespace) -> list[Example]:
    """As many bundled pictures as the largest batch holds; raises what `load_task` raises."""
    return list(load_task("bundled-images", p.SUBJECT, "test", max(p.BATCHES), p.SEED))


# --- the full count


def operations(config: Any, tokens: int, work: str, classes: int = 4) -> dict[str, int]:
    """All operations in matrix products that one prompt costs, by part.

    Nothing is pulled back to the input of the first block's q, k and v. FI forms no products of positions
    without a gradient: in the last block only the last position has one, but for k and v, and elsewhere the
    first position's query has none, since it attends to itself alone.
    """
    _, back, formed = peers.passes(work, classes)
    b, unit, depth = peers.block(config), 2 * peers.linear(config) * tokens, config.num_hidden_layers
    begin = 2 * tokens * (b["q"] + b["k"] + b["v"])
    late = 2 * (tokens - 1) * (sum(b.values()) - b["k"] - b["v"])
    spared = late + 2 * (depth - 1) * b["q"] if work == FI else 0
    return {
        "forward": unit,
        "back to the inputs": back * (unit - begin),
        "back to the weights": formed * (unit - spared),
        "attention": (1 + 2 * back) * 4 * tokens**2 * config.hidden_size * depth,
        "output head": (1 + back) * 2 * config.hidden_size * config.vocab_size,
    }


def count_table(model: LanguageModel, tokens: int) -> pd.DataFrame:
    """Every work's operations in forward passes (2NT), by passes, in full by hand and by torch's counter, and
    in full in Jacobian norms.

    FI first compares its hooks with autograd on a short prompt, once; what a second prompt adds is counted.
    The products of its tiles are none of torch's: the counter sees them where gradients are written out.
    """
    config = model.network.config
    one, two = (Questions.draw(model, tokens, n) for n in (1, 2))
    runs = {
        FORWARD: counted_by_torch(lambda: forward(one)),
        JACOBIAN: counted_by_torch(lambda: peers.jacobian_norm(one)),
        FI: counted_by_torch(lambda: fi_written_out(two)) - counted_by_torch(lambda: fi_written_out(one)),
        STORED: counted_by_torch(lambda: peers.fi_by_stored_gradients(one)),
    }
    unit = 2 * peers.linear(config) * tokens
    full = {work: sum(operations(config, tokens, work).values()) for work in WORKS}
    lines = [
        (w, sum(peers.passes(w)), full[w] / unit, runs[w] / unit, full[w] / full[JACOBIAN]) for w in WORKS
    ]
    columns = ["work", "passes", "in full", "by torch", "Jacobian norms"]
    return pd.DataFrame(lines, columns=columns).set_index("work")


def counted_by_torch(work: Callable[[], object]) -> int:
    """Operations of the matrix products that really run, attention's two among them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


# --- what is timed


def forward(questions: Questions) -> None:
    """One forward pass of each prompt, nothing kept."""
    with torch.no_grad():
        for batch in questions.batches(1):
            questions.model.last_logits(batch)


def layers(model: LanguageModel, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Random inputs (tokens, inputs) and the weights (outputs, inputs) of each linear layer."""
    weights = [weight.detach() for weight in peers.weights_of(model).values()]
    return [(torch.randn(tokens, w.shape[1]), w) for w in weights]


def fi_written_out(questions: Questions) -> dict[str, Tensor]:
    """FI of weights whose class gradients are written out, a matrix at a time and by torch, not in tiles."""
    tiled = mock.patch.object(scores_of_weights, "TILED", frozenset[str]())
    with tiled, mock.patch.object(hooks, "BLOCK", 2**40):
        return peers.fi_of_weights(questions)


def class_grads(batch: PixelBatch) -> Tensor:
    """The class gradients (K, B, 3, H, W) alone, of which FI of pixels is made, each time anew."""
    return replace(batch).grads.class_grads


# --- ratios


def middle(found: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the interval of order statistics that holds the median of such rounds at 95 %.

    It asks nothing of the distribution, and a single interruption does not move it where there are nine
    rounds or more. Fewer than six rounds give no such interval: then it is their range.
    """
    ends = quantile_test(found, p=0.5).confidence_interval(0.95)
    if math.isnan(ends.low):
        return statistics.median(found), min(found), max(found)
    return statistics.median(found), float(ends.low), float(ends.high)


def middles(rounds: pd.DataFrame) -> pd.DataFrame:
    """`middle` of each column (rows are rounds): index work, columns ratio, low, high and n."""
    lines = [(work, *middle(rounds[work].tolist()), len(rounds)) for work in rounds]
    return pd.DataFrame(lines, columns=["work", "ratio", "low", "high", "n"]).set_index("work")


def growth_table(timings: pd.DataFrame, model: LanguageModel) -> pd.DataFrame:
    """Median, smallest and largest seconds a prompt of each sweep and value, beside FI's operations.

    timings: whose works are (sweep, value, tokens, classes). Columns of, value, seconds, low, high, n and
    operations (of a prompt).
    """
    lines = []
    for (of, value, tokens, classes), part in timings.groupby("work", sort=False):
        seconds, count = part.seconds, sum(operations(model.network.config, tokens, FI, classes).values())
        lines.append((of, value, seconds.median(), seconds.min(), seconds.max(), len(part), count))
    return pd.DataFrame(lines, columns=["of", "value", "seconds", "low", "high", "n", "operations"])


def paper_ratios() -> dict[str, float]:
    """Seconds over those of the Jacobian norm, one image, as the paper's Table 4 has them."""
    keys = {"FI exact": "cost_fi", "Captum saliency": "cost_saliency"}
    return {work: published(key).value / published("cost_jacobian").value for work, key in keys.items()}


def claimed_ratios(
    p: SimpleNamespace,
    pixels: Mapping[str, pd.DataFrame],
    weights: Mapping[str, pd.DataFrame],
    pixel_count: Mapping[str, float],
    counted: pd.DataFrame,
    differences: pd.DataFrame,
    floor: pd.DataFrame,
    foreseen: pd.DataFrame,
) -> pd.DataFrame:
    """What claims 24 and 25 and the question R10 rest on: of, measure, setting, n, value, low, high.

    With a MODEL the bundled model of pictures has no line: what it costs is told by a run without one.
    pixels, weights: from `middles`, in times of the Jacobian norm, by setting. pixel_count: from
    `count_pixels`. counted: from `count_table`. differences: from `by_differences`; the value is the median
    over the steps, with their range. floor: from `middles`, in times of the matrix products of a forward
    pass. foreseen: from `foreseen`.
    """
    worst = differences.worst
    blind = (int(differences.pixels.iloc[0]), worst.median(), worst.min(), worst.max())
    full, ends = counted["in full"], ["ratio", "low", "high"]
    over = (int(floor.n[FI]), *floor.loc[FI, ends] / full[FI])
    peak = foreseen.over_least["FI, block by block", "memory, MB"]
    of_pixels = [(s, t[t.index.str.startswith(FI)]) for s, t in pixels.items()]
    lines: list[tuple[Any, ...]] = [
        *(("pixels", i, s, int(r.n), *r[ends]) for s, t in of_pixels for i, r in t.iterrows()),
        *(("weights", "", s, int(t.n[FI]), *t.loc[FI, ends]) for s, t in weights.items()),
        ("operations", "", "operations, pixels", 1, *[pixel_count[GRADIENTS]] * 3),
        ("operations", "", "operations, weights", 1, *[full[FI] / full[JACOBIAN]] * 3),
        ("differences", "", "FI of pixels by central differences", *blind),
        ("cost", "", "FI of weights, operations over a forward pass", 1, *[full[FI]] * 3),
        ("cost", "", "FI of weights, time over its matrix products", *over),
        ("cost", "", "FI of weights, peak over weights and result", 1, *[peak] * 3),
    ]
    table = pd.DataFrame(lines, columns=["of", "measure", "setting", "n", "value", "low", "high"])
    if p.MODEL and p.SEEING in bundled_models():
        table = table[~table.setting.str.contains("pixels") & (table.of != "pixels")]
    return table.reset_index(drop=True)


def beside(both: pd.DataFrame) -> pd.DataFrame:
    """The claimed ratios of FI of weights, medians and ranges in words: a row a ratio, a column a model.

    both: `claimed_ratios` by `real.both`.
    """
    shown = both[both.of.isin(["weights", "operations", "cost"]) & ~both.setting.str.contains("pixels")]
    ways = shown.setting.str.contains("batch").map({True: "in batches", False: "one by one"})
    named = {"operations, weights": "operations over the Jacobian norm"}
    about = shown.setting.where(shown.of != "weights", "time over the Jacobian norm, " + ways).replace(named)
    ends = zip(shown.value, shown.low, shown.high, strict=True)
    words = [f"{x:.2f} ({low:.2f} to {high:.2f})" if low < high else f"{x:.2f}" for x, low, high in ends]
    told = shown.assign(ratio=about.str.removeprefix("FI of weights, "), words=words)
    told["model"] = told.model.str.replace("\n", ", ")
    order = [list(dict.fromkeys(told[column])) for column in ("ratio", "model")]
    return told.pivot(index="ratio", columns="model", values="words").loc[order[0], order[1]]


# --- pixels


def count_pixels(model: VisionModel, example: Example) -> dict[str, float]:
    """FI's operations over those of the Jacobian norm, one image, by torch's counter of matrix products.

    The same for class gradients alone as for each filter, as the algebra is no matrix product.
    """
    (batch,) = pixel_batches(model, [example])
    with frozen(model.network):
        ours, peer = (counted_by_torch(partial(f, batch)) for f in (class_grads, peers.plain_jacobian))
    ratio = ours / peer
    return dict.fromkeys([GRADIENTS, *(f"FI {spectral}" for spectral in FILTERS)], ratio)


def by_differences(model: VisionModel, example: Example, pixels: int, levels: Sequence[int]) -> pd.DataFrame:
    """FI of some pixels from log-probabilities alone, beside FI from gradients.

    Central differences of so many grey levels: two forward passes for each channel of a pixel give the
    derivatives of all classes. The pixels lie evenly over the ranking by FI, the highest among them.
    Columns levels, worst (largest difference, relative to the highest FI), pixels, passes (used) and
    passes_all (that all pixels of the image would take).
    """
    (batch,) = pixel_batches(model, [example])
    image = (batch.images / 255).to(model.network.dtype)

    def ask(x: Tensor) -> Tensor:
        return batch.log_probs(x, torch.zeros(len(x), dtype=torch.int64))

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

RUNS = {"FI, at once": False, "FI, block by block": True}  # save_memory


def foreseen(model: LanguageModel, tokens: int, prompts: int) -> pd.DataFrame:
    """Bytes and seconds of each of RUNS, as preflight predicts and as they are measured.

    Rows by run and "memory, MB" or "time, s"; columns predicted, measured, over_least (of memory: the peak
    over weights and results, which no way of computing can do without) and ratio (measured / predicted).
    """
    questions, lines = Questions.draw(model, tokens, prompts), list[tuple[Any, ...]]()
    with tempfile.TemporaryDirectory() as folder:
        model.network.save_pretrained(folder)
        for run, save in RUNS.items():
            peak, start = peers.peak_bytes(questions, save), time.perf_counter()
            peers.fi_of_weights(questions, save_memory=save)
            seconds = time.perf_counter() - start
            settings: dict[str, Any] = {"measures": ["FI"], "save_memory": save, "batch_size": 1}
            estimate = estimate_scores(folder, lengths=[tokens] * prompts, out=folder, **settings)
            over = peak / peers.least_bytes(model)
            lines.append((run, "memory, MB", estimate.memory_bytes / 1e6, peak / 1e6, over))
            lines.append((run, "time, s", estimate.seconds, seconds, math.nan))
    found = pd.DataFrame(lines, columns=["run", "what", "predicted", "measured", "over_least"])
    return found.assign(ratio=found.measured / found.predicted).set_index(["run", "what"])


# --- larger models, by their configurations

LARGE: dict[str, PreTrainedConfig] = {
    "Llama-2-7B": LLAMA,
    "Llama-2-70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        dtype="bfloat16",
    ),
}


@contextlib.contextmanager
def described(name: str) -> Iterator[Path]:
    """A folder with the configuration of one of LARGE and no weights: enough for a forecast."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        LARGE[name].save_pretrained(folder)
        (folder / WEIGHTS).touch()  # the name of the file is looked for, not what is in it
        yield folder


def gigabytes(estimate: Estimate) -> dict[str, float]:
    """What an estimate says of memory, in GB, by part and together."""
    (parts,) = estimate.parts.values()
    return {what: size / 1e9 for what, size in {**parts, "together": estimate.memory_bytes}.items()}
