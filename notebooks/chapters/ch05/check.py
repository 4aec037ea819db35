"""Checks of chapter 05: odds, corrected intervals, means of ratios, controls, and the slope."""

from __future__ import annotations

from torch import Tensor

from fichapters.exercises import Wrong, choice, equal, exercise, number, tensor


@exercise
def odds_factor(answer: object, before: float, after: float) -> str:
    """The factor of every saturated pixel's exact FI when P(y_hat) goes from `before` to `after`."""
    old, new = (1 - before) / before, (1 - after) / after
    slips = {
        "That is the ratio of the probabilities; FI follows the odds against the answer.": after / before,
        "You divided the other way round: the factor takes the old FI to the new one.": old / new,
        "That is the ratio of what the other answers have; odds divide it by P.": (1 - after) / (1 - before),
        "Those are the new odds; how do they compare with the old ones?": new,
        "That is the difference of the odds; a factor is a ratio.": new - old,
    }
    equal(answer, new / old, slips, hint="At the ceiling FI is the odds against the predicted answer.")
    return "The whole map changed by one factor, and nothing about pixels had to change for it."


@exercise
def bonferroni(level: object, by_chance: object, comparisons: int, family: float) -> str:
    """The level of each interval, and how many plain ones miss by chance if there is no effect at all."""
    missed = 1 - family
    value = number(level, "`level`")
    if abs(value - family ** (1 / comparisons)) < 1e-6:
        raise Wrong(
            "That is Šidák's level, for independent comparisons. Bonferroni's needs no such assumption."
        )
    slips = {
        "That is what each interval may miss; its level is one minus that.": missed / comparisons,
        "That is how likely all of them hold without any correction.": family**comparisons,
    }
    truth = 1 - missed / comparisons
    hint = "All intervals together may miss as often as one plain interval; share that out."
    if abs(value - truth) > 0.02 * (1 - truth):  # levels are all near one, so what they miss is compared
        missing = {text: 1 - slip for text, slip in slips.items()}
        equal(1 - value, 1 - truth, missing, name="What `level` misses", hint=hint)
    slips = {
        "That many hold; how many do not?": comparisons * family,
        "That is the share for one interval.": missed,
        "That is the chance of at least one; what is asked for is how many to expect.": 1
        - family**comparisons,
    }
    hint = "Each one misses with the same chance."
    equal(by_chance, comparisons * missed, slips, name="`by_chance`", hint=hint)
    return "Many plain intervals always bring finds. Correct them, or say how many chance would bring."


@exercise
def mean_of_ratios(ratios: object) -> str:
    """Four ratios with an arithmetic mean above one and a geometric mean below one."""
    values = tensor(ratios, (4,), "`ratios`")
    if (values <= 0).any():
        raise Wrong("A ratio of two FIs is above zero.")
    plain, logs = float(values.mean()), float(values.log().mean().exp())
    if plain <= 1:
        raise Wrong(f"The plain mean is {plain:.2f}; one large rise would lift it above one.")
    if logs >= 1:
        raise Wrong(f"The mean of the logarithms gives a factor of {logs:.2f}; let more pictures fall.")
    return (
        f"The plain mean says FI rose ({plain:.2f} times), the logarithms say it fell ({logs:.2f} "
        "times). A halving and a doubling cancel only in the logarithm, so the chapter averages "
        "logarithms."
    )


@exercise
def controlled(answer: object) -> str:
    """Which conclusion the controls of the exercise leave standing."""
    others = {
        "the model understands the instruction": "Then its words backwards, which say nothing, should "
        "do less.",
        "any sentence does it": "Look at the unrelated sentence: does its interval contain one?",
        "instructions have no effect": "Does the interval of the safe wording contain one?",
    }
    choice(answer, "these words do it, whatever their order", others)
    return (
        "What words mean depends on their order; an effect that survives the wrong order is not the "
        "meaning's."
    )


@exercise
def slope_and_metric(
    metric_factor: object, slope_factor: object, g: Tensor, unsure: Tensor, sure: Tensor
) -> str:
    """How G and the slope 2 tr G / (1 - sum P²) of one grey value change from `unsure` to `sure` (p = 1)."""
    G = [float((P * g**2).sum() - (P * g).sum() ** 2) for P in (unsure, sure)]
    slope = [2 * m / (1 - float((P**2).sum())) for m, P in zip(G, (unsure, sure), strict=True)]
    raw = [float((P * g**2).sum()) for P in (unsure, sure)]
    slips = {
        "You divided the other way round: sure over unsure.": G[0] / G[1],
        "g is the gradient of the logits. The class gradients are s_y = g_y - Σ P(y) g_y.": raw[1] / raw[0],
        "That is the new G; compare it with the old one.": G[1],
    }
    equal(metric_factor, G[1] / G[0], slips, name="`metric_factor`", hint="G is the variance of g under P.")
    slips = {
        "You divided the slopes the other way round: sure over unsure.": slope[0] / slope[1],
        "That is the factor of G again; divide each G by its 1 - Σ P².": G[1] / G[0],
        "That is the new slope; compare it with the old one.": slope[1],
    }
    hint = "It is 2 G / (1 - Σ P²) twice."
    equal(slope_factor, slope[1] / slope[0], slips, name="`slope_factor`", hint=hint)
    return (
        "The logits answer to the pixel exactly as before. G fell because the model is surer; the slope "
        "moved far less, and only because it weighs pairs of answers by their probabilities."
    )
