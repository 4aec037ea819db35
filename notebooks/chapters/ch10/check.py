"""Checks of chapter 10: passes counted, what fits on a device, what limits the time, FI of a black box."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fichapters.exercises import Wrong, equal, exercise, tensor, whole
from fihelpers import influence
from fihelpers.filters import Exact

BILLION = 1e9


@exercise
def passes(of_weights: object, of_pixels: object, classes: int) -> str:
    """What FI of all weights and FI of all pixels cost, in forward passes' worth of operations."""
    skipped = classes - 1
    right = {"`of_weights`": 1 + 2 * skipped, "`of_pixels`": 1 + skipped}
    for (name, truth), answer in zip(right.items(), (of_weights, of_pixels), strict=True):
        value = whole(answer, name)
        if value == truth:
            continue
        if value == truth + (2 if name == "`of_weights`" else 1):
            raise Wrong(f"{name} has a class too many: the gradients of one class follow from the others.")
        if value == truth - 1:
            raise Wrong(f"{name} lacks a pass: before a gradient is pulled back there is a forward pass.")
        raise Wrong(
            f"{name} is {value}. Count a forward pass, and for each class that is asked one pass back to the "
            "inputs; for weights as much again, to form their gradients."
        )
    return "For weights the price of one more class is two passes, for pixels one."


@exercise
def largest_model(answer: object, gigabytes: float, weight_bytes: int, score_bytes: int) -> str:
    """How many billion weights fit on a device beside one score each."""
    truth = gigabytes / (weight_bytes + score_bytes)
    slips = {
        "That leaves no room for the scores.": gigabytes / weight_bytes,
        "That leaves no room for the weights.": gigabytes / score_bytes,
        "The class gradients are combined on the spot; what stays is one score a weight.": gigabytes
        / (weight_bytes + 3 * score_bytes),
        "Give it in billions of weights.": truth * BILLION,
    }
    equal(answer, truth, slips, hint="Each weight takes its own bytes and those of its score.")
    return "The rest of the memory, activations and blocks at work, is small beside these two."


@exercise
def fewest_tokens(answer: object, rate: float, bandwidth: float, classes: int) -> str:
    """From how many tokens on FI's products take longer than reading and writing the float32 result."""
    moved = 8 / bandwidth  # seconds a weight: 4 bytes read, 4 written
    a_token = 2 * (2 * classes - 1) / rate
    truth = moved / a_token
    slips = {
        "The result is read *and* written.": truth / 2,
        "That counts a forward pass only; FI takes more of them.": truth * (2 * classes - 1),
        "One multiplication and one addition are two operations.": truth * 2,
        "That passes back every class; one of them is free.": moved / (2 * (2 * classes + 1) / rate),
    }
    equal(answer, truth, slips, hint="Set the time of a weight's operations equal to that of its bytes.")
    return "Shorter prompts should share one reading and writing of the result: that is what a batch is for."


Ask = Callable[[Sequence[float]], Tensor]


def black_box() -> Ask:
    """A model of which one sees four log-probabilities, for two numbers that can be moved. In float32."""
    generator = torch.Generator().manual_seed(10)
    pull = torch.randn(4, 2, generator=generator)
    bend = torch.randn(4, 2, generator=generator) / 2
    start = torch.tensor([1.5, 0.4, 0.0, -0.6])

    def ask(moved: Sequence[float]) -> Tensor:
        by = torch.as_tensor(moved, dtype=torch.float32)
        return (start + pull @ by + bend @ by**2).log_softmax(0)

    return ask


@exercise
def without_gradients(answer: object, ask: Ask) -> str:
    """Exact FI of each of two directions by itself, from log-probabilities alone."""
    values = tensor(answer, (2,))
    log_p = ask([0.0, 0.0])
    slopes = torch.autograd.functional.jacobian(ask, torch.zeros(2)).double()
    probs = log_p.exp().double()
    truth = influence.fi(slopes, probs, over=(), spectral=Exact())
    if torch.allclose(values, truth, rtol=0.02, atol=0):
        return "Nothing but answers was asked for: two for each direction, whatever the number of classes."
    squares = slopes[int(probs.argmax())] ** 2
    if torch.allclose(values, squares, rtol=0.02, atol=0):
        raise Wrong("These are the squared slopes of the predicted class. Divide each by its metric.")
    if (values < 0).any():
        raise Wrong("FI is a square over a sum of squares, so it cannot be below zero.")
    if (values > float(influence.ceiling(probs)) * 1.02).any():
        raise Wrong("That exceeds the ceiling, the odds against the answer: look at the step.")
    if torch.allclose(values, truth, rtol=0.3, atol=0):
        raise Wrong("Near, but not there: one step is too coarse, another drowns in the rounding of float32.")
    raise Wrong(
        "Move one number up and down by the same step, take half the difference of all log-probabilities "
        "over the step, and put these slopes into the formula for one dimension."
    )
