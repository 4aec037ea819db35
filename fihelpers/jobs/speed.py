"""How fast weights are scored on this machine, measured in a moment before a run that takes long.

Two blocks of the model, of their real widths and with random weights, score batches of few and of more
tokens. What grows with the tokens are matrix products; what does not is the work on each weight's gradients.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fihelpers.answers import Groups
from fihelpers.measures import Measure
from fihelpers.models.language import DTYPES, Batch, LanguageModel, find_device, left_padded
from fihelpers.scores.hooks import CHECKED, named_parameters, transformer_blocks
from fihelpers.scores.weights import Totals, accumulate

ROUNDS = 2  # of both batches; the faster counts, as others can only slow a run down
MOST = {"cpu": 1e10, "cuda": 1e13, "mps": 1e11}  # operations of the larger batch, a fraction of a second
LEAST = 16  # tokens of it, where prompts have as many
VOCABULARY = 1000  # of the two blocks, as embedding and head are not timed


@dataclass(frozen=True)
class Work:
    """What a run scores. matrices: weights in matrices of all `blocks`; scored: those of them that are
    scored; embedding, head: weights of these that are scored."""

    matrices: int
    scored: int
    blocks: int
    embedding: int = 0
    head: int = 0


@dataclass(frozen=True)
class Rate:
    """Seconds of one sample's work on one weight of a matrix: for each of its tokens, and beside them.

    classes: K, with which it was measured.
    """

    per_token: float
    per_sample: float
    classes: int

    def seconds(self, work: Work, shapes: Sequence[tuple[int, int]]) -> float:
        """Seconds that batches of these shapes (samples, tokens) take, and the check of the hooks.

        Of the 2K - 1 passes through a weight (forward, K - 1 to the inputs, K - 1 to the weights), the last
        K - 1 are spared where it is not scored, and in the last block, where one position has gradients.
        """
        through = _spared(self.classes)
        formed = (1 - through) * (work.scored * (work.blocks - 1) / work.blocks + work.embedding)
        each = self.per_sample * (work.scored + work.embedding + work.head) + self.per_token * work.head
        along = self.per_token * (through * work.matrices + formed)
        return sum(samples * (each + along * tokens) for samples, tokens in [*shapes, (1, CHECKED)])


def measure_rate(
    config: Any,
    measures: Mapping[str, Measure],
    *,
    batch_size: int,
    tokens: int,
    classes: int = 4,
    device: str = "cpu",
    dtype: str = "float32",
    save_memory: bool = False,
) -> Rate:
    """Time the engine of `score_weights` on two blocks of a network of this configuration.

    tokens: of the longest prompt. Where a batch of so many samples and tokens would take long, a smaller
    one is timed. Raises ValueError for a network without a list of blocks.
    """
    model = _two_blocks(config, device, dtype)
    parameters = named_parameters(model.network, matrices_of(model.network))
    weights = sum(p.numel() for p in parameters.values())
    samples, many = _affordable(weights, batch_size, tokens, classes, find_device(device).type)
    few = max(1, many // 4)
    lengths = [few, *[few, many] * ROUNDS]
    contexts = [(_batch(model, samples, length), torch.ones(samples)) for length in lengths]
    answers = Groups(tuple(map(str, range(classes))), tuple((k,) for k in range(classes)))
    totals = Totals(dict(measures), parameters, samples)
    marks = []
    for _ in accumulate(model, contexts, totals, answers, save_memory=save_memory):
        _wait(model.device)
        marks.append(time.perf_counter())
    taken = [end - start for start, end in itertools.pairwise(marks)]
    return _line(min(taken[0::2]), min(taken[1::2]), few, many, samples * weights, _depth(config), classes)


def matrices_of(network: nn.Module) -> dict[str, int]:
    """The matrices of the transformer blocks by name, with their numbers of weights.

    Raises ValueError for a network without a list of blocks.
    """
    inside = {p for block in transformer_blocks(network) for p in block.parameters() if p.dim() > 1}
    return {name: p.numel() for name, p in network.named_parameters() if p in inside}


def shapes_of(lengths: Sequence[int], batch_size: int) -> list[tuple[int, int]]:
    """Samples and tokens of the batches of prompts of these lengths, which are sorted and padded."""
    ranked = sorted(lengths)
    parts = [ranked[i : i + batch_size] for i in range(0, len(ranked), batch_size)]
    return [(len(part), part[-1]) for part in parts]


def _line(short: float, long: float, few: int, many: int, work: int, blocks: int, classes: int) -> Rate:
    """The rate on the line through both times, or through the longer alone where they do not rise."""
    slope = (long - short) / (many - few) if many > few else 0.0
    slope = min(max(slope, 0.0), long / many)
    share = (blocks - 1 + _spared(classes)) / blocks  # see `Rate.seconds`
    return Rate(slope / (work * share), (long - slope * many) / work, classes)


def _spared(classes: int) -> float:
    """The share of the passes that a weight takes without products for itself: K of 2K - 1."""
    return classes / (2 * classes - 1)


def _affordable(weights: int, batch_size: int, tokens: int, classes: int, kind: str) -> tuple[int, int]:
    positions = MOST[kind] / (2 * (2 * classes - 1) * weights)
    many = min(tokens, max(LEAST, int(positions)))
    return max(1, min(batch_size, int(positions / many))), many


def _depth(config: Any) -> int:
    return min(2, int(config.get_text_config().num_hidden_layers))


def _two_blocks(config: Any, device: str, dtype: str) -> LanguageModel:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    layers = text.num_hidden_layers
    text.num_hidden_layers = _depth(config)
    for name, value in vars(text).items():  # lists with an entry a layer
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(text, name, value[: text.num_hidden_layers])
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    if (getattr(text, "pad_token_id", None) or 0) >= text.vocab_size:
        text.pad_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(small, dtype=DTYPES[dtype]).to(device).eval()
    return LanguageModel(network, cast(PreTrainedTokenizerBase, None), "two blocks", None, "0" * 64)


def _batch(model: LanguageModel, samples: int, length: int) -> Batch:
    vocabulary = model.network.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(vocabulary, (samples, length), generator=generator).tolist()
    return left_padded(range(samples), ids, model.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
