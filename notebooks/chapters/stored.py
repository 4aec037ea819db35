"""What packed weights weigh, and a quantized model on disk: saved, and opened again (method 4.5)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from fichapters.packed import packed_layers, plain_tensors, quantize_model, unpacked_dtypes
from fihelpers.data import new_folder
from fihelpers.models.language import (
    WEIGHTS,
    LanguageModel,
    brief,
    find_device,
    open_tokenizer,
    weights_sha256,
)
from fihelpers.perturb.quantize import STORED, Packed, Scheme, code_bytes, laid_by_torch

SIXTEEN, POSITION = 2, 4  # bytes of a kept weight, and of the place of a kept channel
HOW = "quantization.json"
FORMAT = 2


@dataclass(frozen=True)
class SizeReport:
    """Bytes of quantized layers, without their biases.

    packed: as they are stored; kept: of that, the protected channels and their positions; unprotected: the
    same layers with nothing protected; sixteen_bit: the same layers not quantized; share: of the weights, how
    many are protected.
    """

    packed: int
    kept: int
    unprotected: int
    sixteen_bit: int
    share: float

    @property
    def extra(self) -> int:
        """What the protection costs, in bytes."""
        return self.packed - self.unprotected

    @property
    def bits_per_weight(self) -> float:
        return 16 * self.packed / self.sixteen_bit


def size_report(packed: Mapping[str, Packed]) -> SizeReport:
    """Measure quantized layers: of `pack_model`, or the `packed_layers` of a network."""
    if not packed:
        raise ValueError("There are no quantized layers to measure; name at least one.")
    kept = [t for p in packed.values() for n, t in p.tensors().items() if n.startswith("kept")]
    weights = sum(p.shape[0] * p.shape[1] for p in packed.values())
    protected = sum(p.kept_values.numel() for p in packed.values() if p.kept_values is not None)
    return SizeReport(
        packed=sum(p.nbytes for p in packed.values()),
        kept=sum(t.numel() * t.element_size() for t in kept),
        unprotected=sum(packed_bytes(p.scheme, p.shape) for p in packed.values()),
        sixteen_bit=SIXTEEN * weights,
        share=protected / weights,
    )


def packed_bytes(scheme: Scheme, shape: tuple[int, int], kept_rows: int = 0) -> int:
    """Bytes of a matrix (out, in) of which some rows are kept, as `Packed.nbytes` of it."""
    rows, columns = shape[0] - kept_rows, shape[1]
    count = rows * columns
    scales = count // (scheme.group or columns)
    kept = kept_rows * (SIXTEEN * columns + POSITION)
    return code_bytes(scheme.bits, count) + scales * (3 if scheme.mapping == "asymmetric" else 2) + kept


def save_quantized(model: LanguageModel, folder: Path) -> None:
    """Write a model after `quantize_model`: config, tokenizer, model.safetensors, and how it was made.

    `quantization.json` names the original model with its hash, and the scheme of each layer. The folder
    appears whole or not at all. Raises FileExistsError for a folder that is not empty, ValueError for a model
    without quantized layers, or of an architecture that `open_quantized` does not know.
    """
    if not packed_layers(model.network):
        raise ValueError(f"Model {model.name!r} has no quantized layers; use quantize_model first.")
    with new_folder(Path(folder)) as beside:
        model.network.config.save_pretrained(beside)
        if model.network.can_generate() and model.network.generation_config is not None:
            model.network.generation_config.save_pretrained(beside)
        model.tokenizer.save_pretrained(beside)
        try:
            new = _new_network(beside, model.network.dtype)
        except Exception as error:  # of many types, for code of its own or a network of another kind
            raise ValueError(f"Model {model.name!r} could not be opened again: {brief(error)}") from error
        save_file(_stored(model.network, new), beside / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(_how(model), indent=1)
        (beside / HOW).write_text(text + "\n", encoding="utf-8")


def open_quantized(folder: Path, device: str = "cpu") -> LanguageModel:
    """Open what `save_quantized` wrote; the logits are the saved model's, bit for bit, on the same device.

    The library chooses anew how attention and experts are computed; another choice of the saved model's
    (`set_attn_implementation`) is not stored, and rounds otherwise.
    Raises FileNotFoundError where there is no such folder, ValueError for damaged or foreign files.
    """
    folder, place = Path(folder), find_device(device)
    if not (folder / HOW).is_file():
        raise FileNotFoundError(f"{folder} has no {HOW}; give a folder that save_quantized wrote.")
    label = folder.resolve().name
    try:
        how = json.loads((folder / HOW).read_text(encoding="utf-8"))
        if how["format"] != FORMAT:
            raise ValueError(f"its format is {how['format']}, known is {FORMAT}")
        tensors = load_file(folder / WEIGHTS)
        network = _rebuilt(folder, how, tensors)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ValueError(
            f"the quantized model {label!r} cannot be opened: {brief(error)}; save it again."
        ) from error
    tokenizer = open_tokenizer(folder, label)
    sha256 = weights_sha256(folder, label)
    network.to(place)  # type: ignore[arg-type]
    return LanguageModel(network.eval(), tokenizer, label, None, sha256)


def _stored(network: nn.Module, new: nn.Module) -> dict[str, Tensor]:
    """What goes into the file: packed weights under names of their own, and all else that `new` lacks.

    That is the state dict, and buffers that a new network has in another type or with other values.
    """
    kept, known = set(network.state_dict()), dict(new.named_buffers())
    stored = {
        name: tensor.detach().contiguous()
        for name, tensor in plain_tensors(network).items()
        if name in kept or not _is_same(tensor, known.get(name))
    }
    for name, packed in packed_layers(network).items():
        stored |= {f"{_stem(name)}.{field}": tensor for field, tensor in packed.tensors().items()}
    return stored


def _is_same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and not b.is_meta and a.dtype == b.dtype and a.cpu().equal(b)


def _stem(name: str) -> str:
    """What the names of a packed weight's tensors begin with."""
    return name.removesuffix(".weight")


def _how(model: LanguageModel) -> dict[str, Any]:
    origin = {"name": model.name, "revision": model.revision, "sha256": model.sha256}
    made = {"format": FORMAT, "made_from": origin, "dtype": _name_of(model.network.dtype)}
    layers, dtypes = {}, unpacked_dtypes(model.network)
    for name, packed in packed_layers(model.network).items():
        kept = 0 if packed.kept is None else len(packed.kept)
        about = {**asdict(packed.scheme), "shape": list(packed.shape), "axis": packed.axis, "kept": kept}
        own = {} if dtypes[name] == model.network.dtype else {"dtype": _name_of(dtypes[name])}
        layers[name] = {**about, **own}
    return {**made, "layers": layers}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _new_network(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The network of a folder's configuration; its buffers have values, its parameters no storage."""
    with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
        warnings.simplefilter("ignore")  # of values that are not to be had
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    network.tie_weights()  # which emptying parts
    return network


def _rebuilt(folder: Path, how: Mapping[str, Any], tensors: dict[str, Tensor]) -> PreTrainedModel:
    """The network of a folder, its packed weights in place; `tensors` is used up."""
    network = _new_network(folder, getattr(torch, how["dtype"]))
    if (folder / GENERATION_CONFIG_NAME).is_file():
        network.generation_config = GenerationConfig.from_pretrained(folder)
    packed = {name: _read_packed(_stem(name), entry, tensors) for name, entry in how["layers"].items()}
    for name in packed:
        weight = network.get_parameter(name)
        weight.data = weight.data.to(getattr(torch, how["layers"][name].get("dtype", how["dtype"])))
    quantize_model(network, packed)
    own, kept = plain_tensors(network), set(network.state_dict())
    wrong = {n for n, t in own.items() if n not in tensors and (n in kept or t.is_meta)}
    wrong |= {n for n, t in tensors.items() if n not in own or t.shape != own[n].shape}
    if wrong:
        raise ValueError(f"tensor {min(wrong)!r} is missing or not the model's")
    _fill(network, {own[name]: tensor for name, tensor in tensors.items()})
    return network


def _fill(network: nn.Module, tensors: Mapping[Tensor, Tensor]) -> None:
    """Put tensors in the place of a network's own, a shared one everywhere."""
    new: dict[Tensor, Any] = {
        own: nn.Parameter(t, own.requires_grad) if isinstance(own, nn.Parameter) else t
        for own, t in tensors.items()
    }
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            table.update({local: new[t] for local, t in table.items() if t is not None and t in new})
    laid_by_torch(network)


def _read_packed(stem: str, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> Packed:
    shape = (int(entry["shape"][0]), int(entry["shape"][1]))
    scheme = Scheme(entry["bits"], entry["mapping"], entry["group"])
    stored: dict[str, Any] = {field: tensors.pop(f"{stem}.{field}", None) for field in STORED}
    packed = Packed(scheme, shape, entry["axis"], **stored)
    kept, values = (0 if stored[field] is None else len(stored[field]) for field in ("kept", "kept_values"))
    if (packed.zeros is None) != (scheme.mapping == "symmetric") or not entry["kept"] == kept == values:
        raise ValueError(f"the tensors of {stem} are not those that {HOW} tells of")
    packed.unpack()  # a wrong size shows here
    return packed
