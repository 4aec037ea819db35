"""The top share of values that are read in pieces: exact, without holding more than one piece of them.

The border between chosen and not is found digit by digit: a histogram of the upper 16 bits of the values,
then one of the lower 16 bits of those at the border (four digits for float64).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**20  # values handled at a time
DIGIT = 16  # bits
BINS = 2**DIGIT

Stream = Callable[[str], Iterator[Tensor]]


@dataclass(frozen=True)
class Border:
    """The key above which a value is chosen; of the `tied` values that have this key, `take` are chosen."""

    key: int
    take: int
    tied: int


def seed_of(seed: int, name: str, salt: int = 0) -> int:
    """A seed of 32 bits, all that torch uses, for one tensor: the same in every run and order of tensors."""
    return zlib.crc32(f"{seed} {salt} {name}".encode())


class TopShare:
    """Masks of the largest values of named tensors, read as flat pieces of at most CHUNK values.

    counts: how many to choose of all values together (scope "global") or of each tensor ("layer").
    dtype: float32 or float64, in which values are compared.
    Of equal values at the border, each tensor and each piece gives its share (method 1b.5), drawn at random
    with the seed. Raises ValueError, naming the tensor, where values are NaN.
    """

    def __init__(
        self,
        names: Iterable[str],
        stream: Stream,
        counts: int | Mapping[str, int],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.names, self.stream, self.counts = tuple(names), stream, counts
        self.dtype, self.seed = dtype, seed
        self.borders: dict[str, Border] = {}
        if isinstance(counts, int):
            whole = _border(lambda: self._keys(self.names), counts, dtype)
            self.borders = self._divided(whole)

    @property
    def total(self) -> int:
        """How many values are chosen."""
        return self.counts if isinstance(self.counts, int) else sum(self.counts.values())

    def mask(self, name: str) -> Tensor:
        """The mask (flat) of the chosen values of one tensor."""
        border = self.borders.get(name)
        if border is None:
            assert not isinstance(self.counts, int)
            border = _border(lambda: self._keys([name]), self.counts[name], self.dtype)
        generator = torch.Generator().manual_seed(seed_of(self.seed, name))
        parts, seen, given = [torch.zeros(0, dtype=torch.bool)], 0, 0
        for keys in self._keys([name]):
            if border.take == border.tied:
                parts.append(keys >= border.key if border.take else keys > border.key)
                continue
            part = keys > border.key
            tied = (keys == border.key).nonzero()[:, 0]
            seen += len(tied)
            due = border.take * seen // border.tied
            part[tied[torch.randperm(len(tied), generator=generator)[: due - given]]] = True
            given = due
            parts.append(part)
        return torch.cat(parts)

    def _keys(self, names: Iterable[str]) -> Iterator[Tensor]:
        for name in names:
            for values in self.stream(name):
                yield _ordered(values.to(self.dtype), name)

    def _divided(self, whole: Border) -> dict[str, Border]:
        """The border for each tensor, of which each takes its part of the tied values."""
        if whole.take == whole.tied:
            return dict.fromkeys(self.names, whole)
        borders, seen, given = {}, 0, 0
        for name in self.names:
            tied = sum(int((keys == whole.key).sum()) for keys in self._keys([name]))
            seen += tied
            due = whole.take * seen // whole.tied
            borders[name] = Border(whole.key, due - given, tied)
            given = due
        return borders


def _ordered(values: Tensor, name: str) -> Tensor:
    """Whole numbers in the same order as the values, which are float32 or float64.

    The bits of a float, read as a whole number, rise with its size; NaN lies beyond infinity.
    """
    whole = torch.int32 if values.dtype == torch.float32 else torch.int64
    keys = values.contiguous().view(whole)
    if not len(keys):
        return keys
    least, most = (int(end) for end in keys.aminmax())
    if least < 0:  # with values below zero, or -0
        keys = (values + 0.0).view(whole)  # -0 becomes 0
        keys = torch.where(keys < 0, keys ^ torch.iinfo(whole).max, keys)
        least = int(keys.amin())
    infinity = int(torch.tensor(torch.inf, dtype=values.dtype).view(whole))
    if most > infinity or least < -infinity - 1:
        raise ValueError(f"The values of {name} hold NaN, which has no rank; leave them out.")
    return keys


def _border(keys: Callable[[], Iterable[Tensor]], count: int, dtype: torch.dtype) -> Border:
    """The key of the `count`-th largest, found by one pass for each digit."""
    bits = 8 * dtype.itemsize
    prefix, tied = 0, 0
    if count == 0:
        return Border(2 ** (bits - 1) - 1, 0, 0)
    for shift in range(bits - DIGIT, -1, -DIGIT):
        first = shift == bits - DIGIT
        histogram = torch.zeros(BINS, dtype=torch.long)
        for part in keys():
            part = part if first else part[(part >> (shift + DIGIT)) == prefix]
            digits = (part >> shift).add_(BINS // 2) if first else (part >> shift).bitwise_and_(BINS - 1)
            histogram += torch.bincount(digits, minlength=BINS)
        reached = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(reached, count))
        digit = BINS - 1 - place
        tied = int(histogram[digit])
        count -= int(reached[place]) - tied
        prefix = digit - BINS // 2 if first else (prefix << DIGIT) | digit
    return Border(prefix, count, tied)
