"""What a run needs of memory and disk, estimated from the configuration before anything is downloaded.

    print(plan_scores("mini-lm", lengths=[60] * 32).check())
    print(estimate_scores("Qwen/Qwen2-7B", dtype="bfloat16", layers=["o_proj"]))

Parameters are counted exactly, on a network without storage; bytes follow from what the code keeps. Memory is
of tensors: Python and its libraries add about half a gigabyte. Seconds follow from a short calibration on
this machine (`fihelpers.jobs.speed`) and the operations of the run.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fihelpers.answers import usual_answers
from fihelpers.jobs.speed import matrices_of, measure_rate, passed_through, shapes_of
from fihelpers.measures import MEASURES, Measure, find_measure
from fihelpers.models.gguf import SUFFIX
from fihelpers.models.language import (
    HUB_FILES,
    LanguageModel,
    brief,
    find_device,
    find_dtype,
    is_local,
    locate,
    open_tokenizer,
    tokenize,
    weight_files,
)
from fihelpers.models.linear import linear_names
from fihelpers.scores.hooks import BLOCK, CHECKED, named_parameters, transformer_blocks
from fihelpers.tasks import Example

log = logging.getLogger(__name__)

SCORE = 4  # bytes of a score, float32
TOKENS = 512  # of the longest prompt, where the caller does not say


@dataclass(frozen=True)
class Estimate:
    """What a run needs, and what is free.

    parameters: of the model, or of all models. parts: bytes by place, such as "memory", "memory of cuda:0" or
    "disk at /", and by what they are for. free: bytes by place, when the estimate was made.
    alternatives: bytes of memory under other settings. path: the way that is taken, where there are several.
    seconds: that the run takes once the model is open, None where they were not asked for.
    """

    what: str
    parameters: int
    parts: Mapping[str, Mapping[str, int]]
    free: Mapping[str, int]
    alternatives: Mapping[str, int] = field(default_factory=dict)
    path: str = ""
    save_memory: bool = False
    seconds: float | None = None

    @property
    def memory_bytes(self) -> int:
        return sum(self._needed(place) for place in self.parts if not _is_disk(place))

    @property
    def disk_bytes(self) -> int:
        return sum(self._needed(place) for place in self.parts if _is_disk(place))

    def __str__(self) -> str:
        lines = [", ".join(filter(None, [f"{self.what}: {self.parameters:,} parameters", self.path]))]
        if self.seconds is not None:
            lines.append(f"  time: about {_time(self.seconds)}")
        for place, free in self.free.items():
            lines.append(f"  {place}: {_size(self._needed(place))} of {_size(free)} free")
            lines += [f"    {_size(size):>9}  {what}" for what, size in self.parts[place].items()]
        return "\n".join(lines)

    @property
    def fits(self) -> bool:
        return all(self._needed(place) <= free for place, free in self.free.items())

    def check(self) -> Estimate:
        """Return the estimate; raise MemoryError or OSError, in one sentence, where the run does not fit."""
        for place, free in self.free.items():
            needed = self._needed(place)
            if needed <= free:
                continue
            problem = (
                f"{self.what} needs {_size(needed)} of {place}, {_size(needed - free)} more than the "
                f"{_size(free)} that are free; "
            )
            if _is_disk(place):
                raise OSError(errno.ENOSPC, problem + "make room, or choose a folder on another disk")
            raise MemoryError(problem + self._remedy(free))
        return self

    def _needed(self, place: str) -> int:
        return sum(self.parts[place].values())

    def _remedy(self, free: int) -> str:
        for settings, needed in self.alternatives.items():
            if needed <= free:
                return f"with {settings} it needs {_size(needed)} and fits."
        remedy = "choose a smaller model or a larger machine."
        if not self.alternatives:
            return remedy
        least = min(self.alternatives, key=lambda settings: self.alternatives[settings])
        return f"even with {least} it needs {_size(self.alternatives[least])}: {remedy}"


def estimate_scores(
    model_name: str | PathLike[str],
    *,
    revision: str | None = None,
    layers: Collection[str] | None = None,
    every: bool = False,
    out: str | PathLike[str] | None = None,
    files: int | None = None,
    **settings: Any,
) -> Estimate:
    """What `score_weights` needs for the weights of linear layers, and for saving the scores below `out`.

    model_name: bundled name, folder or hub id. layers: names of linear layers such as "o_proj"; all by
    default. every: all parameters are scored, not only linear weights. files: how many scores of all weights
    are saved; one a measure by default. settings: fields of `Scoring`; with `lengths` the seconds are
    predicted, from a calibration of a few seconds.

    Raises ValueError for an unknown dtype, measure or architecture, FileNotFoundError for an unknown name,
    and ConnectionError where the hub does not give the configuration.
    """
    source = source_of(model_name, revision)
    names = dict(source.network.named_parameters()) if every else linear_of(source, layers)
    return Scoring(source, tuple(names), **settings).estimate(out, files)


def plan_scores(
    model_name: str | PathLike[str], *, save_memory: bool = False, lengths: Sequence[int], **settings: Any
) -> Estimate:
    """`estimate_scores` of the way to take: at once, or block by block where only that fits, or if asked to.

    The seconds are measured for what fits; of what does not, the estimate says how much is missing.
    """
    tokens = max(lengths)  # and no lengths at first: nothing is timed that does not fit
    first = estimate_scores(model_name, save_memory=save_memory, tokens=tokens, **settings)
    found, saving = first, save_memory
    if not first.fits and "save_memory=True" in first.alternatives:
        found, saving = estimate_scores(model_name, save_memory=True, tokens=tokens, **settings), True
    if not found.fits:
        return first
    return estimate_scores(model_name, save_memory=saving, lengths=lengths, **settings)


def tokenizer_of(model_name: str | PathLike[str], revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that is not opened; of one on the hub it alone is fetched."""
    name = str(model_name)
    if is_local(name) or name.endswith(SUFFIX):
        folder, label, _ = locate(name, revision)
        return open_tokenizer(folder, label)
    with _from_hub("tokenizer", name, OSError, ValueError):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False
        )
    return found


def prompt_lengths(
    model_name: str | PathLike[str], prompts: Sequence[str], revision: str | None = None
) -> list[int]:
    """How many tokens each prompt has for a model that is not opened."""
    return [len(ids) for ids in tokenize(tokenizer_of(model_name, revision), prompts)]


@dataclass(frozen=True, eq=False)
class Scoring:
    """A run of `score_weights`, whose arguments these are where nothing else is said.

    names: of the parameters that are scored. dtype: of the weights in memory; scores are float32 at least.
    tokens: of the longest prompt, where there are no lengths. lengths: of all prompts, in tokens. classes: K.
    device_map: "auto" spreads the model over all GPUs. processes: that share the prompts and, on a CPU, its
    memory.
    """

    source: Source
    names: tuple[str, ...]
    dtype: str = "float32"
    measures: Sequence[str | Measure] | None = None
    batch_size: int = 16
    tokens: int = TOKENS
    lengths: Sequence[int] = ()
    classes: int = 4
    save_memory: bool = False
    device: str = "cpu"
    device_map: str | None = None
    processes: int = 1

    @property
    def network(self) -> PreTrainedModel:
        return self.source.network

    @property
    def chosen(self) -> dict[str, Measure]:
        return {m.name: m for m in map(find_measure, self.measures or MEASURES)}

    @property
    def longest(self) -> int:
        return max(self.lengths, default=self.tokens)

    @property
    def sizes(self) -> list[int]:
        return [self.network.get_parameter(name).numel() for name in self.names]

    @property
    def weights(self) -> int:
        return sum(self.sizes)

    @property
    def path(self) -> str:
        way = f"block by block ({_blocks(self.network)} blocks)" if self.save_memory else "at once"
        if self.device_map:
            return f"{way}, over all GPUs (device map {self.device_map})"
        return way if self.processes == 1 else f"{way}, in {self.processes} processes"

    def estimate(self, out: str | PathLike[str] | None, files: int | None) -> Estimate:
        whole = SCORE * self.weights
        found = estimate_of(
            f"scoring the weights of {self.source.label} in {self.dtype}",
            [self.source],
            self.memory(),
            {"scores, saved": whole * (len(self.chosen) if files is None else files)},
            self.device,
            out,
            self.alternatives(),
            self.device_map,
        )
        seconds = self.seconds() if self.lengths else None
        return replace(found, path=self.path, save_memory=self.save_memory, seconds=seconds)

    def memory(self) -> dict[str, int]:
        """Bytes by part, of all processes that share a CPU's memory."""
        itemsize = max(find_dtype(self.dtype).itemsize, SCORE)
        # One matrix's gradient is there twice, in autograd and as `.grad`, while hooks are compared with it;
        # what the measures make of a block of gradients comes to some four times the block.
        parts = {
            "weights": self.source.parameters * find_dtype(self.dtype).itemsize,
            "scores at work": len(self.chosen) * self.weights * itemsize,
            "gradients of a batch": self._activations() + 2 * max(self.sizes) * itemsize,
            "block of gradients at work": 5 * BLOCK * SCORE,
        }
        copies = self.processes if find_device(self.device).type == "cpu" else 1
        return {name: copies * size for name, size in parts.items()}

    def _activations(self) -> int:
        """Bytes of a batch: what each layer gives, as much again in the graph, and K - 1 of its gradients.

        Block by block they are of one block, beside what goes from each to the next.
        """
        network, itemsize = self.network, find_dtype(self.dtype).itemsize
        text, head = network.config.get_text_config(), network.get_output_embeddings()
        places, ends = self.batch_size * self.longest * itemsize, self.batch_size * text.vocab_size * SCORE
        if not self.save_memory:
            width = sum(_width(module) for module in network.modules() if module is not head)
            return (self.classes + 1) * (places * width + ends)
        width = max(sum(map(_width, block.modules())) for block in transformer_blocks(network))
        return (self.classes + 1) * (places * width + ends) + _blocks(network) * places * text.hidden_size

    def alternatives(self) -> dict[str, int]:
        """Bytes of memory under other settings, those that keep the precision first."""
        exact: list[dict[str, Any]] = [{"batch_size": 1}] if self.batch_size > 1 else []
        if not self.save_memory and _blocks(self.network):
            exact += [{**way, "save_memory": True} for way in [{}, *exact]]
        ways = [*exact, *({"dtype": other, **way} for other in narrower(self.dtype) for way in [{}, *exact])]
        needed = {
            " and ".join(f"{key}={value!r}" for key, value in way.items()): sum(
                replace(self, **way).memory().values()
            )
            for way in ways
        }
        gpus = torch.cuda.device_count() if find_device(self.device).type == "cuda" else 0
        if gpus > 1 and not self.device_map:  # each then holds its part
            needed[f"device_map='auto' over {gpus} GPUs"] = sum(self.memory().values()) // gpus
        return needed

    def seconds(self) -> float | None:
        """Seconds of the process that has most to do; None where no part of the network can be timed."""
        try:
            rate = measure_rate(
                self.network.config,
                self.chosen,
                batch_size=min(self.batch_size, len(self.lengths)),
                tokens=round(sum(self.lengths) / len(self.lengths)),
                classes=self.classes,
                device=self.device,
                dtype=self.dtype,
                save_memory=self.save_memory,
            )
        except Exception as error:  # two blocks of an unusual architecture: no reason not to score the whole
            log.info("the time of %s is not foreseen (%s)", self.source.label, brief(error))
            return None
        shapes = shapes_of(self.lengths, self.batch_size)[-1 :: -self.processes]
        places = CHECKED + sum(samples * tokens for samples, tokens in shapes)
        matrices = matrices_of(self.network)
        others = sum(matrices[name] for name in matrices.keys() - set(self.names))
        return rate * places * (self.weights + passed_through(self.classes) * others)


@dataclass(frozen=True, eq=False)
class Source:
    """A model that may not be here yet: its network without storage, and its files.

    itemsize: bytes of a weight as stored. download: bytes that are still to be fetched.
    """

    label: str
    network: PreTrainedModel
    itemsize: int
    download: int

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())


def scoring_of(
    model: LanguageModel,
    examples: Sequence[Example],
    measures: Sequence[str | Measure],
    only: Collection[str] | None = None,
    batch_size: int = 16,
) -> Scoring:
    """What `score_weights` runs with these arguments. Raises ValueError for an unknown name."""
    network = model.network
    return Scoring(
        Source(model.name, network, network.dtype.itemsize, 0),
        tuple(named_parameters(network, only)),
        str(network.dtype).removeprefix("torch."),
        measures,
        min(batch_size, len(examples)),
        lengths=[len(ids) for ids in tokenize(model.tokenizer, [e.prompt for e in examples])],
        classes=usual_answers(model.tokenizer, examples).size,
        device=str(model.device),
    )


def source_of(name: str | PathLike[str], revision: str | None) -> Source:
    """A bundled model, a folder or a hub id; raises what `estimate_scores` raises."""
    place = label = str(name)
    here = is_local(label) or label.endswith(SUFFIX)  # of a file the configuration is inside
    if here:
        folder, label, _ = locate(place, revision)
        weight_files(folder, label)
        place, revision = str(folder), None
    network = _without_storage(_config(place, revision, label), label)
    stored = getattr(network.config, "dtype", None)
    itemsize = stored.itemsize if isinstance(stored, torch.dtype) else SCORE
    size = itemsize * sum(p.numel() for p in network.parameters())
    download = 0 if here else _to_download(place, revision)
    return Source(label, network, itemsize, size if download is None else download)


def linear_of(source: Source, layers: Collection[str] | None) -> list[str]:
    """Names of the weights of linear layers, all or those of some names. Raises ValueError for none."""
    names = linear_names(source.network)
    found = [name for name in names if layers is None or name.split(".")[-2] in layers]
    if not found:
        known = ", ".join(dict.fromkeys(name.split(".")[-2] for name in names))
        raise ValueError(f"{source.label!r} has no linear layers {sorted(layers or ())}; known: {known}.")
    return found


def _config(place: str, revision: str | None, label: str) -> Any:
    try:
        with _from_hub("configuration", label, OSError):
            return AutoConfig.from_pretrained(place, revision=revision or "main", trust_remote_code=False)
    except ValueError as error:  # an unknown architecture, or one that needs remote code
        raise ValueError(f"the configuration of {label!r} cannot be read: {brief(error)}") from error


@contextmanager
def _from_hub(what: str, label: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise ConnectionError(
            f"the hub did not give the {what} of {label!r} ({type(error).__name__}); check the name, the "
            "revision and the network."
        ) from error


def _without_storage(config: Any, label: str) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            network: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"model {label!r} is no language model: {brief(error)}") from error
    return network


def _to_download(name: str, revision: str | None) -> int | None:
    """Bytes of the files that `open_model` would fetch and that are not here yet; None without an answer.

    Raises ValueError for a repository without safetensors.
    """
    from huggingface_hub import snapshot_download

    try:
        files = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, dry_run=True)
    except Exception:  # the hub client raises many types; the configuration says enough
        return None
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise ValueError(
            f"model {name!r} has no safetensors weights; pickled weights can run code and are not opened."
        )
    return sum(file.file_size or 0 for file in files if file.will_download)


def _blocks(network: PreTrainedModel) -> int:
    """How many transformer blocks there are to go through one by one; 0 for a network without a list."""
    try:
        return len(transformer_blocks(network))
    except ValueError:
        return 0


def _width(module: nn.Module) -> int:
    """Numbers that a layer with weights of its own gives for each token."""
    own = [p for p in module.parameters(recurse=False) if p.dim()]
    if not own or list(module.children()):
        return 0
    return own[0].shape[-1 if isinstance(module, nn.Embedding) else 0]


def narrower(dtype: str) -> list[str]:
    """Types of fewer bytes, the widest first."""
    return [
        other for other in ("float32", "bfloat16") if find_dtype(other).itemsize < find_dtype(dtype).itemsize
    ]


def estimate_of(
    what: str,
    sources: Sequence[Source],
    memory: Mapping[str, int],
    disk: Mapping[str, int],
    device: str,
    out: str | PathLike[str] | None,
    alternatives: Mapping[str, int],
    device_map: str | None = None,
) -> Estimate:
    """Bytes by part against what is free: memory of the device, disk below `out`.

    What is to be downloaded is added, and stands on the disk of the hub's cache.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    place, free = place_and_free(device, device_map)
    frees = {place: free}
    parts = {place: dict(memory)}
    downloads = {f"download of {source.label}": source.download for source in sources if source.download}
    for sizes, folder in ((downloads, HF_HUB_CACHE), (disk, out)):
        if sizes and folder is not None:
            mount = _mount(Path(folder))
            frees[f"disk at {mount}"] = shutil.disk_usage(mount).free
            parts.setdefault(f"disk at {mount}", {}).update(sizes)
    return Estimate(what, sum(s.parameters for s in sources), parts, frees, alternatives)


def memory_free(device: str) -> int:
    """Bytes that are free on a device, with those that torch holds there and does not use."""
    place = find_device(device)
    if place.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    return int(torch.cuda.mem_get_info(place)[0] + unused)


def place_and_free(device: str, device_map: str | None = None) -> tuple[str, int]:
    """What a device's memory is called in an `Estimate`, and the bytes that are free there."""
    gpus = torch.cuda.device_count() if device_map else 0
    if gpus:
        return f"memory of {gpus} GPUs", sum(memory_free(f"cuda:{i}") for i in range(gpus))
    name = "memory" if find_device(device).type != "cuda" else f"memory of {device}"
    return name, memory_free(device)


def _mount(folder: Path) -> Path:
    """Where the file system begins that the folder lies on, or will."""
    folder = folder.expanduser().resolve()
    while not os.path.ismount(folder):
        folder = folder.parent
    return folder


def _is_disk(place: str) -> bool:
    return place.startswith("disk")


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
