"""``python -m fihelpers bench``: what FI costs, beside simpler ways of computing the same, in one run.

Every row of the table sets a piece of work beside a peer that ran in turn with it, round by round, so that a
busy machine slows both; the ratio is the median over the rounds, with the smallest and the largest. The
floors count the multiplications of matrices alone (2 operations for each weight and token, 1 of them an
addition): a forward pass is one unit, and so is pulling a gradient back to the inputs or to the weights.
A ratio may lie on the far side of its floor, as the peer too does more than multiply: plain autograd writes
every gradient of a weight to memory, FI does not.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from transformers import LlamaConfig

from fichapters import peers, runs
from fichapters.peers import FI, FILTERS, JACOBIAN, LLAMA, STORED, Questions, Size, fi_of_weights
from fihelpers.data import write_atomically
from fihelpers.influence import SaturationWarning
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.perturb.topshare import CHUNK, TopShare
from fihelpers.scores.hooks import frozen
from fihelpers.scores.pixels import pixel_batches, score_pixels
from fihelpers.tasks import Example, load_task

UNITS = {work: sum(peers.passes(work)) for work in (JACOBIAN, FI, STORED)}
PIXEL_GOALS = {1: 1.8, 32: 2.3}  # times the Jacobian norm, by batch size
ON_GPU = 1.5  # for one picture, where the paper takes 1.97 times as long (method 4.7)
PLAIN, SALIENCY = "Jacobian norm, plain autograd", "saliency, Captum"
SORT = "full sort"
THREE = ("FI", JACOBIAN, "SNIP")
H100_SECONDS = 0.12  # asked for of a sample
MINUTE = 60.0  # seconds of one core, asked of a chapter; and of those that may take longer:
LONGER = dict.fromkeys(("04_fragile_pixels", "09_merging", "10_cost"), 90.0)
BUSY = 2.5  # times as long a chapter may take beside a process at work
PRODUCTS, ASKED = "its products at the measured rate", f"{H100_SECONDS} s a sample (asked of an H100)"

Work = Callable[[], object]
Works = Mapping[str, tuple[Work, int]]  # by name, each with how many samples it handles


Row = dict[str, Any]  # a line of the table, see `beside`


def in_turn(works: Works, rounds: int) -> pd.DataFrame:
    """Seconds a sample of each work (a column), all of them once in every round, after a round to warm up.

    A GPU is waited for before and after.
    """
    lines = []
    for _ in range(rounds + 1):
        seconds = {}
        for name, (work, samples) in works.items():
            _wait()
            start = time.perf_counter()
            work()
            _wait()
            seconds[name] = (time.perf_counter() - start) / samples
        lines.append(seconds)
    return pd.DataFrame(lines[1:])


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def beside(
    work: str,
    seconds: pd.DataFrame,
    ours: str,
    peer: str,
    goal: float | None = None,
    floor: float | None = None,
    faster: bool = False,
    note: str = "",
) -> Row:
    """How the seconds of a piece of work, one sample, compare with a peer's, both timed by `in_turn`.

    ratio is work / peer, or peer / work where `faster`; low and high are its extremes over the rounds; met
    says whether it keeps to the goal. note: what else was counted.
    """
    mine, its = seconds[ours], seconds[peer]
    ratios = its / mine if faster else mine / its
    ratio = ratios.median()
    row = {"work": work, "peer": peer, "seconds": mine.median(), "peer seconds": its.median()}
    row |= {"ratio": ratio, "low": ratios.min(), "high": ratios.max(), "floor": floor, "note": note}
    if goal is None:
        return row
    met = bool(ratio >= goal if faster else ratio <= goal)
    return row | {"goal": f"{'>=' if faster else '<='} {goal:g}", "met": met}


def of_memory(
    work: str,
    seconds: float,
    peak: int,
    least: float,
    goal: float | None,
    peer: str = "weights + result",
    floor: float | None = 1.0,
    note: str = "",
) -> Row:
    """How a peak, in bytes, compares with the least that is needed, the peer."""
    taken = pd.DataFrame({"peak": [peak], peer: [least]})
    row = beside(f"memory of {work}", taken, "peak", peer, goal, floor, note=note)
    return row | {"seconds": seconds, "peer seconds": None, "peak MB": peak / 1e6}


# --- what can be measured


def long_prompts(size: Size, rounds: int, length: int = 128, count: int = 8) -> list[Row]:
    """FI of every linear weight, one prompt at a time, beside a Jacobian norm and stored gradients."""
    questions = Questions.draw(size.model(), length, count)
    works: Works = {
        FI: (lambda: fi_of_weights(questions), count),
        JACOBIAN: (lambda: peers.jacobian_norm(questions), count),
        STORED: (lambda: peers.fi_by_stored_gradients(questions), count),
    }
    row = partial(beside, f"FI of weights, {length} tokens, batch 1", in_turn(works, rounds), FI)
    return [
        row(JACOBIAN, 2.33, UNITS[FI] / UNITS[JACOBIAN]),
        row(STORED, 1.7, UNITS[STORED] / UNITS[FI], faster=True),
    ]


def short_prompts(size: Size, rounds: int, length: int = 24, count: int = 64) -> list[Row]:
    """FI of every linear weight in batches of 16, beside stored gradients one prompt at a time."""
    model, fewer = size.model(), max(1, count // 8)
    questions, few = (Questions.draw(model, length, n) for n in (count, fewer))
    works: Works = {
        FI: (lambda: fi_of_weights(questions, 16), count),
        STORED: (lambda: peers.fi_by_stored_gradients(few), fewer),
    }
    work = f"FI of weights, {length} tokens, batches of 16"
    return [beside(work, in_turn(works, rounds), FI, STORED, 5.0, UNITS[STORED] / UNITS[FI], faster=True)]


def memory(size: Size, rounds: int, length: int = 128, count: int = 2) -> list[Row]:
    """Peak memory of FI of weights, of the model and what scoring takes beside it, and its seconds."""
    model = size.model()
    questions = Questions.draw(model, length, count)
    rows = []
    for way, save_memory, goal in (("block by block", True, 1.15), ("at once", False, None)):
        works: Works = {way: (partial(fi_of_weights, questions, save_memory=save_memory), count)}
        seconds = in_turn(works, min(rounds, 3))[way].median()
        peak, work = peers.peak_bytes(questions, save_memory), f"FI of weights, {length} tokens, {way}"
        rows.append(of_memory(work, seconds, peak, peers.least_bytes(model), goal))
    return rows


def three_measures(size: Size, rounds: int, length: int = 100, count: int = 8) -> list[Row]:
    """Three measures of every linear weight block by block, all questions in one batch, and their peak."""
    model = size.model()
    questions = Questions.draw(model, length, count)
    total = sum(p.numel() for p in model.network.parameters())
    work = partial(peers.scored, questions, THREE, count, save_memory=True)
    works: Works = {"ours": (work, count), JACOBIAN: (lambda: peers.jacobian_norm(questions), count)}
    name, seconds = f"three measures of {total:.2g} weights, {length} tokens", in_turn(works, rounds)
    peak, least = peers.peak_bytes(questions, True, THREE, count), peers.least_bytes(model, len(THREE))
    return [
        beside(name, seconds, "ours", JACOBIAN, 3.0),
        of_memory(name, seconds["ours"].median(), peak, least, 1.15),
    ]


def pixels(size: Size, rounds: int) -> list[Row]:
    """FI of every pixel of the bundled pictures by each filter, beside one gradient of the prediction."""
    model = open_vision_model("mini-vlm", device="cuda" if torch.cuda.is_available() else "cpu")
    examples = load_task("bundled-images", n=max(PIXEL_GOALS)).examples
    return [row for batch in PIXEL_GOALS for row in pixel_rows(model, examples[:batch], rounds)]


def pixel_rows(model: VisionModel, examples: Sequence[Example], rounds: int) -> list[Row]:
    """Time FI of every pixel of one batch, K classes and RGB, by each filter, with the model frozen.

    Ours is `score_pixels` with all that it does, from decoding the image on; the peers start from decoded
    images. The floor counts a forward pass and one back to the pixels for each class but one, of which the
    Jacobian norm has one.
    """
    count = len(examples)
    (batch,) = pixel_batches(model, examples, batch_size=count)
    ours = partial(score_pixels, model, examples, ["FI"], batch_size=count)
    works: dict[str, tuple[Work, int]] = {f"FI {f}": (partial(ours, spectral=f), count) for f in FILTERS}
    works[PLAIN] = (lambda: peers.plain_jacobian(batch), count)
    works[SALIENCY] = (lambda: peers.captum_saliency(batch), count)
    with frozen(model.network), warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)  # exact FI of pixels is, and takes as long
        seconds = in_turn(works, rounds)
    goal = ON_GPU if count == 1 and model.device.type == "cuda" else PIXEL_GOALS.get(count)
    rows = []
    for name in (f"FI {f}" for f in FILTERS):
        row = partial(beside, f"pixel {name}, batch {count}", seconds, name)
        rows += [row(PLAIN, goal, len(examples[0].options) / 2), row(SALIENCY)]
    return rows


def topshare(size: Size, rounds: int, count: int = 10**7, share: float = 0.01) -> list[Row]:
    """The exact top share of many scores with ties, beside a full sort; bytes beyond the scores themselves.

    The bytes are a mask of the tensor at hand and the pieces at work, however many tensors there are.
    """
    scores = torch.randn(count, generator=torch.Generator().manual_seed(0)).abs_()
    scores = scores.mul_(2**16).round_().div_(2**16)  # with ties
    take = max(1, round(share * count))

    def ours() -> object:
        return TopShare(["all"], lambda _: iter(scores.split(CHUNK)), take).mask("all")

    works: Works = {"ours": (ours, 1), SORT: (lambda: scores.sort(descending=True), 1)}
    work, extra = f"exact top share of {count:g} scores", peers.extra_bytes(ours)
    sorting = beside(work, in_turn(works, rounds), "ours", SORT, faster=True)
    largest = max(peers.block(LLAMA).values())
    bound = 2 * largest + max(0, extra - 2 * count)  # a mask is there twice while its pieces are joined
    note = f"for {peers.linear(LLAMA):.2g} weights in matrices of at most {largest:.2g}: {bound / 1e9:.2f} GB"
    return [sorting, of_memory(f"the {work}", sorting["seconds"], extra, 2e9, 1.0, "2 GB", None, note)]


def gpu(size: Size, rounds: int) -> list[Row]:
    """FI of every linear weight of a network of Llama-2-7B's shape, random bfloat16 weights, on a GPU."""
    if not torch.cuda.is_available():
        return [{"work": "FI of weights, Llama-2-7B's shape, 200 tokens", "note": "not measured: no GPU"}]
    return large_network(LLAMA, rounds, "cuda")


def large_network(
    config: LlamaConfig, rounds: int, device: str, length: int = 200, count: int = 4
) -> list[Row]:
    """Seconds a sample at once and block by block, beside the goal and beside its matrix products alone.

    The rate of matrix products is measured in the same rounds, on the largest matrix of the network; the
    second ratio, turned over, is the share of this rate that is reached. Peaks are of the device.
    """
    model = peers.random_model(config, torch.bfloat16, device)
    questions, weights = Questions.draw(model, length, count), peers.weights_of(model).values()
    matrix = max(weights, key=torch.numel).detach()
    x = torch.randn(1024, matrix.shape[1], device=matrix.device, dtype=matrix.dtype)
    ways: Works = {
        "at once": (lambda: fi_of_weights(questions), count),
        "block by block": (lambda: fi_of_weights(questions, save_memory=True), count),
    }
    seconds = in_turn({**ways, "products": (lambda: [x @ matrix.T for _ in range(32)], 32)}, rounds)
    rate = 2 * len(x) * matrix.numel() / seconds["products"]
    operations = UNITS[FI] * 2 * length * sum(w.numel() for w in weights)
    seconds = seconds.assign(**{PRODUCTS: operations / rate, ASKED: H100_SECONDS})
    note = f"{rate.median() / 1e12:.0f} TFLOPS measured in products"
    rows = []
    for way, (work, _) in ways.items():
        shape = f"{config.num_hidden_layers} blocks of {config.hidden_size}"
        name = f"FI of weights, {shape}, {length} tokens, {way}"
        rows += [
            beside(name, seconds, way, PRODUCTS, floor=1.0, note=note),
            beside(name, seconds, way, ASKED, 1.0),
        ]
        goal = 1.1 if way == "block by block" else None
        peak = _device_peak(work, device)
        rows.append(of_memory(name, seconds[way].median(), peak, peers.least_bytes(model), goal))
    return rows


def _device_peak(work: Work, device: str) -> int:
    """Peak bytes on a GPU while a piece of work runs."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


def chapters(size: Size, rounds: int, profile: str = "embedded") -> list[Row]:
    """Every chapter of the book, run once by itself on one thread and once beside a process at work.

    Its seconds of CPU (its processes' start and end included) stand beside those asked for.
    """
    rows = []
    for notebook in runs.chapters(runs.notebooks_folder()):
        name = notebook.stem
        alone, used = _run_of(name, profile)
        with at_work():
            busy, _ = _run_of(name, profile)
        asked = LONGER.get(name, MINUTE)
        taken = pd.DataFrame({"CPU": [used], "alone": [alone], "busy": [busy], "asked": [asked]})
        rows += [
            beside(f"CPU of {name}", taken, "CPU", "asked", 1.0),
            beside(f"{name} beside a process at work", taken, "busy", "alone", BUSY),
        ]
    return rows


def _run_of(chapter: str, profile: str) -> tuple[float, float]:
    """Seconds and seconds of CPU of one run of a chapter, in a folder of its own and on one thread."""
    with tempfile.TemporaryDirectory() as out:
        words = ["run", chapter, "--profile", profile, "--threads", "1", "--out", out]
        before, start = os.times(), time.perf_counter()
        subprocess.run([sys.executable, "-m", "fihelpers", *words], check=True, capture_output=True)
        seconds, after = time.perf_counter() - start, os.times()
    user, system = (getattr(after, of) - getattr(before, of) for of in ("children_user", "children_system"))
    return seconds, user + system


@contextmanager
def at_work() -> Iterator[None]:
    """A process that computes without pause, for as long as the context lasts."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


ROWS: dict[str, Callable[[Size, int], list[Row]]] = {  # by the name to ask for it
    "long": long_prompts,
    "short": short_prompts,
    "memory": memory,
    "half": lambda _, rounds: three_measures(peers.HALF_A_BILLION, rounds),
    "pixels": pixels,
    "topshare": topshare,
    "gpu": gpu,
    "chapters": chapters,
}
ASKED_FOR = ("chapters",)  # only by name: each is run twice, in full


def bench(only: Sequence[str] = (), rounds: int = 5, size: Size | None = None) -> list[Row]:
    """Measure the rows of these names, by default all but the chapters.

    Raises ValueError for an unknown name or no round.
    """
    unknown = sorted(set(only) - set(ROWS))
    if unknown:
        raise ValueError(f"unknown row {unknown[0]!r}; known: {', '.join(ROWS)}.")
    if rounds < 1:
        raise ValueError(f"at least one round is needed, not {rounds}.")
    usual = [name for name in ROWS if name not in ASKED_FOR]
    return [made for name in only or usual for made in ROWS[name](size or Size(), rounds)]


def main(only: Sequence[str], rounds: int, out: Path | None) -> None:
    """Print the table and the machine, and write both as JSON."""
    before = machine()
    rows = bench(only, rounds)
    print(table(rows))
    print(", ".join(f"{name} {value}" for name, value in before.items()))
    if out is not None:
        made = {"machine": before, "load after": machine()["load"], "rows": rows}
        write_atomically(out, (json.dumps(made, indent=1) + "\n").encode())


def machine() -> dict[str, str | int | float]:
    """What the numbers were measured on, and how busy it was."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.is_file() else None
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "vector unit": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load": round(psutil.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as text, and their notes below."""
    frame = pd.DataFrame(rows).drop(columns="note").astype(object)
    text = frame.where(frame.notna(), "").to_string(index=False, float_format="{:.3f}".format)
    return "\n".join([text, *(f"{row['work']}: {row['note']}" for row in rows if row["note"])])
