"""Tiny random vision-language models, saved as local folders as a hub would give them."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

VISION_KINDS = ("qwen2_vl", "qwen2_5_vl", "llava")
CLASSES = {"qwen2_vl": "Qwen2VLImageProcessor", "qwen2_5_vl": "Qwen2VLImageProcessor",
           "llava": "LlavaImageProcessor"}  # fmt: skip
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>", "<image>", "<pad>")  # fmt: skip
WORDS = ["<unk>", *SPECIAL, *"ABCDEF", ".", ":", "Answer", "user", "assistant", "USER", "ASSISTANT",
         *(f"w{i}" for i in range(27))]  # fmt: skip
ID = {word: i for i, word in enumerate(WORDS)}
PATCH, MERGE, LLAVA_SIZE = 4, 2, 16  # an image token of the Qwen family sees 8x8 pixels, one of LLaVA 4x4
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
CONTEXT = 160

QWEN_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{% if part['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAVA_TEMPLATE = """{% for message in messages %}USER: {% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>
{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


def save_vision_model(kind: str, folder: Path, template: bool = True) -> Path:
    """Write network, tokenizer (with or without a chat template) and preprocessor_config.json into a folder.

    Weights are large enough that gradients are not all alike. Images of whole 8x8 blocks (Qwen family) or of
    16x16 pixels (LLaVA) need no resize; the Qwen family takes 64 to 4096 pixels, the rest is resized.
    """
    network = vision_network(kind)
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    network.save_pretrained(folder)
    vision_tokenizer(kind, template).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(kind)))
    return folder


def vision_network(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24,
             "max_position_embeddings": CONTEXT, "pad_token_id": ID["<pad>"],
             "bos_token_id": None, "eos_token_id": ID["<|im_end|>"]}  # fmt: skip
    if kind == "llava":
        sight = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
                 "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": LLAVA_SIZE,
                 "patch_size": PATCH, "projection_dim": 16}  # fmt: skip
        text = {"model_type": "llama", **shape}
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=sight, text_config=text, image_token_index=ID["<image>"])
        ).eval()
    shape["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    tokens = {"image_token_id": ID["<|image_pad|>"], "video_token_id": ID["<|video_pad|>"],
              "vision_start_token_id": ID["<|vision_start|>"],
              "vision_end_token_id": ID["<|vision_end|>"]}  # fmt: skip
    sight = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE}
    if kind == "qwen2_vl":
        sight |= {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}
        return Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(vision_config=sight, text_config=shape, **tokens)
        ).eval()
    sight |= {"hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "window_size": 16,
              "fullatt_block_indexes": [1]}  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=sight, text_config=shape, **tokens)
    ).eval()


def vision_tokenizer(kind: str, template: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    if template:
        fast.chat_template = LLAVA_TEMPLATE if kind == "llava" else QWEN_TEMPLATE
    return fast


def preprocessor_config(kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {"image_processor_type": CLASSES[kind], "image_mean": MEAN, "image_std": STD}
    if kind == "llava":
        size = {"height": LLAVA_SIZE, "width": LLAVA_SIZE}
        return config | {"size": {"shortest_edge": LLAVA_SIZE}, "crop_size": size}
    return config | {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2,
                     "size": {"shortest_edge": 64, "longest_edge": 4096}}  # fmt: skip


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Grey levels (3, H, W), whole numbers 0..255 as float32: smooth colours with noise on them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    noise = torch.rand(3, height, width, generator=generator)
    return ((0.7 * smooth + 0.3 * noise) * 255).round()


def to_pil(image: torch.Tensor) -> Image.Image:
    """Grey levels (3, H, W), 0 to 255, as a picture, rounded."""
    levels = image.detach().round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.contiguous().numpy())


def encode_png(image: torch.Tensor) -> bytes:
    """Grey levels (3, H, W) as a PNG file, which loses nothing of whole ones."""
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG")
    return file.getvalue()
