"""Vision-language models: images prepared as the library prepares them, with gradients to every pixel."""

import copy
import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from tiny_vision import (
    CONTEXT,
    ID,
    LLAVA_SIZE,
    MEAN,
    STD,
    VISION_KINDS,
    WORDS,
    preprocessor_config,
    random_image,
    save_vision_model,
    to_pil,
)
from torch import Tensor
from transformers import LlavaImageProcessorPil, Qwen2VLImageProcessorPil

from fihelpers.answers import letters
from fihelpers.data import file_sha256
from fihelpers.images import read_image
from fihelpers.models import vision
from fihelpers.models.vision import (
    ClipPreprocess,
    Preprocess,
    QwenPreprocess,
    VisionModel,
    open_vision_model,
    qwen_patches,
    resize,
    resize_matrix,
)

PROMPTS = ["w1 w2 w3 Answer :", "w4", "w5 w6 w7"]
BLOCK = 8  # of the tiny Qwen models

QWEN = QwenPreprocess(tuple(MEAN), tuple(STD), 1 / 255, 14, 2, 2, 56 * 56, 224 * 224)
CLIP = ClipPreprocess(tuple(MEAN), tuple(STD), 1 / 255, 14, 112, 112)
COLOURS = {"image_mean": MEAN, "image_std": STD}
FAMILIES = {
    "qwen": (QWEN, lambda: Qwen2VLImageProcessorPil(
        **COLOURS, size={"shortest_edge": 56 * 56, "longest_edge": 224 * 224})),
    "clip": (CLIP, lambda: LlavaImageProcessorPil(
        **COLOURS, size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {kind: save_vision_model(kind, base / f"tiny-{kind}") for kind in VISION_KINDS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, VisionModel]:
    """The tiny models in float64."""
    return {kind: open_vision_model(folder, dtype="float64") for kind, folder in folders.items()}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of one's own to damage; Qwen2.5-VL unless a test is parametrised otherwise."""
    return save_vision_model(getattr(request, "param", "qwen2_5_vl"), tmp_path / "my-model")


def library_values(processor: Callable, image: Tensor) -> dict[str, Tensor]:
    return dict(processor(to_pil(image), return_tensors="pt"))


def images_of_odd_sizes(real: list[Path] | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 150, (50, 2), generator=generator).tolist()
    if real is None:
        return [random_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    whole = [read_image(path) for path in real]
    # Different corners, so that the sizes are odd and few images share one.
    return [image[:, : -1 - h % 97, : -1 - w % 89] for image, (h, w) in zip(whole, sizes, strict=False)]


def real_paths(real_data: Path) -> list[Path]:
    """Twenty images of every kind of puzzle; skips where they are not there."""
    paths = sorted((real_data / "puzzlevqa" / "images").rglob("*.png"))
    if len(paths) < 20:
        pytest.skip(f"{real_data} holds no puzzlevqa images")
    return paths[:: len(paths) // 20][:20]


def assert_library_equal(preprocess: Preprocess, processor: Callable, images: list[Tensor]) -> None:
    for image in images:
        expected, found = library_values(processor, image), preprocess([image])
        assert expected.keys() == found.keys()
        if "image_grid_thw" in expected:
            assert expected["image_grid_thw"].tolist() == found["image_grid_thw"].tolist()
        torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_images_are_prepared_as_by_the_library(family: str) -> None:
    preprocess, make = FAMILIES[family]
    images = images_of_odd_sizes()
    resized = [preprocess.layout(*image.shape[1:]).resized != tuple(image.shape[1:]) for image in images]
    assert sum(resized) >= 45
    assert_library_equal(preprocess, make(), images)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_images_are_prepared_as_by_the_library(family: str, real_data: Path) -> None:
    preprocess, make = FAMILIES[family]
    assert_library_equal(preprocess, make(), images_of_odd_sizes(real_paths(real_data)))


@pytest.mark.parametrize(
    ("family", "height", "width"),
    [("qwen", 112, 168), ("qwen", 56, 56), ("clip", 112, 112), ("clip", 112, 151)],
)
def test_without_a_resize_values_are_the_librarys(family: str, height: int, width: int) -> None:
    preprocess, make = FAMILIES[family]
    image = random_image(height, width)
    assert preprocess.layout(height, width).resized == (height, width)
    assert_library_equal(preprocess, make(), [image])
    between = image * 0.9 + 0.3  # not whole grey levels: nothing is rounded
    expected, whole = (preprocess([x])["pixel_values"] for x in (between, image))
    shift = 0.3 / 255 / torch.tensor(STD)
    origin = preprocess([torch.zeros_like(image)])["pixel_values"]
    moved = preprocess([torch.full_like(image, 0.3)])["pixel_values"] - origin
    torch.testing.assert_close(expected - origin, 0.9 * (whole - origin) + moved, rtol=0, atol=2e-6)
    assert moved.min() > 0.99 * shift.min() and moved.max() < 1.01 * shift.max()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((7, 90), (30, 31)),
        ((90, 41), (20, 41)),
        ((3, 300), (28, 28)),
        ((64, 64), (64, 65)),
        ((80, 80), (40, 60)),  # from Pillow 13 on, the last width for which rows come first
        ((80, 80), (40, 61)),
        ((60, 30), (80, 70)),
    ],
)
def test_a_resize_gives_pillows_grey_levels(source: tuple[int, int], target: tuple[int, int]) -> None:
    extreme = (torch.rand(3, *source, generator=torch.Generator().manual_seed(0)) > 0.5).float() * 255
    for image in (random_image(*source), extreme):
        expected = to_pil(image).resize(target[::-1], Image.Resampling.BICUBIC)
        found = resize(image, *target)
        assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1).float())


def test_resize_weights_are_those_of_torchs_antialias_filter() -> None:
    image = torch.rand(1, 3, 45, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = resize_matrix(45, 20) @ image @ resize_matrix(80, 111).T
    expected = torch.nn.functional.interpolate(image, (20, 111), mode="bicubic", antialias=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_patches_need_whole_blocks() -> None:
    with pytest.raises(ValueError, match="whole blocks of 28 x 28 pixels, got images of 28 x 30"):
        qwen_patches(torch.zeros(1, 3, 28, 30))


def test_images_of_several_sizes_follow_each_other() -> None:
    images = [random_image(60, 60, 1), random_image(28, 140, 2), random_image(60, 60, 3)]
    found = QWEN(images)
    parts = [QWEN(image[None]) for image in images]
    for name, value in found.items():
        assert torch.equal(value, torch.cat([part[name] for part in parts]))
    assert torch.equal(QWEN(torch.stack(images[::2]))["pixel_values"], QWEN(images[::2])["pixel_values"])
    assert torch.equal(QWEN([image.byte() for image in images])["pixel_values"], found["pixel_values"])


def linear_values(preprocess: Preprocess, image: Tensor) -> Tensor:
    """The inputs without rounding or clipping, resized by torch."""
    layout = preprocess.layout(*image.shape[-2:])
    levels = torch.nn.functional.interpolate(image[None], layout.resized, mode="bicubic", antialias=True)
    levels = levels[..., layout.top :, layout.left :]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    if isinstance(preprocess, ClipPreprocess):
        return (levels[..., : preprocess.crop, : preprocess.crop] / 255 - mean) / std
    return qwen_patches((levels / 255 - mean) / std)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(75, 40), (300, 201)])
@pytest.mark.parametrize("extreme", [False, True])
def test_the_gradient_passes_straight_through_a_resize(
    family: str, height: int, width: int, extreme: bool
) -> None:
    preprocess, _ = FAMILIES[family]
    image = random_image(height, width)
    image = ((image > 128) * 255.0 if extreme else image).requires_grad_()  # extreme: much is clipped
    found, expected = preprocess([image])["pixel_values"], linear_values(preprocess, image)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad((v * weight).sum(), image)[0] for v in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("kind", VISION_KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_pixel_gradients_are_those_of_finite_differences(kind: str, whole: bool, models) -> None:
    model = models[kind]
    image = random_image(16, 16).double() + (0 if whole else 0.37)
    weight = torch.randn(len(WORDS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(x: Tensor) -> Tensor:
        return (model.last_logits(x[None], PROMPTS[:1]).log_softmax(-1) * weight).sum()

    image.requires_grad_()
    (gradient,) = torch.autograd.grad(value(image), image)
    assert (gradient != 0).all()
    for seed in range(3):
        way = torch.randn(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        # The networks' norms calculate in float32 whatever is asked: a wide step, of fourth order.
        with torch.no_grad():
            near, far = (value(image + t * way) - value(image - t * way) for t in (0.5, 1.0))
        slope = (8 * near - far) / 6
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-4, atol=1e-5)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("kind", VISION_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder_answers_without_the_hub(kind: str, dtype: str, folders, no_network: None) -> None:
    model = open_vision_model(folders[kind], dtype=dtype)
    assert (model.name, model.revision, model.device.type) == (f"tiny-{kind}", None, "cpu")
    assert model.sha256 == file_sha256(folders[kind] / "model.safetensors")
    assert not model.network.training and model.network.dtype == getattr(torch, dtype)
    images = torch.stack([random_image(16, 16, seed) for seed in range(3)]).requires_grad_()
    logits = model.last_logits(images, PROMPTS)
    assert logits.shape == (3, len(WORDS)) and logits.dtype == torch.float32
    assert letters(model.tokenizer, "ABCD").log_probs(logits).shape == (3, 4)
    logits.log_softmax(-1)[:, ID["A"]].sum().backward()
    assert images.grad is not None and images.grad.abs().amax((1, 2, 3)).min() > 0


def library_logits(model: VisionModel, processor: Callable, image: Tensor, prompt: str) -> Tensor:
    """What the library's own steps give: its image processor, and the placeholder repeated in the text."""
    values = library_values(processor, image)
    values["pixel_values"] = values["pixel_values"].to(model.network.dtype)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    token = model.tokenizer.convert_ids_to_tokens(model.network.config.image_token_id)
    n = LLAVA_SIZE**2 // 16
    if "image_grid_thw" in values:
        n = int(values["image_grid_thw"].prod()) // 4
    ids = model.tokenizer(text.replace(token, token * n), return_tensors="pt")["input_ids"]
    if "image_grid_thw" in values:
        values["mm_token_type_ids"] = (ids == model.network.config.image_token_id).int()
    return model.network(input_ids=ids, **values).logits[:, -1]


def assert_librarys_logits(kind: str, model: VisionModel, images: list[Tensor]) -> None:
    config = {key: value for key, value in preprocessor_config(kind).items() if key != "image_processor_type"}
    processor = (LlavaImageProcessorPil if kind == "llava" else Qwen2VLImageProcessorPil)(**config)
    for i, image in enumerate(images):
        prompt = PROMPTS[i % 3]
        with torch.no_grad():
            expected = library_logits(model, processor, image, prompt)
            found = model.last_logits([image], [prompt])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert found.argmax() == expected.argmax()


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_logits_are_those_of_the_librarys_own_input(kind: str, models) -> None:
    sizes = [(16, 16), (24, 40), (33, 17), (90, 101), (5, 60)]
    assert_librarys_logits(kind, models[kind], [random_image(*size, seed) for seed, size in enumerate(sizes)])


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_real_images_give_the_logits_of_the_librarys_own_input(kind: str, models, real_data: Path) -> None:
    assert_librarys_logits(kind, models[kind], images_of_odd_sizes(real_paths(real_data)))


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_batch_of_several_sizes_gives_the_logits_of_each_image_alone(kind: str, models) -> None:
    model = models[kind]
    sizes = [(16, 24), (33, 17), (16, 16)]
    images = [random_image(*size, seed).double() for seed, size in enumerate(sizes)]
    alone = [model.last_logits(x[None], [prompt]) for x, prompt in zip(images, PROMPTS, strict=True)]
    for _ in range(2):
        torch.testing.assert_close(model.last_logits(images, PROMPTS), torch.cat(alone), rtol=0, atol=1e-10)
    assert (alone[0] - alone[2]).abs().max() > 0.01
    swapped = model.last_logits(images[::-1], PROMPTS)
    assert (swapped - torch.cat(alone)).abs().max() > 1e-4


def test_the_layout_says_which_pixels_a_token_sees(models) -> None:
    layout = models["qwen2_5_vl"].layout(24, 40)
    assert (layout.rows, layout.columns, layout.block, layout.resized) == (3, 5, BLOCK, (24, 40))
    assert layout.token_rows.tolist() == [y // BLOCK for y in range(24)]
    assert layout.token_columns.tolist() == [x // BLOCK for x in range(40)]
    assert QWEN.layout(112, 112).block == 28
    small = models["qwen2_5_vl"].layout(300, 37)  # shrunk
    assert small.resized != (300, 37)
    assert small.token_rows.unique().tolist() == list(range(small.rows))
    assert (small.token_rows.diff() >= 0).all()
    wide = models["llava"].layout(16, 21)  # two columns are cut off on the left and three on the right
    assert wide.token_columns.tolist() == [-1] * 2 + [x // 4 for x in range(16)] + [-1] * 3
    assert wide.token_rows.tolist() == [y // 4 for y in range(16)]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_a_token_sees_the_pixels_that_the_layout_names(kind: str, models) -> None:
    preprocess = models[kind].preprocess
    image = random_image(16, 24).requires_grad_()
    layout = preprocess.layout(16, 24)
    values = preprocess([image])["pixel_values"]
    token = values[4:8] if kind == "qwen2_5_vl" else values[..., :4, 4:8]  # row 0, column 1
    (gradient,) = torch.autograd.grad(token.sum(), image)
    named = (layout.token_rows == 0)[:, None] & (layout.token_columns == 1)
    assert torch.equal((gradient != 0).all(0), named) and torch.equal((gradient != 0).any(0), named)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_images_that_cannot_be_read_are_refused(kind: str, models) -> None:
    model = models[kind]
    with pytest.raises(ValueError, match=r"^the image has 5000 x 1 pixels; one side may be at most 200"):
        model.last_logits([torch.zeros(3, 1, 5000)], ["w1"])
    with pytest.raises(ValueError, match=r"got \(1, 16, 16\) for image 1"):
        model.last_logits([torch.zeros(3, 16, 16), torch.zeros(1, 16, 16)], ["w1", "w1"])
    with pytest.raises(ValueError, match=r"got \(3, 0, 16\) for image 0"):
        model.last_logits(torch.zeros(1, 3, 0, 16), ["w1"])
    with pytest.raises(ValueError, match="no images"):
        model.last_logits([], [])


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_prompts_that_cannot_be_read_are_refused(kind: str, models) -> None:
    model = models[kind]
    image = random_image(16, 16)[None]
    with pytest.raises(ValueError, match="each image needs a prompt, got 2 prompts for 1 images"):
        model.last_logits(image, ["w1", "w2"])
    with pytest.raises(ValueError, match="got one text for 1 images"):
        model.last_logits(image, "w")
    words = " ".join(["w1"] * CONTEXT)
    with pytest.raises(
        ValueError, match=rf"more than the {CONTEXT} that model 'tiny-{kind}' can read; .* a smaller image"
    ):
        model.last_logits(image, [words])
    placeholder = model.tokenizer.convert_ids_to_tokens(model.network.config.image_token_id)
    with pytest.raises(ValueError, match=r"holds the image placeholder '<.*'; leave it out"):
        model.last_logits(image, [f"w1 {placeholder} w2"])


def test_logits_that_are_not_finite_name_the_model_and_the_prompt(folder: Path) -> None:
    model = open_vision_model(folder)
    model.network.model.language_model.embed_tokens.weight.data[ID["w9"]] = torch.nan
    images = [random_image(16, 16)] * 2
    with pytest.raises(FloatingPointError, match="'my-model' gives NaN or infinite logits for prompt 1"):
        model.last_logits(images, ["w1", "w2 w9"])


def test_a_language_model_is_not_a_vision_model(tmp_path: Path) -> None:
    made = tiny_model("qwen2", torch.float32)
    made.network.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'qwen2', which is none of .*: qwen2_vl, qwen2_5_vl, llava"):
        open_vision_model(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"min_pixels": 128, "max_pixels": 1024},
        {"size": {"min_pixels": 128, "max_pixels": 1024}},
        {"size": {"shortest_edge": 128, "longest_edge": 1024}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 128, "max_pixels": 1024},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_every_layout_of_the_processors_file_is_read(folder: Path, said: dict, nested: bool) -> None:
    path = folder / "preprocessor_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "size"} | said
    if nested:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    else:
        path.write_text(json.dumps(config))
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    preprocess = open_vision_model(folder).preprocess
    assert preprocess == QwenPreprocess(tuple(MEAN), tuple(STD), 1 / 255, 4, 2, 2, 128, 1024)


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
def test_llavas_sizes_may_be_plain_numbers(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    before = open_vision_model(folder).preprocess
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": LLAVA_SIZE, "crop_size": LLAVA_SIZE}))
    assert open_vision_model(folder).preprocess == before


@pytest.mark.parametrize(
    ("folder", "said", "message"),
    [
        ("qwen2_vl", {"do_normalize": False}, "leaves out one of"),
        ("qwen2_vl", {"resample": 2}, "does not resize bicubically"),
        ("qwen2_vl", {"patch_size": 14}, r"cuts patches .*: \[14, 2, 2\]\) that its network does not take"),
        ("llava", {"do_center_crop": False}, "cut out a square of 16 pixels"),
        ("llava", {"do_pad": True}, "cut out a square of 16 pixels"),
        ("llava", {"size": {"shortest_edge": 8}}, "cut out a square of 16 pixels"),
    ],
    indirect=["folder"],
)
def test_a_processor_that_is_not_imitated_is_refused(folder: Path, said: dict, message: str) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(ValueError, match=message):
        open_vision_model(folder)


def test_an_absent_or_damaged_processor_is_named(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    for damaged in ("{", "[]"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"^the image processor of model 'my-model' cannot be opened"):
            open_vision_model(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"^the image processor of model 'my-model' cannot be opened"):
        open_vision_model(folder)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("qwen2_vl", "<|vision_start|><|image_pad|><|vision_end|>w1 w2"), ("llava", "<image>\nw1 w2")],
)
def test_without_a_chat_template_the_prompt_is_plain(kind: str, text: str, tmp_path: Path) -> None:
    model = open_vision_model(save_vision_model(kind, tmp_path / kind, template=False))
    assert model.template is None and model.plain("w1 w2") == text
    assert torch.isfinite(model.last_logits([random_image(16, 16)], ["w1 w2"])).all()


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
def test_a_chat_template_is_read_from_its_old_file(folder: Path) -> None:
    image, prompts = [random_image(16, 16)], ["w1 w2"]
    model = open_vision_model(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": model.template}))
    again = open_vision_model(folder)
    assert again.template == model.template
    assert torch.equal(again.last_logits(image, prompts), model.last_logits(image, prompts))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['role'] }}", "makes 0 image placeholders '<.image_pad.>' of one image"),
        ("{{ raise_exception('no images') }}", r"^the chat template of model 'my-model' fails: .*no images$"),
    ],
)
def test_a_chat_template_without_images_is_refused(folder: Path, template: str, message: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    model = open_vision_model(folder)
    with pytest.raises(ValueError, match=message):
        model.last_logits([random_image(16, 16)], ["w1"])


@pytest.mark.parametrize(("size", "bias"), [((2, 4, 4), False), ((2, 4, 4), True), ((4, 8, 4), True)])
def test_patches_are_multiplied_as_they_would_be_convolved(size: tuple[int, ...], bias: bool) -> None:
    """Also where the input holds more than one patch, which is left to the convolution."""
    plain = torch.nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4), bias=bias).double()
    ours = copy.deepcopy(plain)
    vision._multiply_patches(ours)
    x = torch.randn(7, 3, *size, dtype=torch.float64, requires_grad=True)
    found, truth = ours(x), plain(x)
    torch.testing.assert_close(found, truth)
    way = torch.randn_like(truth)
    torch.testing.assert_close(torch.autograd.grad(found, x, way), torch.autograd.grad(truth, x, way))
    torch.testing.assert_close(copy.deepcopy(ours)(x), truth)
