"""A network that holds packed weights in the place of its own, unpacked at every call (method 4.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fihelpers.models.linear import from_rows
from fihelpers.perturb.quantize import STORED, OwnWeight, Packed, Scheme, laid_by_torch, own_weights
from fihelpers.scores.channels import Axis


@dataclass(frozen=True)
class _Form:
    """A parameter that is packed: its shape and type, whether it lies turned, and how its rows are packed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    turned: bool
    scheme: Scheme
    rows: tuple[int, int]
    axis: Axis

    @classmethod
    def of(cls, weight: OwnWeight, packed: Packed) -> _Form:
        weight.check(packed)
        p = weight.parameter
        return cls(tuple(p.shape), p.dtype, weight.turned, packed.scheme, packed.shape, packed.axis)

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
    weights = own_weights(network, packed)
    forms = {name: _Form.of(weight, packed[name]) for name, weight in weights.items()}
    for name, form in forms.items():
        path, _, local = name.rpartition(".")
        module = network.get_submodule(path)
        of: Any = module._of if isinstance(module, Quantized) else type(module)
        packed_forms = {**vars(module).get("_forms", {}), local: form}
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


def plain_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters, a shared one once, and buffers, without what stands for packed weights."""
    packed = {
        module.get_buffer(_buffer(local, field))
        for _, module, local in _packed_parameters(network)
        for field in _packed(module, local).tensors()
    }
    buffers = {name: b for name, b in network.named_buffers() if b not in packed}
    return {**dict(network.named_parameters()), **buffers}
