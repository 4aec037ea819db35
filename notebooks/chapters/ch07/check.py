"""Checks of chapter 07: who competes with whom, ROUGE-1, pruning scores, a dispensable weight, pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fichapters.ch07.judges import rouge1
from fichapters.exercises import Wrong, equal, exercise, number, tensor, whole
from fihelpers import influence
from fihelpers.evaluate.questions import Evaluator
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import linear_names, select, zeroed
from fihelpers.tasks import Example

HARMLESS = 1e-3  # nats
KEPT = 0.9  # of the right answers of the intact model


@exercise
def competitors(
    over_all: object, in_each: object, scores: Mapping[str, Tensor], share: float, name: str
) -> str:
    """How many weights of the matrix `name` are in the top share of all, and of each matrix's own."""
    counts = {scope: len(select(scores, share, scope=scope)[name]) for scope in ("global", "layer")}
    for label, answer, scope in (("`over_all`", over_all, "global"), ("`in_each`", in_each, "layer")):
        count = whole(answer, label)
        if count != counts[scope]:
            other = "of all weights together" if scope == "global" else "of this matrix alone"
            raise Wrong(
                f"{label} is {count}. Take the top {share:.0%} {other}, then count those in {name!r}."
            )
    return "Over all weights, a matrix with large scores gives most; with a share of its own, as much as any."


@exercise
def words_shared(answer: object, text: str, reference: str) -> str:
    """ROUGE-1 of two texts whose words are in lower case and without punctuation (Lin 2004)."""
    words, others = text.split(), reference.split()
    common = sum(min(words.count(w), others.count(w)) for w in set(words))
    together = len(set(words) | set(others))
    slips = {
        "That is the precision: the share of the text's words that the reference has, too.": common
        / len(words),
        "That is the recall: the share of the reference's words that are found.": common / len(others),
        "That is the share of all different words that both have.": len(set(words) & set(others)) / together,
        "That is the number of common words.": float(common),
    }
    hint = (
        "It is 2 × common / (words of one + words of the other), and a word counts as often as both have it."
    )
    equal(answer, float(rouge1([text], [reference])[0]), slips, hint=hint)
    return "Most of it is small words. Before you read a ROUGE-1, ask what two unrelated texts would get."


@exercise
def first_to_go(by_magnitude: object, by_wanda: object, W: Tensor, norms: Tensor) -> str:
    """The (row, column) of the weight that magnitude and Wanda, |W_ij| times |X_j|, remove first."""
    for name, answer, scores in (
        ("`by_magnitude`", by_magnitude, W.abs()),
        ("`by_wanda`", by_wanda, W.abs() * norms),
    ):
        row, column = (int(i) for i in tensor(answer, (2,), name).round())
        if not (0 <= row < W.shape[0] and 0 <= column < W.shape[1]):
            raise Wrong(
                f"{name} should be (row, column), counted from 0, of a matrix of shape {tuple(W.shape)}."
            )
        if scores[row, column] == scores.max():
            raise Wrong(f"{name} has the highest score: pruning removes the lowest.")
        if scores[row, column] > scores.min():
            raise Wrong(
                f"By the score of {name} {int((scores < scores[row, column]).sum())} weights are lower."
            )
    return "A small weight may multiply a large input. Neither of the two asks what the answer makes of it."


@exercise
def dispensable(theta: object, others: object, P: Tensor) -> str:
    """A weight of high exact FI that hardly changes the answer when it is zeroed.

    others: its class gradients for the classes other than the predicted one, shape (K-1,).
    """
    value = number(theta, "`theta`")
    if value == 0:
        raise Wrong("A weight that is zero already cannot be removed; let it have a small value.")
    rows = tensor(others, (len(P) - 1,), "`others`")
    m = influence.moments(torch.cat([torch.zeros(1, dtype=rows.dtype), rows]), P)
    if m.metric == 0:
        raise Wrong("With all class gradients zero there is no FI. Let the answer depend on the weight.")
    share, change = float(influence.fi_of_moments(m) / m.ceiling), abs(float(m.score) * value)
    if share < 0.5:
        raise Wrong(
            f"Its FI is {share:.0%} of the ceiling; it should be half of it or more. Let all others lose."
        )
    if change > HARMLESS:
        raise Wrong(
            f"Zeroing it changes log P by about {change:.2g} nats. FI does not look at the weight itself."
        )
    return (
        f"FI stands at {share:.0%} of its ceiling, and zeroing the weight costs about {change:.1g} nats. "
        "So exact FI is no pruning score, and its highest weights need not be missed."
    )


@exercise
def prune(answer: object, model: LanguageModel, asked: Sequence[Example], shares: Sequence[float]) -> str:
    """The largest share of each matrix's smallest weights that leaves nine of ten right answers."""
    sizes = {n: model.network.get_parameter(n).detach().abs() for n in linear_names(model.network)}
    value = number(answer)
    if value not in shares:
        raise Wrong(f"Choose one of the shares {', '.join(map(str, shares))}.")
    ask = Evaluator(model, asked)
    intact, right = int(ask().correct.sum()), {}
    for share in shares:
        with zeroed(model, select(sizes, share, "bottom", scope="layer")):
            right[share] = int(ask().correct.sum())
    enough = [share for share, count in right.items() if count >= KEPT * intact]
    if right[value] < KEPT * intact:
        raise Wrong(
            f"That leaves {right[value]} right answers of {intact}: less than nine in ten. Remove less."
        )
    if value < max(enough):
        raise Wrong(f"That leaves {right[value]} of {intact}. A larger share keeps enough, too.")
    shown = ", ".join(f"{share:g}: {count}" for share, count in right.items())
    return (
        f"Right answers by share, of {intact} intact: {shown}. With {len(asked)} questions the intervals "
        "are wide; the chapter asks more of them, and pairs them."
    )
