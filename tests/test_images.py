"""Reading images: every kind becomes RGB grey levels as it is meant to look, or is refused by name."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_vision import encode_png, to_pil

from fihelpers.images import (
    MAX_ASPECT,
    MAX_PIXELS,
    check_image,
    decode_base64,
    is_data_url,
    read_image,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with hardly any pixels in it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_encoding_and_reading_gives_the_same_grey_levels(height: int, width: int, seed: int) -> None:
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).float()
    back = read_image(encode_png(image))
    assert back.dtype == torch.float32 and back.is_contiguous()
    assert torch.equal(back, image)
    assert torch.equal(read_image(encoded(to_pil(image), "BMP")), image)


def test_a_file_is_read_like_its_content(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(encoded(Image.new("RGB", (3, 2), RED)))
    assert read_image(path).tolist() == read_image(path.read_bytes()).tolist()
    assert read_image(path).shape == (3, 2, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode)
    content = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert read_image(content).shape == (3, 3, 4)
    assert read_image(content).min() >= 254


def test_a_grey_image_has_three_equal_channels() -> None:
    levels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert torch.equal(read_image(encoded(Image.fromarray(levels))), torch.tensor(levels).expand(3, 3, 4))


def test_a_palette_is_looked_up() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    for content in (encoded(image), encoded(image, "GIF")):
        assert read_image(content)[:, 0].T.tolist() == [list(RED), list(BLUE)]


def test_transparent_pixels_lie_on_white() -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 0))
    image.putpixel((1, 0), (*RED, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    assert read_image(encoded(image))[:, 0].T.tolist() == [[255] * 3, list(RED), [204] * 3]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    see_through = encoded(palette, transparency=bytes([0, 255]))
    assert read_image(see_through)[:, 0].T.tolist() == [[255] * 3, list(BLUE)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (24, 16), BLUE)
    upright.paste(RED, (0, 0, 8, 8))  # the top left corner
    undo = {  # from upright to what a camera held that way stores
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(encoded(stored, "PNG", exif=exif))
    assert image.shape == (3, 16, 24)
    assert torch.equal(image[0] > 128, torch.tensor(np.array(upright))[..., 0] > 128)


def test_sixteen_bits_are_scaled() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF", "PPM"):
        image = read_image(encoded(Image.fromarray(values), format))
        assert image[:, 0].tolist() == [[0, 1, 128, 255]] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70000]], dtype=np.int32), "grey values from 0 to 70000, which are not 16 bits"),
        (np.array([[-1, 5]], dtype=np.int32), "grey values from -1 to 5"),
        (np.array([[0.0, 0.5]], dtype=np.float32), "floating-point pixels"),
    ],
)
def test_grey_values_of_unknown_range_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert read_image(content).flatten(1).unique(dim=1).flatten().tolist() == list(RED)


NOISE = torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_a_file_that_ends_early_is_corrupt(format: str) -> None:
    content = encoded(to_pil(NOISE), format)
    assert read_image(content).shape == (3, 40, 40)
    with pytest.raises(ValueError, match=r"^the image is corrupt.*; replace it\.$"):
        read_image(content[: len(content) // 2])


def test_a_damaged_pixel_is_noticed() -> None:
    content = bytearray(encode_png(NOISE))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="the image is corrupt"):
        read_image(bytes(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the image is empty \(0 bytes\)"),
        (b"not an image", "the image is corrupt, has no pixels or is none of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "or is none of PNG"),  # would start a program
        (png_header(0, 5), "has no pixels"),
        (png_header(5, 5), "the image is corrupt"),
        (png_header(5000, 5000), "the image is corrupt"),  # as large as is allowed, but without the pixels
        (png_header(5001, 5000), r"has 5001 x 5000 = 25,005,000 pixels, more than the limit of 25,000,000"),
        (png_header(10_000, 10_000), "100,000,000 pixels, more than"),  # Pillow would warn
        (png_header(40_000, 40_000), "1,600,000,000 pixels, more than"),  # Pillow would refuse
        (png_header(1, 5000), "has 1 x 5000 pixels; one side may be at most 200 times"),
        (png_header(5000, 1), "has 5000 x 1 pixels"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(content: bytes, message: str) -> None:
    for read in (read_image, check_image):
        with pytest.raises(ValueError, match=message):
            read(content)


def test_the_limits_themselves_are_allowed() -> None:
    assert MAX_PIXELS == 5000 * 5000
    assert read_image(encoded(Image.new("RGB", (MAX_ASPECT, 1)))).shape == (3, 1, MAX_ASPECT)
    with pytest.raises(ValueError, match="at most 200 times"):
        read_image(encoded(Image.new("RGB", (1, MAX_ASPECT + 1))))


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png")


@given(st.binary(max_size=200), st.integers(1, 80), st.sampled_from(["\n", "\r\n", " ", "\t", "\u2028"]))
def test_base64_is_decoded_in_every_valid_spelling(content: bytes, width: int, gap: str) -> None:
    plain, safe = base64.b64encode(content).decode(), base64.urlsafe_b64encode(content).decode()
    broken = gap.join(plain[i : i + width] for i in range(0, len(plain), width)) + gap
    for text in (plain, safe, broken, plain.rstrip("="), safe.rstrip("=")):
        assert decode_base64(text) == content
        assert not is_data_url(text)
        for start in ("data:image/jpeg;base64,", "DATA:image/png;charset=x;Base64,", " data:; base64 ,\n"):
            assert is_data_url(start + text)
            assert decode_base64(start + text) == content
    assert decode_base64("data:image/png;base64," + plain.replace("=", "%3D").replace("+", "%2B")) == content


@pytest.mark.parametrize(
    "text",
    [
        "*" * 100,
        "é" * 100,
        "\0" * 100,
        "A" * 101,  # one character, 6 bits, over
        "QQ=",
        "QQ==QQ==",
        "data:image/svg+xml,%3Csvg/%3E",
        "data:image/png;base64,*",
        "data:image/png;base64,data:image/png;base64,QQ==",
        "image/png;base64,QQ==",
        "cat.png",
    ],
)
def test_what_is_no_base64_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"^the image is not base64 \(.*\); replace it\.$"):
        decode_base64(text)
