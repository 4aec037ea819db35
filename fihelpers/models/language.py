"""Opening a language model with its tokenizer: bundled, from a folder, or from the hub."""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from fihelpers.cache import kept_sha256
from fihelpers.data import check_folder, data_folder
from fihelpers.identity import model_identity
from fihelpers.models import gguf

log = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")
}
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
HUB_FILES = ["model*.safetensors", WEIGHTS_INDEX, "*.json", "*.model", "*.txt", "*.jinja"]
MIN_PREFIX = 8  # a shorter shared prefix costs more than it saves
TRIED = 12  # tokens of the prompt on which ways of reading are compared
ALIKE = {8: 3e-5, 4: 3e-5, 2: 3e-2}  # how far logits may be apart, of their largest, by bytes of a number
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(HUB_ID.pattern + r"(/[A-Za-z0-9][\w.-]*)+\.gguf")


class Framed(str):
    """A prompt in the words of a chat template, which writes all special tokens: the tokenizer adds none."""


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt, with the tokenizer's special ones unless it is `Framed`."""
    framed = [isinstance(prompt, Framed) for prompt in prompts]
    if len(set(framed)) > 1:
        return [tokenize(tokenizer, [prompt])[0] for prompt in prompts]
    ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=not framed[0], verbose=False)[
        "input_ids"
    ]
    return ids


def in_chat(
    tokenizer: PreTrainedTokenizerBase,
    message: str | list[dict[str, str]],
    name: str,
    template: str | None = None,
) -> Framed:
    """A user's message in a chat template, the tokenizer's by default, up to where the answer begins.

    message: a text, or parts such as {"type": "image"}. Raises ValueError, naming the model, where the
    template fails.
    """
    turn: list[dict[str, Any]] = [{"role": "user", "content": message}]
    render = partial(
        tokenizer.apply_chat_template, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    try:
        return Framed(str(render(turn)))
    except Exception as error:  # a template is a program of its own
        reason = f"fails: {brief(error)}"
        with suppress(Exception):
            render([{"role": "system", "content": "Answer."}, *turn])
            reason = (
                "needs a system turn, which prompts here do not have; set its tokenizer's chat_template to "
                "one that does without."
            )
        raise ValueError(f"the chat template of model {name!r} {reason}") from error


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of similar length, padded to one.

    ``index`` (B,) holds their positions in the list of prompts; ``input_ids``, ``attention_mask`` (1 for a
    token, 0 for padding) and ``position_ids`` are (B, T). Padding is on the left. Where the prompts follow
    a shared prefix of P tokens, ``input_ids`` and ``position_ids`` hold what comes after it,
    ``attention_mask`` is (B, P + T), and padding is on the right: between the prefix and the rest it would
    count in the distances of every layer that counts places (windows, ALiBi).
    """

    index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    @property
    def last(self) -> Tensor:
        """The column (B,) of each prompt's last token in ``input_ids``."""
        width = self.input_ids.shape[1]
        places = torch.arange(width, device=self.input_ids.device)
        return (self.attention_mask[:, -width:] * places).amax(1)


@dataclass(eq=False)
class LanguageModel:
    """A causal language model in evaluation mode with its tokenizer.

    ``revision`` is the hub commit (None for local weights), ``sha256`` the hash of the weights as opened.

    Networks differ in what they read rightly: some ignore the attention mask, some keep nothing that a later
    token could be read with. How this one is to be read is found by comparing its own logits, when it is
    first asked (:meth:`chunks`, :meth:`prefixed_batches`).
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    sha256: str

    def __post_init__(self) -> None:
        if self.network.dtype == torch.float64:  # torch's grouped product of experts knows no float64
            self.network.set_experts_implementation("eager")

    @property
    def device(self) -> torch.device:
        return self.network.device

    def identity(self) -> list[object]:
        """What a computation with this model depends on; see :mod:`fihelpers.identity`."""
        return model_identity(self.network, self.tokenizer, self.sha256)

    def batches(self, prompts: Sequence[str], batch_size: int = 32) -> list[Batch]:
        """Tokenise prompts once, into batches sorted by length that can be used again and again.

        Raises ValueError for no prompts, an empty prompt, or one longer than the model's context.
        """
        return self.batches_of(self._token_ids(prompts), batch_size)

    def batches_of(self, ids: Sequence[Sequence[int]], batch_size: int = 32) -> list[Batch]:
        """The batches of prompts that are tokens already, each within the model's context."""
        chunks = self.chunks(ids, batch_size)
        return [left_padded(chunk, [ids[i] for i in chunk], self.device) for chunk in chunks]

    def chunks(self, ids: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
        """The places of prompts, given as tokens, that can be read together: sorted by length, then by place.

        Prompts of different lengths come together where padding on the left changes no answer.
        """
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}.")
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        groups = [order]
        padded = self.counts_places and batch_size > 1 and len(ids[order[0]]) < len(ids[order[-1]])
        if padded and not self.bears_padding:
            groups = [list(group) for _, group in groupby(order, key=lambda i: len(ids[i]))]
        return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]

    def prefixed_batches(self, prompts: Sequence[str], batch_size: int = 32) -> tuple[Tensor, list[Batch]]:
        """Split off the tokens (1, P) that all prompts begin with, and batch what follows them.

        P is 0 where there are fewer than :data:`MIN_PREFIX` or the network cannot go on from a prefix, and
        leaves every prompt at least one token. Raises what :meth:`batches` raises.
        """
        ids = self._token_ids(prompts)
        first, last = min(ids), max(ids)  # in lexicographic order: what these two share, all share
        limit = min(map(len, ids)) - 1
        shared = next((p for p in range(limit) if first[p] != last[p]), limit)
        if shared < MIN_PREFIX or not self.continues:
            return self._tensor([first[:0]]), self.batches_of(ids, batch_size)
        rests = [tokens[shared:] for tokens in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        prefix = self._tensor([first[:shared]])
        return prefix, [right_padded(c, [rests[i] for i in c], shared, self.device) for c in chunks]

    @torch.no_grad()
    def read(self, prefix: Tensor) -> Cache | None:
        """Return the keys and values of a prefix (1, P), None for P = 0; no gradient runs through them."""
        if prefix.shape[1] == 0:
            return None
        cache: Cache = self.network(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
        return cache

    def embed(self, batch: Batch) -> Tensor:
        """Return the embeddings (B, T, hidden) of a batch's tokens, as the first layer gets them."""
        embeddings: Tensor = self.network.get_input_embeddings()(batch.input_ids)
        return embeddings

    def last_logits(
        self, batch: Batch, past: Cache | None = None, embeddings: Tensor | None = None
    ) -> Tensor:
        """Return the logits (B, V) of the next token, float32 or better, differentiable.

        ``past`` is what :meth:`read` made of the prefix that the batch follows; it stays as it is.
        ``embeddings`` (B, T, hidden) take the place of what :meth:`embed` makes of the tokens.
        Raises FloatingPointError, naming the model and a prompt, where the logits are NaN or infinite.
        """
        return checked_logits(self._last_logits(batch, past, embeddings), batch.index, self.name)

    def _last_logits(
        self, batch: Batch, past: Cache | None = None, embeddings: Tensor | None = None
    ) -> Tensor:
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask, "use_cache": past is not None}
        if vars(self).get("counts_places", True):  # asked for before, never amid a pass that somebody watches
            inputs["position_ids"] = batch.position_ids
        inputs |= {"input_ids": batch.input_ids} if embeddings is None else {"inputs_embeds": embeddings}
        if past is None:  # padding on the left: the last column has every prompt's last token
            logits: Tensor = self.network(**inputs, logits_to_keep=1).logits
            return logits[:, -1]
        past = _repeated(past, len(batch.index))
        columns, places = batch.last.unique(return_inverse=True)
        logits = self.network(**inputs, past_key_values=past, logits_to_keep=columns).logits
        kept = logits.shape[1] == len(columns)  # some networks give all
        return logits[torch.arange(len(logits)), (places if kept else batch.last).to(logits.device)]

    @cached_property
    def counts_places(self) -> bool:
        """Whether the network counts the places of tokens from 0, as position ids do."""
        tokens = self.some_tokens()
        inputs = {"input_ids": self._tensor([tokens]), "use_cache": False}
        with torch.no_grad():
            told = self.network(**inputs, position_ids=self._tensor([range(len(tokens))]))
            return self.alike(told.logits, self.network(**inputs).logits)

    @cached_property
    def bears_padding(self) -> bool:
        """Whether a prompt padded on the left gets the logits that it gets alone."""
        tokens = self.some_tokens()
        shorts = [tokens[:3], tokens[: 3 * len(tokens) // 4 or 1]]  # some layers join tokens, by fours
        padded = left_padded((0, 1, 2), (*shorts, tokens), self.device)
        alone = [left_padded((0,), (short,), self.device) for short in shorts]
        with torch.no_grad():
            return self.alike(self._last_logits(padded)[:2], torch.cat(list(map(self._last_logits, alone))))

    @cached_property
    def continues(self) -> bool:
        """Whether prompts that go on from a prefix read once get the logits that they get alone."""
        tokens = self.some_tokens()
        if len(tokens) < TRIED:
            return False
        start, rests = tokens[:MIN_PREFIX], (tokens[MIN_PREFIX:-3], tokens[MIN_PREFIX:])
        together = right_padded((0, 1), rests, MIN_PREFIX, self.device)
        alone = [left_padded((0,), (start + rest,), self.device) for rest in rests]
        with torch.no_grad():
            truth = torch.cat([self._last_logits(one) for one in alone])
            try:
                found = self._last_logits(together, self.read(self._tensor([start])))
            except Exception as error:  # networks without keys and values fail in many ways
                log.info("model %s reads every prompt from its start (%s)", self.name, brief(error))
                return False
        return self.alike(found, truth)

    def some_tokens(self) -> list[int]:
        """Tokens, other than those with a meaning of their own, on which ways of reading are compared."""
        size = self.network.config.get_text_config().vocab_size
        special = set(() if self.tokenizer is None else self.tokenizer.all_special_ids)
        usual = [i for i in range(size // 3, size) if i not in special] or list(range(size))
        count = min(TRIED, context_of(self.network) or TRIED)
        return [usual[(i * len(usual)) // TRIED] for i in range(count)]

    def alike(self, found: Tensor, truth: Tensor) -> bool:
        """Whether logits are the same but for rounding."""
        apart = (found - truth).abs().max().double()
        return bool(apart <= ALIKE[truth.dtype.itemsize] * truth.abs().max())

    def _tensor(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"batches need a non-empty list of prompts, got {prompts!r}.")
        ids = tokenize(self.tokenizer, prompts)
        check_tokens(ids, self.network, self.name)
        return ids


def context_of(network: PreTrainedModel) -> int | None:
    """How many tokens the network can read, None where nothing bounds them."""
    length = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None or length < 1 else int(length)


def check_tokens(
    ids: Sequence[Sequence[int]],
    network: PreTrainedModel,
    name: str,
    remedy: str = "shorten it or use fewer shots",
    room: int = 0,
) -> None:
    """Raise ValueError for a prompt without tokens, with an unknown one, or too long for the context.

    ``room`` is the number of tokens that are to follow it.
    """
    config = network.config.get_text_config()
    context = context_of(network)
    for i, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(f"prompt {i} has no tokens; give a prompt with text.")
        if context is not None and len(tokens) + room > context:
            more = f" and {room} more to come" if room else ""
            raise ValueError(
                f"prompt {i} has {len(tokens)} tokens{more}, more than the {context} that model {name!r} "
                f"can read; {remedy}."
            )
        if max(tokens) >= config.vocab_size:
            raise ValueError(
                f"prompt {i} has token {max(tokens)}, but model {name!r} knows {config.vocab_size}; "
                "use the tokenizer that the model was trained with."
            )


def checked_logits(logits: Tensor, index: Tensor, name: str) -> Tensor:
    """Return logits (B, V) in float32 or better; ``index`` (B,) holds the positions of their prompts.

    Raises FloatingPointError, naming the model and a prompt, where they are NaN or infinite.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    finite = torch.isfinite(logits).all(-1)
    if not finite.all():
        prompt = int(index[~finite.cpu()][0])
        raise FloatingPointError(f"model {name!r} gives NaN or infinite logits for prompt {prompt}.")
    return logits


def left_padded(index: Sequence[int], ids: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """The batch of whole prompts, given as tokens; ``index`` holds their places."""
    length = max(map(len, ids))
    gaps = [length - len(tokens) for tokens in ids]
    # Padding is masked, so its token id does not matter.
    input_ids = torch.tensor([[0] * gap + list(tokens) for gap, tokens in zip(gaps, ids, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (length - gap) for gap in gaps])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(torch.tensor(list(index)), input_ids.to(device), mask.to(device), positions.to(device))


def right_padded(
    index: Sequence[int], ids: Sequence[Sequence[int]], shared: int, device: torch.device
) -> Batch:
    """The batch of prompts of which ``ids`` holds what follows the first ``shared`` tokens."""
    length = max(map(len, ids))
    input_ids = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for tokens in ids])
    mask = torch.tensor([[1] * (shared + len(t)) + [0] * (length - len(t)) for t in ids])
    positions = torch.arange(shared, shared + length).expand(len(ids), -1)
    return Batch(torch.tensor(list(index)), input_ids.to(device), mask.to(device), positions.to(device))


def _repeated(past: Cache, size: int) -> Cache:
    """Copy the cache of one prefix for each prompt of a batch: the network writes into what it is given."""
    past = copy.deepcopy(past)
    past.batch_repeat_interleave(size)
    return past


def open_model(
    name: str | PathLike[str] = "mini-lm",
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    device_map: str | Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Open a bundled model by name, a local folder or GGUF file, or a hub id such as ``Qwen/Qwen2-0.5B``.

    A hub id may be followed by a GGUF file (``owner/name/file.gguf``); "smollm2" is the file of a package,
    see `fihelpers.models.gguf`. Only safetensors and GGUF are read, and no code that comes with a model is
    run. Bundled files are checked against the manifest. A hub id without a revision, or with a branch name,
    is resolved to the commit it names now, which is logged and recorded. ``device_map`` (accelerate's:
    "auto", or names of modules and their devices) spreads a model that is too large for one device, instead
    of ``device``. Raises FileNotFoundError for an
    unknown name, ValueError for a damaged, incomplete or pickled checkpoint, an unknown dtype, an absent
    device or a model that does not fit on the devices, and ConnectionError if the hub does not answer.
    """
    kind, place = find_dtype(dtype), find_device(device)
    folder, label, commit = locate(str(name), revision)
    sha256 = weights_sha256(folder, label)
    tokenizer = open_tokenizer(folder, label)
    network = open_network(folder, label, kind, device_map=device_map)
    if device_map is None:
        network = network.to(place)  # type: ignore[arg-type]
    check_placed(network, label)
    return LanguageModel(network.eval(), tokenizer, label, commit, sha256)


def check_placed(network: PreTrainedModel, label: str) -> None:
    """Raise ValueError where a device map left weights without a device, to be fetched when they are used."""
    sizes = {name: p.numel() * p.element_size() / 1e9 for name, p in network.named_parameters()}
    absent = sum(sizes[name] for name, p in network.named_parameters() if p.is_meta)
    if absent:
        raise ValueError(
            f"model {label!r} does not fit: {absent:.3g} GB of its {sum(sizes.values()):.3g} GB found no "
            "room on the devices; use more or larger ones, or a smaller dtype."
        )


def bundled_models() -> list[str]:
    """Return the names of the models in the data folder (none where there is no data folder)."""
    try:
        folder = data_folder() / "models"
    except FileNotFoundError:
        return []
    return sorted(path.name for path in folder.glob("*") if (path / "config.json").is_file())


def find_dtype(name: str) -> torch.dtype:
    """Return the type of weights of that name; raises ValueError for an unknown one."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def find_device(name: str) -> torch.device:
    """Return the device of that name; raises ValueError where this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not available on this machine; use 'cpu'.") from error
    return device


def is_local(name: str) -> bool:
    """Whether a name is no hub id: what is nothing known either is then said to be unknown."""
    if name in (*bundled_models(), *gguf.PACKAGED) or Path(name).expanduser().exists():
        return True
    hub = HUB_FILE if name.endswith(gguf.SUFFIX) else HUB_ID
    return not hub.fullmatch(name)


def locate(name: str, revision: str | None) -> tuple[Path, str, str | None]:
    """Return the folder of the model, the name to record and the hub commit.

    A GGUF file is converted first, if it was not before.
    """
    if not is_local(name):
        return _download(name, revision)
    if revision is not None:
        raise ValueError(f"{name!r} is local and has no revision; leave revision {revision!r} out.")
    if name in gguf.PACKAGED:
        return gguf.converted(gguf.packaged_file(name), name), name, None
    folder = data_folder() / "models" / name if name in bundled_models() else Path(name).expanduser()
    if folder.is_file() and folder.suffix == gguf.SUFFIX:
        return gguf.converted(folder, folder.stem), folder.stem, None
    if not folder.is_dir():
        if "/" not in name:
            data_folder()  # without one, say so rather than that the name is unknown
        names = ", ".join((*bundled_models(), *gguf.PACKAGED))
        raise FileNotFoundError(
            f"no model {name!r}: give a bundled name ({names}), an existing folder or GGUF file, or a hub id "
            "of the form owner/name or owner/name/file.gguf."
        )
    if name in bundled_models():
        check_folder(folder)
    return folder, folder.resolve().name, None


def _download(name: str, revision: str | None) -> tuple[Path, str, str]:
    """Fetch a model of the hub at the commit that the revision names now; returns as `locate`."""
    from huggingface_hub import hf_hub_download, snapshot_download

    owner, title, *inside = name.split("/")
    file = "/".join(inside)
    try:
        if file:
            path = Path(hf_hub_download(f"{owner}/{title}", file, revision=revision))
            folder = path.parents[len(inside) - 1]
        else:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many types; the remedy is the same
        raise ConnectionError(
            f"no local folder is called {name!r} and the hub did not give it ({type(error).__name__}); "
            "check the name, the revision and the network."
        ) from error
    log.info("model %s: using commit %s", name, folder.name)
    return gguf.converted(path, name) if file else folder, name, folder.name


def weight_files(folder: Path, label: str) -> list[Path]:
    """Return the safetensors files of a model's folder; raises ValueError where one is missing."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {label!r} has no config.json; give a folder saved in Hugging Face format.")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        try:
            index = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
            shards = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{WEIGHTS_INDEX} of model {label!r} is damaged; fetch it again.") from error
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise ValueError(f"model {label!r} lacks the weight file {shard!r}; fetch it again.")
        return [folder / shard for shard in shards]
    raise ValueError(
        f"model {label!r} has no safetensors weights; pickled weights can run code and are not opened: "
        "convert them to safetensors."
    )


def weights_sha256(folder: Path, label: str) -> str:
    """Return the hash of the one weight file, or of the list of the shards' hashes.

    Of a folder that was made of a GGUF file it is that of the file.
    """
    source = gguf.source_sha256(folder)
    if source:
        return source
    hashes = [kept_sha256(path) for path in weight_files(folder, label)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def open_tokenizer(folder: Path, label: str) -> PreTrainedTokenizerBase:
    """Open the tokenizer in a folder; raises ValueError, naming the model, where there is no usable one."""
    # Without any file, transformers would make up an empty tokenizer.
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"model {label!r} has no tokenizer; give a folder with a {TOKENIZER_FILES[0]}.")
    try:
        if _has_own_tokenizer(folder):
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a folder without a usable tokenizer
        raise ValueError(f"the tokenizer of model {label!r} cannot be opened: {brief(error)}") from error


def _has_own_tokenizer(folder: Path) -> bool:
    """Whether the folder's tokenizer is of no architecture's class, and so is to be taken as it is written.

    AutoTokenizer would take the class of the architecture instead, which cuts the text by its own rules.
    """
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    return json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") in GENERIC_TOKENIZERS


def open_network(
    folder: Path,
    label: str,
    dtype: torch.dtype,
    kind: Any = AutoModelForCausalLM,
    device_map: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Open the weights in a folder with one of transformers' automatic classes; every weight has to be there.

    Raises ValueError, naming the model, for damaged or absent weights and an unknown architecture.
    """
    try:
        with _without_bar():
            opened: Any = kind.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                device_map=device_map,
            )
    except Exception as error:  # a cut-off file, an unknown architecture, refused remote code
        raise ValueError(f"the weights of model {label!r} cannot be opened: {brief(error)}") from error
    network, info = opened
    # transformers fills absent weights with random numbers and only logs it.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"model {label!r} lacks {len(missing)} weights, {missing[0]} first; fetch it again.")
    return network


@contextmanager
def _without_bar() -> Iterator[None]:
    """Without transformers' bar over the tensors, which flashes by and stays in a notebook's page."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def brief(error: Exception) -> str:
    """Return the first line of a library's message, which may run over many."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"
