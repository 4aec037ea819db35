"""Make the bundled language model: a small Qwen2 that learns the facts of data/facts.

Three kinds of text are mixed: four-choice questions (the loss is on the letter, and more lightly on the
question's own text), statements and open questions, and instructions with their answers. The letter's
target is smoothed and some facts are told but never asked, so that the model stays a fair test bed: one
that is always right and always sure would hide what a perturbation does.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from fihelpers.evaluate.questions import Evaluator
from fihelpers.models.language import open_model
from fihelpers.tasks import load_task
from fihelpers.tasks.instructions import instruction_prompt, load_instructions
from fihelpers.tasks.mcq import format_prompt
from fiminis import facts
from fiminis.manifest import write_manifest

END = "<|end|>"
NAME = "mini-lm"
HEADER = 14  # tokens of the prompt's first line, about
EARLY = 0.6  # the part of the training with easy questions and with answers spoken in words


@dataclass(frozen=True)
class Recipe:
    """Every setting of the training run; `python -m fihelpers train-minis lm` uses the defaults."""

    seed: int = 0
    steps: int = 3400
    choices: int = 32
    easy: float = 0.5
    # share of the facts that are stated but never asked: without them the model would know every subject
    # too well to be a fair test bed
    told_only: float = 0.12
    texts: int = 16
    instructions: int = 6
    learning_rate: float = 1.5e-3
    smoothing: float = 0.2
    reading_weight: float = 0.5
    answer_weight: float = 0.5
    vocabulary: int = 5000
    hidden: int = 112
    layers: int = 4
    heads: int = 4
    intermediate: int = 336


RECIPE = Recipe()


class Corpus:
    """Draws training batches: lists of (prompt, continuation), the loss being on the continuation."""

    def __init__(self, data: Path, seed: int, told_only: float) -> None:
        self.rng = random.Random(seed)
        self.instructions = load_instructions(data)
        told = [(r, f) for r in facts.load_relations(data / "facts") for f in r.facts]
        self.asked = [pair for pair in told if self.rng.random() >= told_only]
        asked = set(self.asked)
        self.texts = [list(facts.training_text(r, f, asked=(r, f) in asked)) for r, f in told]

    def choices(self, n: int, easy: float = 0.0) -> list[tuple[str, int, str]]:
        """Four-choice prompts with the index of the right letter, and the right option's text.

        A share `easy` of them takes the wrong options from other relations (a river among people), and as
        many state the fact before the question: choosing by kind and choosing what was just read are
        learned long before choosing by memory, and lead to it.
        """
        drawn = []
        for relation, fact in self.rng.sample(self.asked, n):
            question, luck = self.rng.choice(relation.questions["train"]), self.rng.random()
            if luck < easy:
                strange = [f.answer for r, f in self.rng.sample(self.asked, 12) if r is not relation]
                fact = replace(fact, wrong=tuple(dict.fromkeys(a for a in strange if a != fact.answer)))
            elif luck < 2 * easy:
                told = self.rng.choice(relation.statements).format(s=fact.subject, o=fact.answer)
                question = f"{told} {question}"
            item = facts.ask(fact, question, self.rng)
            prompt = format_prompt(relation.subject, item.question, item.options)
            drawn.append((prompt, item.answer, item.options[item.answer]))
        return drawn

    def sentences(self, n: int) -> list[tuple[str, str]]:
        """Three texts about one fact in a row, as (empty prompt, text).

        Seeing a fact again in other words teaches the model to look back at what it has read.
        """
        return [("", " ".join(self.rng.sample(about, 3))) for about in self.rng.sample(self.texts, n)]

    def answered(self, n: int) -> list[tuple[str, str]]:
        """Instructions in a training wording, with their answers."""
        return [
            (instruction_prompt(self.rng.choice(entry["wordings"][:2])), " " + entry["answer"])
            for entry in self.rng.sample(self.instructions, n)
        ]

    def everything(self) -> list[str]:
        """All words the tokenizer should know."""
        answered = [
            instruction_prompt(w) + " " + e["answer"] for e in self.instructions for w in e["wordings"][:2]
        ]
        return (
            [text for about in self.texts for text in about]
            + answered
            + [prompt for prompt, *_ in self.choices(len(self.asked))]
        )


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def build_network(recipe: Recipe, vocabulary: int) -> Qwen2ForCausalLM:
    """The untrained language model of the recipe, with seeded weights."""
    torch.manual_seed(recipe.seed)
    network = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads // 2,
            max_position_embeddings=512,
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    look_for_the_like(network.model)
    return network


def look_for_the_like(model: Qwen2Model | Qwen2_5_VLTextModel) -> None:
    """Start queries and keys alike, so that a token first attends to tokens like itself.

    A random start is slow to find out that equal words matter (after Trockman & Kolter 2023).
    """
    config = model.config
    for layer in model.layers:
        attention: Any = layer.self_attn
        shape = (config.num_key_value_heads, -1, attention.head_dim, config.hidden_size)
        query, key = attention.q_proj.weight.data.view(shape), attention.k_proj.weight.data.view(shape)
        query.mul_(2)
        key.copy_(query[:, :1])
        query.copy_(key.expand_as(query))


class Losses(NamedTuple):
    """Of four-choice questions: the letter (smoothed over the four), the right option spoken in words after
    "Answer:", the question's own text, and the pointer to the right option."""

    letter: Tensor
    spoken: Tensor
    reading: Tensor
    pointed: Tensor


def choice_losses(
    network: Qwen2ForCausalLM,
    pointer: nn.Linear,
    tokenizer: PreTrainedTokenizerFast,
    drawn: list[tuple[str, int, str]],
    smoothing: float,
) -> Losses:
    """Mean losses over some prompts.

    `pointer` reads, before the last layer, the line end of each option and points to the right one. It only
    teaches the model to compare each option with what it knows, and is thrown away after the training.
    """
    rows = tokenizer([prompt for prompt, _, _ in drawn])["input_ids"]
    right, each = torch.tensor([answer for _, answer, _ in drawn]), torch.arange(len(rows))
    ids, last = pad(rows), torch.tensor([len(row) - 1 for row in rows])
    states = network.model(input_ids=ids, output_hidden_states=True)
    pointed = pointer(states.hidden_states[-2][each[:, None], _option_ends(tokenizer, rows)])[..., 0]
    log_p = network.lm_head(states.last_hidden_state[each, last]).log_softmax(-1)
    words = [row[0] for row in tokenizer([f" {option}" for _, _, option in drawn])["input_ids"]]
    letters = [tokenizer(f" {letter}")["input_ids"][0] for letter in facts.LETTERS]
    target = F.one_hot(right, len(letters)) * (1 - smoothing) + smoothing / len(letters)
    # the header is the same in every prompt, so there is nothing to learn from it
    place = torch.arange(ids.shape[1] - 1)
    body = (place >= HEADER) & (place < last[:, None])
    return Losses(
        letter=-(target * log_p[:, letters]).sum(-1).mean(),
        spoken=-log_p[each, words].mean(),
        reading=F.cross_entropy(network.lm_head(states.last_hidden_state[:, :-1][body]), ids[:, 1:][body]),
        pointed=F.cross_entropy(pointed, right),
    )


def _option_ends(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]) -> Tensor:
    """Positions (B, 4) of the line ends of the options, the last four of a prompt."""
    line_end = tokenizer("\n")["input_ids"][0]
    return torch.tensor([[i for i, token in enumerate(row) if token == line_end][-4:] for row in rows])


def text_loss(
    network: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, drawn: list[tuple[str, str]]
) -> Tensor:
    """Mean cross-entropy per token of the continuations, end token included."""
    prompts = tokenizer([p for p, _ in drawn])["input_ids"]
    whole = [p + c + [0] for p, c in zip(prompts, tokenizer([c for _, c in drawn])["input_ids"], strict=True)]
    ids = pad(whole)
    position = torch.arange(ids.shape[1])
    start = torch.tensor([max(len(p), 1) for p in prompts])[:, None]
    stop = torch.tensor([len(w) for w in whole])[:, None]
    wanted = ((position >= start) & (position < stop))[:, 1:]
    hidden = network.model(input_ids=ids).last_hidden_state[:, :-1][wanted]
    return F.cross_entropy(network.lm_head(hidden), ids[:, 1:][wanted])


def train(data: Path, recipe: Recipe) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Train from scratch; the bar shows the losses of the letter and of the pointer."""
    corpus = Corpus(data, recipe.seed, recipe.told_only)
    tokenizer = train_tokenizer(corpus.everything(), recipe.vocabulary)
    network = build_network(recipe, len(tokenizer))
    pointer = nn.Linear(recipe.hidden, 1)
    weights = [*network.parameters(), *pointer.parameters()]
    optimiser = torch.optim.AdamW(weights, recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, recipe.steps)
    )
    bar = tqdm(range(recipe.steps), desc="training", unit="step", mininterval=1)
    for step in bar:
        early = max(0.0, 1 - step / recipe.steps / EARLY)
        drawn = corpus.choices(recipe.choices, recipe.easy * early)
        parts = choice_losses(network, pointer, tokenizer, drawn, recipe.smoothing)
        loss = parts.letter + early * parts.spoken + recipe.reading_weight * parts.reading + parts.pointed
        loss = loss + text_loss(network, tokenizer, corpus.sentences(recipe.texts))
        answered = text_loss(network, tokenizer, corpus.answered(recipe.instructions))
        loss = loss + recipe.answer_weight * answered
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(
            letter=f"{parts.letter.item():.2f}", pointer=f"{parts.pointed.item():.2f}", refresh=False
        )
    return network.eval(), tokenizer


def learning_rate_factor(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / 100)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def pad(rows: list[list[int]]) -> Tensor:
    """Right padding; a causal model never looks at it from the left."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids


def save(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, more: Mapping[str, str] = {}
) -> None:
    """Write the model's folder as a whole: into a temporary one beside it, then renamed.

    `more` are further files, by name, with their text.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".mini-") as temporary:
        new = Path(temporary) / folder.name
        network.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for name, text in more.items():
            (new / name).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def report(data: Path) -> str:
    """Accuracy and median P(y_hat) of the saved model on each subject, a line each."""
    model = open_model(str(data / "models" / NAME))
    lines = []
    for split in ("val", "test"):
        for subject in facts.SUBJECTS:
            task = load_task(str(data / "mcq"), subject, split)
            outcome = Evaluator(model, task.examples)()
            scores = f"accuracy {outcome.accuracy:.3f} median P {outcome.confidence:.3f}"
            lines.append(f"{split:4} {subject:9} {scores} n {len(task)}")
    return "\n".join(lines)


def main(data: Path, recipe: Recipe = RECIPE) -> None:
    """Write the questions, train the model, save both in `data`, list them in the manifest, and report."""
    relations = facts.load_relations(data / "facts")
    facts.write_mcq(relations, data / "mcq", recipe.seed)
    facts.write_cloze(relations, data / "cloze")
    network, tokenizer = train(data, recipe)
    save(network, tokenizer, data / "models" / NAME)
    write_manifest(data)
    print(report(data))
