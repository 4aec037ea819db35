"""Reading an image file into grey levels."""

import base64
import io
import re
import warnings
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# A 24-megapixel photograph passes. As float32 an image of this size takes 300 MB, and each class's gradient
# as much again; Qwen2-VL shrinks everything beyond 12.8 million pixels anyway.
MAX_PIXELS = 25_000_000
MAX_ASPECT = 200  # the longer side over the shorter one; Qwen2-VL's processor refuses more
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow's others may start other programs
WHITE = (255, 255, 255, 255)
MAX_16_BIT = 65535
DATA_URL = re.compile(r"\s*data:([^,]*),", re.IGNORECASE)
URL_SAFE = str.maketrans("-_", "+/")


def read_image(source: bytes | Path) -> Tensor:
    """Read an encoded image as RGB grey levels (3, H, W), whole numbers 0 to 255 in float32.

    The EXIF orientation is applied, transparent pixels are laid on white, 16 bits are scaled to 8, and of an
    animation the first frame is taken. Raises ValueError for a file that is empty, corrupt, of another
    format than :data:`FORMATS`, or larger or longer than :data:`MAX_PIXELS` and :data:`MAX_ASPECT` allow
    (both decided before any pixel is decoded), and OSError where a path cannot be read.
    """
    pixels = np.array(_decode(source))
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).contiguous()


def check_image(source: bytes | Path) -> None:
    """Raise what :func:`read_image` would raise."""
    _decode(source)


def check_aspect(width: int, height: int) -> None:
    """Raise ValueError for an image without pixels, or with one side too long for the other."""
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"the image has {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other, "
            "so crop it."
        )


def is_data_url(text: str) -> bool:
    """Whether a text is a file as an address, "data:image/png;base64,iVBOR…" (RFC 2397)."""
    return DATA_URL.match(text) is not None


def decode_base64(text: str) -> bytes:
    """Decode base64, plain or in a data URL, as forgivingly as browsers do (WHATWG, Infra, section 7).

    White space and line breaks may stand anywhere, the padding may be missing, and the alphabet may be the
    one for URLs (RFC 4648, section 5). Raises ValueError for anything else.
    """
    url = DATA_URL.match(text)
    if url and not re.search(r";\s*base64\s*$", url[1], re.IGNORECASE):
        raise ValueError(f"the image is not base64 (it begins with {url[0].strip()[:40]!r}); replace it.")
    encoded = unquote(text[url.end() :]) if url else text
    encoded = "".join(encoded.split()).translate(URL_SAFE)
    if not encoded.endswith("="):
        encoded += "=" * (-len(encoded) % 4)
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise ValueError(f"the image is not base64 ({error}); replace it.") from error


def _decode(source: bytes | Path) -> Image.Image:
    content = source if isinstance(source, bytes) else source.read_bytes()
    if not content:
        raise ValueError("the image is empty (0 bytes); give an encoded image.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow only warns of is refused below or harmless
        image = _open(content)
        _check_size(*image.size)
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
        except Exception as error:  # decoders raise many types; the image is at fault in each case
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the image is corrupt ({reason}); replace it.") from error
        return _to_rgb(image)


def _open(content: bytes) -> Image.Image:
    """Read the header only."""
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))  # Pillow refuses these before it lets us see their size
        raise _too_large(f"{int(found[0]):,} pixels" if found else "far too many pixels") from error
    except Exception as error:  # as above; Pillow's message would name a memory address
        raise ValueError(
            f"the image is corrupt, has no pixels or is none of {', '.join(FORMATS)}; replace it."
        ) from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} x {height} = {width * height:,} pixels")
    check_aspect(width, height)


def _too_large(size: str) -> ValueError:
    return ValueError(f"the image has {size}, more than the limit of {MAX_PIXELS:,}; make it smaller.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError(
            "the image has floating-point pixels, whose white is not defined; save it with 8 bits."
        )
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale grey values 0 to 65535; Pillow's own conversion would clip them at 255."""
    values = np.asarray(image).astype(np.float64)
    if values.min() < 0 or values.max() > MAX_16_BIT:
        raise ValueError(
            f"the image has grey values from {values.min():g} to {values.max():g}, which are not 16 bits; "
            "save it with 8 bits."
        )
    levels = np.rint(values * (255 / MAX_16_BIT)).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")
