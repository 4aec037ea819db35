"""How fast weights are scored on this machine, measured in a moment before a run that takes long.

Two blocks of the model, of their real widths and with random weights, score prompts of the run's usual
length. The time grows with the weights and with the tokens.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fihelpers.answers import Groups
from fihelpers.measures import Measure
from fihelpers.models.language import DTYPES, Batch, LanguageModel, find_device, left_padded
from fihelpers.scores.hooks import named_parameters, transformer_blocks
from fihelpers.scores.weights import Totals, accumulate

ROUNDS = 3  # of the batch; the fastest counts, as others can only slow a run down
MOST = {"cpu": 1e10, "cuda": 1e13, "mps": 1e11}  # operations of the batch, a fraction of a second
LEAST = 16  # tokens of it, where prompts have as many
VOCABULARY = 1000  # of the two blocks, as embedding and head are not timed


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
) -> float:
    """Seconds of one token's work on one weight of a matrix, by the engine of `score_weights` on two blocks.

    tokens: of the usual prompt. Where a batch of so many samples and tokens would take long, a smaller one is
    timed. Raises ValueError for a network without a list of blocks.
    """
    model = _two_blocks(config, device, dtype)
    parameters = named_parameters(model.network, matrices_of(model.network))
    weights = sum(p.numel() for p in parameters.values())
    samples, length = _affordable(weights, batch_size, tokens, classes, find_device(device).type)
    contexts = [(_batch(model, samples, length), torch.ones(samples))] * (1 + ROUNDS)
    answers = Groups(tuple(map(str, range(classes))), tuple((k,) for k in range(classes)))
    totals = Totals(dict(measures), parameters, samples)
    marks = []
    for _ in accumulate(model, contexts, totals, answers, save_memory=save_memory):
        _wait(model.device)
        marks.append(time.perf_counter())
    taken = min(end - start for start, end in itertools.pairwise(marks))
    depth = _depth(config)
    share = (depth - 1 + passed_through(classes)) / depth  # in the last block one position has gradients
    return taken / (samples * length * weights * share)


def passed_through(classes: int) -> float:
    """The share of a weight's work that is left where it is not scored: K of 2K - 1 passes.

    They are the forward pass, K - 1 to the inputs and, spared then, K - 1 to the weights.
    """
    return classes / (2 * classes - 1)


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
