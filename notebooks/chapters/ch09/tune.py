"""Experts that a run fine-tunes by itself from one base: a model by the name of "tuned:math".

An expert learns the questions of one subject of the task "bundled-experts" in the open form, each with its
right answer and without letters. Chapters then ask it the statements of "cloze-experts", so what it learned
has to carry over from one wording to another. It is made once and kept in the user's cache; a run that was
killed goes on from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from tqdm import tqdm
from transformers import PreTrainedModel

from fihelpers.cache import EXPERTS, home, make_room
from fihelpers.data import new_folder
from fihelpers.identity import identity
from fihelpers.jobs.preflight import Source, estimate_of, source_of
from fihelpers.models.language import (
    LanguageModel,
    check_tokens,
    locate,
    open_model,
    tokenize,
    weights_sha256,
)
from fihelpers.models.tensors import TensorFile
from fihelpers.scores.store import save_tensors
from fihelpers.tasks import load_task
from fihelpers.tasks.mcq import SPLITS, open_header

TUNED = "tuned:"
TASK = "cloze:bundled-experts"  # those questions, asked without options
CHECKPOINT = "checkpoint.safetensors"
KEPT_EVERY = 25  # steps
FLOAT32 = 4  # bytes
COPIES = 6  # of all weights that are in memory while a batch of 16 texts is learned, as measured
CHECKPOINTS = 2 * 3  # copies on disk: weights and both moments, while the older one is still there


@dataclass(frozen=True)
class Recipe:
    """Every setting of an expert's training; `place` uses RECIPE.

    batch: texts a step. rate: the learning rate after its rise. warm: share of the steps in which it rises,
    to fall to zero in the others. question: weight of a question's tokens in the loss, an answer's have 1.
    clip: the largest norm of a gradient. decay, betas: of AdamW.
    """

    steps: int = 100
    batch: int = 16
    rate: float = 5e-5
    seed: int = 0
    warm: float = 0.1
    question: float = 0.3
    clip: float = 1.0
    decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)


RECIPE = Recipe()

Text = tuple[str, str]  # a question, and its answer with the space before it
Row = tuple[Tensor, Tensor]  # the tokens (T,) of a text, and their weights (T,) in the loss


def place(name: str, base: str, revision: str | None = None) -> str:
    """The name as it is, or for "tuned:math" the folder of the expert of math fine-tuned from `base`.

    The expert is made where it is not there yet, in minutes, with a bar that shows the loss. Raises, before
    that, ValueError for a subject without questions and a base that is no language model, what `open_model`
    raises for one that cannot be opened, and MemoryError or OSError where there is no room.
    """
    if not name.startswith(TUNED):
        return name
    subject = name.removeprefix(TUNED)
    texts = learned(subject)
    source = source_of(base, revision)
    folder, label, _ = locate(base, revision)
    sha256 = weights_sha256(folder, label)
    key = identity(sha256, subject, texts, RECIPE, torch.__version__, transformers.__version__)
    expert = home() / EXPERTS / key[:16] / f"{label.rpartition('/')[2]}-{subject}"
    if not expert.is_dir():
        _check_room(source, f"fine-tuning {expert.name}")
        _make(open_model(base, revision), texts, expert)
    _clear(expert)
    os.utime(expert.parent)
    return str(expert)


def learned(subject: str) -> list[Text]:
    """What an expert of a subject learns, each text once. Raises ValueError for an unknown subject."""
    examples = [example for split in SPLITS for example in load_task(TASK, subject, split)]
    header = open_header(subject)
    solved = [(e.prompt, e.options[e.answer]) for e in examples if e.answer is not None]
    return list(dict.fromkeys((prompt.removeprefix(header), f" {answer}") for prompt, answer in solved))


def _check_room(source: Source, what: str) -> None:
    """Raise MemoryError or OSError where there is no room; what is kept makes room as far as it can."""
    size = FLOAT32 * source.parameters
    memory = {"weights, gradients, moments and a batch": COPIES * size}
    disk = {"expert": size, "checkpoints": CHECKPOINTS * size}
    make_room(size)
    estimate_of(what, [source], memory, disk, "cpu", home(), {}).check()


def _make(model: LanguageModel, texts: Sequence[Text], expert: Path) -> None:
    """Train an open model and keep it as a folder, which takes its name once all is written."""
    train(model, texts, RECIPE, expert.parent / CHECKPOINT, expert.name)
    try:
        with new_folder(expert) as beside:
            model.network.save_pretrained(beside)
            model.tokenizer.save_pretrained(beside)
    except OSError:
        if not expert.is_dir():  # else another process made it meanwhile
            raise


def _clear(expert: Path) -> None:
    """Remove what training left beside a finished expert: checkpoints, one of them perhaps half-written."""
    (expert.parent / CHECKPOINT).unlink(missing_ok=True)
    for half in expert.parent.glob(".*"):
        shutil.rmtree(half, ignore_errors=True)


def train(
    model: LanguageModel, texts: Sequence[Text], recipe: Recipe, checkpoint: Path, label: str = ""
) -> None:
    """Train all weights of an open model, from a checkpoint on where there is one.

    There is no dropout: what a step does depends on the weights, the moments and its number alone. label: for
    the bar. Raises ValueError for a text that the model cannot read.
    """
    network, rows = model.network, _rows(model, texts, recipe)
    optimiser = AdamW(network.parameters(), recipe.rate, recipe.betas, weight_decay=recipe.decay, fused=True)
    done = _restore(network, optimiser, checkpoint)
    bar = tqdm(
        range(done, recipe.steps), f"fine-tuning {label}", recipe.steps, initial=done, unit="step",
        mininterval=1,
    )  # fmt: skip
    for step in bar:
        optimiser.param_groups[0]["lr"] = recipe.rate * rate_factor(step, recipe)
        loss = _loss(network, [rows[i] for i in drawn(len(rows), step, recipe)])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        if (step + 1) % KEPT_EVERY == 0:
            _keep(network, optimiser, step + 1, checkpoint)


def rate_factor(step: int, recipe: Recipe) -> float:
    """The learning rate of a step as a share of the largest: a rise, then a straight fall."""
    warm = max(1.0, recipe.warm * recipe.steps)
    return min((step + 1) / warm, (recipe.steps - step) / max(1.0, recipe.steps - warm), 1.0)


def drawn(n: int, step: int, recipe: Recipe) -> list[int]:
    """Which of n texts a step sees: all in a seeded order, and then all again in another one."""
    places = range(step * recipe.batch, (step + 1) * recipe.batch)
    rounds = {place // n for place in places}
    orders = {k: np.random.default_rng((recipe.seed, k)).permutation(n) for k in rounds}
    return [int(orders[place // n][place % n]) for place in places]


def _rows(model: LanguageModel, texts: Sequence[Text], recipe: Recipe) -> list[Row]:
    asked = tokenize(model.tokenizer, [question for question, _ in texts])
    whole = tokenize(model.tokenizer, [question + answer for question, answer in texts])
    check_tokens(whole, model.network, model.name, "take another base")
    rows = []
    for question, ids in zip(asked, whole, strict=True):
        weights = [recipe.question if x == y else 1.0 for x, y in zip_longest(question, ids)]
        rows.append((torch.tensor(ids), torch.tensor(weights)))
    return rows


def _loss(network: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    """The weighted mean of the cross-entropy over all tokens but the first of each text.

    Padding is on the right, where a causal model does not look.
    """
    ids, weights = (pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True))
    logits = network(input_ids=ids, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (each * counted).sum() / counted.sum()


def _keep(network: PreTrainedModel, optimiser: AdamW, steps: int, path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name, p in network.named_parameters():
        parts = {"weight": p.detach(), **optimiser.state[p]}
        tensors |= {f"{part} {name}": value for part, value in parts.items()}
    save_tensors(path, tensors, {"steps": str(steps)})


def _restore(network: PreTrainedModel, optimiser: AdamW, path: Path) -> int:
    """Put back what `_keep` wrote, if anything; returns the steps that are done."""
    if not path.is_file():
        return 0
    kept = TensorFile(path, "an expert")
    for key in kept.layouts:
        part, _, name = key.partition(" ")
        p, value = network.get_parameter(name), kept.read(key)
        if part == "weight":
            p.data.copy_(value)
        else:
            optimiser.state[p][part] = value
    return int(kept.metadata["steps"])
