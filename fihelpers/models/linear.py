"""The weights of linear layers: which of a network's parameters they are, and how each lies in memory.

A layer multiplies what it reads, (..., in), by a matrix W (out, in). Networks keep W as it is (`nn.Linear`,
routers), turned (GPT-2's `Conv1D`: (in, out)), or many of them in one parameter, those of fused experts:
(experts, out, in), turned (experts, in, out). Seen as rows, every parameter is one matrix (rows, in); those
of fused experts one with the rows of all experts.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# ends of the names of parameters of several dimensions that are added or scale element by element
ELEMENTWISE = ("bias", "A_log", "D", "scale", "embed")


def linear_names(network: PreTrainedModel) -> list[str]:
    """Names of the weights of all linear layers but the output head, in the model's order; a shared one once.

    Those of fused experts and of routers count as well. Embeddings, convolutions and norms do not.
    """
    head = network.get_output_embeddings()
    named = dict(network.named_parameters())
    found = []
    for path, module in network.named_modules():
        for local, p in module.named_parameters(recurse=False):
            name = f"{path}.{local}" if path else local
            if module is not head and name in named and _multiplies(module, local, p):
                found.append(name)
    return found


def turned_names(network: nn.Module) -> frozenset[str]:
    """Names of the weights whose last axis is the layer's output, not its input."""
    return frozenset(
        f"{path}.{local}"
        for path, module in network.named_modules()
        for local, p in module.named_parameters(recurse=False)
        if _multiplies(module, local, p) and _is_turned(module)
    )


def as_rows(weight: Tensor, turned: bool) -> Tensor:
    """A parameter (out, in) or (experts, out, in), turned or not, as a matrix (rows, in)."""
    weight = weight.transpose(-1, -2) if turned else weight
    return weight.flatten(0, -2)


def from_rows(matrix: Tensor, shape: tuple[int, ...], turned: bool) -> Tensor:
    """The parameter of this shape that `as_rows` sees as the matrix (rows, in)."""
    if not turned:
        return matrix.reshape(shape)
    return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()


def _is_matrix(p: Tensor) -> bool:
    return p.dim() > 1 and min(p.shape) > 1


def _multiplies(module: nn.Module, local: str, p: Tensor) -> bool:
    if isinstance(module, nn.Embedding | _ConvNd) or not _is_matrix(p):
        return False
    return not local.endswith(ELEMENTWISE)


def _is_turned(module: nn.Module) -> bool:
    """Whether a module multiplies by its weights from the right, as they are, and not by their transposes."""
    if isinstance(module, Conv1D):
        return True
    up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    said = getattr(module, "is_transposed", None)  # by the library's fused experts
    if said is not None or not isinstance(up, Tensor) or not isinstance(down, Tensor):
        return bool(said)
    return up.dim() == down.dim() == 3 and up.shape[2] == 2 * down.shape[1]  # experts that do not say it
