"""Class gradients of every weight, streamed layer by layer.

Forward hooks keep each layer's input, K - 1 backward passes give the class gradients of each layer's
output, and a weight's class gradient is formed for one block of rows at a time, used and dropped:
s[k, sample, out, in] = sum over positions of g[k, sample, position, out] x[sample, position, in].
Who combines these products without forming them (`fihelpers.scores.kernels`) takes their `Factors` instead.
No `.grad` is ever stored. The predicted class needs no pass of its own (method 1b.7).

Whatever is linear in the class gradients can be had in their place at no cost, since a backward pass may
start from any combination of the classes' log-probabilities (`Directions`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from fihelpers.answers import Answers
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.scores.class_gradients import class_gradients

BLOCK = 2**20  # elements of class gradients formed at a time: 4 MB of float32, to stay in cache
ROWS = 512  # one matrix product of so many rows is as fast as several of fewer: then samples come in turn
CHECKED = 8  # tokens of the prompt on which hooks are compared with autograd

Directions = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Factors:
    """What the class gradients of a linear layer's weight are products of: g^T x, summed over the positions.

    grads: of the layer's output along D directions, each (B, T, out); x: the layer's input (B, T, in); both
    in the precision of the model, finite or not. start: the first position that has a gradient. ceiling: of
    FI, (B,); index: the places of the samples' examples.
    """

    name: str
    grads: Sequence[Tensor]
    x: Tensor
    start: int
    ceiling: Tensor
    index: Tensor


Taker = Callable[[Factors], bool]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its input, and its output as a node of the graph."""

    module: nn.Module
    x: Tensor
    out: Tensor


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a parameter: the call's module and input, the parameter's name in the module, and the
    gradients of the call's output along D directions, each (B, ...)."""

    module: nn.Module
    x: Tensor
    local: str
    grads: tuple[Tensor, ...]


Uses = dict[str, list[Use]]


@dataclass(frozen=True, eq=False)
class Block:
    """Class gradients (K-1, B, *rows) of some rows of one parameter for some samples.

    others: P of the classes other than y_hat (K-1, B); chosen: P(y_hat) (B,); ceiling: of FI, (B,); index and
    samples: the places of the samples' examples, and which samples of the batch they are. With
    `directions` there are as many gradients as directions, in place of K-1.
    """

    name: str
    rows: slice
    grads: Tensor
    others: Tensor
    chosen: Tensor
    ceiling: Tensor
    index: Tensor
    samples: slice


def class_grad_blocks(
    model: LanguageModel,
    batch: Batch,
    classes: Answers,
    parameters: Mapping[str, nn.Parameter],
    missed: Collection[str],
    directions: Directions | None = None,
    save_memory: bool = False,
    take: Taker | None = None,
) -> Iterator[Block]:
    """All class gradients of a batch, one block of rows at a time; the next takes the place of the last.

    parameters, missed: from `named_parameters` and `missed_by_hooks`; the model is `frozen`.
    directions: maps log P of the classes other than y_hat (B, K-1), their P (K-1, B), P(y_hat) (B,) and log P
        of all classes (B, K) to what is differentiated instead, (B, D).
    save_memory: keep the activations of one transformer block at a time, at the cost of one more forward
        pass. Raises ValueError for a model without such blocks.
    take: is offered the factors of each linear layer's weight; where it returns True there are no blocks.

    Raises FloatingPointError for NaN or infinite gradients.
    """
    hooked = {name: p for name, p in parameters.items() if name not in missed}
    ask = _Question(model, batch, classes, directions)
    for uses in _stages(ask, hooked, save_memory):
        while uses:
            name, of_name = uses.popitem()
            if take is not None and _is_product(of_name) and take(ask.factors(name, of_name)):
                continue
            for rows, samples, grads in _row_blocks(name, of_name, hooked[name]):
                yield ask.block(name, rows, grads, samples)
    if missed:
        with requiring([parameters[name] for name in missed]):
            along = ask.along()
            for name in missed:
                for b in range(len(along)):
                    grads = _by_autograd(along[b], parameters[name])[:, None]
                    if not torch.isfinite(grads).all():
                        raise not_finite(name)
                    yield ask.block(name, slice(None), grads, slice(b, b + 1))


class _Question:
    """A batch put to the model, and the probabilities with which it answers."""

    def __init__(
        self, model: LanguageModel, batch: Batch, classes: Answers, directions: Directions | None
    ) -> None:
        self.model, self.batch, self.directions = model, batch, directions
        self.classes = classes.rows(batch.index)

    @property
    def samples(self) -> int:
        return len(self.batch.index)

    def along(self) -> Tensor:
        """What is to be differentiated (B, D), from a forward pass."""
        log_p = self.classes.log_probs(self.model.last_logits(self.batch))
        p = log_p.detach().exp()
        p = p / p.sum(-1, keepdim=True)
        y = p.argmax(-1, keepdim=True)
        row = torch.arange(p.shape[1] - 1, device=p.device).expand(len(p), -1)
        index = row + (row >= y)
        self.others, self.chosen = p.gather(1, index).T, p.gather(1, y)[:, 0]
        of_others = log_p.gather(1, index)
        if self.directions is None:
            return of_others
        return self.directions(of_others, self.others, self.chosen, log_p)

    def block(self, name: str, rows: slice, grads: Tensor, samples: slice) -> Block:
        others, chosen = self.others[:, samples], self.chosen[samples]
        index = self.batch.index[samples]
        return Block(name, rows, grads, others, chosen, others.sum(0) / chosen, index, samples)

    def factors(self, name: str, uses: Sequence[Use]) -> Factors:
        """Of all uses at once: a sum over uses is one over more positions."""
        parts = [_factors(use) for use in uses]
        grads, x, start = parts[0]
        if len(parts) > 1:
            grads = [torch.cat(of_uses, 1) for of_uses in zip(*(gs for gs, _, _ in parts), strict=True)]
            x, start = torch.cat([inputs for _, inputs, _ in parts], 1), 0
        return Factors(name, grads, x, start, self.others.sum(0) / self.chosen, self.batch.index)


def named_parameters(network: nn.Module, only: Collection[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name, a tied one once. Raises ValueError for an unknown name."""
    named = dict(network.named_parameters())
    if only is None:
        return named
    unknown = sorted(set(only) - set(named))
    if unknown:
        raise ValueError(f"The model has no parameter {unknown[0]!r}; take names from its state dict.")
    return {name: p for name, p in named.items() if name in set(only)}


def frozen(network: nn.Module) -> AbstractContextManager[None]:
    """No weight asks for a gradient, so backward passes reach the layers' outputs only."""
    return requiring(network.parameters(), False)


@contextmanager
def requiring(parameters: Iterable[nn.Parameter], wanted: bool = True) -> Iterator[None]:
    """Whether these parameters ask for a gradient, for as long as the context lasts."""
    before = [(p, p.requires_grad) for p in parameters]
    for p, _ in before:
        p.requires_grad_(wanted)
    try:
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


@contextmanager
def _tape(network: nn.Module, parameters: Mapping[str, nn.Parameter], samples: int) -> Iterator[list[Call]]:
    """Record every call, with gradients on, of a module that owns one of the parameters and no module.

    The graph begins at the first of them, so that backward passes end there. A call whose input and output
    are not (samples, tokens, ...) mixes the samples, so that theirs cannot be told apart, and is left out.
    """
    calls: list[Call] = []
    wanted = set(parameters.values())

    def record(module: nn.Module, inputs: tuple[Tensor, ...], out: object) -> Tensor | None:
        if not isinstance(out, Tensor) or len(inputs) != 1 or not torch.is_grad_enabled():
            return None
        first = not out.requires_grad
        out.requires_grad_(True)
        if out.dim() >= 3 and len(inputs[0]) == len(out) == samples:
            calls.append(Call(module, inputs[0].detach(), out))
        return out.clone() if first else None  # the network may change it in place, but no leaf of the graph

    leaves = [
        m
        for m in network.modules()
        if not list(m.children()) and any(p in wanted for p in m.parameters(recurse=False))
    ]
    with ExitStack() as stack:
        for module in leaves:
            stack.callback(module.register_forward_hook(record).remove)
        yield calls


@dataclass(eq=False)
class _Step:
    """A transformer block's call: its input and other arguments, how many calls were taped before it, and
    its output, where a new graph begins."""

    block: nn.Module
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: int
    out: Tensor


def _stages(ask: _Question, parameters: Mapping[str, nn.Parameter], by_layers: bool) -> Iterator[Uses]:
    """The uses of the parameters, all at once or transformer block by transformer block, the last one first.

    By layers the forward pass keeps only what goes from one block to the next. Each block is then run again,
    with its graph, and the gradients along the D directions are pulled back through it. Parameters that more
    than one module owns, and those outside the blocks, come last.
    """
    late: Uses = {}
    network, shared = ask.model.network, _shared(ask.model.network)
    blocks = transformer_blocks(network) if by_layers else []
    with _tape(network, parameters, ask.samples) as calls, _cut(blocks, calls) as steps:
        targets: list[Tensor] = list(ask.along().sum(0))
    seeds: list[Tensor | None] = [None] * len(targets)
    while targets[0].requires_grad:
        outside = _taken(calls, steps[-1].before if steps else 0)
        uses, seeds = _pulled(targets, seeds, outside, steps[-1].out if steps else None, parameters)
        _merge(late, uses)
        if not steps:
            del uses, outside  # so that the gradients are let go one by one
            break
        step = steps.pop()
        x = step.x.detach().requires_grad_(True)
        with _tape(step.block, parameters, ask.samples) as inside:
            targets = [_first(step.block.forward(x, *step.args, **step.kwargs))] * len(seeds)
        uses, seeds = _pulled(targets, seeds, _taken(inside, 0), x, parameters)
        targets = [step.x] * len(seeds)
        del x, step
        _merge(late, {name: uses.pop(name) for name in shared & set(uses)})
        yield uses
    yield late


@contextmanager
def _cut(blocks: Sequence[nn.Module], calls: Sequence[Call]) -> Iterator[list[_Step]]:
    """Run the blocks without a graph, and begin a new one at the output of each."""
    steps: list[_Step] = []

    def cutting(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            before = len(calls)
            with torch.no_grad():
                out = forward(x, *args, **kwargs)
            end = _first(out).detach().requires_grad_(True)
            steps.append(_Step(block, x, args, kwargs, before, end))
            return (end, *out[1:]) if isinstance(out, tuple) else end

        return run

    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = cutting(block, block.forward)
    try:
        yield steps
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def transformer_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules that a transformer runs one after the other: its longest list of modules.

    Raises ValueError for a network without one.
    """
    lists = [list(m) for m in network.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(
            f"{type(network).__name__} has no list of transformer blocks to go through one by one; leave "
            "save_memory out."
        )
    return max(lists, key=len)


def _shared(network: nn.Module) -> set[str]:
    """Names of the parameters that more than one module owns."""
    owners = Counter(p for module in network.modules() for p in module.parameters(recurse=False))
    return {name for name, p in network.named_parameters() if owners[p] > 1}


def _taken(calls: list[Call], start: int) -> list[Call]:
    """Take the calls from `start` on off the tape."""
    taken = calls[start:]
    del calls[start:]
    return taken


def _merge(uses: Uses, more: Uses) -> None:
    for name, found in more.items():
        uses.setdefault(name, []).extend(found)


def _pulled(
    targets: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    calls: Sequence[Call],
    source: Tensor | None,
    parameters: Mapping[str, nn.Parameter],
) -> tuple[Uses, list[Tensor | None]]:
    """Pull gradients back from D targets: the uses of parameters in these calls, and the gradients of the
    source (B, ...) along the D directions."""
    ends = [c.out for c in calls] + ([] if source is None else [source])
    if not ends:
        return {}, []
    last = len(targets) - 1
    passes = [
        list(torch.autograd.grad(t, ends, seed, retain_graph=j < last, materialize_grads=True))
        for j, (t, seed) in enumerate(zip(targets, seeds, strict=True))
    ]
    pulled: list[Tensor | None] = [] if source is None else [grads.pop() for grads in passes]
    names = {p: name for name, p in parameters.items()}
    uses: Uses = {}
    for call, grads in zip(calls, zip(*passes, strict=True), strict=True):
        for local, p in call.module.named_parameters(recurse=False):
            if p in names:
                uses.setdefault(names[p], []).append(Use(call.module, call.x, local, grads))
    return uses, pulled


def _row_blocks(
    name: str, uses: Sequence[Use], parameter: nn.Parameter
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Class gradients (D, B, *rows) of a parameter, rows by rows along its first axis: rows, samples, them.

    The samples of a batch come in turn where too few rows would otherwise fit into a block.
    """
    if _is_product(uses):
        yield from _products(name, uses, parameter)
        return
    directions, samples = len(uses[0].grads), len(uses[0].grads[0])
    step = max(1, BLOCK // (directions * samples * parameter[:1].numel()))
    for start in range(0, len(parameter), step):
        rows = slice(start, min(start + step, len(parameter)))
        parts = [_class_grads(use, rows) for use in uses]
        grads = sum(parts[1:], parts[0])
        if not torch.isfinite(grads).all():
            raise not_finite(name)
        yield rows, slice(0, samples), grads


def not_finite(name: str) -> FloatingPointError:
    """The error of a parameter whose gradient holds NaN or infinite values."""
    return FloatingPointError(f"The gradient of {name} holds NaN or infinite values.")


def _is_product(uses: Sequence[Use]) -> bool:
    return all(isinstance(use.module, nn.Linear) and use.local == "weight" for use in uses)


def _factors(use: Use) -> tuple[list[Tensor], Tensor, int]:
    """The gradients (B, T, out) of a linear layer's output, and its input (B, T, in).

    Also the first position that has a gradient: padding comes before, and all but the last position in the
    last block. On a GPU it is the first, since to look for it is to wait.
    """
    grads = [g.reshape(len(g), -1, g.shape[-1]) for g in use.grads]
    x = use.x.reshape(len(use.x), -1, use.x.shape[-1])
    start = 0
    if x.device.type == "cpu" and not any(g[:, 0].any() for g in grads):
        live = torch.stack([g.any(-1).any(0) for g in grads]).any(0)
        start = min(int((~live).cumprod(0).sum()), len(live) - 1)
    return grads, x, start


def _products(
    name: str, uses: Sequence[Use], parameter: nn.Parameter
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of the weight of a linear layer: the products g^T x of each sample, summed over the uses."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    factors = [
        ([g[:, start:].to(dtype) for g in gs], x[:, start:].to(dtype)) for gs, x, start in map(_factors, uses)
    ]
    (grads, x), width = factors[0], parameter.shape[1]
    if not all(torch.isfinite(t.sum()) or torch.isfinite(t).all() for gs, x in factors for t in (*gs, x)):
        raise not_finite(name)
    samples, step = _shares(len(x), len(grads) * width, len(parameter))
    room = x.new_empty(max(of.stop - of.start for of in samples) * len(grads) * step * width)
    for start in range(0, len(parameter), step):
        rows = slice(start, min(start + step, len(parameter)))
        for of in samples:
            shape = (of.stop - of.start, len(grads) * (rows.stop - start), width)
            out = room[: math.prod(shape)].view(shape)
            for number, (gs, inputs) in enumerate(factors):
                stacked = torch.cat([g[of, :, rows] for g in gs], -1).transpose(1, 2)
                torch.baddbmm(out, stacked, inputs[of], beta=int(number > 0), out=out)
            yield rows, of, out.unflatten(1, (len(grads), -1)).transpose(0, 1)


def _shares(samples: int, per_row: int, rows: int) -> tuple[list[slice], int]:
    """Which samples to take in turn, and how many rows, for blocks of about BLOCK elements.

    per_row: the elements of a row of one sample. Samples come in turn where ROWS of all would not fit.
    """
    turns = -(-samples // max(1, BLOCK // (per_row * min(ROWS, rows))))
    together = -(-samples // turns)
    step = max(1, BLOCK // (per_row * together))
    step = min(step // 64 * 64 or step, rows)
    return [slice(i, min(i + together, samples)) for i in range(0, samples, together)], step


def _class_grads(use: Use, rows: slice) -> Tensor:
    """(D, B, *rows) class gradients of one use of a parameter."""
    grads = torch.stack(use.grads)
    if isinstance(use.module, nn.Linear):
        return _linear(use.x, grads[..., rows], use.local, "kboi")
    if isinstance(use.module, Conv1D):  # its weight is (in, out)
        if use.local == "bias":
            return _linear(use.x, grads[..., rows], use.local, "")
        return _linear(use.x[..., rows], grads, use.local, "kbio")
    if isinstance(use.module, nn.Embedding):
        return _embedding(use.x, grads, rows, use.module.padding_idx)
    return _generic(use, grads)[:, :, rows]


def _linear(x: Tensor, g: Tensor, local: str, order: str) -> Tensor:
    """Class gradients of a bias (D, B, out), or of a weight, whose axes are in the given order."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    g = g.flatten(2, -2).to(dtype)
    if local == "bias":
        return g.sum(2)
    return torch.einsum(f"kbto,bti->{order}", g, x.reshape(len(x), -1, x.shape[-1]).to(dtype))


def _embedding(ids: Tensor, g: Tensor, rows: slice, padding: int | None) -> Tensor:
    """A row's gradient is the sum over the positions that looked it up; the row of the padding has none."""
    wanted = torch.arange(rows.start, rows.stop, device=ids.device)
    one_hot = (ids[..., None] == wanted) & (wanted != (-1 if padding is None else padding))
    dtype = torch.promote_types(g.dtype, torch.float32)
    return torch.einsum("btv,kbth->kbvh", one_hot.to(dtype), g.to(dtype))


def _generic(use: Use, grads: Tensor) -> Tensor:
    """Any other module (norms, say): the gradient of its own small function, sample by sample."""
    dtype = torch.promote_types(grads.dtype, torch.float32)
    own = {name: p.detach().to(dtype) for name, p in use.module.named_parameters(recurse=False)}
    weight = own.pop(use.local)

    def pull(x: Tensor, g: Tensor) -> Tensor:
        out = vjp(lambda w: functional_call(use.module, {**own, use.local: w}, (x[None],))[0], weight)[1]
        return vmap(lambda one: out(one)[0])(g)

    return vmap(pull, out_dims=1)(use.x.to(dtype), grads.transpose(0, 1).to(dtype).contiguous())


def _by_autograd(along: Tensor, parameter: nn.Parameter) -> Tensor:
    """(D, *shape) class gradients of one sample, for parameters that the hooks miss."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if not along.requires_grad:  # nothing of what the hooks miss is used
        return torch.zeros(len(along), *parameter.shape, dtype=dtype, device=parameter.device)
    return class_gradients(along, parameter).to(dtype)


def _end(batch: Batch) -> Batch:
    """The last tokens of the batch's last prompt, and once more in another order."""
    ids, mask, positions = (
        t[-1:, -CHECKED:].repeat(2, 1) for t in (batch.input_ids, batch.attention_mask, batch.position_ids)
    )
    ids[1] = ids[1].roll(1)
    return Batch(batch.index[-1:].repeat(2), ids, mask, positions)


def missed_by_hooks(
    model: LanguageModel,
    batches: Sequence[Batch],
    classes: Answers,
    parameters: Mapping[str, nn.Parameter],
    save_memory: bool = False,
) -> set[str]:
    """Names of the parameters whose class gradient the hooks do not reproduce, found on a short prompt.

    It is the end of the longest, in a batch with another, from which it has to be told apart. One
    backward pass with autograd is compared parameter by parameter; each gradient is dropped at once.
    """
    longest = max(batches, key=lambda batch: batch.input_ids.shape[1])
    ask = _Question(model, _end(longest), classes, lambda log_p, *_: log_p[:, :1])
    uses: Uses = {}
    for found in _stages(ask, parameters, save_memory):
        _merge(uses, found)
    missed = set(parameters) - set(uses)  # a later prompt may use what this one does not

    def compare(name: str, parameter: nn.Parameter) -> None:
        truth, parameter.grad = parameter.grad, None
        if truth is None or name not in uses:
            return
        apart = truth.new_zeros((), dtype=torch.float64)
        for rows, samples, g in _row_blocks(name, uses[name], parameter):
            if samples.start == 0:
                apart += torch.linalg.vector_norm(g[0, 0].sub_(truth[rows])).double().square()
        rtol = 1e-3 if parameter.dtype.itemsize >= 4 else 5e-2
        if not apart.sqrt() <= rtol * truth.norm():
            missed.add(name)

    with requiring(list(parameters.values())), ExitStack() as stack:
        for name, p in parameters.items():
            hook = p.register_post_accumulate_grad_hook(lambda p, name=name: compare(name, p))
            stack.callback(hook.remove)
        ask.along()[0].sum().backward()
    return missed
