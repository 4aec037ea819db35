"""Opening a language model with its tokenizer: bundled, from a folder, or from the hub."""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from fihelpers.data import check_folder, data_folder, file_sha256

log = logging.getLogger(__name__)

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
HUB_FILES = ["model*.safetensors", WEIGHTS_INDEX, "*.json", "*.model", "*.txt", "*.jinja"]
MIN_PREFIX = 8  # a shorter shared prefix costs more than it saves
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of similar length, padded on the left.

    ``index`` (B,) holds their positions in the list of prompts; ``input_ids``, ``attention_mask`` (1 for a
    token, 0 for padding) and ``position_ids`` are (B, T). Where the prompts follow a shared prefix of P
    tokens, ``input_ids`` and ``position_ids`` hold what comes after it and ``attention_mask`` is (B, P + T).
    """

    index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


@dataclass(eq=False)
class LanguageModel:
    """A causal language model in evaluation mode with its tokenizer.

    ``revision`` is the hub commit (None for local weights), ``sha256`` the hash of the weights as opened.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    sha256: str

    @property
    def device(self) -> torch.device:
        return self.network.device

    def batches(self, prompts: Sequence[str], batch_size: int = 32) -> list[Batch]:
        """Tokenise prompts once, into batches sorted by length that can be used again and again.

        Raises ValueError for no prompts, an empty prompt, or one longer than the model's context.
        """
        return _make_batches(self._token_ids(prompts), 0, batch_size, self.device)

    def prefixed_batches(self, prompts: Sequence[str], batch_size: int = 32) -> tuple[Tensor, list[Batch]]:
        """Split off the tokens (1, P) that all prompts begin with, and batch what follows them.

        P is 0 where there are fewer than :data:`MIN_PREFIX`, and leaves every prompt at least one token.
        Raises what :meth:`batches` raises.
        """
        ids = self._token_ids(prompts)
        first, last = min(ids), max(ids)  # in lexicographic order: what these two share, all share
        limit = min(map(len, ids)) - 1
        shared = next((p for p in range(limit) if first[p] != last[p]), limit)
        shared = shared if shared >= MIN_PREFIX else 0
        prefix = torch.tensor([first[:shared]], dtype=torch.long, device=self.device)
        return prefix, _make_batches(ids, shared, batch_size, self.device)

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
        output = self.network(
            input_ids=batch.input_ids if embeddings is None else None,
            inputs_embeds=embeddings,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=None if past is None else _repeated(past, len(batch.index)),
            use_cache=past is not None,
            logits_to_keep=1,
        )
        return checked_logits(output.logits[:, -1], batch.index, self.name)

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"batches need a non-empty list of prompts, got {prompts!r}.")
        ids: list[list[int]] = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        check_tokens(ids, self.network, self.name)
        return ids


def check_tokens(
    ids: Sequence[Sequence[int]],
    network: PreTrainedModel,
    name: str,
    remedy: str = "shorten it or use fewer shots",
) -> None:
    """Raise ValueError for a prompt without tokens, longer than the context, or with an unknown token."""
    config = network.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    for i, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(f"prompt {i} has no tokens; give a prompt with text.")
        if context is not None and len(tokens) > context:
            raise ValueError(
                f"prompt {i} has {len(tokens)} tokens, more than the {context} that model {name!r} "
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


def _make_batches(
    ids: Sequence[Sequence[int]], shared: int, batch_size: int, device: torch.device
) -> list[Batch]:
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}.")
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    chunks = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return [left_padded(chunk, [ids[i][shared:] for i in chunk], shared, device) for chunk in chunks]


def left_padded(
    index: Sequence[int], ids: Sequence[Sequence[int]], shared: int, device: torch.device
) -> Batch:
    """Return the batch of prompts of which ``ids`` holds what follows the first ``shared`` tokens."""
    length = max(len(tokens) for tokens in ids)
    # Padding is masked, so its token id does not matter.
    input_ids = torch.zeros(len(ids), length, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(ids):
        input_ids[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, length - len(tokens) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + shared
    mask = torch.cat([mask.new_ones(len(ids), shared), mask], -1)
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
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Open a bundled model by name, a local folder, or a hub id such as ``Qwen/Qwen2-0.5B``.

    Only safetensors are read. Bundled files are checked against the manifest. A hub id without a
    revision, or with a branch name, is resolved to the commit it names now, which is logged and recorded.
    ``device_map`` (accelerate's: "auto", or names of modules and their devices) spreads a model that is too
    large for one device, instead of ``device``. Raises FileNotFoundError for an unknown name, ValueError for
    a damaged, incomplete or pickled checkpoint, an unknown dtype, an absent device or a model that does not
    fit on the devices, and ConnectionError if the hub does not answer.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}.")
    place = find_device(device)
    folder, label, commit = locate(str(name), revision, trust_remote_code)
    sha256 = weights_sha256(folder, label)
    tokenizer = open_tokenizer(folder, label, trust_remote_code)
    network = open_network(folder, label, DTYPES[dtype], trust_remote_code, device_map=device_map)
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


def find_device(name: str) -> torch.device:
    """Return the device of that name; raises ValueError where this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not available on this machine; use 'cpu'.") from error
    return device


def locate(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Path, str, str | None]:
    """Return the folder of the model, the name to record and the hub commit."""
    folder = data_folder() / "models" / name if name in bundled_models() else Path(name).expanduser()
    if not folder.is_dir() and HUB_ID.fullmatch(name):
        commit = revision if revision and COMMIT.fullmatch(revision) else _current_commit(name, revision)
        return _download(name, commit, trust_remote_code), name, commit
    if not folder.is_dir():
        if "/" not in name:
            data_folder()  # without one, say so rather than that the name is unknown
        raise FileNotFoundError(
            f"no model {name!r}: give a bundled name ({', '.join(bundled_models()) or 'none here'}), "
            "an existing folder, or a hub id of the form owner/name."
        )
    if revision is not None:
        raise ValueError(f"{name!r} is local and has no revision; leave revision {revision!r} out.")
    if name in bundled_models():
        check_folder(folder)
    return folder, folder.resolve().name, None


def _current_commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except Exception as error:  # the hub client raises many types; the remedy is the same
        raise _hub_error(name, error) from error
    log.info("model %s: using commit %s", name, commit)
    return str(commit)


def _download(name: str, commit: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
    except Exception as error:
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"no local folder is called {name!r} and the hub did not give it ({type(error).__name__}); "
        "check the name, the revision and the network."
    )


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
    """Return the hash of the one weight file, or of the list of the shards' hashes."""
    hashes = [file_sha256(path) for path in weight_files(folder, label)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def open_tokenizer(folder: Path, label: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Open the tokenizer in a folder; raises ValueError, naming the model, where there is no usable one."""
    # Without any file, transformers would make up an empty tokenizer.
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"model {label!r} has no tokenizer; give a folder with a {TOKENIZER_FILES[0]}.")
    try:
        if _has_own_tokenizer(folder):
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
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
    trust_remote_code: bool,
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
                trust_remote_code=trust_remote_code,
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
