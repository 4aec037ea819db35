"""Checks of chapter 09: where methods meet, what is put back, stage II by hand, a fair gain, B's price."""

from __future__ import annotations

import torch
from torch import Tensor

from fichapters.exercises import Wrong, choice, equal, exercise, off, positions, tensor

GOOD = 0.999  # of what is possible


@exercise
def same_as_average(answer: object, base: float, a: float, b: float) -> str:
    """The task weight at which task arithmetic gives the average of two models."""
    slips = {
        "With that weight each displacement is taken whole: the sum, not the mean.": 1.0,
        "That weight leaves half of the mean.": 0.25,
        "That is the merged weight itself; which task weight leads to it?": (a + b) / 2,
    }
    hint = "Write the average as the base plus something times the sum of the displacements."
    equal(answer, 0.5, slips, hint=hint)
    return (
        "The average is one point on the line that task arithmetic searches, so a tuned task weight can only "
        "do better on the questions it was tuned on. Protection has to beat the *tuned* merge."
    )


@exercise
def stage_two(
    answer: object, merged: Tensor, delta_a: Tensor, delta_b: Tensor, theta_a: Tensor, theta_b: Tensor
) -> str:
    """TIES protected in its second stage: where one expert alone protects, its whole entry wins.

    merged: TIES without protection. theta_a, theta_b: masks of what each expert protects.
    """
    found = tensor(answer, delta_a.shape)
    truth = torch.where(theta_a & ~theta_b, delta_a, torch.where(theta_b & ~theta_a, delta_b, merged))
    if not off(found, truth):
        return "What one expert alone protects is its own again, however small; the rest is as elected."
    if not off(found, merged):
        raise Wrong("That is the merge without protection.")
    if not off(found, torch.where(theta_a, delta_a, torch.where(theta_b, delta_b, merged))):
        raise Wrong("Where both protect a weight, neither wins: there the election stands.")
    raise Wrong(f"{off(found, truth)} entries are off. Look first at who protects alone.")


@exercise
def put_back(answer: object, share: float, common: float) -> str:
    """The share of all weights that protection puts back, where each expert protects `share` of its own.

    common: the share of one expert's protected weights that the other protects, too.
    """
    slips = {
        "Weights that both protect stay merged: neither can have its way.": 2 * share,
        "B's weights are put back, too.": share * (1 - common),
        "That counts a common weight once. It is put back by neither.": share * (2 - common),
        "That is the share that both protect.": share * common,
    }
    equal(answer, 2 * share * (1 - common), slips, hint="Count what exactly one of the two protects.")
    return (
        "Two scores with much in common put little back. Compare choices at the same number of weights put "
        "back, or say that they differ."
    )


@exercise
def which_control(answer: object) -> str:
    """What to compare with, when protection by FI beats the plain average."""
    choice(
        answer,
        "random protection of the same size",
        {
            "the base model": "The base tells what merging brings, not what the choice of weights brings.",
            "the expert alone": "The expert is the upper end; any protection moves the merge towards it.",
            "another seed of the questions": "That tells how sure the gain is, and not whose gain it is.",
        },
    )
    return "Keeping any tenth of an expert moves the merge towards it. Only what is beyond chance is FI's."


@exercise
def fair_to_both(answer: object, delta: Tensor, needs_a: Tensor, needs_b: Tensor, count: int) -> str:
    """`count` weights of A whose keeping lowers the sum of both losses most, against the plain average.

    delta: A's weights minus B's. The loss of a model is half the sum of needs times squared distance from
    its own expert.
    """
    chosen = positions(answer, count, len(delta))
    gain_a, price_b = needs_a * delta.square() / 8, 3 * needs_b * delta.square() / 8
    gain = gain_a - price_b
    best, reached = float(gain.topk(count).values.sum()), float(gain[chosen].sum())
    if reached < GOOD * best:
        if set(chosen) == set(gain_a.topk(count).indices.tolist()):
            raise Wrong(
                f"For A alone these are the best; for both they bring {reached / best:.0%} of what can be "
                "had. B's loss rises, and by more than the average cost it."
            )
        raise Wrong(f"These bring {reached / best:.0%} of what can be had. A negative share is a loss.")
    return (
        f"{int((gain > 0).sum())} of {len(delta)} weights are worth keeping for both. Moving one from "
        "the middle to A takes it twice as far from B, and the loss goes with the square: A must need it "
        "three times as much."
    )
