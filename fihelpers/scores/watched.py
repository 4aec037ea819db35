"""What the weights of linear layers read and write, seen while a network answers.

Layers that are modules of their own are watched by hooks. Fused experts and routers multiply within a larger
module: there the products themselves are watched, and each expert is a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fihelpers.models.language import Batch, LanguageModel
from fihelpers.models.linear import as_rows, linear_names, turned_names

# name of the weight, number of the expert (0 where there is one matrix), input (..., in), output (..., out)
See = Callable[[str, int, Tensor, Tensor], None]
# what is summed of the tokens' inputs (tokens, in) and outputs (tokens, out) of a layer
Summed = Callable[[Tensor, Tensor], Sequence[Tensor]]

SECOND = ("linear", "matmul", "__matmul__", "bmm", "mm")  # products (x, W); those with something added first
THIRD = ("addmm", "baddbmm")
CASTS = ("to", "type", "float", "double", "type_as")
PLAIN = (nn.Linear.forward, Conv1D.forward)


@dataclass(frozen=True, eq=False)
class Watched:
    """A weight, the layers that use it (none for fused experts and routers), and whether it lies turned."""

    weight: nn.Parameter
    modules: Sequence[nn.Module]
    turned: bool

    @property
    def rows(self) -> Tensor:
        """The weight as a matrix (rows, in), see `fihelpers.models.linear`."""
        return as_rows(self.weight.detach(), self.turned)

    @property
    def experts(self) -> int:
        return len(self.weight) if self.weight.dim() == 3 else 1

    @property
    def inputs(self) -> int:
        return self.weight.shape[-2 if self.turned else -1]


Layers = dict[str, Watched]


def linear_layers(network: PreTrainedModel, only: Collection[str] | None) -> Layers:
    """The weights of linear layers, by their names in the state dict (a shared one once).

    only: names; by default all, but for an output head that is also the embedding, which has inputs of
    another kind. Raises ValueError for a name that is no weight of linear layers alone, and where there is
    none.
    """
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in network.modules():
        for p in module.parameters(recurse=False):
            users.setdefault(p, []).append(module)
    turned, others = turned_names(network), set(linear_names(network))
    found: Layers = {}
    for name, p in network.named_parameters():
        linear = [m for m in users[p] if type(m).forward in PLAIN and m.weight is p]
        if len(linear) == len(users[p]) or (name in others and not linear):
            found[name] = Watched(p, linear, name in turned)
    missing = sorted(set(only or ()) - set(found))
    if missing:
        raise ValueError(
            f"{missing[0]!r} is no weight of linear layers alone; take names from `linear_names`."
        )
    wanted = {name: one for name, one in found.items() if only is None or name in set(only)}
    if not wanted:
        raise ValueError("There is no weight of a linear layer to score; the methods are made for those.")
    return wanted


def batch_size_for(layers: Layers, batch_size: int) -> int:
    """1 where a layer is fed tokens without their places, among which padding cannot be told."""
    return batch_size if all(one.modules for one in layers.values()) else 1


@contextmanager
def watching(network: PreTrainedModel, layers: Layers, see: See) -> Iterator[None]:
    """Call `see` at every product with a weight of the layers."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, out: see(name, 0, inputs[0], out)

    within = {name: one for name, one in layers.items() if not one.modules}
    with ExitStack() as stack:
        for name, one in layers.items():
            for module in one.modules:
                stack.callback(module.register_forward_hook(hook(name)).remove)
        if within:  # experts in turn, in plain products, instead of all in one of the library's own
            stack.callback(network.set_experts_implementation, network.get_experts_implementation())
            network.set_experts_implementation("eager")
            stack.enter_context(_Products(within, see))
        yield


class _Products(TorchFunctionMode):
    """Watches torch's products for those with one of the weights, or with an expert's part of it."""

    def __init__(self, layers: Mapping[str, Watched], see: See) -> None:
        super().__init__()
        self.layers, self.see = layers, see
        self.places = {one.weight.untyped_storage().data_ptr(): name for name, one in layers.items()}
        self.casts: list[Tensor] = []  # kept, so that no other tensor takes their place in memory

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = getattr(func, "__name__", "")
        if kind in CASTS and isinstance(out, Tensor) and (name := self._name(args[0])):
            self.places[out.untyped_storage().data_ptr()] = name
            self.casts.append(out)
        if kind in SECOND or kind in THIRD:
            x, w = args[1:3] if kind in THIRD else args[:2]
            name, turn = self._name(w), False
            if name is None and kind != "linear":  # W x in place of x W
                name, turn, x, w = self._name(x), True, w, x
            if name is not None:
                self._tell(name, w, *((t.transpose(-1, -2) for t in (x, out)) if turn else (x, out)))
        return out

    def _name(self, w: Tensor) -> str | None:
        return self.places.get(w.untyped_storage().data_ptr())

    def _tell(self, name: str, w: Tensor, x: Tensor, out: Tensor) -> None:
        weight = self.layers[name].weight
        if weight.dim() == 3 and w.dim() == 3 and len(w) == len(weight):  # of all experts at once
            for expert in range(len(weight)):
                fed = x[expert].any(-1)  # each is fed zeros in place of what is not its own
                self.see(name, expert, x[expert][fed], out[expert][fed])
            return
        of_one = weight[0].numel() if weight.dim() == 3 else weight.numel()
        self.see(name, (w.storage_offset() - weight.storage_offset()) // of_one, x, out)


def of_tokens(x: Tensor, batch: Batch, name: str) -> Tensor:
    """A layer's inputs (tokens, in) without the positions of padding."""
    mask = batch.attention_mask.bool()
    if mask.all() or x.shape[:-1] == (len(mask), 1):  # the head sees the last position, never padding
        return x.reshape(-1, x.shape[-1])
    if x.shape[:-1] in (mask.shape, mask.flatten().shape):  # or all tokens in a row
        return x[mask.view(x.shape[:-1])]
    raise ValueError(
        f"The input of the layer of {name} has the shape {tuple(x.shape)}, in which padding cannot be told "
        "apart; use batch_size=1."
    )


def layer_sums(
    model: LanguageModel, batches: Sequence[Batch], layers: Layers, summed: Summed
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Sums over the tokens of all batches of what `summed` makes of each layer's inputs and outputs.

    Both come in float32 or better. Returns {name of the weight: each sum, (experts, ...)}, zeros for an
    expert to which nothing was sent, and the numbers of tokens (experts,). Raises ValueError for a layer that
    is never called and FloatingPointError for NaN or infinite sums.
    """
    sums: dict[str, list[Tensor]] = {}
    tokens = {name: torch.zeros(one.experts, dtype=torch.long) for name, one in layers.items()}

    def add(name: str, expert: int, x: Tensor, out: Tensor) -> None:
        found = summed(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, out)))
        if name not in sums:
            sums[name] = [one.new_zeros(layers[name].experts, *one.shape) for one in found]
        for total, one in zip(sums[name], found, strict=True):
            total[expert] += one
        tokens[name][expert] += len(x)

    for batch in tqdm(batches, desc="reading activations", leave=False, disable=len(batches) < 8):

        def see(name: str, expert: int, x: Tensor, out: Tensor, batch: Batch = batch) -> None:
            add(name, expert, of_tokens(x, batch, name), of_tokens(out, batch, name))

        with torch.no_grad(), watching(model.network, layers, see):
            model.last_logits(batch)
    for name, one in layers.items():
        if name not in sums and not one.modules:  # experts to which nothing was sent
            add(name, 0, *(one.rows.new_zeros(0, n) for n in (one.inputs, len(one.rows) // one.experts)))
        if name not in sums:
            raise ValueError(f"The layer of {name} is never called; leave its weight out.")
        if not all(total.isfinite().all() for total in sums[name]):
            raise FloatingPointError(f"The layer of {name} reads or writes NaN or infinite values.")
    return sums, tokens
