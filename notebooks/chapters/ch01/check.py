"""Checks of chapter 01: probabilities of classes, intervals, what accuracy does not see, and zeroing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fichapters.exercises import Wrong, distribution, equal, exercise, whole
from fihelpers.evaluate.questions import Evaluator
from fihelpers.evaluate.stats import wilson
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import linear_names, select, zeroed
from fihelpers.tasks import Example


@exercise
def probability_of_b(answer: object, raw: Mapping[str, float]) -> str:
    """P of the class B, renormalised over the classes of `raw` (method 1)."""
    total = sum(raw.values())
    slips = {
        "That is B's share of all tokens. What other words receive has to be left out first.": raw["B"],
        "That is what the four letters receive together; what is B's part of it?": total,
        "That is the chance of any other letter.": 1 - raw["B"] / total,
    }
    equal(answer, raw["B"] / total, slips, hint="The four classes have to sum to one.")
    return "The classes are a choice: FI is about how these four move, whatever the other tokens do."


@exercise
def times_wider(answer: object, small: tuple[int, int], large: tuple[int, int]) -> str:
    """Width of Wilson's interval of `small` (right answers, questions) over that of `large`."""
    few, many = (high - low for low, high in (wilson(*small), wilson(*large)))
    slips = {
        "You divided the other way round: the wider interval comes first.": many / few,
        "That is how many times more questions there are. Does the width shrink as fast?": large[1]
        / small[1],
        "That is the root of the ratio of the questions, a good rule for many questions; "
        "ask `wilson` itself.": (large[1] / small[1]) ** 0.5,
    }
    equal(answer, few / many, slips, hint="The width is the upper end minus the lower end.")
    return "The same share can be nearly certain or hardly known; ten questions say little."


@exercise
def unseen_damage(before: object, after: object) -> str:
    """Two distributions, the right answer first: its probability at least halves, and stays the largest."""
    old, new = (distribution(p, 4, name) for p, name in ((before, "`before`"), (after, "`after`")))
    if old.argmax() != 0:
        raise Wrong("Before the damage the right answer, the first, should be the likeliest.")
    if new.argmax() != 0 or new[0] == new[1:].max():
        raise Wrong("Afterwards another answer is at least as likely as the first: accuracy notices that.")
    if new[0] > old[0] / 2:
        raise Wrong(
            f"The right answer keeps {new[0] / old[0]:.0%} of its probability; let it lose half or more. "
            "How small may the likeliest of four be?"
        )
    return f"log P of the right answer fell by {(old[0] / new[0]).log():.2f} nats, and accuracy did not move."


@exercise
def largest_weights(answer: object, model: LanguageModel, asked: Sequence[Example], share: float) -> str:
    """Right answers to `asked` with the largest `share` of all linear weights zeroed, by absolute value."""
    count = whole(answer)
    if not 0 <= count <= len(asked):
        raise Wrong(f"Count the right answers among the {len(asked)} questions, as a whole number.")
    sizes = {n: model.network.get_parameter(n).detach().abs() for n in linear_names(model.network)}
    ask = Evaluator(model, asked)
    counts = {"intact": int(ask().correct.sum())}
    for which in ("top", "random", "bottom"):
        with zeroed(model, select(sizes, share, which)):
            counts[which] = int(ask().correct.sum())
    if abs(count - counts["top"]) > 1:  # another machine may round one question over the border
        if count in (counts["intact"], counts["bottom"]):
            raise Wrong(
                "So many are right with the intact model, too. Ask within `with zeroed(...)`, and zero "
                "the *top* share."
            )
        raise Wrong("Ask again within `with zeroed(small_model, select(...))`, and choose by `sizes`.")
    return (
        f"{count} of {len(asked)} are right, against {counts['random']} with as many random weights "
        f"zeroed and {counts['intact']} intact. Size alone, without any gradient, is a baseline that FI "
        "has to beat."
    )
