"""Small stand-ins for what the commands of the documents name: models, questions, a grid, few sizes."""

import base64
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tiny_gguf import tiny_qwen2, write_gguf
from tiny_vision import save_vision_model
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from fihelpers.data import data_folder

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("path/to/model", "path/to/base", "Qwen/Qwen2.5-0.5B")
EXPERTS = ("path/to/a", "path/to/b")  # made from the base
FILES = ("path/to/model.gguf", "owner/name/file.gguf")
SEEING = ("Qwen/Qwen2.5-VL-3B-Instruct",)
# questions in MMLU's own files of the subjects that documents name, and that a chapter is run on
MMLU = {
    "college_medicine": {"dev": 5, "val": 22, "test": 173},
    "elementary_mathematics": {"dev": 5, "val": 41, "test": 378},
    "marketing": {"dev": 5, "val": 25, "test": 234},
}
SIZES: dict[str, dict[str, Any]] = {  # in place of every profile's own
    "01_first_look": {"N_CALIBRATION": 2, "N_TEST": 4, "SHARES": [0.02]},
    "04_fragile_pixels": {
        "N_IMAGES": 2, "N_SWEPT": 1, "MASK_SHARES": [0.05], "MASK_PATCHES": [8], "DRAWS": 1, "BATCH": 4,
    },
    "07_sparsification": {
        "SUBJECTS": ["law"], "N_CALIBRATION": 2, "N_TEST": 4, "SEEDS": 2, "RATES": [0.01, 0.05],
        "PRUNING": {"test": 2, "top": [0.01], "bottom": [0.2, 0.5], "compared": [0.2, 0.5]},
        "TEXT": {"n_calibration": 2, "n_test": 4, "rates": [0.1], "length": 6, "horizon": 2,
                 "samples": 2},
    },
    "09_merging": {
        "SHARES": [0.02], "TASK_WEIGHTS": [0.5, 0.6], "SEEDS": 2, "N_TEST": 8,
        "OPTIONS": {"densities": [0.5], "wide": [1.0], "compared": 0.05, "validation": 4,
                    "choices": ["random"]},
    },
}  # fmt: skip


def make_standins(folder: Path) -> Path:
    """Fill a folder with everything that a command of the documents names, relative to it."""
    write_notebooks(folder / "notebooks")
    write_mmlu(folder / "path" / "to" / "mmlu")
    write_mmbench(folder / "path" / "to" / "mmbench_dev_en.tsv")
    write_alpaca(folder / "alpaca_eval.json")
    for place in MODELS:
        save_model(folder / place)
    for seed, place in enumerate(EXPERTS, 1):
        save_model(folder / place, seed)
    for place in FILES:
        save_gguf(folder / place)
    for place in SEEING:
        save_vision_model("qwen2_5_vl", folder / place)
    (folder / "grid.yaml").write_text("HEADLINE_RATE: [0.02]\nSEED: [3]\n")
    return folder


def write_notebooks(folder: Path) -> None:
    """The chapters as they are, under profiles of the same names with the smallest sizes."""
    profiles = folder / "profiles"
    profiles.mkdir(parents=True)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, folder)
    for profile in (ROOT / "notebooks" / "profiles").glob("*.yaml"):
        (profiles / profile.name).write_text(yaml.safe_dump(SIZES))


def save_model(folder: Path, seed: int | None = None) -> None:
    """A random language model with the bundled one's tokenizer; with a seed, one made from it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(data_folder() / "models" / "mini-lm")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=2048, **shape,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    network = Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    if seed is not None:
        generator.manual_seed(seed + 1)
        for p in network.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_gguf(path: Path) -> None:
    """A tiny model with the bundled one's tokenizer, as a GGUF file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(data_folder() / "models" / "mini-lm")
    write_gguf(path, tiny_qwen2(True, len(tokenizer)), tokenizer)


def write_mmlu(folder: Path) -> None:
    """As many questions of each split as the real files have."""
    for subject, counts in MMLU.items():
        for split, n in counts.items():
            text = io.StringIO()
            rows = csv.writer(text)
            for i in range(n):
                rows.writerow([f"{subject} {split} {i}?", *(f"{i + k}" for k in range(4)), "ABCD"[i % 4]])
            path = folder / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.getvalue())


def write_mmbench(path: Path) -> None:
    """Questions of two categories about small pictures."""
    fields = ["index", "question", "A", "B", "C", "D", "answer", "category", "split", "image"]
    rng = np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(fields)
        for i, category in enumerate(("action_recognition", "celebrity_recognition") * 4):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(image, "PNG")
            options = [f"w{4 * i + k}" for k in range(4)]
            coded = base64.b64encode(image.getvalue()).decode()
            rows.writerow([i, f"w{i}?", *options, "ABCD"[i % 4], category, "dev", coded])


def write_alpaca(path: Path) -> None:
    """Instructions in AlpacaEval's layout."""
    rows = [
        {"instruction": f"Tell me about number {i}.", "output": f"It is {i}.", "dataset": "numbers"}
        for i in range(16)
    ]
    path.write_text(json.dumps(rows))
