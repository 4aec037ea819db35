"""Vision-language models whose logits are differentiable in the grey levels of the original image.

The library prepares images with Pillow, where gradients end. Here the same steps (resize, crop, scale,
normalise, cut into patches) are tensor operations, configured by the model's own files, so that a gradient
reaches every pixel of the image as it was given (method 4.1). Families: Qwen2-VL and Qwen2.5-VL, and LLaVA
with a CLIP tower.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import Any

import PIL
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from fihelpers.identity import model_identity
from fihelpers.images import check_aspect
from fihelpers.models.language import (
    Batch,
    brief,
    check_tokens,
    checked_logits,
    find_device,
    find_dtype,
    in_chat,
    left_padded,
    locate,
    open_network,
    open_tokenizer,
    weights_sha256,
)

LLAVA = "llava"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", LLAVA)
PRECISION_BITS = 22  # of Pillow's 8-bit resampling: 32 bits less 8 for the pixel and 2 of head room
BICUBIC = 3  # Pillow's number for it
PILLOW = int(PIL.__version__.partition(".")[0])
QWEN_CUTS = ("patch_size", "merge_size", "temporal_patch_size")
STEPS = ("do_resize", "do_rescale", "do_normalize")  # of the library's processors, all done here


@lru_cache(maxsize=8)  # of a large photograph one takes 100 MB
def resize_matrix(source: int, target: int) -> Tensor:
    """Return Pillow's bicubic antialias weights (target, source) in float64, rounded to 22 bits as Pillow's.

    Each row sums to 1 up to that rounding. The kernel has a = -0.5 and widens where the image shrinks; torch
    sums up its weights in Pillow's order, so that they round alike.
    """
    pixels = torch.eye(source, dtype=torch.float64)[None, None]
    weights = interpolate(pixels, (target, source), mode="bicubic", antialias=True)[0, 0] * 2**PRECISION_BITS
    rounded = torch.where(weights < 0, (weights - 0.5).trunc(), (weights + 0.5).trunc())
    return rounded / 2**PRECISION_BITS


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize grey levels (..., H, W) to (..., height, width) with the values of Pillow's bicubic filter.

    One axis after the other, in Pillow's order, each result rounded to whole grey levels; an axis that keeps
    its length is not touched. In float64, where the sums are exact. The gradient is that of the two matrix
    products alone: rounding and clipping to 0..255 are passed straight through.
    """
    if images.shape[-2:] == (height, width):
        return images
    passes = [(-1, width), (-2, height)]  # the rows' pixels first
    if _shrinks_down_first(images.shape[-2] - height, images.shape[-1] - width):
        passes.reverse()
    result = images.double()
    for axis, length in passes:
        if length != result.shape[axis]:
            weights = resize_matrix(result.shape[axis], length).to(images.device)
            result = _rounded(result @ weights.T if axis == -1 else weights @ result)
    return result.to(images.dtype)


def _rounded(levels: Tensor) -> Tensor:
    """Rounded to the grey levels 0..255 as Pillow does; the gradient passes as if nothing was changed."""
    whole = torch.floor(levels.detach() + 0.5).clamp(0, 255)
    return whole + (levels - levels.detach())


def _shrinks_down_first(lost_rows: int, lost_columns: int) -> bool:
    """Whether Pillow resizes the columns first: from version 13, where the height shrinks much more."""
    return PILLOW >= 13 and lost_rows > 0 and lost_rows > 2 * lost_columns


def qwen_patches(images: Tensor, patch: int = 14, merge: int = 2, temporal: int = 2) -> tuple[Tensor, Tensor]:
    """Cut normalised images (B, 3, H, W) into the patches that the Qwen-VL networks take.

    Returns ``pixel_values`` (B * H/patch * W/patch, 3 * temporal * patch * patch), the patches of one merged
    token one after another and a still image repeated ``temporal`` times, and ``image_grid_thw`` (B, 3):
    1 and the number of patches down and across. H and W have to be multiples of patch * merge.
    """
    size, channels, height, width = images.shape
    block = patch * merge
    if height % block or width % block:
        raise ValueError(
            f"patches need whole blocks of {block} x {block} pixels, got images of {height} x {width}."
        )
    down, across = height // block, width // block
    cut = images.reshape(size, channels, down, merge, patch, across, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # image, token row and column, patch row and column, channel
    cut = cut.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, temporal, -1, -1)
    grid = torch.tensor([[1, down * merge, across * merge]], device=images.device).expand(size, 3)
    return cut.reshape(size * down * across * merge**2, -1), grid


@dataclass(frozen=True)
class PatchLayout:
    """Where the image tokens of one image lie: ``rows`` x ``columns`` of them.

    The image of ``height`` x ``width`` pixels is resized to ``resized`` (height, width), of which each token
    sees a square of ``block`` pixels; the first begins at ``top``, ``left`` (not 0 where it is cropped).
    Where ``resized`` is the image's own size, the squares are blocks of original pixels.
    """

    rows: int
    columns: int
    height: int
    width: int
    resized: tuple[int, int]
    block: int
    top: int = 0
    left: int = 0

    @property
    def token_rows(self) -> Tensor:
        """The token row (H,) that sees the middle of each row of original pixels, -1 where it is cut off."""
        return self._tokens(self.height, self.resized[0], self.top, self.rows)

    @property
    def token_columns(self) -> Tensor:
        """The token column (W,) that sees the middle of each column of original pixels, -1 where cut off."""
        return self._tokens(self.width, self.resized[1], self.left, self.columns)

    def _tokens(self, length: int, resized: int, start: int, count: int) -> Tensor:
        middle = (torch.arange(length, dtype=torch.float64) + 0.5) * resized / length
        token = torch.div(middle - start, self.block, rounding_mode="floor").long()
        return torch.where((token >= 0) & (token < count), token, -1)


@dataclass(frozen=True)
class Preprocess(ABC):
    """From grey levels 0..255 to a network's image inputs, differentiable.

    ``mean`` and ``std`` are of the values multiplied by ``scale``; ``patch`` is the side of the tower's
    patches in pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    patch: int

    def __call__(self, images: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the inputs for images (B, 3, H, W), or for a list of images (3, H, W) of any sizes.

        Whole grey levels give what the library's Pillow processor gives. Other values are legal, and stay
        as they are where no resize is needed. Raises ValueError for another shape, and for an image with
        one side more than :data:`fihelpers.images.MAX_ASPECT` times the other.
        """
        parts = [self._inputs(batch) for batch in _batches(images)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def layout(self, height: int, width: int) -> PatchLayout:
        """Return where the image tokens of an image of this size lie; raises ValueError for a refused one."""
        check_aspect(width, height)
        return self._layout(height, width)

    @abstractmethod
    def _layout(self, height: int, width: int) -> PatchLayout: ...

    @abstractmethod
    def _inputs(self, images: Tensor) -> dict[str, Tensor]: ...

    def _normalised(self, images: Tensor, layout: PatchLayout) -> Tensor:
        """Resize, cut out what the tokens see, and normalise (B, 3, H, W)."""
        levels = resize(images, *layout.resized)
        bottom, right = layout.top + layout.rows * layout.block, layout.left + layout.columns * layout.block
        levels = levels[..., layout.top : bottom, layout.left : right]
        mean, std = (levels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (levels * self.scale - mean) / std


@dataclass(frozen=True)
class QwenPreprocess(Preprocess):
    """Qwen2-VL and Qwen2.5-VL: whole blocks of patch * merge pixels, between two numbers of pixels."""

    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int

    def _layout(self, height: int, width: int) -> PatchLayout:
        block = self.patch * self.merge
        resized = smart_resize(height, width, block, self.min_pixels, self.max_pixels)
        return PatchLayout(resized[0] // block, resized[1] // block, height, width, resized, block)

    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        normalised = self._normalised(images, self.layout(*images.shape[-2:]))
        values, grid = qwen_patches(normalised, self.patch, self.merge, self.temporal)
        return {"pixel_values": values, "image_grid_thw": grid}


@dataclass(frozen=True)
class ClipPreprocess(Preprocess):
    """LLaVA with a CLIP tower: the shorter side to ``shortest`` pixels, then the middle ``crop`` square."""

    shortest: int
    crop: int

    def _layout(self, height: int, width: int) -> PatchLayout:
        long = int(self.shortest * max(height, width) / min(height, width))
        resized = (long, self.shortest) if width <= height else (self.shortest, long)
        top, left = ((side - self.crop) // 2 for side in resized)
        count = self.crop // self.patch
        return PatchLayout(count, count, height, width, resized, self.patch, top, left)

    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": self._normalised(images, self.layout(*images.shape[-2:]))}


def _batches(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return stacks (B, 3, H, W) that follow each other as the images do."""
    if len(images) == 0:
        raise ValueError("there are no images; give at least one.")
    shapes = [tuple(image.shape) for image in images]
    for i, shape in enumerate(shapes):
        if len(shape) != 3 or shape[0] != 3 or 0 in shape:
            raise ValueError(f"an image has the shape (3, height, width), got {shape} for image {i}.")
    alike = len(set(shapes)) == 1
    stacks = [torch.stack(list(images))] if alike else [image[None] for image in images]
    return [stack if stack.is_floating_point() else stack.float() for stack in stacks]


@dataclass(eq=False)
class VisionModel:
    """A vision-language model in evaluation mode with its tokenizer and its preparation of images.

    ``revision`` is the hub commit (None for local weights), ``sha256`` the hash of the weights as opened,
    ``template`` the chat template (None: a plain prompt, see :meth:`plain`).
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    sha256: str
    preprocess: Preprocess
    template: str | None

    def __post_init__(self) -> None:
        # Experiments ask the same prompts about the same images many times.
        self._ids = lru_cache(maxsize=4096)(self._prompt_ids)
        self._texts = lru_cache(maxsize=64)(self._text_inputs)

    @property
    def device(self) -> torch.device:
        return self.network.device

    def identity(self) -> list[object]:
        """What a computation with this model depends on; see :mod:`fihelpers.identity`."""
        return [model_identity(self.network, self.tokenizer, self.sha256), self.template]

    def layout(self, height: int, width: int) -> PatchLayout:
        """Return where the image tokens of an image of this size lie; raises ValueError for a refused one."""
        return self.preprocess.layout(height, width)

    def last_logits(self, images: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Return the logits (B, V) of the next token, float32 or better, differentiable in the images.

        ``images`` are grey levels 0..255 (B, 3, H, W), or a list of images (3, H, W) of any sizes; prompt i
        asks about image i. The chat template and the image's tokens are added here. Raises ValueError for
        an image that :class:`Preprocess` refuses, a number of prompts that is not the number of images, and a
        prompt that is too long for the context together with its image, or holds the image placeholder;
        FloatingPointError, naming the model and a prompt, for NaN or infinite logits.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            given = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise ValueError(f"each image needs a prompt, got {given} for {len(images)} images.")
        inputs = self.preprocess([image.to(self.device) for image in images])
        layouts = [self.layout(*image.shape[-2:]) for image in images]
        batch, text = self._texts(tuple(prompts), tuple((at.rows, at.columns) for at in layouts))
        values = inputs.pop("pixel_values").to(self.network.dtype)
        output = self.network(**text, pixel_values=values, **inputs, use_cache=False, logits_to_keep=1)
        return checked_logits(output.logits[:, -1], batch.index, self.name)

    def plain(self, prompt: str) -> str:
        """Return the text that stands in for a chat template: the image's tokens and the prompt.

        Of a Qwen model these are start of vision, the image and end of vision, with nothing between them; of
        a LLaVA the image and a line break.
        """
        config = self.network.config
        if config.model_type == LLAVA:
            return f"{self.tokenizer.convert_ids_to_tokens(config.image_token_id)}\n{prompt}"
        ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
        return "".join(self.tokenizer.convert_ids_to_tokens(ids)) + prompt

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt in its chat, with one placeholder for the image."""
        text = self._rendered(prompt)
        bos = self.tokenizer.bos_token
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=not (bos and text.startswith(bos)), verbose=False
        )["input_ids"]
        image = self.network.config.image_token_id
        if ids.count(image) == 1:
            return ids
        placeholder = str(self.tokenizer.convert_ids_to_tokens(image))
        if placeholder in prompt:
            raise ValueError(
                f"the prompt {prompt[:60]!r} holds the image placeholder {placeholder!r}; leave it out, it "
                "is added for you."
            )
        raise ValueError(
            f"the chat template of model {self.name!r} makes {ids.count(image)} image placeholders "
            f"{placeholder!r} of one image; use the template that the model was trained with."
        )

    def _rendered(self, prompt: str) -> str:
        if self.template is None:
            return self.plain(prompt)
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return in_chat(self.tokenizer, content, self.name, self.template)

    def _text_inputs(
        self, prompts: tuple[str, ...], shapes: tuple[tuple[int, int], ...]
    ) -> tuple[Batch, dict[str, Tensor]]:
        image = self.network.config.image_token_id
        ids = []
        for prompt, (rows, columns) in zip(prompts, shapes, strict=True):
            text = self._ids(prompt)
            at = text.index(image)
            ids.append([*text[:at], *[image] * (rows * columns), *text[at + 1 :]])
        check_tokens(ids, self.network, self.name, "shorten it or use a smaller image")
        batch = left_padded(range(len(ids)), ids, self.device)
        # The network looks for its image token in the padding, too.
        tokens = batch.input_ids.masked_fill(batch.attention_mask == 0, int(image == 0))
        text_inputs = {"input_ids": tokens, "attention_mask": batch.attention_mask}
        if self.network.config.model_type == LLAVA:
            return batch, text_inputs | {"position_ids": batch.position_ids}
        return batch, text_inputs | {"mm_token_type_ids": (tokens == image).int()}  # it places them itself


def open_vision_model(
    name: str | PathLike[str] = "mini-vlm",
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> VisionModel:
    """Open a bundled vision-language model by name, a local folder, or a hub id.

    Everything said of :func:`fihelpers.models.language.open_model` holds here, too. Further ValueErrors: a
    model of another family than :data:`FAMILIES`, and a processor that does more or other than is done here.
    """
    weights, place = find_dtype(dtype), find_device(device)
    folder, label, commit = locate(str(name), revision)
    sha256 = weights_sha256(folder, label)
    _check_type(folder, label)
    tokenizer = open_tokenizer(folder, label)
    network = open_network(folder, label, weights, AutoModelForImageTextToText).to(place).eval()  # type: ignore[arg-type]
    _multiply_patches(network)
    preprocess = _open_preprocess(folder, label, network.config)
    template = _template(folder, label, tokenizer)
    return VisionModel(network, tokenizer, label, commit, sha256, preprocess, template)


def _multiply_patches(network: nn.Module) -> None:
    """Let convolutions that see one patch at a time, as Qwen's do, compute the matrix product that they are.

    On a CPU the gradient of such a convolution with respect to its input took more than half of the time of
    scoring pixels.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d) and module.padding == (0, 0, 0) and module.groups == 1:
            module.forward = MethodType(_of_patches, module)  # type: ignore[method-assign]


def _of_patches(module: nn.Conv3d, x: Tensor) -> Tensor:
    """The convolution of patches (N, channels, *kernel), which has one output of each."""
    if x.shape[2:] != module.kernel_size or module.dilation != (1, 1, 1):
        return nn.Conv3d.forward(module, x)
    return linear(x.flatten(1), module.weight.flatten(1), module.bias)[:, :, None, None, None]


def _check_type(folder: Path, label: str) -> None:
    kind = str(_read_json(folder / "config.json", label).get("model_type"))
    if kind not in FAMILIES:
        raise ValueError(
            f"model {label!r} is of type {kind!r}, which is none of the vision-language models that can be "
            f"read: {', '.join(FAMILIES)}."
        )


def _read_json(path: Path, label: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # neither JSON nor UTF-8, nor an object
        raise ValueError(f"{path.name} of model {label!r} is damaged; fetch it again.") from error


def _template(folder: Path, label: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template; a model's processor used to keep its own in chat_template.json."""
    old = folder / "chat_template.json"
    if old.is_file() and not (folder / "chat_template.jinja").is_file():
        template = _read_json(old, label).get("chat_template")
    else:
        template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template


def _open_preprocess(folder: Path, label: str, config: Any) -> Preprocess:
    """Read the image processor's settings by the library, from whichever file the model has them in."""
    clip = config.model_type == LLAVA
    try:
        said = (CLIPImageProcessorPil if clip else Qwen2VLImageProcessorPil).from_pretrained(folder)
    except Exception as error:  # of many types, for an absent or a damaged file
        raise ValueError(
            f"the image processor of model {label!r} cannot be opened ({brief(error)}); give a folder saved "
            "with its processor."
        ) from error
    if not all(getattr(said, step) for step in STEPS) or said.resample != BICUBIC:
        raise ValueError(
            f"the processor of model {label!r} leaves out one of {', '.join(STEPS)} or does not resize "
            "bicubically; only processors that do are imitated."
        )
    return (_clip_preprocess if clip else _qwen_preprocess)(said, config, label)


def _common(said: Any) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    return tuple(said.image_mean), tuple(said.image_std), float(said.rescale_factor)


def _qwen_preprocess(said: Any, config: Any, label: str) -> QwenPreprocess:
    """Sizes are in pixels, in ``size`` under either name."""
    low = said.size.shortest_edge or said.size.min_pixels
    high = said.size.longest_edge or said.size.max_pixels
    patch, merge, temporal = cuts = [getattr(said, name) for name in QWEN_CUTS]
    tower = config.vision_config
    if cuts != [tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size]:
        raise ValueError(
            f"the processor of model {label!r} cuts patches ({', '.join(QWEN_CUTS)}: {cuts}) that its "
            "network does not take; use the processor that the model was trained with."
        )
    return QwenPreprocess(*_common(said), patch, merge, temporal, low, high)


def _clip_preprocess(said: Any, config: Any, label: str) -> ClipPreprocess:
    tower, shortest, crop = config.vision_config, said.size.shortest_edge, said.crop_size
    crops = said.do_center_crop and not said.do_pad
    square = crop.height == crop.width == tower.image_size
    if not crops or not square or shortest is None or shortest < tower.image_size:
        raise ValueError(
            f"the processor of model {label!r} does not resize the shorter side and cut out a square of "
            f"{tower.image_size} pixels; only such processors are imitated for LLaVA."
        )
    # A token for each patch and none besides: CLIP's class token is left out.
    strategy = config.vision_feature_select_strategy
    whole = tower.image_size % tower.patch_size == 0
    if tower.model_type != "clip_vision_model" or strategy != "default" or not whole:
        raise ValueError(
            f"model {label!r} has a vision tower of type {tower.model_type!r} with strategy {strategy!r}; "
            "LLaVA models are read with a CLIP tower of whole patches and strategy 'default'."
        )
    return ClipPreprocess(*_common(said), tower.patch_size, shortest, tower.image_size)
