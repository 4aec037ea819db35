"""How long pixel FI takes beside a plain Jacobian norm of the same images, in one run (method 4.7)."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fihelpers.influence import Cut, Damped, Exact, SaturationWarning, Spectral
from fihelpers.scores.classgrads import frozen
from fihelpers.scores.pixels import image_of, option_letters, score_pixels
from fihelpers.tasks import Example
from fihelpers.vision import VisionModel

FILTERS: tuple[Spectral, ...] = (Exact(), Cut(1e-3), Damped(1e-4))
GOALS = {1: 2.1, 32: 2.6}  # times the Jacobian norm, by batch size; of other sizes nothing is asked
ON_GPU = 1.5  # for one image, where the paper takes 1.97 times as long (method 4.7)
JACOBIAN = "Jacobian norm, plain autograd"
SALIENCY = "saliency, Captum"


@dataclass(frozen=True)
class PixelRow:
    """One row of the table: medians over the repeats, in seconds a batch, and their ratio.

    `peers` are the seconds of the others; `ratio` is to plain autograd, and `low` and `high` the quartiles of
    the ratios within one repeat. `goal` is the largest ratio asked for, None where none is.
    """

    work: str
    seconds: float
    peers: Mapping[str, float]
    ratio: float
    low: float
    high: float
    goal: float | None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio <= self.goal


def pixel_rows(
    model: VisionModel, examples: Sequence[Example], batch_sizes: Sequence[int] = (1, 32), repeats: int = 7
) -> list[PixelRow]:
    """Time FI of every pixel, K classes and RGB, by each filter and batch size, with the model frozen.

    examples: at least as many as the largest batch, with images of one size. Ours is :func:`score_pixels`
    with all that it does, from decoding the image on; the peers start from decoded images. All take turns
    within each of the `repeats`. Raises ValueError for too few examples or repeats.
    """
    if len(examples) < max(batch_sizes) or repeats < 2:
        raise ValueError(
            f"give at least {max(batch_sizes)} examples and 2 repeats, not {len(examples)} and {repeats}."
        )
    rows = []
    for size in tqdm(batch_sizes, desc="pixel FI", unit="batch size", delay=3, leave=False):
        chosen = examples[:size]
        works = {str(f): _ours(model, chosen, f) for f in FILTERS}
        with frozen(model.network), warnings.catch_warnings():
            warnings.simplefilter("ignore", SaturationWarning)  # exact FI of pixels is, and takes as long
            seconds = interleaved({**works, **_peers(model, chosen)}, repeats, model.device)
        rows += [_row(name, size, seconds, model.device) for name in works]
    return rows


def plain_jacobian(model: VisionModel, images: Tensor, prompts: Sequence[str], options: int = 4) -> Tensor:
    """Return the norm over the channels (B, H, W) of the gradient of log P(y_hat): one backward pass."""
    answers = option_letters(model.tokenizer, options)
    x = (images / 255).requires_grad_()
    log_p = answers.log_probs(model.last_logits(x * 255, prompts))
    (grad,) = torch.autograd.grad(log_p.amax(-1).sum(), x)
    return grad.norm(dim=1)


def captum_saliency(model: VisionModel, images: Tensor, prompts: Sequence[str], options: int = 4) -> Tensor:
    """Return the same by Captum, which has to be told the predicted class."""
    from captum.attr import Saliency

    answers = option_letters(model.tokenizer, options)

    def log_probs(x: Tensor) -> Tensor:
        return answers.log_probs(model.last_logits(x * 255, prompts))

    x = images / 255
    with torch.no_grad():
        predicted = log_probs(x).argmax(-1)
    made: Tensor = Saliency(log_probs).attribute(x.requires_grad_(), target=predicted)
    return made.norm(dim=1)


def interleaved(
    works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every work in every repeat, in turns, after one call of each that does not count."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _ours(model: VisionModel, examples: Sequence[Example], spectral: Spectral) -> Callable[[], object]:
    return lambda: score_pixels(model, examples, ["FI"], spectral, batch_size=len(examples))


def _peers(model: VisionModel, examples: Sequence[Example]) -> dict[str, Callable[[], object]]:
    images = torch.stack([image_of(example) for example in examples]).to(model.device)
    prompts = [example.prompt for example in examples]
    options = len(examples[0].options)
    return {
        JACOBIAN: lambda: plain_jacobian(model, images, prompts, options),
        SALIENCY: lambda: captum_saliency(model, images, prompts, options),
    }


def _row(name: str, size: int, seconds: Mapping[str, list[float]], device: torch.device) -> PixelRow:
    pairs = [ours / plain for ours, plain in zip(seconds[name], seconds[JACOBIAN], strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    peers = {peer: statistics.median(seconds[peer]) for peer in (JACOBIAN, SALIENCY)}
    ours = statistics.median(seconds[name])
    goal = ON_GPU if size == 1 and device.type == "cuda" else GOALS.get(size)
    work = f"pixel FI {name}, batch {size}"
    return PixelRow(work, ours, peers, ours / peers[JACOBIAN], low, high, goal)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
