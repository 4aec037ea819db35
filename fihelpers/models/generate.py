"""Text that a model writes itself: its likeliest continuation, and samples of its own distribution.

No setting of the model's generation file (temperature, penalties, suppressed tokens) is applied: what is
sampled is the very distribution whose influence is measured (method 2).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fihelpers.models.language import (
    Batch,
    LanguageModel,
    brief,
    check_tokens,
    checked_logits,
    left_padded,
    tokenize,
)

log = logging.getLogger(__name__)

TRIED_STEPS = 4  # tokens written to find out whether the library's loop can be used
_GENERATES: WeakKeyDictionary[LanguageModel, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Response:
    """What a model wrote after a prompt.

    ``ids`` are its tokens without the one that ends it; ``ended`` says whether it came to that end within
    the length asked for. A response that ends at once has no ids and an empty text.
    """

    ids: tuple[int, ...]
    ended: bool
    text: str


@dataclass(frozen=True)
class _Row:
    """One response to write: the prompt's place in the list, its tokens, and the noise of a sample."""

    prompt: int
    ids: tuple[int, ...]
    noise: np.random.Generator | None


def greedy(model: LanguageModel, prompts: Sequence[str], length: int, batch_size: int = 32) -> list[Response]:
    """Write the likeliest token at every step: at most ``length`` tokens, the one that ends it included.

    Raises ValueError for a length below 1, no prompts, an empty one, or one that leaves no room for
    ``length`` more tokens in the model's context, and FloatingPointError, naming the model and the prompt's
    place, for NaN or infinite logits.
    """
    _at_least_one(length, "the length of a response")
    ids = prompt_ids(model, prompts, length)
    rows = [_Row(prompt, tokens, None) for prompt, tokens in enumerate(ids)]
    return _written(model, rows, length, batch_size)


def sample(
    model: LanguageModel,
    prompts: Sequence[str],
    n: int,
    length: int,
    seed: int = 0,
    *,
    batch_size: int = 32,
) -> list[list[Response]]:
    """Draw n responses to every prompt from the model's own distribution: at most ``length`` tokens each.

    A response follows from the weights, ``seed``, the prompt and its number among the n alone: not from the
    other prompts, nor from the batch (but for the rounding of the logits). A longer one begins as a shorter
    one does. ``batch_size`` counts responses; those to one prompt share what is read of it.

    Raises what :func:`greedy` raises, and ValueError for n below 1.
    """
    _at_least_one(length, "the length of a response")
    _at_least_one(n, "the number of responses to a prompt")
    ids = prompt_ids(model, prompts, length)
    rows = [
        _Row(prompt, tokens, _noise(seed, tokens, number))
        for prompt, tokens in enumerate(ids)
        for number in range(n)
    ]
    found = _written(model, rows, length, batch_size)
    return [found[i : i + n] for i in range(0, len(found), n)]


def prompt_ids(model: LanguageModel, prompts: Sequence[str], room: int = 0) -> list[tuple[int, ...]]:
    """Tokenise prompts to be continued by ``room`` tokens.

    Raises ValueError for no prompts, an empty one, or one that is too long for the model's context with
    ``room`` more tokens.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"give a non-empty list of prompts, not {prompts!r}.")
    for place, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {place} is empty; give a prompt with text.")
    ids = tokenize(model.tokenizer, prompts)
    check_tokens(ids, model.network, model.name, "shorten it or ask for fewer", room)
    return [tuple(tokens) for tokens in ids]


def _at_least_one(value: int, name: str) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _written(model: LanguageModel, rows: Sequence[_Row], length: int, batch_size: int) -> list[Response]:
    """Write all responses, in batches of prompts of similar length."""
    _at_least_one(batch_size, "the batch size")
    found: dict[int, Response] = {}
    with tqdm(total=len(rows), desc="generating", unit="response", delay=3, leave=False) as bar:
        for places in model.chunks([row.ids for row in rows], batch_size):
            written = _write(model, [rows[place] for place in places], length)
            found.update(zip(places, written, strict=True))
            bar.update(len(places))
    return [found[place] for place in range(len(rows))]


@torch.no_grad()
def _write(model: LanguageModel, rows: Sequence[_Row], length: int) -> list[Response]:
    ends = end_tokens(model)
    write = _generated if _generates(model) else _reread
    new = write(model, rows, length, ends, _Choice(model.name, rows))
    return [_response(model.tokenizer, tokens, ends) for tokens in new]


def _generated(
    model: LanguageModel, rows: Sequence[_Row], length: int, ends: Sequence[int], choice: _Choice
) -> list[list[int]]:
    """The new tokens of each row by the library's own loop, which keeps what it has read."""
    prompts = {row.prompt: row.ids for row in rows}
    batch = left_padded(list(prompts), list(prompts.values()), model.device)
    place = torch.tensor([list(prompts).index(row.prompt) for row in rows], device=model.device)
    past = _read_prompts(model, batch)
    if past is not None:
        past.batch_select_indices(place)
    stop = list(ends) or None
    settings = GenerationConfig(max_new_tokens=length, eos_token_id=stop, pad_token_id=[*ends, 0][0])
    with _only(model.network, settings):
        written: Tensor = model.network.generate(  # type: ignore[operator]
            batch.input_ids[place],
            attention_mask=batch.attention_mask[place],
            past_key_values=past,
            generation_config=settings,
            logits_processor=LogitsProcessorList([choice]),
        )
    new: list[list[int]] = written[:, batch.input_ids.shape[1] :].tolist()
    return new


def _reread(
    model: LanguageModel, rows: Sequence[_Row], length: int, ends: Sequence[int], choice: _Choice
) -> list[list[int]]:
    """The same, with everything read anew for each token: slow, and right for whatever gives logits."""
    starts = [list(row.ids) for row in rows]
    new: list[list[int]] = [[] for _ in rows]
    for _ in range(length):
        so_far = [start + tokens for start, tokens in zip(starts, new, strict=True)]
        batch = left_padded([row.prompt for row in rows], so_far, model.device)
        chosen = choice(batch.input_ids, model.last_logits(batch)).argmax(-1)
        for tokens, token in zip(new, chosen.tolist(), strict=True):
            tokens.append(token)
        if all(set(tokens) & set(ends) for tokens in new):
            break
    return new


def _generates(model: LanguageModel) -> bool:
    """Whether the library's loop writes what the model's logits say, found once on two short prompts.

    It does not for architectures that lose what they have read, or that are given other inputs there.
    """
    if model not in _GENERATES:
        tokens = tuple(model.some_tokens())
        second = tokens[:-3] if model.bears_padding else tokens[::-1]
        rows = [_Row(0, tokens, None), _Row(1, second, None)]
        one, other = _Choice(model.name, rows), _Choice(model.name, rows)
        truth = _reread(model, rows, TRIED_STEPS, (), one)
        try:
            same = _generated(model, rows, TRIED_STEPS, (), other) == truth
            _GENERATES[model] = same and model.alike(other.last, one.last)
        except Exception as error:  # they fail in many ways
            log.info("model %s is read anew for every token it writes (%s)", model.name, brief(error))
            _GENERATES[model] = False
    return _GENERATES[model]


def _read_prompts(model: LanguageModel, batch: Batch) -> Cache | None:
    """Keys and values of all but the last token, so that the responses to one prompt share its reading.

    None where there are no such tokens, or the network cannot go on from what it has read.
    """
    if batch.input_ids.shape[1] == 1 or not model.continues:
        return None
    cache: Cache = model.network(
        input_ids=batch.input_ids[:, :-1],
        attention_mask=batch.attention_mask[:, :-1],
        position_ids=batch.position_ids[:, :-1],
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    return cache


@contextmanager
def _only(network: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """`generate` fills up what `settings` leaves open from the network's own settings: hide those."""
    own = network.generation_config
    network.generation_config = settings
    try:
        yield
    finally:
        network.generation_config = own


class _Choice(LogitsProcessor):
    """Checks the logits, and adds each sample's Gumbel noise, whose largest sum is a draw from softmax.

    ``last`` holds the latest logits (rows, V).
    """

    last: Tensor

    def __init__(self, name: str, rows: Sequence[_Row]) -> None:
        self.name = name
        self.index = torch.tensor([row.prompt for row in rows])
        self.noise = [row.noise for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.last = scores = checked_logits(scores, self.index, self.name)
        if not any(self.noise):
            return scores
        drawn = [
            np.zeros(scores.shape[1]) if g is None else g.gumbel(size=scores.shape[1]) for g in self.noise
        ]
        return scores + torch.as_tensor(np.stack(drawn)).to(scores)


def end_tokens(model: LanguageModel) -> list[int]:
    """The tokens that end a response, as the model's generation settings or its tokenizer name them."""
    settings = model.network.generation_config
    named = None if settings is None else settings.eos_token_id
    ends = model.tokenizer.eos_token_id if named is None else named
    return [] if ends is None else [int(token) for token in np.atleast_1d(ends)]


def _response(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], ends: Sequence[int]) -> Response:
    """What comes before the first token that ends a response."""
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    ids = tuple(tokens[:length])
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Response(ids, length < len(tokens), str(text))


def _noise(seed: int, ids: Sequence[int], number: int) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps([seed, ids, number]).encode()).hexdigest()
    return np.random.default_rng(int(digest, 16))
