"""Scores of the parts of an image: pixels, channels, patches, image tokens.

:func:`score_pixels` scores a vision-language model's images from their class gradients, see
`fihelpers.scores.inputs`. A perturbation of an image is in units of its full range of grey levels: pixel
values are scaled to [0, 1].
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fihelpers.answers import Answers, Groups, letters
from fihelpers.filters import EXACT, Spectral
from fihelpers.images import read_image
from fihelpers.measures import Measure
from fihelpers.models.vision import VisionModel
from fihelpers.scores.inputs import InputGrads, class_grads_of_inputs, gathered
from fihelpers.tasks import Example
from fihelpers.tasks.pictures import LETTERS

Grouping = Literal["pixel", "channel", "patch", "token"]


@dataclass(frozen=True, eq=False)
class Blocks:
    """A grid of blocks of pixels: `rows` (H,) and `columns` (W,) say which of the `grid` a pixel belongs to.

    They ascend; -1 belongs to no block. `grid` is the number of block rows and of block columns.
    """

    rows: Tensor
    columns: Tensor
    grid: tuple[int, int]

    def cut(self, x: Tensor) -> Tensor:
        """Turn (..., H, W) into (..., block rows, rows, block columns, columns), filled up with zeros."""
        return _cut(_cut(x, self.columns, self.grid[1], x.dim() - 1), self.rows, self.grid[0], x.dim() - 2)

    def cut_grads(self, grads: InputGrads) -> InputGrads:
        """Cut images (C, H, W) into (C, blocks down, rows of a block, blocks across, columns of a block).

        Smaller blocks are filled up with zero gradients and values, which add nothing to any measure.
        """
        return replace(grads, class_grads=self.cut(grads.class_grads), value=self.cut(grads.value))


@dataclass(frozen=True, eq=False)
class PixelBatch:
    """Images of one size with their questions, whose class gradients are made when first asked for.

    `index` are their places in the list of examples; `images` (N, 3, H, W) hold grey levels 0 to 255;
    `answers` are fixed, so that the classes stay while the pixels are perturbed.
    """

    model: VisionModel
    index: tuple[int, ...]
    examples: tuple[Example, ...]
    images: Tensor
    answers: Answers

    @cached_property
    def grads(self) -> InputGrads:
        """Class gradients (K, N, 3, H, W) with respect to the pixels' values in [0, 1]."""
        rows = torch.arange(len(self.images))
        value = self.images / 255
        made = class_grads_of_inputs(lambda x: self.log_probs(x, rows), value)
        salts = tuple(zlib.crc32(example.id.encode()) for example in self.examples)
        return InputGrads(*made, value, salts)

    def log_probs(self, x: Tensor, rows: Tensor) -> Tensor:
        """Log-probabilities (B, K) of images x (B, 3, H, W) in [0, 1] under the questions of rows (B,)."""
        prompts = [self.examples[row].prompt for row in rows.tolist()]
        return self.answers.rows(rows).log_probs(self.model.last_logits(x * 255, prompts))

    def scores(
        self,
        measures: Sequence[str | Measure],
        over: Grouping = "pixel",
        *,
        patch: int = 8,
        spectral: Spectral = EXACT,
    ) -> dict[str, Tensor]:
        """The measures of every group of this batch, {measure name: (N, ...)}; see :func:`score_pixels`."""
        blocks = self._blocks(over, patch)
        if blocks:
            return blocks.cut_grads(self.grads).scores(measures, (0, 2, 4), spectral)
        return self.grads.scores(measures, 0 if over == "pixel" else (), spectral)

    def _blocks(self, over: Grouping, patch: int) -> Blocks | None:
        """The blocks of pixels to join; None for single pixels."""
        height, width = self.images.shape[-2:]
        if over in ("pixel", "channel"):
            return None
        if over == "token":
            layout = self.model.layout(height, width)
            return Blocks(layout.token_rows, layout.token_columns, (layout.rows, layout.columns))
        if over != "patch":
            raise ValueError(f"over must be one of {', '.join(get_args(Grouping))}, not {over!r}.")
        if not isinstance(patch, int) or patch < 1:
            raise ValueError(f"a patch is a square, so give its side as one whole number, not {patch}.")
        rows, columns = torch.arange(height) // patch, torch.arange(width) // patch
        return Blocks(rows, columns, (int(rows[-1]) + 1, int(columns[-1]) + 1))


def score_pixels(
    model: VisionModel,
    examples: Example | Sequence[Example],
    measures: Sequence[str | Measure] = ("FI",),
    spectral: Spectral = EXACT,
    *,
    answers: Answers | None = None,
    over: Grouping = "pixel",
    patch: int = 8,
    batch_size: int = 16,
) -> dict[str, list[Tensor]]:
    """Score the parts of every example's image: {measure name: one map an example} (method 1, 3 and 4.1).

    measures: as in :func:`score_inputs`.
    answers: the classes, by default the letters of an example's options; ``Top`` is fixed on the intact
        image.
    over: "pixel" (its three channels together), map (H, W); "channel" (each value by itself), map (3, H, W);
        "patch" (squares of `patch` pixels, smaller at the far edges) or "token" (what the model sees as one
        image token), map (rows, columns).

    For several groupings or filters of one pass see :func:`pixel_batches`. Warns `SaturationWarning` once a
    measure where FI ranks nothing (method 1b.2). Raises ValueError for no examples, one without an image, or
    an unknown name, and FloatingPointError for NaN or infinite logits or gradients.
    """
    chosen = [examples] if isinstance(examples, Example) else examples
    batches = pixel_batches(model, chosen, answers, batch_size)
    return gathered(
        batches,
        lambda batch: batch.scores(measures, over, patch=patch, spectral=spectral),
        measures,
        spectral,
    )


def pixel_batches(
    model: VisionModel, examples: Sequence[Example], answers: Answers | None = None, batch_size: int = 16
) -> Iterator[PixelBatch]:
    """Put examples with images of one size and equally many options together; arguments as in `score_pixels`.

    ``batches = list(pixel_batches(...))`` keeps the class gradients, K * 3 * H * W floats an example, so that
    their `scores` can be asked for again and again with other measures, filters and groupings.
    """
    if not examples or batch_size < 1:
        raise ValueError(f"give at least one example and a batch size of at least 1, not {batch_size}.")
    with tqdm(total=len(examples), desc="scoring", unit="image", delay=3, leave=False) as bar:
        for start in range(0, len(examples), batch_size):
            groups: dict[tuple[object, ...], list[tuple[int, Tensor]]] = {}
            for i, example in enumerate(examples[start : start + batch_size], start):
                image = image_of(example).to(model.device)
                key = (image.shape, len(example.options) if answers is None else 0)
                groups.setdefault(key, []).append((i, image))
            for members in groups.values():
                yield _pixel_batch(model, examples, members, answers)
                bar.update(len(members))


def image_of(example: Example) -> Tensor:
    """Read the image (3, H, W) of an example. Raises ValueError where it has none or a broken one."""
    if example.image is None:
        raise ValueError(f"example {example.id!r} has no image; take a task that asks about images.")
    return read_image(example.image)


@lru_cache(maxsize=16)
def option_letters(tokenizer: PreTrainedTokenizerBase, count: int) -> Groups:
    """Make one class an option, named by its letter, A first. Raises ValueError for too few or too many."""
    if not 2 <= count <= len(LETTERS):
        raise ValueError(
            f"a question has 2 to {len(LETTERS)} options, not {count}; or give other answer classes."
        )
    return letters(tokenizer, LETTERS[:count])


def _pixel_batch(
    model: VisionModel,
    examples: Sequence[Example],
    members: Sequence[tuple[int, Tensor]],
    answers: Answers | None,
) -> PixelBatch:
    index = tuple(i for i, _ in members)
    images = torch.stack([image for _, image in members])
    asked = tuple(examples[i] for i in index)
    if answers is None:
        classes: Answers = option_letters(model.tokenizer, len(asked[0].options))
    else:
        classes = answers.rows(torch.tensor(index))
    if not isinstance(classes, Groups):
        with torch.no_grad():
            classes = classes.fix(model.last_logits(images, [example.prompt for example in asked]))
    return PixelBatch(model, index, asked, images, classes)


def _cut(x: Tensor, labels: Tensor, count: int, axis: int) -> Tensor:
    """Cut an axis into `count` pieces by the label of each place: (pieces, longest piece), zeros fill up."""
    kept = (labels >= 0).nonzero()[:, 0]
    sizes = labels[kept].bincount(minlength=count)
    place = torch.arange(int(sizes.max()))
    index = (sizes.cumsum(0) - sizes)[:, None] + place
    inside = (place < sizes[:, None]).to(x.device)
    places = kept[index.clamp(max=len(kept) - 1)].flatten().to(x.device)
    pieces = x.index_select(axis, places).unflatten(axis, inside.shape)
    return pieces * inside.reshape(inside.shape + (1,) * (x.dim() - 1 - axis))
