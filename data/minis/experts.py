"""Make the bundled experts: mini-lm, trained further on one domain each, for the chapter on merging.

Each expert learns the facts of one file of data/experts and never sees the other's. A part of every batch is
the base's own text, so that what both share stays alike and the average of the two still answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from fihelpers.evaluate.questions import Evaluator
from fihelpers.models.language import LanguageModel, open_model
from fihelpers.tasks import load_task
from fiminis import facts, lm
from fiminis.manifest import write_manifest

DOMAINS = ("math", "health")
SEED = 0
TOKENIZER_SETTINGS = "tokenizer_config.json"
FOLDER = "experts"  # of the data folder; holds the sources and, below dev, val and test, the questions


@dataclass(frozen=True)
class Recipe:
    """Every setting of one expert's training; `python -m fihelpers train-minis experts` uses RECIPES."""

    seed: int = SEED
    steps: int = 1200
    choices: int = 24
    easy: float = 0.4
    told_only: float = 0.05  # share of the facts that are stated but never asked, as for the base
    texts: int = 12
    base_choices: int = 6
    base_texts: int = 3
    learning_rate: float = 1e-3
    smoothing: float = 0.2
    reading_weight: float = 0.5


RECIPES = {  # numbers are learned more slowly than names
    "math": Recipe(),
    "health": Recipe(steps=900, told_only=0.12),
}


class Lessons(lm.Corpus):
    """Draws the questions and statements of one domain, as `lm.Corpus` does those of all its subjects."""

    def __init__(self, relations: Sequence[facts.Relation], seed: int, told_only: float) -> None:
        self.rng = random.Random(seed)
        self.instructions = []
        told = [(r, f) for r in relations for f in r.facts]
        self.asked = [pair for pair in told if self.rng.random() >= told_only]
        asked = set(self.asked)
        self.texts = [list(facts.training_text(r, f, asked=(r, f) in asked)) for r, f in told]


def model_name(domain: str) -> str:
    """The bundled name of a domain's expert."""
    return f"mini-{domain}"


def write_questions(data: Path) -> None:
    """Write data/experts/{dev,val,test}/{domain}_{split}.csv in the MMLU layout, and data/cloze-experts/."""
    folder = data / FOLDER
    relations = facts.load_relations(folder, DOMAINS)
    facts.write_mcq(relations, folder, SEED, DOMAINS)
    facts.write_cloze(relations, data / f"cloze-{FOLDER}", DOMAINS)


def train(data: Path, domain: str, recipe: Recipe) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Train all weights of mini-lm further on one domain; the bar shows the losses of letter and pointer."""
    base = data / "models" / lm.NAME
    torch.manual_seed(recipe.seed)
    network = Qwen2ForCausalLM.from_pretrained(base, use_safetensors=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    lessons = Lessons(facts.load_relations(data / FOLDER, [domain]), recipe.seed, recipe.told_only)
    # with the base's own seed, the facts that the base was never asked are not asked here either
    memory = lm.Corpus(data, lm.RECIPE.seed, lm.RECIPE.told_only)
    pointer = nn.Linear(network.config.hidden_size, 1)
    weights = [*network.parameters(), *pointer.parameters()]
    optimiser = torch.optim.AdamW(weights, recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: lm.learning_rate_factor(step, recipe.steps)
    )
    bar = tqdm(range(recipe.steps), desc=f"training {model_name(domain)}", unit="step", mininterval=1)
    for step in bar:
        early = max(0.0, 1 - step / recipe.steps / lm.EARLY)
        easy = recipe.easy * early
        drawn = lessons.choices(recipe.choices, easy) + memory.choices(recipe.base_choices)
        parts = lm.choice_losses(network, pointer, tokenizer, drawn, recipe.smoothing)
        told = lessons.sentences(recipe.texts) + memory.sentences(recipe.base_texts)
        loss = parts.letter + parts.pointed + early * parts.spoken + recipe.reading_weight * parts.reading
        loss = loss + lm.text_loss(network, tokenizer, told)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        shown = {"letter": f"{parts.letter.item():.2f}", "pointer": f"{parts.pointed.item():.2f}"}
        bar.set_postfix(shown, refresh=False)
    return network.eval(), tokenizer


def accuracy(model: LanguageModel, data: Path, domain: str, split: str) -> tuple[float, float]:
    """Accuracy and median P(y_hat) of a model on one domain's questions."""
    task = load_task(data / FOLDER, domain, split)
    outcome = Evaluator(model, task.examples)()
    return outcome.accuracy, outcome.confidence


def report(data: Path) -> str:
    """Accuracy and median P(y_hat) of the base and of both experts on each domain, a line each."""
    lines = []
    for name in (lm.NAME, *map(model_name, DOMAINS)):
        model = open_model(str(data / "models" / name))
        for split in ("val", "test"):
            for domain in DOMAINS:
                share, confidence = accuracy(model, data, domain, split)
                lines.append(f"{name:11} {split:4} {domain:6} accuracy {share:.3f} median P {confidence:.3f}")
    return "\n".join(lines)


def main(data: Path, recipes: Mapping[str, Recipe] = RECIPES) -> None:
    """Write the questions, train both experts, save all in `data`, list it in the manifest, and report."""
    write_questions(data)
    for domain, recipe in recipes.items():
        network, tokenizer = train(data, domain, recipe)
        # of the opened tokenizer transformers would write down more than its settings
        settings = (data / "models" / lm.NAME / TOKENIZER_SETTINGS).read_text(encoding="utf-8")
        lm.save(network, tokenizer, data / "models" / model_name(domain), {TOKENIZER_SETTINGS: settings})
    write_manifest(data)
    print(report(data))
