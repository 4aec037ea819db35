"""What the checks of all chapters share: verdicts, and readers of answers that say what is wrong with them.

A check computes the truth from what was given, so that a reader may change the given numbers and go on. It
knows the usual slips by their values. What it says about a wrong answer is a hint and never the solution.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec

import numpy as np
import torch
from torch import Tensor

NOT_YET = "Not yet: put your answer in place of the dots, and run the cell again."
RTOL = 0.005  # an answer typed with three digits is right
WIDTH = 96  # characters a line of a message on a terminal

Arguments = ParamSpec("Arguments")
Slips = Mapping[str, float]  # a hint, and the value that shows that it is needed


@dataclass(frozen=True, repr=False)
class Verdict:
    """Whether an answer is right, and what to say about it (in markdown); a notebook shows the message."""

    solved: bool
    message: str

    def __repr__(self) -> str:
        return textwrap.fill(self.message, WIDTH)

    def _repr_markdown_(self) -> str:
        return re.sub(r"^[\w ]+[.:]", r"**\g<0>**", self.message)


class Wrong(Exception):
    """An answer is wrong; the text is a hint."""


def exercise(check: Callable[Arguments, str]) -> Callable[Arguments, Verdict]:
    """Make a check of a function that returns what to remember, or raises :class:`Wrong` with a hint.

    An answer that still holds the dots (or None) is not looked at.
    """

    @functools.wraps(check)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Verdict:
        if any(_unfilled(answer) for answer in args):
            return Verdict(False, NOT_YET)
        try:
            return Verdict(True, f"Solved. {check(*args, **kwargs)}")
        except Wrong as wrong:
            return Verdict(False, f"Not quite. {wrong}")

    return checked


def number(answer: object, name: str = "Your answer") -> float:
    """Read one finite number, also a tensor or array of one element."""
    if isinstance(answer, Tensor | np.ndarray):
        if answer.size != 1 if isinstance(answer, np.ndarray) else answer.numel() != 1:
            raise Wrong(f"{name} holds {len(answer)} rows; one number is asked for.")
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, int | float | np.number):
        raise Wrong(f"{name} should be a number, not of the type {type(answer).__name__}.")
    value = float(answer)
    if not math.isfinite(value):
        raise Wrong(f"{name} is {value}; a finite number is asked for.")
    return value


def whole(answer: object, name: str = "Your answer") -> int:
    """Read one whole number."""
    value = number(answer, name)
    if value != round(value):
        raise Wrong(f"{name} counts something, so it should be a whole number.")
    return round(value)


def tensor(answer: object, shape: Sequence[int], name: str = "Your answer") -> Tensor:
    """Read finite numbers of one shape, also from nested lists or an array, as float64."""
    try:
        values = torch.as_tensor(answer).to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{name} should be numbers of shape {tuple(shape)}: a list or a tensor.") from None
    if values.shape != tuple(shape):
        raise Wrong(f"{name} has the shape {tuple(values.shape)}; {tuple(shape)} is asked for.")
    if not torch.isfinite(values).all():
        raise Wrong(f"{name} holds NaN or infinity.")
    return values


def positions(answer: object, count: int, size: int) -> list[int]:
    """Read `count` different positions, counted from 0, among `size`."""
    values = tensor(answer, (count,))
    found = [int(value) for value in values]
    if not torch.equal(values, values.round()) or min(found) < 0 or max(found) >= size:
        raise Wrong(f"Give {count} positions, counted from 0 and below {size}.")
    if len(set(found)) < count:
        raise Wrong("A position is named twice.")
    return found


def off(found: Tensor, truth: Tensor) -> int:
    """How many entries differ from the truth by more than a share RTOL of its largest."""
    return int(((found - truth).abs() > RTOL * truth.abs().max()).sum())


def equal(answer: object, truth: float, slips: Slips, *, name: str = "Your answer", hint: str = "") -> None:
    """Compare a number with the truth; a slip's value brings its hint, others whether they are too large."""
    value = number(answer, name)
    if _near(value, truth):
        return
    for text, slip in slips.items():
        if _near(value, slip) and not _near(slip, truth):
            raise Wrong(text)
    if _near(value, 100 * truth):
        raise Wrong(f"{name} looks like a percentage; give a share between 0 and 1.")
    if value * truth < 0:
        raise Wrong(f"{name} has the wrong sign. {hint}".strip())
    raise Wrong(f"{name} is too {'large' if value > truth else 'small'}. {hint}".strip())


def choice(answer: object, right: str, others: Mapping[str, str]) -> None:
    """Compare one of several words with the right one; `others` says of each other word why it is wrong."""
    offered = sorted([right, *others])
    if not isinstance(answer, str) or answer not in offered:
        raise Wrong(f"Choose one of {', '.join(map(repr, offered))}.")
    if answer != right:
        raise Wrong(others[answer])


def names(answer: object, offered: Sequence[str], name: str = "Your answer") -> list[str]:
    """Read some of the offered names, each at most once, from a list, a tuple or a set."""
    if isinstance(answer, str) or not isinstance(answer, list | tuple | set | frozenset):
        raise Wrong(f"{name} should be a list of some of {', '.join(map(repr, offered))}.")
    unknown = [item for item in answer if item not in offered]
    if unknown:
        raise Wrong(f"{unknown[0]!r} is none of {', '.join(map(repr, offered))}.")
    if len(set(answer)) < len(answer):
        raise Wrong(f"{name} names something twice.")
    return list(answer)


def distribution(answer: object, size: int, name: str) -> Tensor:
    """Read probabilities of `size` classes: above zero, with the sum one."""
    values = tensor(answer, (size,), name)
    if (values <= 0).any():
        raise Wrong(f"{name} holds a probability that is not above zero.")
    if not _near(float(values.sum()), 1):
        raise Wrong(f"{name} sums to {values.sum():.3f}; probabilities of all classes sum to one.")
    return values / values.sum()


def _near(value: float, truth: float) -> bool:
    return math.isclose(value, truth, rel_tol=RTOL, abs_tol=1e-12)


def _unfilled(answer: object) -> bool:
    if isinstance(answer, Mapping):
        return any(_unfilled(part) for part in answer.values())
    if isinstance(answer, list | tuple | set | frozenset):
        return any(_unfilled(part) for part in answer)
    return answer is ... or answer is None
