"""How long pixel FI takes beside a plain Jacobian norm of the same images, in one run (method 4.7)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fichapters.timed import Row, Work, in_turn, row
from fihelpers.filters import Cut, Damped, Exact, Spectral
from fihelpers.influence import SaturationWarning
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.scores.hooks import frozen
from fihelpers.scores.pixels import image_of, option_letters, score_pixels
from fihelpers.tasks import Example, load_task

FILTERS: tuple[Spectral, ...] = (Exact(), Cut(1e-3), Damped(1e-4))
GOALS = {1: 2.1, 32: 2.6}  # times the Jacobian norm, by batch size; of other sizes nothing is asked
ON_GPU = 1.5  # for one image, where the paper takes 1.97 times as long (method 4.7)
JACOBIAN = "Jacobian norm, plain autograd"
SALIENCY = "saliency, Captum"


def bundled_rows(rounds: int) -> list[Row]:
    """`pixel_rows` of the bundled model and pictures, on a GPU where there is one."""
    model = open_vision_model("mini-vlm", device="cuda" if torch.cuda.is_available() else "cpu")
    examples = load_task("bundled-images", n=max(GOALS)).examples
    return pixel_rows(model, examples, tuple(GOALS), rounds)


def pixel_rows(
    model: VisionModel, examples: Sequence[Example], batch_sizes: Sequence[int], rounds: int
) -> list[Row]:
    """Time FI of every pixel, K classes and RGB, by each filter and batch size, with the model frozen.

    examples: at least as many as the largest batch, with images of one size. Ours is :func:`score_pixels`
    with all that it does, from decoding the image on; the peers start from decoded images. The floor counts
    a forward pass and one back to the pixels for each class but one, of which the Jacobian norm has one.
    Raises ValueError for too few examples.
    """
    if len(examples) < max(batch_sizes):
        raise ValueError(f"give at least {max(batch_sizes)} examples, not {len(examples)}.")
    floor = len(examples[0].options) / 2
    rows = []
    for size in tqdm(batch_sizes, desc="pixel FI", unit="batch size", delay=3, leave=False):
        chosen = examples[:size]
        ours = {f"FI {f}": _ours(model, chosen, f) for f in FILTERS}
        works: dict[str, Work] = {**ours, **_peers(model, chosen)}
        with frozen(model.network), warnings.catch_warnings():
            warnings.simplefilter("ignore", SaturationWarning)  # exact FI of pixels is, and takes as long
            seconds = in_turn(works, dict.fromkeys(works, size), rounds)
        goal = ON_GPU if size == 1 and model.device.type == "cuda" else GOALS.get(size)
        for name in ours:
            work = f"pixel {name}, batch {size}"
            rows.append(row(work, seconds, name, JACOBIAN, goal, floor))
            rows.append(row(work, seconds, name, SALIENCY, None, None))
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
