"""Checks of chapter 08: stored bits, rounding to one bit, the joint FI of rows, rows worth keeping."""

from __future__ import annotations

from torch import Tensor

from fichapters.exercises import Wrong, choice, equal, exercise, off, positions, tensor
from fihelpers.perturb.quantize import Scheme, quantization_error

SIXTEEN = 16  # bits of a scale, and of a kept weight


@exercise
def stored_bits(answer: object, bits: int, row: int, kept: float) -> str:
    """Stored bits a weight: codes, a 16-bit scale for a row of `row` weights, a share `kept` in 16 bits."""
    rounded = bits + SIXTEEN / row
    slips = {
        "The scales are stored, too: one of 16 bits for each rounded row.": (1 - kept) * bits
        + kept * SIXTEEN,
        "The kept rows are stored instead of their codes, not beside them.": rounded + kept * SIXTEEN,
        "That is without the kept rows, which have 16 bits a weight.": rounded,
        "That is the price of the codes alone.": float(bits),
    }
    equal(answer, (1 - kept) * rounded + kept * SIXTEEN, slips, hint="Average over rounded and kept rows.")
    return "Compare that with one more bit for everything before you call a protection small."


@exercise
def one_bit(answer: object, row: Tensor) -> str:
    """The rounding errors (new minus old) of a row of weights at one bit, symmetric."""
    found = tensor(answer, row.shape)
    truth = quantization_error(row[None].float(), Scheme(1))[0].double()
    if not off(found, truth):
        return (
            "Weights near plus or minus the mean magnitude hardly move. The others move by a good part of "
            "themselves, small ones by more than their size."
        )
    if not off(found, -truth):
        raise Wrong("That is old minus new; the displacement is new minus old.")
    if not off(found, truth + row):
        raise Wrong("These are the rounded weights. How far did each of them move?")
    if not off(found, row.sign() * row.abs().max() - row):
        raise Wrong("The rungs are plus and minus the *mean* magnitude, not the largest.")
    raise Wrong(f"{off(found, truth)} of the errors are off. There are two rungs for the row.")


@exercise
def what_joint_says(answer: object) -> str:
    """What the exact joint FI of whole rows tells about which row to keep."""
    choice(
        answer,
        "nothing",
        {
            "the sensitive rows": "Count first: how many directions do four answers have, how many a row?",
            "the long rows": "Two rows of different length get the same value here; it is not the length.",
            "the large weights": "FI is made of gradients alone; no weight enters it.",
        },
    )
    return (
        "A row has more dimensions than four answers can move in, so every row stands at the ceiling. "
        "The sum of its weights' own FI does rank; what it ranks by is another question."
    )


@exercise
def worth_keeping(answer: object, W: Tensor, X: Tensor, bits: int, count: int) -> str:
    """The `count` rows of W whose keeping in 16 bits saves most of the squared error of the outputs on X.

    W: (outputs, inputs); X: (examples, inputs).
    """
    chosen = positions(answer, count, len(W))
    delta = quantization_error(W.float(), Scheme(bits)).to(X.dtype)
    saved = (X @ delta.T).square().sum(0)
    best = float(saved.topk(count).values.sum())
    reached = float(saved[chosen].sum()) / best
    if reached < 1 - 1e-6:
        blind = {
            "the largest weights": W.abs().sum(1),
            "the largest outputs": (X @ W.T.to(X.dtype)).abs().mean(0),
            "the largest rounding errors": delta.square().sum(1),
        }
        for name, scores in blind.items():
            if set(chosen) == set(scores.topk(count).indices.tolist()):
                raise Wrong(
                    f"Keeping {name} saves {reached:.0%} of what can be saved. What do the inputs see?"
                )
        raise Wrong(f"These rows save {reached:.0%} of what can be saved.")
    return (
        "An error counts as far as inputs run through it. This needs no gradient; what it does not know is "
        "whether the answer depends on that output."
    )
