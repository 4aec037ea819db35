"""Round-to-nearest quantization with protected channels (method 4.5), really packed.

A matrix W (out, in) is cut to 1, 2, 3, 4 or 8 bits, but for chosen channels, output rows or input columns,
which keep 16 bits. What is kept takes no part in the ranges of the rest. The codes are packed: what a model
weighs is measured (`Packed.nbytes`), not estimated. Rounding follows torchao's affine primitives, with scales
in float16. Every linear weight is such a matrix: those of fused experts are one, with the rows of
all experts (`fihelpers.models.linear`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fihelpers.models.language import LanguageModel
from fihelpers.models.linear import as_rows, from_rows, linear_names, turned_names
from fihelpers.perturb.sparsify import Which, select
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
    group: how many successive weights of an output row share a scale; None for the whole row.

    Raises ValueError for other values.
    """

    bits: int
    mapping: Literal["symmetric", "asymmetric"] = "symmetric"
    group: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, not {self.bits}.")
        if self.mapping not in ("symmetric", "asymmetric"):
            raise ValueError(f"mapping must be 'symmetric' or 'asymmetric', not {self.mapping!r}.")
        if self.bits == 1 and self.mapping != "symmetric":
            raise ValueError("1 bit is a sign times a magnitude, which is symmetric; choose that mapping.")
        if self.group is not None and self.group < 1:
            raise ValueError(f"A group holds at least 1 weight, not {self.group}; None is a whole row.")

    def group_of(self, width: int) -> int:
        """How many weights of a row of this width share a scale; ValueError where they leave a rest."""
        group = self.group or width
        if width % group:
            raise ValueError(
                f"A row of {width} weights does not divide into groups of {group}; choose a divisor, or None "
                "for one scale a row."
            )
        return group

    def __str__(self) -> str:
        groups = "" if self.group is None else f" in groups of {self.group}"
        return f"{self.bits} bit {self.mapping}{groups}"


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
    seed: int = 0,
) -> Kept:
    """The channels to protect, by scores of channels such as `fihelpers.scores.channels` makes.

    share: of the channels of each matrix; `which` as in `select`, where "low half" is v1's FI-low. Ties are
    settled by the seed.
    Raises ValueError for scores that are not of channels, and what `select` raises.
    """
    axis = scores.metadata.get("axis", "")
    if axis not in ("rows", "columns") or any(v.dim() != 1 for v in scores.values.values()):
        raise ValueError("These are scores of weights, not of channels; pass them through channel_scores.")
    chosen = select(scores, share, which, scope="layer", seed=seed)
    channels = {name: index.sort().values for name, index in chosen.items()}
    return Kept(axis, channels, scores.metadata.get("sha256", ""))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Packed:
    """One quantized matrix W (out, in).

    codes: uint8, the bits of the codes (`_pack_bits`); scales: float16 (rows, groups), the mean
    magnitude for 1 bit; zeros: uint8 like scales, the code of 0, None for "symmetric"; kept: int32, the
    positions of the protected channels along `axis`; kept_values: their 16-bit weights, a channel a row.
    Kept rows have no scales.
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
        along, rest = _rest(self.shape, self.axis, self.kept, self.codes.device)
        size = [*self.shape]
        size[along] = len(rest)
        codes = _unpack_bits(self.codes, self.scheme.bits, size[0] * size[1]).view(size)
        columns = rest if along == 1 else torch.arange(size[1], device=codes.device)
        groups = columns // self.scheme.group_of(self.shape[1])
        body = _decode(
            codes, self.scales[:, groups], None if self.zeros is None else self.zeros[:, groups], self.scheme
        )
        whole = torch.empty(self.shape, dtype=dtype, device=codes.device)
        whole.index_copy_(along, rest, body.to(dtype))
        if self.kept is not None and self.kept_values is not None:
            values = self.kept_values if along == 0 else self.kept_values.T
            whole.index_copy_(along, self.kept.long(), values.to(dtype))
        return whole

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names of the fields."""
        named = {name: getattr(self, name) for name in STORED}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def pack(
    weight: Tensor, scheme: Scheme, kept: Tensor | Sequence[int] | None = None, axis: Axis = "rows"
) -> Packed:
    """Quantize one matrix W (out, in), but for the channels `kept` along `axis`.

    Kept channels stay in the weight's own type where that has 16 bits, else in float16.
    Raises ValueError for a group that does not divide the row, channels that are absent or named twice,
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
    along, rest = _rest(shape, axis, index, weight.device)
    body = weight.float()
    if along == 0:
        body = body[rest]
    elif index is not None:
        body = body.index_fill(1, index.long(), 0)  # ranges include 0 anyway, so these do not change them
    scales, zeros = _ranges(body, rest if along == 1 else None, scheme)
    if not torch.isfinite(scales).all():
        raise ValueError(f"Weights up to {float(weight.abs().max()):.3g} are beyond the scales of float16.")
    codes = _encode(body, scales, zeros, scheme)
    codes = codes if along == 0 else codes[:, rest]
    values = None if index is None else _sixteen_bits(weight, index, axis)
    return Packed(scheme, shape, axis, _pack_bits(codes, scheme.bits), scales, zeros, index, values)


def quantization_error(
    weight: Tensor,
    scheme: Scheme,
    *,
    turned: bool = False,
) -> Tensor:
    """The displacement of every weight, quantized minus original, like weight in float32 or better.

    It is the delta of the displacement-aware scores (method 1b.4). weight: a matrix W (out, in), or a linear
    weight of another shape, `turned` or not (`fihelpers.models.linear`). Raises what `pack` raises.
    """
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    matrix = weight if weight.dim() < 2 else as_rows(weight, turned)
    unpacked = pack(matrix, scheme).unpack(exact.dtype)
    return from_rows(unpacked, tuple(weight.shape), turned) - exact


def pack_model(
    model: LanguageModel, names: Collection[str], scheme: Scheme, kept: Kept | None = None
) -> dict[str, Packed]:
    """Quantize the named weights of a model's linear layers; the model itself stays as it is.

    Raises ValueError for an unknown name, kept channels of a weight that is not quantized, or chosen by the
    scores of another model; and what `pack` raises, naming the weight.
    """
    weights = own_weights(model.network, names)
    if kept is not None:
        _check_kept(kept, weights, model)
    packed = {}
    for name, weight in weights.items():
        chosen = None if kept is None else kept.channels.get(name)
        try:
            packed[name] = pack(
                as_rows(weight.parameter.detach(), weight.turned),
                scheme,
                chosen,
                "rows" if kept is None else kept.axis,
            )
        except (ValueError, FloatingPointError) as error:
            raise type(error)(f"{name}: {error}") from error
    return packed


@contextmanager
def quantized(network: nn.Module, packed: Mapping[str, Packed]) -> Iterator[nn.Module]:
    """The network with its weights as the packed ones stand for; on leaving they are as before, bit for bit.

    Packed weights are unpacked once, on entering.
    """
    weights = own_weights(network, packed)
    before: dict[Tensor, Tensor] = {weight.parameter: weight.parameter.data for weight in weights.values()}
    try:
        for name, weight in weights.items():
            weight.parameter.data = weight.unpacked(packed[name])
        before |= laid_by_torch(network)
        yield network
    finally:
        for tensor, data in before.items():
            tensor.data = data


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


def _rest(
    shape: tuple[int, int], axis: Axis, kept: Tensor | None, device: torch.device
) -> tuple[int, Tensor]:
    """The axis that kept channels count, and the positions on it that are not kept."""
    along = 0 if axis == "rows" else 1
    free = torch.ones(shape[along], dtype=torch.bool, device=device)
    if kept is not None:
        free[kept.long()] = False
    return along, free.nonzero()[:, 0]


def _ranges(body: Tensor, columns: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales, float16 (rows, groups), and the codes of 0 for "asymmetric", uint8, else None.

    columns: those that are not kept, None for all.
    """
    group = scheme.group_of(body.shape[1])
    grouped = body.unflatten(1, (-1, group))
    if scheme.bits == 1:
        columns = torch.arange(body.shape[1], device=body.device) if columns is None else columns
        members = (columns // group).bincount(minlength=grouped.shape[1])
        return (grouped.abs().sum(-1) / members.clamp(min=1)).half(), None
    levels = 2**scheme.bits - 1
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if scheme.mapping == "symmetric":
        return (torch.maximum(-low, high) / (levels / 2)).clamp(min=SMALLEST).half(), None
    scales = ((high - low) / levels).clamp(min=SMALLEST)
    return scales.half(), (-(low / scales).round()).clamp(0, levels).to(torch.uint8)


def _encode(body: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes, uint8, of all columns (rows, columns)."""
    if scheme.bits == 1:
        return (body >= 0).to(torch.uint8)
    inverse = 1.0 / scales.float()  # torchao multiplies by the inverse, which rounds unlike a division
    steps = (body.unflatten(1, (scales.shape[1], -1)) * inverse[..., None]).round()
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
class OwnWeight:
    """A parameter by which its module multiplies, and no other, and whether it lies turned."""

    name: str
    parameter: nn.Parameter
    turned: bool

    def check(self, packed: Packed) -> None:
        """Raises ValueError for packed weights of another shape."""
        width = self.parameter.shape[-2 if self.turned else -1]
        shape = (self.parameter.numel() // width, width)
        if packed.shape != shape:
            raise ValueError(f"{self.name} is {shape}, packed it is {packed.shape}: that is another model's.")

    def unpacked(self, packed: Packed) -> Tensor:
        """What the packed weights stand for, like the parameter. Raises what `check` raises."""
        self.check(packed)
        return from_rows(packed.unpack(self.parameter.dtype), tuple(self.parameter.shape), self.turned)


def own_weights(network: nn.Module, names: Collection[str]) -> dict[str, OwnWeight]:
    """Weights of linear layers by their names, in the model's order; none that two modules use.

    Raises ValueError for a name of another parameter.
    """
    users = Counter(p for module in network.modules() for p in module._parameters.values() if p is not None)
    linear = set(linear_names(network)) if isinstance(network, PreTrainedModel) else set()
    linear |= {f"{path}.weight" for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    turned = turned_names(network)
    found = {
        name: OwnWeight(name, p, name in turned)
        for name, p in network.named_parameters()
        if name in linear and users[p] == 1
    }
    unknown = sorted(set(names) - set(found))
    if unknown:
        raise ValueError(
            f"The model has no linear layer whose own weight is {unknown[0]!r}; take names from "
            "linear_names, without those that two modules share."
        )
    return {name: weight for name, weight in found.items() if name in set(names)}


def _check_kept(kept: Kept, weights: Mapping[str, OwnWeight], model: LanguageModel) -> None:
    if kept.sha256 and kept.sha256 != model.sha256:
        raise ValueError(
            f"The channels were chosen by scores of another model (SHA-256 {kept.sha256[:12]}…, that of "
            f"{model.name!r} is {model.sha256[:12]}…); score this model."
        )
    unused = sorted(set(kept.channels) - set(weights))
    if unused:
        raise ValueError(f"Channels of {unused[0]!r} are kept, but it is not quantized; leave it out.")


def laid_by_torch(network: nn.Module) -> dict[Tensor, Tensor]:
    """Lay weights as torch lays its own tensors; returns those that were moved, with their data before.

    A product rounds by where its weights lie, and those of a file that is mapped into memory lie anywhere.
    """
    moved, kept = {}, set(network.state_dict())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name in kept and (tensor.data_ptr() % ALIGNED or not tensor.is_contiguous()):
            moved[tensor] = tensor.data
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return moved
