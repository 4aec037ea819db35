"""Weights of a model as a stream: read one tensor at a time, and written without holding a whole shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel

from fihelpers.models.conversion import LoadedTensors, as_loaded
from fihelpers.models.language import (
    WEIGHTS_INDEX,
    LanguageModel,
    locate,
    open_tokenizer,
    weight_files,
    weights_sha256,
)
from fihelpers.models.tensors import CODES, TensorDict, TensorFile, TensorGroup, Tensors

SHARD_BYTES = 5 * 10**9  # as transformers writes them
LONG = 2**28  # bytes from which on writing shows a bar


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """The weights of one model: where they come from and its tensors, a tied one once.

    They have the names that they have in the opened model, or, where transformers does not know the
    architecture, those that they are stored under. folder: None for a model in memory. config: what
    config.json holds. loaded: how the opened model's tensors follow from the stored ones, None for a model in
    memory and an unknown architecture.
    """

    label: str
    revision: str | None
    folder: Path | None
    config: Mapping[str, Any]
    tensors: Tensors
    model: LanguageModel | None = None
    loaded: LoadedTensors | None = None

    @property
    def layouts(self) -> Mapping[str, Tensor]:
        return self.tensors.layouts

    @cached_property
    def extra(self) -> frozenset[str]:
        """Names, as stored, of learned tensors that the opened model does without."""
        return frozenset(self.loaded.others if self.loaded else ())

    @property
    def network(self) -> PreTrainedModel | None:
        """The opened model, or one like it without storage; None for an unknown architecture."""
        return self.model.network if self.model else self.loaded.network if self.loaded else None

    @cached_property
    def architecture(self) -> str | None:
        """The class of the opened model, as far as it is known."""
        network = self.network
        return type(network).__name__ if network else next(iter(self.config.get("architectures") or ()), None)

    @cached_property
    def tied(self) -> frozenset[str]:
        """Further names of tensors that are tied to one another."""
        return frozenset(self.network.state_dict() if self.network else ()) - self.layouts.keys()

    @cached_property
    def sha256(self) -> str:
        """Hash of the weight files, as `open_model` records it."""
        return weights_sha256(self.folder, self.label) if self.folder else self._open.sha256

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids of the tokens."""
        tokenizer = open_tokenizer(self.folder, self.label) if self.folder else self._open.tokenizer
        return dict(tokenizer.get_vocab())

    def read(self, name: str, rows: int | None = None) -> Tensor:
        return self.tensors.read(name, rows)

    @property
    def _open(self) -> LanguageModel:
        assert self.model is not None  # without a folder there is a model
        return self.model


def open_weights(
    model: str | PathLike[str] | LanguageModel | ModelWeights, revision: str | None = None
) -> ModelWeights:
    """Open a model's weights by bundled name, folder or hub id (and revision), or those of an open model.

    Raises what `open_model` raises for a model that is not there, and ValueError for a missing, damaged or
    cut-off weight file, or one without some of the weights.
    """
    if isinstance(model, ModelWeights):
        return model
    if isinstance(model, LanguageModel):
        network = model.network
        held = TensorDict({**dict(network.named_parameters()), **_saved_buffers(network)})
        return ModelWeights(model.name, model.revision, None, network.config.to_dict(), held, model)
    folder, label, commit = locate(str(model), revision)
    files = TensorGroup([TensorFile(path, label) for path in weight_files(folder, label)])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loaded = _loaded(folder, files, label)
    if loaded is None:
        return ModelWeights(label, commit, folder, config, files)
    tensors = TensorGroup([loaded, TensorGroup([files], loaded.others)])
    return ModelWeights(label, commit, folder, config, tensors, None, loaded)


def _loaded(folder: Path, files: Tensors, label: str) -> LoadedTensors | None:
    """The stored tensors as transformers loads them, None where it does not know the architecture."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # of many types, for a configuration that is not of the library's
        return None
    if getattr(config, "quantization_config", None) is not None:
        return None  # its codes have no mean, under whatever name
    return as_loaded(files, config, label)


def _saved_buffers(network: PreTrainedModel) -> dict[str, Tensor]:
    saved = network.state_dict(keep_vars=True)
    return {name: value for name, value in network.named_buffers() if name in saved}


def write_weights(folder: Path, layouts: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
    """Write `make(name)` for every name into safetensors files, one tensor in memory at a time.

    One file where all fit into SHARD_BYTES, otherwise several with an index, as transformers reads them.
    """
    split = split_state_dict_into_shards_factory(
        dict(layouts),
        get_storage_size=lambda layout: layout.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    short = split.metadata["total_size"] < LONG
    with tqdm(total=len(layouts), desc="writing", unit="tensor", leave=False, disable=short) as bar:
        for file_name, names in split.filename_to_tensors.items():
            with open(folder / file_name, "wb") as file:
                _write_shard(file, names, layouts, make, bar)


def _write_shard(
    file: BinaryIO,
    names: list[str],
    layouts: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    bar: tqdm[Any],
) -> None:
    """One file of the safetensors format: length of the header (8 bytes), header (JSON), bytes of all."""
    # The widest types first, so that every tensor begins at a multiple of its elements' size.
    names = sorted(names, key=lambda name: -layouts[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        layout = layouts[name]
        start, end = end, end + layout.nbytes
        header[name] = {
            "dtype": CODES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        tensor = make(name)
        assert (tensor.shape, tensor.dtype) == (layouts[name].shape, layouts[name].dtype), name
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        bar.update()
