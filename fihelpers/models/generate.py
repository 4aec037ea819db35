"""Text that a model writes itself: its likeliest continuation, and samples of its own distribution.

No setting of the model's generation file (temperature, penalties, suppressed tokens) is applied: what is
sampled is the very distribution whose influence is measured (method 2).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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

from fihelpers.data import write_atomically
from fihelpers.models.language import (
    Batch,
    LanguageModel,
    brief,
    check_tokens,
    checked_logits,
    context_of,
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
    found: dict[int, Response] = {}
    for places, responses in _written(model, rows, length, batch_size):
        found.update(zip(places, responses, strict=True))
    return [found[place] for place in range(len(rows))]


def sample(
    model: LanguageModel,
    prompts: Sequence[str],
    n: int,
    length: int,
    seed: int = 0,
    *,
    cache: Path | None = None,
    batch_size: int = 32,
) -> list[list[Response]]:
    """Draw n responses to every prompt from the model's own distribution: at most ``length`` tokens each.

    A response follows from the weights, ``seed``, the prompt and its number among the n alone: not from the
    other prompts, nor from the batch (but for the rounding of the logits). A longer one begins as a shorter
    one does. ``batch_size`` counts responses; those to one prompt share what is read of it.

    ``cache`` is a file of JSON lines to which every batch is added once it is finished. What it holds (for
    the weights as they are now) is not sampled again, so that an interrupted call continues.

    Raises what :func:`greedy` raises, and ValueError for n below 1 or a damaged cache.
    """
    _at_least_one(length, "the length of a response")
    _at_least_one(n, "the number of responses to a prompt")
    ids = prompt_ids(model, prompts, length)
    numbered = [(prompt, number) for prompt in range(len(ids)) for number in range(n)]
    keys = _keys(model, ids, n, seed) if cache is not None else []
    found = _cached(model.tokenizer, cache, keys, length) if cache is not None else {}
    missing = [place for place in range(len(numbered)) if place not in found]
    rows = [
        _Row(prompt, ids[prompt], _noise(seed, ids[prompt], number))
        for prompt, number in (numbered[place] for place in missing)
    ]
    for written, responses in _written(model, rows, length, batch_size):
        places = [missing[row] for row in written]
        if cache is not None:
            _append(cache, [keys[place] for place in places], responses, length)
        found.update(zip(places, responses, strict=True))
    return [[found[prompt * n + number] for number in range(n)] for prompt in range(len(ids))]


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
    check_tokens(ids, model.network, model.name)
    context = context_of(model.network)
    for place, tokens in enumerate(ids):
        if context is not None and len(tokens) + room > context:
            raise ValueError(
                f"prompt {place} has {len(tokens)} tokens and {room} more do not fit into the {context} that "
                f"model {model.name!r} can read; shorten the prompt or ask for fewer."
            )
    return [tuple(tokens) for tokens in ids]


def _at_least_one(value: int, name: str) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _written(
    model: LanguageModel, rows: Sequence[_Row], length: int, batch_size: int
) -> Iterator[tuple[list[int], list[Response]]]:
    """Write all responses, batches of prompts of similar length: (places among the rows, responses)."""
    _at_least_one(batch_size, "the batch size")
    with tqdm(total=len(rows), desc="generating", unit="response", delay=3, leave=False) as bar:
        for places in model.chunks([row.ids for row in rows], batch_size) if rows else ():
            yield places, _write(model, [rows[place] for place in places], length)
            bar.update(len(places))


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
    return Response(ids, length < len(tokens), _text(tokenizer, ids))


def _text(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _noise(seed: int, ids: Sequence[int], number: int) -> np.random.Generator:
    return np.random.default_rng(int(_sha256([seed, ids, number]), 16))


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _keys(model: LanguageModel, ids: Sequence[Sequence[int]], n: int, seed: int) -> list[str]:
    """What each response is found by in a cache: all that it follows from, the weights as they are now."""
    weights = _weights_sha256(model.network)
    common = [weights, end_tokens(model), seed]
    return [_sha256([*common, tokens, number]) for tokens in ids for number in range(n)]


def _weights_sha256(network: PreTrainedModel) -> str:
    total = hashlib.sha256()
    for name, value in network.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _cached(
    tokenizer: PreTrainedTokenizerBase, cache: Path, keys: Sequence[str], length: int
) -> dict[int, Response]:
    """The responses that the cache holds at this length or more, by their place among the keys."""
    wanted = {key: place for place, key in enumerate(keys)}
    found = {}
    for key, sampled, ended, ids in _lines(cache):
        if key in wanted and (ended or sampled >= length):
            cut = ids[:length]
            found[wanted[key]] = Response(cut, ended and len(ids) < length, _text(tokenizer, cut))
    return found


def _lines(cache: Path) -> list[tuple[str, int, bool, tuple[int, ...]]]:
    """What the cache holds: (key, length asked for, whether it ended, ids) of each response.

    A last line that an interruption cut off is taken out of the file.
    """
    if not cache.is_file():
        return []
    content = cache.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomically(cache, whole)
    lines = []
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            ids = tuple(int(token) for token in line["ids"])
            lines.append((str(line["key"]), int(line["length"]), bool(line["ended"]), ids))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {cache} is no finished response; delete the file to sample again."
            ) from error
    return lines


def _append(cache: Path, keys: Sequence[str], responses: Sequence[Response], length: int) -> None:
    lines = [
        json.dumps({"key": key, "length": length, "ended": made.ended, "ids": made.ids})
        for key, made in zip(keys, responses, strict=True)
    ]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache, "a", encoding="ascii") as file:
        file.write("\n".join(lines) + "\n")
