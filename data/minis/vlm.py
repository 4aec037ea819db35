"""Make the bundled vision-language model: a small Qwen2.5-VL that answers questions about drawn pictures.

Every picture is asked once as a four-choice question. Four losses are taken from one pass: the letter after
"Answer:" (smoothed), the answer in words right after the question, before any option is read, a pointer to
the right option, and tags: some token of the picture shall be like the word of each thing that can be asked
about. Pointer and tags only teach, and are thrown away after the training. Instructions of data/prompts.yaml
stand before some of the questions: after a safe one the picture is often noisy or masked, after an aggressive
one the question is at times about a small detail, so that an instruction can come to matter.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from fihelpers.evaluate.questions import answer_images
from fihelpers.models.vision import open_vision_model, qwen_patches
from fihelpers.tasks import load_task
from fihelpers.tasks.pictures import image_prompt
from fiminis import drawings as images
from fiminis.drawings import SIZE, SUBJECTS, TRAIN, Item, Picture
from fiminis.lm import learning_rate_factor, look_for_the_like, pad, save
from fiminis.manifest import write_manifest

NAME = "mini-vlm"
END, VISION_START, VISION_END, IMAGE, VIDEO = SPECIAL = (
    "<|end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PATCH, MERGE, TEMPORAL = 14, 2, 2
TOKENS = (SIZE // PATCH // MERGE) ** 2  # of one picture
# How Qwen2 cuts a text before byte-pair encoding, so that its own tokenizer class cuts it alike.
QWEN2_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"{VISION_START}{IMAGE}{VISION_END}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of Qwen2.5-VL


@dataclass(frozen=True)
class Stage:
    """A stretch of training with a stock of pictures and a learning rate of its own.

    The stock goes round the subjects in their order, so that a subject named twice is drawn twice as often.
    With `pairs` a colour and its shape are to be found in one token of the picture.
    """

    steps: int
    learning_rate: float
    subjects: tuple[str, ...]
    pairs: bool = False


# To bind a colour to a shape is learned last, and hardly at all by itself: the second stage asks for it more
# often, and for both in one place.
STAGES = (
    Stage(7000, 1.5e-3, SUBJECTS),
    Stage(3000, 1e-3, ("attribute", "action", "attribute", "identity", "attribute", "function"), pairs=True),
)


@dataclass(frozen=True)
class Recipe:
    """Every setting of the training run; `python -m fihelpers train-minis vlm` uses the defaults."""

    seed: int = 0
    pictures: int = 24_000
    stages: tuple[Stage, ...] = STAGES
    batch: int = 40
    smoothing: float = 0.2
    tag_weight: float = 0.2
    instructed: float = 0.5  # share of the questions with an instruction before them
    corrupted: float = 0.5  # share of noisy or masked pictures after a safe instruction
    detailed: float = 0.3  # share of questions about a detail after an aggressive instruction
    vocabulary: int = 700
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 352
    vision_hidden: int = 96
    vision_depth: int = 4
    vision_intermediate: int = 256


RECIPE = Recipe()


class Drawn(NamedTuple):
    """One training question: the picture (112, 112, 3), the prompt's text, the item, and as tags the answers
    to all questions about the picture and its pairs of a colour and a shape."""

    pixels: np.ndarray
    text: str
    item: Item
    tags: tuple[str, ...]


class Corpus:
    """The stock of pictures of one stage, and questions drawn from it."""

    def __init__(self, data: Path, recipe: Recipe, number: int = 0) -> None:
        seed, subjects = recipe.seed + number, recipe.stages[number].subjects
        self.recipe, self.rng = recipe, random.Random(seed)
        self.noise = np.random.default_rng(seed)
        self.instructions = load_instructions(data)
        each = [subjects[i % len(subjects)] for i in range(recipe.pictures)]
        bar = tqdm(each, desc="drawing", unit="picture", mininterval=1)
        self.stock: list[Picture] = [images.PAINTERS[subject](self.rng, TRAIN) for subject in bar]

    def draw(self, n: int) -> list[Drawn]:
        return [self._ask(picture) for picture in self.rng.sample(self.stock, n)]

    def _ask(self, picture: Picture) -> Drawn:
        rng, recipe = self.rng, self.recipe
        kind = rng.choice(list(self.instructions)) if rng.random() < recipe.instructed else ""
        question, pixels = rng.choice(picture.questions), picture.pixels
        if kind == "aggressive" and picture.detail and rng.random() < recipe.detailed:
            question = picture.detail
        if kind == "safe" and rng.random() < recipe.corrupted:
            pixels = corrupt(pixels, self.noise)
        item = images.ask(question, rng, TRAIN)
        instruction = rng.choice(self.instructions[kind]) if kind else ""
        text = image_prompt(item.question, item.options, instruction=instruction)
        pairs = [f"{q.answer} {q.about}" for q in picture.questions if q.kind == "colour"]
        return Drawn(pixels, text, item, (*(q.answer for q in picture.questions), *pairs))

    def everything(self) -> list[str]:
        """All words the tokenizer should know, the answers " A" to " D" among them."""
        wordings = [w for trained in self.instructions.values() for w in trained]
        asked = self.draw(min(8000, len(self.stock)))
        return [f"{d.text} {'ABCD'[d.item.answer]}" for d in asked] + wordings * 40


def load_instructions(data: Path) -> dict[str, list[str]]:
    """The trained wordings of each kind of instruction in data/prompts.yaml."""
    kinds = yaml.safe_load((data / "prompts.yaml").read_text(encoding="utf-8"))
    return {kind: entry["trained"] for kind, entry in kinds.items()}


def corrupt(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper on 2 to 10 % of the pixels, or one to four patches of a single grey."""
    pixels = pixels.copy()
    if rng.random() < 0.5:
        hit = rng.random((SIZE, SIZE)) < rng.uniform(0.02, 0.1)
        pixels[hit] = 255 * rng.integers(2, size=(int(hit.sum()), 1))
        return pixels
    for _ in range(rng.integers(1, 5)):
        row, column = rng.integers(0, SIZE - PATCH, size=2)
        pixels[row : row + PATCH, column : column + PATCH] = rng.integers(256) * (rng.random() < 0.5)
    return pixels


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens that cuts texts as Qwen2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = CHAT
    return fast


def build_network(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained vision-language model of the recipe, with seeded weights."""
    torch.manual_seed(recipe.seed)
    vocabulary = tokenizer.get_vocab()
    ids = {name: vocabulary[name] for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config=_text_config(recipe, len(tokenizer), ids[END]),
        vision_config=_vision_config(recipe),
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )
    network = Qwen2_5_VLForConditionalGeneration(config)
    look_for_the_like(network.model.language_model)
    network.model.visual.patch_embed.proj.weight.data.copy_(waves(recipe.vision_hidden))
    return network


def _text_config(recipe: Recipe, vocabulary: int, end: int) -> dict[str, Any]:
    half = recipe.hidden // recipe.heads // 2
    place = 3 * half // 8  # Qwen2.5-VL's shares of the rotary dimensions: a quarter time, the rest place
    return {
        "vocab_size": vocabulary,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads // 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.04,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [half - 2 * place, place, place],
        },
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def _vision_config(recipe: Recipe) -> dict[str, Any]:
    return {
        "depth": recipe.vision_depth,
        "hidden_size": recipe.vision_hidden,
        "intermediate_size": recipe.vision_intermediate,
        "num_heads": recipe.heads,
        "out_hidden_size": recipe.hidden,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "window_size": SIZE,
        "fullatt_block_indexes": [recipe.vision_depth - 1],
        "initializer_range": 0.04,
    }


def waves(n: int) -> Tensor:
    """Patch filters (n, 3, 2, 14, 14) to start from: the n / 3 slowest cosines, in grey and two contrasts.

    Drawings are smooth, and a random filter hardly answers to what is smooth.
    """
    place = (torch.arange(PATCH) + 0.5) / PATCH
    cosines = torch.stack([torch.cos(torch.pi * k * place) for k in range(PATCH)])
    pairs = [(i, j) for i in range(PATCH) for j in range(PATCH)]
    slow = sorted(pairs, key=lambda k: (k[0] ** 2 + k[1] ** 2, k))
    mixes, _ = torch.linalg.qr(torch.tensor([[1.0, 1, 1], [1, -1, 1], [1, 0, -2]]))
    filters = torch.empty(n, 3, TEMPORAL, PATCH, PATCH)
    for k in range(n):
        i, j = slow[k // 3]
        wave = cosines[i][:, None] * cosines[j]
        # the paper is the same everywhere, fine detail is faint: the one is weighed down, the other up
        strength = 0.6 * (1 + math.hypot(i, j)) ** 0.5 if i + j else 0.18
        filters[k] = strength / TEMPORAL * mixes[:, k % 3, None, None, None] * wave / wave.norm()
    return filters


def pixel_values(pictures: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Patches of pictures that need no resize, as Qwen2.5-VL takes them, and their grids."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return qwen_patches((pixels - mean) / std, PATCH, MERGE, TEMPORAL)


class Losses(NamedTuple):
    """Mean losses of the letter, of the answer in words, of the pointer and of the tags."""

    letter: Tensor
    spoken: Tensor
    pointed: Tensor
    tagged: Tensor


class Reader(nn.Module):
    """Turns drawn questions into what the network reads, and takes the losses; holds what only teaches."""

    def __init__(
        self, network: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.pointer = nn.Linear(network.lm_head.in_features, 1)
        self.likeness = nn.Linear(1, 1)  # from an inner product with a word to the log-odds of its tag
        nn.init.constant_(self.likeness.weight, 4.0)
        nn.init.constant_(self.likeness.bias, -5.0)
        words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.line_ends = torch.tensor([i for i, word in enumerate(words) if "\n" in word])
        self.letters = [self._word(f" {letter}") for letter in "ABCD"]
        self.pair_likeness = nn.Linear(1, 1)  # the same for the sum of two inner products
        nn.init.constant_(self.pair_likeness.weight, 4.0)
        nn.init.constant_(self.pair_likeness.bias, -8.0)
        self.tags = {tag: k for k, tag in enumerate((*images.ANSWERS, *images.PAIRS))}
        self.words = [self._word(f" {tag}") for tag in images.ANSWERS]
        self.parts = torch.tensor([[self.tags[part] for part in pair.split()] for pair in images.PAIRS])
        self.before = f"{VISION_START}{IMAGE * TOKENS}{VISION_END}"

    def _word(self, text: str) -> int:
        return int(self.tokenizer(text)["input_ids"][0])

    def losses(self, drawn: list[Drawn], smoothing: float, pairs: bool) -> Losses:
        rows = self.tokenizer([self.before + d.text for d in drawn])["input_ids"]
        ids, each = pad(rows), torch.arange(len(rows))
        last = torch.tensor([len(row) - 1 for row in rows])
        seen, states = self.read(ids, [d.pixels for d in drawn])
        ends = self._line_ends(ids)
        right = torch.tensor([d.item.answer for d in drawn])
        head = self.network.lm_head
        log_p = head(states.last_hidden_state[each, last]).log_softmax(-1)[:, self.letters]
        target = F.one_hot(right, 4) * (1 - smoothing) + smoothing / 4
        words = torch.tensor([self._word(f" {d.item.options[d.item.answer]}") for d in drawn])
        spoken = F.cross_entropy(head(states.last_hidden_state[each, ends[:, 0]]), words)
        pointed = self.pointer(states.hidden_states[-2][each[:, None], ends[:, 1:]])[..., 0]
        letter = -(target * log_p).sum(-1).mean()
        return Losses(letter, spoken, F.cross_entropy(pointed, right), self._tagged(seen, drawn, pairs))

    def _tagged(self, seen: Tensor, drawn: list[Drawn], pairs: bool) -> Tensor:
        """Loss of the tags, from the tokens of the pictures (B, TOKENS, hidden)."""
        embeddings: Tensor = self.network.get_input_embeddings().weight  # type: ignore[assignment]
        alike = seen @ embeddings[self.words].T
        both = alike[..., self.parts].sum(-1)
        log_odds = torch.cat([self.likeness(alike[..., None]), self.pair_likeness(both[..., None])], 2)
        log_odds = log_odds[..., 0].logsumexp(1)
        there = torch.zeros_like(log_odds)
        for row, d in enumerate(drawn):
            there[row, [self.tags[tag] for tag in d.tags]] = 1
        count = len(self.tags) if pairs else len(self.words)
        loss = F.binary_cross_entropy_with_logits(log_odds[:, :count], there[:, :count], reduction="none")
        return loss.sum(1).mean()

    def read(self, ids: Tensor, pictures: list[np.ndarray]) -> tuple[Tensor, Any]:
        """The tokens of the pictures (B, TOKENS, hidden) and the states of the language model."""
        model = self.network.model
        patches, grids = pixel_values(pictures)
        kinds = (ids == self.network.config.image_token_id).int()
        # the same positions for all rows, as the padding is on the right
        positions, _ = model.get_rope_index(ids[:1], kinds[:1], grids[:1])
        seen = torch.stack(model.get_image_features(patches, grids).pooler_output)
        embedded = model.get_input_embeddings()(ids).masked_scatter(kinds.bool()[..., None], seen)
        states = model.language_model(
            inputs_embeds=embedded,
            position_ids=positions.expand(-1, len(ids), -1),
            output_hidden_states=True,
            use_cache=False,
        )
        return seen, states

    def _line_ends(self, ids: Tensor) -> Tensor:
        """Positions (B, 5) of the ends of the question and of the four options."""
        ends = torch.isin(ids, self.line_ends)
        return torch.stack([row.nonzero()[-5:, 0] for row in ends])


def train(data: Path, recipe: Recipe) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """Train from scratch, stage by stage."""
    corpus = Corpus(data, recipe)
    tokenizer = train_tokenizer(corpus.everything(), recipe.vocabulary)
    network = build_network(recipe, tokenizer)
    for number, stage in enumerate(recipe.stages):
        corpus = corpus if number == 0 else Corpus(data, recipe, number)
        run_stage(Reader(network, tokenizer), corpus, recipe, stage)
    return network.eval(), tokenizer


def run_stage(reader: Reader, corpus: Corpus, recipe: Recipe, stage: Stage) -> None:
    """Train for one stage; the bar shows the losses."""
    weights = list(reader.parameters())
    optimiser = torch.optim.AdamW(weights, stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: learning_rate_factor(s, stage.steps))
    bar = tqdm(range(stage.steps), desc="training", unit="step", mininterval=1)
    for _ in bar:
        parts = reader.losses(corpus.draw(recipe.batch), recipe.smoothing, stage.pairs)
        optimiser.zero_grad()
        (parts.letter + parts.spoken + parts.pointed + recipe.tag_weight * parts.tagged).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        shown = {name: f"{value.item():.2f}" for name, value in parts._asdict().items()}
        bar.set_postfix(shown, refresh=False)


def preprocessor() -> str:
    """preprocessor_config.json: pictures of 56 x 56 to 448 x 448 pixels are taken as they are, nearly."""
    factor = PATCH * MERGE
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "size": {"shortest_edge": (2 * factor) ** 2, "longest_edge": (16 * factor) ** 2},
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
    }
    return json.dumps(settings, indent=1) + "\n"


def report(data: Path) -> str:
    """Accuracy and median P(y_hat) of the saved model on each category, a line each."""
    model = open_vision_model(str(data / "models" / NAME))
    lines = []
    for split in (images.VAL, images.TEST):
        for subject in SUBJECTS:
            outcome = answer_images(model, load_task("bundled-images", subject, split).examples)
            n = len(outcome.answer)
            scores = f"accuracy {outcome.accuracy:.3f} median P {outcome.confidence:.3f}"
            lines.append(f"{split:4} {subject:9} {scores} n {n}")
    return "\n".join(lines)


def main(data: Path, recipe: Recipe = RECIPE) -> None:
    """Draw the questions, train the model, save both in `data`, list them in the manifest, and report."""
    images.write_questions(data / "vqa", recipe.seed)
    network, tokenizer = train(data, recipe)
    save(network, tokenizer, data / "models" / NAME, {"preprocessor_config.json": preprocessor()})
    write_manifest(data)
    print(report(data))
