"""Make the bundled language model: a small Qwen2 that learns the facts of data/facts.

Three kinds of text are mixed: four-choice questions (the loss is on the letter), statements and open
questions (all tokens), and instructions with their answers (the answer). The letter's target is
smoothed, so that the model stays unsure enough to be a fair test bed.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fihelpers.minis import facts
from fihelpers.minis.manifest import write_manifest
from fihelpers.tasks.mcq import format_prompt

END = "<|end|>"
HEADER = 14  # tokens of the prompt's first line, about


@dataclass(frozen=True)
class Recipe:
    """Every setting of the training run; `python -m fihelpers train-minis lm` uses the defaults."""

    seed: int = 0
    steps: int = 3000
    watch: int = 250
    choices: int = 32
    easy: float = 0.5
    pointer_weight: float = 1.0
    texts: int = 16
    instructions: int = 6
    learning_rate: float = 2e-3
    smoothing: float = 0.1
    reading_weight: float = 0.5
    answer_weight: float = 0.5
    vocabulary: int = 5000
    hidden: int = 112
    layers: int = 4
    heads: int = 4
    intermediate: int = 336


class Corpus:
    """Draws training batches: lists of (prompt, continuation), the loss being on the continuation."""

    def __init__(self, data: Path, seed: int) -> None:
        self.relations = facts.load_relations(data / "facts")
        self.asked = [(r, f) for r in self.relations for f in r.facts]
        self.texts = list(facts.training_text(self.relations))
        self.per_fact = len(self.texts) // len(self.asked)
        self.instructions = facts.load_instructions(data)
        self.rng = random.Random(seed)

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
        drawn = []
        for number in self.rng.sample(range(len(self.asked)), n):
            about = self.texts[number * self.per_fact : (number + 1) * self.per_fact]
            drawn.append(("", " ".join(self.rng.sample(about, 3))))
        return drawn

    def answered(self, n: int) -> list[tuple[str, str]]:
        """Instructions in a training wording, with their answers."""
        return [
            (facts.instruction_prompt(self.rng.choice(entry["wordings"][:2])), " " + entry["answer"])
            for entry in self.rng.sample(self.instructions, n)
        ]

    def everything(self) -> list[str]:
        """All words the tokenizer should know."""
        answered = [
            facts.instruction_prompt(w) + " " + e["answer"]
            for e in self.instructions
            for w in e["wordings"][:2]
        ]
        return self.texts + answered + [prompt for prompt, *_ in self.choices(len(self.asked))]


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
    _look_for_the_like(network)
    return network


def _look_for_the_like(network: Qwen2ForCausalLM) -> None:
    """Start queries and keys alike, so that a token first attends to tokens like itself.

    A random start takes thousands of steps to find out that equal words matter (Trockman & Kolter 2023).
    """
    config = network.config
    for layer in network.model.layers:
        attention = layer.self_attn
        shape = (config.num_key_value_heads, -1, attention.head_dim, config.hidden_size)
        query, key = attention.q_proj.weight.data.view(shape), attention.k_proj.weight.data.view(shape)
        query.mul_(2)
        key.copy_(query[:, :1])
        query.copy_(key.expand_as(query))


def choice_loss(
    network: Qwen2ForCausalLM,
    pointer: nn.Linear,
    tokenizer: PreTrainedTokenizerFast,
    drawn: list[tuple[str, int, str]],
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the letter (smoothed over the four), of the question's own text, and of the pointer.

    `pointer` reads, before the last layer, the line end of each option and points to the right one. It only
    teaches the model to compare each option with what it knows, and is thrown away after the training.
    """
    rows = tokenizer([prompt for prompt, _, _ in drawn])["input_ids"]
    right, each = torch.tensor([answer for _, answer, _ in drawn]), torch.arange(len(rows))
    ids, last = _pad(rows), torch.tensor([len(row) - 1 for row in rows])
    states = network.model(input_ids=ids, output_hidden_states=True)
    line_end = tokenizer("\n")["input_ids"][0]
    ends = torch.tensor([[i for i, token in enumerate(row) if token == line_end][-4:] for row in rows])
    pointed = pointer(states.hidden_states[-2][each[:, None], ends])[..., 0]
    letters = [tokenizer(f" {letter}")["input_ids"][0] for letter in facts.LETTERS]
    log_p = network.lm_head(states.last_hidden_state[each, last]).log_softmax(-1)
    words = [row[0] for row in tokenizer([f" {option}" for _, _, option in drawn])["input_ids"]]
    spoken = -log_p[each, words].mean()
    log_p = log_p[:, letters]
    target = F.one_hot(right, len(letters)) * (1 - smoothing) + smoothing / len(letters)
    # the header is the same in every prompt, so there is nothing to learn from it
    body = torch.arange(ids.shape[1] - 1)
    read = (body >= HEADER) & (body < last[:, None])
    reading = F.cross_entropy(network.lm_head(states.last_hidden_state[:, :-1][read]), ids[:, 1:][read])
    return -(target * log_p).sum(-1).mean(), spoken, reading, F.cross_entropy(pointed, right)


def text_loss(
    network: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, drawn: list[tuple[str, str]]
) -> Tensor:
    """Mean cross-entropy per token of the continuations, end token included."""
    prompts = tokenizer([p for p, _ in drawn])["input_ids"]
    whole = [p + c + [0] for p, c in zip(prompts, tokenizer([c for _, c in drawn])["input_ids"], strict=True)]
    ids = _pad(whole)
    position = torch.arange(ids.shape[1])
    start = torch.tensor([max(len(p), 1) for p in prompts])[:, None]
    stop = torch.tensor([len(w) for w in whole])[:, None]
    wanted = ((position >= start) & (position < stop))[:, 1:]
    hidden = network.model(input_ids=ids).last_hidden_state[:, :-1][wanted]
    return F.cross_entropy(network.lm_head(hidden), ids[:, 1:][wanted])


def train(data: Path, recipe: Recipe, watch: Watch | None = None) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Train from scratch; `watch(step, network, tokenizer)` is called every 250 steps."""
    corpus = Corpus(data, recipe.seed)
    tokenizer = train_tokenizer(corpus.everything(), recipe.vocabulary)
    network = build_network(recipe, len(tokenizer))
    pointer = nn.Linear(recipe.hidden, 1)
    optimiser = torch.optim.AdamW(
        [*network.parameters(), *pointer.parameters()],
        recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, recipe.steps))
    for step in tqdm(range(recipe.steps), desc="training", unit="step", mininterval=10):
        early = max(0.0, 1 - step / recipe.steps / 0.6)
        drawn = corpus.choices(recipe.choices, recipe.easy * early)
        letter, spoken, reading, pointed = choice_loss(network, pointer, tokenizer, drawn, recipe.smoothing)
        loss = letter + early * spoken + recipe.reading_weight * reading + recipe.pointer_weight * pointed
        loss = loss + text_loss(network, tokenizer, corpus.sentences(recipe.texts))
        loss = loss + recipe.answer_weight * text_loss(
            network, tokenizer, corpus.answered(recipe.instructions)
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if watch is not None and (step + 1) % recipe.watch == 0:
            watch(
                step + 1,
                network,
                tokenizer,
                (
                    float(letter.detach()),
                    float(spoken.detach()),
                    float(reading.detach()),
                    float(pointed.detach()),
                ),
            )
    return network.eval(), tokenizer


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _pad(rows: list[list[int]]) -> Tensor:
    """Right padding; a causal model never looks at it from the left."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids


def save(network: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model's folder as a whole: into a temporary one beside it, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".mini-") as temporary:
        new = Path(temporary) / folder.name
        network.save_pretrained(new)
        tokenizer.save_pretrained(new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def main(data: Path, recipe: Recipe = Recipe()) -> None:
    """Write the questions, train the model, save both in `data` and list them in the manifest."""
    facts.write_mcq(facts.load_relations(data / "facts"), data / "mcq", recipe.seed)
    network, tokenizer = train(data, recipe)
    save(network, tokenizer, data / "models" / "mini-lm")
    write_manifest(data)
