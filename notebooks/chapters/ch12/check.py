"""Checks of chapter 12: verdicts from many settings, chance, and how many questions a small effect needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from fichapters.claims import FAILS, HOLDS, IN_PART, OPEN
from fichapters.exercises import Wrong, choice, equal, exercise, whole


@exercise
def headline(answer: object, counts: Mapping[str, Sequence[int]]) -> str:
    """The verdict by the rule on a claim of one part; counts: {filter: (holds, fails, undecided)}."""
    holds, fails, undecided = (sum(found[i] for found in counts.values()) for i in range(3))
    if not fails + undecided:
        truth = HOLDS
    elif any(found[0] > sum(found) / 2 for found in counts.values()):
        truth = IN_PART
    else:
        truth = FAILS if fails > (holds + fails + undecided) / 2 else OPEN
    told = {
        HOLDS: "A claim holds where every setting does. Is there none that does not?",
        IN_PART: "Is there a filter with more than half of its settings on the claim's side?",
        FAILS: "Look at each filter by itself first, and remember that an undecided setting says nothing "
        "against the claim.",
        OPEN: "Undecided is what is left over. Look at each filter by itself first.",
    }
    choice(answer, truth, {name: hint for name, hint in told.items() if name != truth})
    return "The counts say more than the headline; read them before you quote it."


@exercise
def by_chance(answer: object, settings: int, level: float) -> str:
    """How many settings hold by chance, on average, where there is no effect at all."""
    truth = settings * (1 - level) / 2
    slips = {
        "Half of the intervals that miss zero lie on the other side, against the claim.": settings
        * (1 - level),
        "That is how many intervals do hold zero.": settings * level,
    }
    equal(answer, truth, slips, hint="Which share of such intervals lies wholly on one side of zero?")
    return (
        "And they are not spread evenly: settings that share their questions go wrong together. A few "
        "settings that hold among hundreds are no finding."
    )


@exercise
def questions_needed(answer: object, asked: int, half_width: float, effect: float) -> str:
    """Questions for which an interval around `effect` would just exclude zero."""
    truth = math.ceil(asked * (half_width / effect) ** 2)
    slips = {
        "An interval shrinks with the root of the number of questions.": asked * half_width / effect,
        "Turn the ratio of the widths over: more questions are needed, not fewer.": asked
        * (effect / half_width) ** 2,
    }
    equal(answer, truth, slips, hint="By which factor must the interval shrink, and what does that take?")
    return "Undecided often means: asked too few. The published effects of a point or two are of this kind."


@exercise
def still_hold(answer: object, intervals: Sequence[tuple[float, float]], level: float) -> str:
    """How many of the settings' intervals lie above zero once widened for their number (Bonferroni)."""
    normal = NormalDist()
    wider = normal.inv_cdf(1 - (1 - level) / (2 * len(intervals))) / normal.inv_cdf(1 - (1 - level) / 2)
    kept = sum((low + high) / 2 - wider * (high - low) / 2 > 0 for low, high in intervals)
    plain = sum(low > 0 for low, _ in intervals)
    found = whole(answer)
    if found == plain:
        raise Wrong("That many hold before the correction. Widen each interval about its middle first.")
    if found != kept:
        hint = "too many" if found > kept else "too few"
        raise Wrong(
            f"That is {hint}. The half width grows by the ratio of two quantiles of the normal curve."
        )
    return (
        "What is left after the correction can be believed together. Chapter 05 draws its intervals so from "
        "the start."
    )
