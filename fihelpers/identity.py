"""What a computation depends on, as one hash: its functions with all that they use, models, tasks, values.

A function of a notebook or of a chapter counts by its code, its defaults and the values that it reads; a
module or a class of a chapter by its file and the files that this imports; what belongs to the library by its
name, since the library's files are hashed as a whole. A changed comment in a notebook changes nothing.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from fihelpers.data import PACKAGE

PLAIN = (bool, int, float, complex, str, bytes, type(None), Path, range, slice, torch.dtype, torch.device)
READS = ("LOAD_GLOBAL", "LOAD_NAME")  # what the code of a function does to a name of its notebook


class Unknown(TypeError):
    """Something cannot be hashed; the message says what, and where it was found."""


def identity(*things: object) -> str:
    """SHA-256 (64 hex digits) of some things; equal where they would compute the same.

    Known are plain values and containers of them, arrays, tensors, tables, dataclasses, modules, functions,
    and objects with a method ``identity()`` that returns such things. Raises Unknown, which names the thing,
    for anything else.
    """
    total = hashlib.sha256()
    for part in _parts(things, "the key", frozenset()):
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


def model_identity(network: nn.Module, tokenizer: Any, sha256: str) -> list[object]:
    """An opened model: its files, the network's weights as they are now, and the tokenizer's words.

    A weight that a notebook changed makes another model. Weights count by a checksum (CRC-32) of each, which
    takes a second for a few billion bytes.
    """
    weights = [(name, _checksum(value)) for name, value in network.state_dict().items()]
    words = repr((sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)))
    return [sha256, type(network).__qualname__, weights, zlib.crc32(words.encode())]


def _parts(thing: object, place: str, above: frozenset[int]) -> Iterator[bytes]:
    """The bytes that a thing stands for. place: how to name it. above: the ids of what it is in."""
    if id(thing) in above:  # a function that calls itself
        yield b"again"
        return
    inside = above | {id(thing)}
    yield type(thing).__qualname__.encode()
    if isinstance(thing, PLAIN):
        yield repr(thing).encode()
    elif isinstance(thing, FunctionType):
        yield from _function(thing, inside)
    elif isinstance(thing, MethodType):
        yield from _parts((thing.__self__, thing.__func__), place, inside)
    elif isinstance(thing, functools.partial):
        yield from _parts((thing.func, thing.args, thing.keywords), place, inside)
    elif isinstance(thing, ModuleType | type) or inspect.isbuiltin(thing):
        yield from _named(thing, place)
    elif isinstance(thing, torch.Tensor | np.ndarray | pd.DataFrame | pd.Series):
        yield from _numbers(thing)
    else:
        for name, part in _members(thing, place):
            yield from _parts(part, name, inside)


def _members(thing: object, place: str) -> Iterator[tuple[str, object]]:
    """What a container or an object of a known kind consists of, each with its name."""
    if hasattr(thing, "identity"):
        yield place, thing.identity()
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield place, key
            yield f"{place}[{key!r}]", value
    elif isinstance(thing, Set):
        yield place, sorted(map(repr, thing))
    elif isinstance(thing, SimpleNamespace):
        yield place, vars(thing)
    elif is_dataclass(thing):
        for field in fields(thing):
            yield f"{place}.{field.name}", getattr(thing, field.name)
    elif isinstance(thing, Sequence):
        for number, value in enumerate(thing):
            yield f"{place}[{number}]", value
    else:
        raise Unknown(f"{place}, of the type {type(thing).__name__}")


def _function(function: FunctionType, inside: frozenset[int]) -> Iterator[bytes]:
    name = function.__qualname__
    yield f"{function.__module__}.{name}".encode()
    if _is_installed(inspect.getmodule(function)):
        return
    code = function.__code__
    yield from _code(code)
    yield from _parts((function.__defaults__, function.__kwdefaults__), name, inside)
    free = zip(code.co_freevars, function.__closure__ or (), strict=True)
    used = {label: cell.cell_contents for label, cell in free}
    used |= {label: function.__globals__[label] for label in _reads(code) if label in function.__globals__}
    for label in sorted(used):
        yield from _parts(used[label], label, inside)


def _code(code: CodeType) -> Iterator[bytes]:
    """The instructions and constants of a function and of those inside it, without places in the text."""
    yield code.co_code
    yield repr((code.co_names, code.co_varnames, code.co_freevars)).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield repr(constant).encode()


def _reads(code: CodeType) -> set[str]:
    """The names outside a function that its code reads."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in READS}
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found.union(*map(_reads, inner))


def _named(thing: Any, place: str) -> Iterator[bytes]:
    """A module, a class or a built-in function by its name, and by its files where it is a chapter's."""
    module = thing if isinstance(thing, ModuleType) else inspect.getmodule(thing)
    yield f"{getattr(module, '__name__', '')}.{getattr(thing, '__qualname__', '')}".encode()
    if not _is_installed(module) and not inspect.isbuiltin(thing):
        if module is None or not getattr(module, "__file__", None):
            raise Unknown(f"{place}, a class of the notebook")
        yield from _sources(module)


def _sources(module: ModuleType) -> Iterator[bytes]:
    """The file of a module, and those of its package that it imports, directly or not, by their names."""
    package = module.__name__.partition(".")[0]
    todo, seen = [module.__name__], set()
    while todo:
        name = todo.pop()
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in seen or file is None:
            continue
        seen.add(name)
        source = Path(file).read_bytes()
        yield f"{name} {hashlib.sha256(source).hexdigest()}".encode()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
                todo += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]


def _is_installed(module: ModuleType | None) -> bool:
    """Whether a module counts by its name: the library's, whose files are hashed, or another package's.

    A notebook's own functions lie in no file, those of a chapter outside the folders of packages.
    """
    if module is None or module.__name__ == "__main__":
        return False
    file = getattr(module, "__file__", None)
    if file is None or Path(file).resolve().is_relative_to(PACKAGE):
        return True
    return any(Path(file).is_relative_to(place) for place in sysconfig.get_paths().values())


def _numbers(values: torch.Tensor | np.ndarray | pd.DataFrame | pd.Series) -> Iterator[bytes]:
    if isinstance(values, torch.Tensor):
        yield repr((values.dtype, values.shape, _checksum(values))).encode()
    elif isinstance(values, np.ndarray):
        yield repr((values.dtype, values.shape)).encode()
        yield (
            np.ascontiguousarray(values).tobytes()
            if values.dtype != object
            else repr(values.tolist()).encode()
        )
    else:
        yield values.to_csv().encode()


def _checksum(values: torch.Tensor) -> int:
    flat = values.detach().cpu().contiguous().flatten()
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
