"""Round-to-nearest quantization with protected channels (method 4.5), really packed.

A matrix W (out, in) is cut to 1, 2, 3, 4 or 8 bits, but for chosen channels, output rows or input columns,
which keep 16 bits. What is kept takes no part in the ranges of the rest. The codes are packed: what a model
weighs is measured (`Packed.nbytes`), not estimated. Rounding follows torchao's affine primitives, with scales
in float16. Every linear weight is such a matrix: those of fused experts are one, with the rows of
all experts (`fihelpers.models.linear`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, from_rows, linear_names, turned_names
from fihelpers.perturb.sparsify import Scope, Which, select
from fihelpers.scores.channels import Axis, check_axis
from fihelpers.scores.store import Scores

BITS = (1, 2, 3, 4, 8)
SMALLEST = 2.0**-24  # scale, the smallest that float16 holds: weights that are all 0 still have one
STORED = ("codes", "scales", "zeros", "kept", "kept_values")
ALIGNED = 64  # bytes, to which torch lays its own tensors in memory


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded.

    bits: 1, 2, 3, 4 or 8. 1 bit is the sign times the mean magnitude.
    mapping: "symmetric", 2^bits levels around 0 whose step is the largest magnitude over (2^bits - 1) / 2, or
        "asymmetric", the levels spread from the smallest to the largest weight (0 is always a level).
    per: the channel that shares a scale, an output row or an input column of W (out, in).
    group: how many successive weights of that channel share a scale; None for the whole channel.

    Raises ValueError for other values.
    """

    bits: int
    mapping: Literal["symmetric", "asymmetric"] = "symmetric"
    group: int | None = None
    per: Axis = "rows"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, not {self.bits}.")
        if self.mapping not in ("symmetric", "asymmetric"):
            raise ValueError(f"mapping must be 'symmetric' or 'asymmetric', not {self.mapping!r}.")
        if self.bits == 1 and self.mapping != "symmetric":
            raise ValueError("1 bit is a sign times a magnitude, which is symmetric; choose that mapping.")
        if self.group is not None and self.group < 1:
            raise ValueError(f"A group holds at least 1 weight, not {self.group}; None is a whole channel.")
        check_axis(self.per)

    def __str__(self) -> str:
        groups = "" if self.group is None else f" in groups of {self.group}"
        return f"{self.bits} bit {self.mapping}, {self.per}{groups}"


@dataclass(frozen=True, eq=False)
class Kept:
    """Channels to keep in 16 bits: their positions by the name of the weight, and the axis they count.

    sha256: the hash of the model whose scores chose them, "" where none did.
    """

    axis: Axis
    channels: Mapping[str, Tensor]
    sha256: str = ""


def select_channels(
    scores: Scores,
    share: float,
    which: Which = "top",
    *,
    names: Collection[str] | None = None,
    scope: Scope = "layer",
    seed: int = 0,
) -> Kept:
    """The channels to protect, by scores of channels such as `fihelpers.scores.channels` makes.

    share: of the channels of each matrix (scope "layer") or of all matrices ("global"); `which` as in
    `select`, where "low half" is v1's FI-low. Ties are settled by the seed.
    Raises ValueError for scores that are not of channels, and what `select` raises.
    """
    axis = scores.metadata.get("axis", "")
    if axis not in ("rows", "columns") or any(v.dim() != 1 for v in scores.values.values()):
        raise ValueError("These are scores of weights, not of channels; pass them through channel_scores.")
    chosen = select(scores, share, which, names=names, scope=scope, seed=seed)
    channels = {name: index.sort().values for name, index in chosen.items()}
    return Kept(axis, channels, scores.metadata.get("sha256", ""))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Packed:
    """One quantized matrix W (out, in).

    codes: uint8, the bits of the codes (`_pack_bits`); scales: float16 (channels, groups), the mean
    magnitude for 1 bit; zeros: uint8 like scales, the code of 0, None for "symmetric"; kept: int32, the
    positions of the protected channels along `axis`; kept_values: their 16-bit weights, a channel a row.
    Where the scheme goes by rows and rows are kept (or columns and columns), the kept have no scales.
    """

    scheme: Scheme
    shape: tuple[int, int]
    axis: Axis
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    kept: Tensor | None
    kept_values: Tensor | None

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in) that the codes stand for."""
        place = _Layout(self.scheme, self.shape, self.axis, self.kept, self.codes.device)
        codes = _unpack_bits(self.codes, self.scheme.bits, place.rows * len(place.columns))
        codes = codes.view(place.rows, len(place.columns))
        groups = place.columns // place.group
        body = _decode(
            codes, self.scales[:, groups], None if self.zeros is None else self.zeros[:, groups], self.scheme
        )
        whole = torch.empty(place.shape, dtype=dtype, device=codes.device)
        whole.index_copy_(place.along, place.rest, body.to(dtype))
        if self.kept is not None and self.kept_values is not None:
            values = self.kept_values if place.along == 0 else self.kept_values.T
            whole.index_copy_(place.along, self.kept.long(), values.to(dtype))
        return whole.T.contiguous() if place.flipped else whole

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names of the fields."""
        named = {name: getattr(self, name) for name in STORED}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


class _Layout:
    """Where the weights of a matrix lie once its scaled channels are rows: kept ones and the rest.

    shape: of the turned matrix; along: the axis that the kept channels count; rest: the other positions on
    that axis; rows: how many rows have codes; columns: the columns that have codes; groups and group: how
    many groups a row has, and how many columns each.
    """

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        axis: Axis,
        kept: Tensor | None,
        device: torch.device,
    ) -> None:
        self.flipped = scheme.per == "columns"
        self.shape = (shape[1], shape[0]) if self.flipped else shape
        self.along = int((axis == "rows") == self.flipped)
        free = torch.ones(self.shape[self.along], dtype=torch.bool, device=device)
        if kept is not None:
            free[kept.long()] = False
        self.rest = free.nonzero()[:, 0]
        self.rows = len(self.rest) if self.along == 0 else self.shape[0]
        self.columns = self.rest if self.along == 1 else torch.arange(self.shape[1], device=device)
        self.group = scheme.group or self.shape[1]
        self.groups = self.shape[1] // self.group
        if self.shape[1] % self.group:
            raise ValueError(
                f"A channel of {self.shape[1]} weights does not divide into groups of {self.group}; choose a "
                "divisor, or None for one scale a channel."
            )


def pack(
    weight: Tensor, scheme: Scheme, kept: Tensor | Sequence[int] | None = None, axis: Axis = "rows"
) -> Packed:
    """Quantize one matrix W (out, in), but for the channels `kept` along `axis`.

    Kept channels stay in the weight's own type where that has 16 bits, else in float16.
    Raises ValueError for a group that does not divide the channel, channels that are absent or named twice,
    a tensor that is no matrix, or weights beyond float16's range; FloatingPointError for NaN or infinity.
    """
    check_axis(axis)
    if weight.dim() != 2:
        raise ValueError(f"Only matrices are quantized, not a tensor of shape {tuple(weight.shape)}.")
    weight = weight.detach()
    if not torch.isfinite(weight).all():
        raise FloatingPointError("The weights hold NaN or infinite values; they cannot be quantized.")
    shape = (weight.shape[0], weight.shape[1])
    index = _checked(kept, shape[0 if axis == "rows" else 1], axis, weight.device)
    place = _Layout(scheme, shape, axis, index, weight.device)
    matrix = (weight.T if place.flipped else weight).float()
    body = matrix[place.rest] if place.along == 0 else _without(matrix, index)
    scales, zeros = _ranges(body, place, scheme)
    if not torch.isfinite(scales).all():
        raise ValueError(f"Weights up to {float(weight.abs().max()):.3g} are beyond the scales of float16.")
    codes = _encode(body, place, scales, zeros, scheme)[:, place.columns]
    values = None if index is None else _sixteen_bits(weight, index, axis)
    return Packed(scheme, shape, axis, _pack_bits(codes, scheme.bits), scales, zeros, index, values)


def quantization_error(
    weight: Tensor,
    scheme: Scheme,
    kept: Tensor | Sequence[int] | None = None,
    axis: Axis = "rows",
    *,
    turned: bool = False,
) -> Tensor:
    """The displacement of every weight, quantized minus original, like weight in float32 or better.

    It is the delta of the displacement-aware scores (method 1b.4). weight: a matrix W (out, in), or a linear
    weight of another shape, `turned` or not (`fihelpers.models.linear`). Raises what `pack` raises.
    """
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    matrix = weight if weight.dim() < 2 else as_rows(weight, turned)
    unpacked = pack(matrix, scheme, kept, axis).unpack(exact.dtype)
    return from_rows(unpacked, tuple(weight.shape), turned) - exact


def pack_model(
    model: LanguageModel, names: Collection[str], scheme: Scheme, kept: Kept | None = None
) -> dict[str, Packed]:
    """Quantize the named weights of a model's linear layers; the model itself stays as it is.

    Raises ValueError for an unknown name, kept channels of a weight that is not quantized, or chosen by the
    scores of another model; and what `pack` raises, naming the weight.
    """
    weights = _weights(model.network, names)
    if kept is not None:
        _check_kept(kept, weights, model)
    packed = {}
    for name, weight in weights.items():
        chosen = None if kept is None else kept.channels.get(name)
        try:
            packed[name] = pack(weight.rows, scheme, chosen, "rows" if kept is None else kept.axis)
        except (ValueError, FloatingPointError) as error:
            raise type(error)(f"{name}: {error}") from error
    return packed


@contextmanager
def quantized(network: nn.Module, packed: Mapping[str, Packed]) -> Iterator[nn.Module]:
    """The network with its weights as the packed ones stand for; on leaving they are as before, bit for bit.

    Without gradients, its logits are those of the packed model (`quantize_model`), bit for bit, without
    unpacking at every call.
    """
    weights = _weights(network, packed)
    before: dict[Tensor, Tensor] = {weight.parameter: weight.parameter.data for weight in weights.values()}
    try:
        for name, weight in weights.items():
            weight.parameter.data = weight.form(_fitting(packed[name], weight, name)).unpack(packed[name])
        before |= laid_by_torch(network)
        yield network
    finally:
        for tensor, data in before.items():
            tensor.data = data


@dataclass(frozen=True)
class _Form:
    """A parameter that is packed: its shape and type, whether it lies turned, and how its rows are packed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    turned: bool
    scheme: Scheme
    rows: tuple[int, int]
    axis: Axis

    def unpack(self, packed: Packed) -> Tensor:
        return from_rows(packed.unpack(self.dtype), self.shape, self.turned)


class Quantized(nn.Module):
    """What a module of any class becomes that holds packed weights: one of a subclass of both.

    Each packed parameter is buffers, `packed_<parameter>_<field>`, and an attribute of its old name that
    unpacks them: once in a call of the module, however often its forward reads it, else at every look.
    """

    _forms: dict[str, _Form]  # by the parameter's name
    _of: type[nn.Module]  # the class before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "_seen" in vars(self):
            return super().__call__(*args, **kwargs)
        vars(self)["_seen"] = {}
        try:
            return super().__call__(*args, **kwargs)
        finally:
            vars(self).pop("_seen", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        """Move to a device, or multiply in another type: what is packed keeps its own types."""
        before = {
            _buffer(local, field): tensor
            for local in self._forms
            for field, tensor in _packed(self, local).tensors().items()
        }
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            setattr(self, name, new if new.dtype == old.dtype else old.to(new.device))
        for local, form in self._forms.items():
            self._forms[local] = replace(form, dtype=fn(torch.empty(0, dtype=form.dtype)).dtype)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:  # its class has no name to be found by
        return _new_quantized, (self._of, tuple(self._forms)), vars(self)

    def extra_repr(self) -> str:
        about = [super().extra_repr(), *(f"{local}: {form.scheme}" for local, form in self._forms.items())]
        return "; ".join(filter(None, about))


@cache
def _quantized_class(of: Any, parameters: tuple[str, ...]) -> type[Quantized]:
    """The class of modules of a class whose parameters of these names are packed."""
    unpacked = {local: property(partial(_unpack, local=local)) for local in parameters}
    about = {"_of": of, "__module__": of.__module__, "__qualname__": of.__qualname__, "__doc__": of.__doc__}
    return type(of.__name__, (Quantized, of), {**unpacked, **about})


def _new_quantized(of: Any, parameters: tuple[str, ...]) -> Quantized:
    kind = _quantized_class(of, parameters)
    return kind.__new__(kind)


def _unpack(module: Quantized, local: str) -> Tensor:
    seen: dict[str, Tensor] = vars(module).get("_seen", {})
    if local not in seen:
        learns = torch.is_grad_enabled()
        with torch.inference_mode(False):
            whole = module._forms[local].unpack(_packed(module, local)).detach()
        # torch lays out a product, and rounds it, by whether the weight asks for a gradient, as parameters do
        seen[local] = whole if learns else whole.requires_grad_()
    return seen[local]


def _packed(module: Quantized, local: str) -> Packed:
    form = module._forms[local]
    stored: dict[str, Any] = {field: getattr(module, _buffer(local, field), None) for field in STORED}
    return Packed(form.scheme, form.rows, form.axis, **stored)


def _buffer(local: str, field: str) -> str:
    return f"packed_{local}_{field}"


def _packed_parameters(network: nn.Module) -> Iterator[tuple[str, Quantized, str]]:
    """The names of packed weights, each with its module and its name there."""
    for path, module in network.named_modules():
        if isinstance(module, Quantized):
            for local in module._forms:
                yield f"{path}.{local}" if path else local, module, local


def quantize_model(network: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Put packed weights in the place of the linear layers' own, for good: the original ones are let go."""
    weights = _weights(network, packed)
    forms = {name: weight.form(_fitting(packed[name], weight, name)) for name, weight in weights.items()}
    for name, weight in weights.items():
        module, local = weight.module, weight.local
        of: Any = module._of if isinstance(module, Quantized) else type(module)
        packed_forms = {**vars(module).get("_forms", {}), local: forms[name]}
        del module._parameters[local]
        module.__class__ = _quantized_class(of, tuple(packed_forms))
        vars(module)["_forms"] = packed_forms
        for field, tensor in packed[name].tensors().items():
            module.register_buffer(_buffer(local, field), tensor)
    laid_by_torch(network)


def packed_layers(network: nn.Module) -> dict[str, Packed]:
    """The packed weights of a quantized network, by the names that they had."""
    return {name: _packed(module, local) for name, module, local in _packed_parameters(network)}


def unpacked_dtypes(network: nn.Module) -> dict[str, torch.dtype]:
    """The types in which a quantized network multiplies by its packed weights, by the names that they had."""
    return {name: module._forms[local].dtype for name, module, local in _packed_parameters(network)}


def _checked(
    kept: Tensor | Sequence[int] | None, channels: int, axis: Axis, device: torch.device
) -> Tensor | None:
    """Positions of kept channels, sorted, int32; None where there are none."""
    if kept is None or len(kept) == 0:
        return None
    index = torch.as_tensor(kept, device=device).long().sort().values
    if int(index[0]) < 0 or int(index[-1]) >= channels:
        wrong = int(index[0]) if int(index[0]) < 0 else int(index[-1])
        raise ValueError(f"There is no channel {wrong} among {channels} {axis}.")
    if (index.diff() == 0).any():
        raise ValueError(f"Channel {int(index[:-1][index.diff() == 0][0])} is kept twice; name it once.")
    return index.int()


def _without(matrix: Tensor, columns: Tensor | None) -> Tensor:
    """The matrix with 0 in the kept columns: ranges include 0 anyway, so these do not change them."""
    return matrix if columns is None else matrix.index_fill(1, columns.long(), 0)


def _ranges(body: Tensor, place: _Layout, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales, float16 (rows, groups), and the codes of 0 for "asymmetric", uint8, else None."""
    grouped = body.view(len(body), place.groups, place.group)
    if scheme.bits == 1:
        members = torch.zeros(grouped.shape[1], device=body.device).index_add_(
            0, place.columns // place.group, torch.ones(len(place.columns), device=body.device)
        )
        return (grouped.abs().sum(-1) / members.clamp(min=1)).half(), None
    levels = 2**scheme.bits - 1
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if scheme.mapping == "symmetric":
        return (torch.maximum(-low, high) / (levels / 2)).clamp(min=SMALLEST).half(), None
    scales = ((high - low) / levels).clamp(min=SMALLEST)
    return scales.half(), (-(low / scales).round()).clamp(0, levels).to(torch.uint8)


def _encode(body: Tensor, place: _Layout, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes, uint8, of all columns (rows, columns)."""
    if scheme.bits == 1:
        return (body >= 0).to(torch.uint8)
    inverse = 1.0 / scales.float()  # torchao multiplies by the inverse, which rounds unlike a division
    steps = (body.view(len(body), place.groups, place.group) * inverse[..., None]).round()
    zero = 2 ** (scheme.bits - 1) if zeros is None else zeros[..., None]
    return (steps + zero).clamp(0, 2**scheme.bits - 1).to(torch.uint8).view_as(body)


def _decode(codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    if scheme.bits == 1:
        return torch.where(codes.bool(), scales.float(), -scales.float())
    zero = 2 ** (scheme.bits - 1) if zeros is None else zeros.float()
    return (codes.float() - zero) * scales.float()


def _sixteen_bits(weight: Tensor, index: Tensor, axis: Axis) -> Tensor:
    """The kept channels, one a row, in 16 bits."""
    rows = weight[index.long()] if axis == "rows" else weight[:, index.long()].T
    values = rows.contiguous() if weight.dtype.itemsize == 2 else rows.half().contiguous()
    if not torch.isfinite(values).all():
        raise ValueError(f"Weights up to {float(rows.abs().max()):.3g} are beyond the range of float16.")
    return values


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bytes that hold codes of so many bits: one bit of all of them, then the next, from a whole byte on."""
    planes = (codes.flatten() >> _places(bits, codes)[:, None]) & 1
    planes = functional.pad(planes, (0, -planes.shape[1] % 8)).view(bits, -1, 8)
    return (planes << _places(8, codes)).sum(-1, dtype=torch.uint8).flatten()


def _unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes, uint8, that `_pack_bits` packed."""
    if len(packed) != code_bytes(bits, count):
        raise ValueError(f"{count} codes of {bits} bits do not fill {len(packed)} bytes")
    planes = ((packed.view(bits, -1, 1) >> _places(8, packed)) & 1).flatten(1)[:, :count]
    return (planes << _places(bits, packed)[:, None]).sum(0, dtype=torch.uint8)


def _places(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=torch.uint8, device=like.device)


def code_bytes(bits: int, count: int) -> int:
    """Bytes of so many packed codes."""
    return bits * -(-count // 8)


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter by which its module multiplies, and whether it lies turned."""

    module: nn.Module
    local: str
    turned: bool

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.local)

    @property
    def rows(self) -> Tensor:
        """The parameter as a matrix (rows, in)."""
        return as_rows(self.parameter.detach(), self.turned)

    @property
    def shape(self) -> tuple[int, int]:
        """Of `rows`, which may be a copy."""
        width = self.parameter.shape[-2 if self.turned else -1]
        return self.parameter.numel() // width, width

    def form(self, packed: Packed) -> _Form:
        p = self.parameter
        return _Form(tuple(p.shape), p.dtype, self.turned, packed.scheme, packed.shape, packed.axis)


def _weights(network: nn.Module, names: Collection[str]) -> dict[str, _Weight]:
    """Weights of linear layers by their names, in the model's order; none that two modules use."""
    users = Counter(p for module in network.modules() for p in module._parameters.values() if p is not None)
    multiply = set(linear_names(network)) if isinstance(network, PreTrainedModel) else set()
    turned, found = turned_names(network), {}
    for path, module in network.named_modules():
        for local, p in module.named_parameters(recurse=False):
            name = f"{path}.{local}" if path else local
            linear = name in multiply or (isinstance(module, nn.Linear) and local == "weight")
            if linear and users[p] == 1:
                found[name] = _Weight(module, local, name in turned)
    unknown = sorted(set(names) - set(found))
    if unknown:
        raise ValueError(
            f"The model has no linear layer whose own weight is {unknown[0]!r}; take names from "
            "linear_names, without those that two modules share."
        )
    return {name: weight for name, weight in found.items() if name in set(names)}


def _check_kept(kept: Kept, weights: Mapping[str, _Weight], model: LanguageModel) -> None:
    if kept.sha256 and kept.sha256 != model.sha256:
        raise ValueError(
            f"The channels were chosen by scores of another model (SHA-256 {kept.sha256[:12]}…, that of "
            f"{model.name!r} is {model.sha256[:12]}…); score this model."
        )
    unused = sorted(set(kept.channels) - set(weights))
    if unused:
        raise ValueError(f"Channels of {unused[0]!r} are kept, but it is not quantized; leave it out.")


def _fitting(packed: Packed, weight: _Weight, name: str) -> Packed:
    if packed.shape != weight.shape:
        raise ValueError(f"{name} is {weight.shape}, packed it is {packed.shape}: that is another model's.")
    return packed


def plain_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters, a shared one once, and buffers, without what stands for packed weights."""
    packed = {
        module.get_buffer(_buffer(local, field))
        for _, module, local in _packed_parameters(network)
        for field in _packed(module, local).tensors()
    }
    buffers = {name: b for name, b in network.named_buffers() if b not in packed}
    return {**dict(network.named_parameters()), **buffers}


def laid_by_torch(network: nn.Module) -> dict[Tensor, Tensor]:
    """Lay weights as torch lays its own tensors; returns those that were moved, with their data before.

    A product rounds by where its weights lie, and those of a file that is mapped into memory lie anywhere.
    """
    moved, kept = {}, set(network.state_dict())
    for name, tensor in plain_tensors(network).items():
        if name in kept and (tensor.data_ptr() % ALIGNED or not tensor.is_contiguous()):
            moved[tensor] = tensor.data
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return moved
