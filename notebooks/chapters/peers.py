"""What the cost of FI is measured on and beside: random models and prompts, FI, and plainer computations.

The command ``bench`` and chapter 10 time these works and count their operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from fihelpers.answers import Groups
from fihelpers.filters import Cut, Damped, Exact, Spectral
from fihelpers.models.language import Batch, LanguageModel, left_padded
from fihelpers.models.linear import linear_names
from fihelpers.scores.pixels import PixelBatch
from fihelpers.scores.weights import Scores, score_contexts
from fihelpers.tasks import Example

FORWARD, JACOBIAN, FI, STORED = "forward pass", "Jacobian norm", "FI", "K backward passes, .grad kept"
FILTER = Damped(1e-4)  # of weights
FILTERS: tuple[Spectral, ...] = (Exact(), Cut(1e-3), FILTER)  # of pixels
LLAMA = LlamaConfig(dtype="bfloat16")  # Llama-2-7B, the library's own defaults


def groups(classes: int) -> Groups:
    """So many classes, each of one token."""
    return Groups(tuple(str(k) for k in range(classes)), tuple((k + 1,) for k in range(classes)))


CLASSES = groups(4)


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: str = "cpu") -> LanguageModel:
    """A model of this shape with random weights, and no tokenizer."""
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    name = f"random {type(network).__name__.removesuffix('ForCausalLM')}"
    return LanguageModel(network, cast(PreTrainedTokenizerBase, None), name, None, "0" * 64)


@dataclass(frozen=True)
class Size:
    """A random Qwen2: by default one of 25 million weights in linear layers."""

    hidden: int = 512
    inner: int = 1536
    layers: int = 8
    heads: int = 8
    vocabulary: int = 1000

    def model(self) -> LanguageModel:
        config = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
        return random_model(config, torch.float32)


HALF_A_BILLION = Size(896, 4864, 24, 14, 151936)  # Qwen2.5-0.5B's shape, with half as many keys as heads


@dataclass(frozen=True)
class Questions:
    """Random prompts of one length, as batches of one and as batches of several."""

    model: LanguageModel
    ids: list[list[int]]

    @classmethod
    def draw(cls, model: LanguageModel, length: int, count: int) -> Questions:
        vocabulary = int(model.network.config.vocab_size)
        generator = torch.Generator().manual_seed(0)
        return cls(model, torch.randint(5, vocabulary, (count, length), generator=generator).tolist())

    def batches(self, size: int) -> list[Batch]:
        places = [range(i, min(i + size, len(self.ids))) for i in range(0, len(self.ids), size)]
        return [left_padded(p, [self.ids[i] for i in p], self.model.device) for p in places]


# --- weights


def block(config: Any) -> dict[str, int]:
    """The weights of each linear layer of one transformer block of a Llama or Qwen2."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden * (hidden * config.num_key_value_heads // config.num_attention_heads)
    square, wide = hidden**2, hidden * inner
    return {"q": square, "k": keys, "v": keys, "o": square, "gate": wide, "up": wide, "down": wide}


def linear(config: Any) -> int:
    """The weights in linear layers, without biases and norms: they are less than a thousandth of these."""
    return int(config.num_hidden_layers * sum(block(config).values()))


def passes(work: str, classes: int = 4) -> tuple[int, int, int]:
    """How often a work goes forward, back to the inputs of the layers, and to their weights."""
    times = {FORWARD: 0, JACOBIAN: 1, FI: classes - 1, STORED: classes}[work]
    return 1, times, times


def least_bytes(model: LanguageModel, measures: int = 1) -> int:
    """What no way of computing can do without: the weights, and float32 scores for each linear one."""
    return _bytes(model) + 4 * measures * linear(model.network.config)


def _bytes(model: LanguageModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.network.parameters())


def weights_of(model: LanguageModel) -> dict[str, nn.Parameter]:
    """The weights of linear layers by name."""
    return {name: model.network.get_parameter(name) for name in linear_names(model.network)}


def fi_of_weights(
    questions: Questions, batch_size: int = 1, classes: int = 4, save_memory: bool = False
) -> dict[str, Tensor]:
    """Mean damped FI of every linear weight, by the engine of `score_weights`: {name: (outputs, inputs)}."""
    return dict(scored(questions, ["FI"], batch_size, classes, save_memory)[f"FI {FILTER}"].values)


def scored(
    questions: Questions,
    measures: Sequence[str],
    batch_size: int,
    classes: int = 4,
    save_memory: bool = False,
) -> dict[str, Scores]:
    """Scores of every linear weight by some measures, FI damped."""
    model, answers = questions.model, groups(classes)
    contexts = [(b, torch.ones(len(b.index))) for b in questions.batches(batch_size)]
    examples = [Example(str(i), "random", "", answers.names, None, "") for i in range(len(questions.ids))]
    names = linear_names(model.network)
    return score_contexts(
        model, contexts, examples, measures, FILTER, answers, names, save_memory=save_memory
    )


def jacobian_norm(questions: Questions) -> dict[str, Tensor]:
    """Mean absolute gradient of log P(y_hat), by plain autograd: one backward pass a sample, with `.grad`."""
    weights = weights_of(questions.model)
    totals = {name: torch.zeros_like(w) for name, w in weights.items()}
    for batch in questions.batches(1):
        log_p = CLASSES.log_probs(questions.model.last_logits(batch))[0]
        for name, grad in _grads(log_p.max(), weights).items():
            totals[name] += grad.abs()
    return {name: total / len(questions.ids) for name, total in totals.items()}


def fi_by_stored_gradients(questions: Questions) -> dict[str, Tensor]:
    """Mean FI by plain autograd: K backward passes a sample, of which every `.grad` is kept (method 1)."""
    weights = weights_of(questions.model)
    totals = {name: torch.zeros_like(w) for name, w in weights.items()}
    for batch in questions.batches(1):
        log_p = CLASSES.log_probs(questions.model.last_logits(batch))[0]
        kept = [_grads(one, weights, k < len(log_p) - 1) for k, one in enumerate(log_p)]
        for name, total in totals.items():
            total += _fi(torch.stack([grads[name] for grads in kept]), log_p.detach().exp())
    return {name: total / len(questions.ids) for name, total in totals.items()}


def _grads(value: Tensor, weights: Mapping[str, nn.Parameter], keep_graph: bool = False) -> dict[str, Tensor]:
    """The gradients of a number with respect to some weights, each taken off its `.grad`."""
    value.backward(inputs=list(weights.values()), retain_graph=keep_graph)
    grads = {name: cast(Tensor, weight.grad) for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
    return grads


def _fi(grads: Tensor, probs: Tensor) -> Tensor:
    metric = (probs[:, None, None] * grads * grads).sum(0)
    return grads[probs.argmax()].square() / (metric + FILTER.lam)


# --- memory


def extra_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that a piece of work holds at a time beyond those that were there before.

    They are counted in the machine's memory, by torch's profiler.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    held = most = 0
    events = [e for e in cast(Any, found.profiler).kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):  # allocations, and frees below zero
        held += event.nbytes()
        most = max(most, held)
    return most


def peak_bytes(
    questions: Questions, save_memory: bool, measures: Sequence[str] = ("FI",), batch_size: int = 1
) -> int:
    """Bytes of a model, and the most that scoring its weights takes beside it."""
    work = partial(scored, questions, measures, batch_size, save_memory=save_memory)
    return _bytes(questions.model) + extra_bytes(work)


# --- pixels


def plain_jacobian(batch: PixelBatch) -> Tensor:
    """The norm over the channels (B, H, W) of the gradient of log P(y_hat): one backward pass."""
    x = (batch.images / 255).requires_grad_()
    log_p = batch.log_probs(x, torch.arange(len(x)))
    (grad,) = torch.autograd.grad(log_p.amax(-1).sum(), x)
    return grad.norm(dim=1)


def captum_saliency(batch: PixelBatch) -> Tensor:
    """The same by Captum, which has to be told the predicted class."""
    from captum.attr import Saliency

    x, rows = batch.images / 255, torch.arange(len(batch.images))
    with torch.no_grad():
        predicted = batch.log_probs(x, rows).argmax(-1)
    saliency = Saliency(batch.log_probs)
    made: Tensor = saliency.attribute(x.requires_grad_(), target=predicted, additional_forward_args=rows)
    return made.norm(dim=1)
