"""What the chapters' recorded numbers say about the claims: one rule a number, judged by its interval.

Chapters 04, 06 and 08 judge most of their claims from whole tables; their rules here are the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from fichapters.results import Chapter, Record

COLUMNS = ["claim", "setting", "n", "value", "low", "high", "verdict"]  # of a chapter's table "claims"
NOT_MEASURED = "not measured in this run"
MOST = 0.5  # what "most" or "works" means for a share
SKEWED = 0.1  # of the total, held by the highest hundredth: ten times an even share
BARELY = 0.05  # of the accuracy, lost or left


@dataclass(frozen=True)
class Judged:
    """What a recorded number must be for a claim to hold in one setting.

    claim: its id or ids, and its words ("6, 10: few carry it"). record: the name of the number. It has to lie
    above `above` and below `below`; a name there stands for that record's upper
    (above) or lower (below) end.
    """

    claim: str
    setting: str
    record: str
    above: float | str = -math.inf
    below: float | str = math.inf


def judge_claims(run: Chapter) -> pd.DataFrame:
    """A chapter's lines for its table of claims, by its rules below; columns as `COLUMNS`."""
    return judged(RULES[run.name], run.records)


def judged(rules: Iterable[Judged], records: Mapping[str, Record]) -> pd.DataFrame:
    """What each rule says of its record.

    A claim holds where the whole interval (without one, the value) lies within the bounds, does not hold
    where it lies outside on one side, and is undecided otherwise. What a run did not record is said to be
    missing.
    """
    lines = []
    for rule in rules:
        needed = [rule.record, *(b for b in (rule.above, rule.below) if isinstance(b, str))]
        if any(name not in records for name in needed):
            lines.append((rule.claim, rule.setting, 0, math.nan, math.nan, math.nan, NOT_MEASURED))
            continue
        found = records[rule.record]
        low, high = _ends(found)
        said = _within(low, high, _bound(rule.above, records, 1), _bound(rule.below, records, 0))
        lines.append((rule.claim, rule.setting, found.n, found.value, low, high, said))
    return pd.DataFrame(lines, columns=COLUMNS)


def _ends(record: Record) -> tuple[float, float]:
    low = record.value if record.low is None else record.low
    return low, record.value if record.high is None else record.high


def _bound(bound: float | str, records: Mapping[str, Record], end: int) -> float:
    return _ends(records[bound])[end] if isinstance(bound, str) else bound


def _within(low: float, high: float, above: float, below: float) -> str:
    if low > above and high < below:
        return "holds"
    return "does not hold" if high <= above or low >= below else "undecided"


FORM = "1: the closed form is the largest change per length"
SAME = "2: unchanged in other coordinates"
OTHERS_CHANGE = "2: other measures change"
ONLY = "2: no other measure has it"
APART = "3: FI tells two margins apart"
ALIKE = "3: other measures see no difference"
RANKS = "5: not at the ceiling"
FLAT = "O1: saturated"
BETTER = "O3: predicts the change better than exact FI"

MEASURE = [
    Judged(FORM, "K = 3, best of a grid of directions over FI exact", "ch02_search3", 0.999, 1 + 1e-9),
    Judged(FORM, "K = 5, best of a grid of directions over FI exact", "ch02_search5", 0.999, 1 + 1e-9),
    Judged(
        FORM, "a real question, FI exact, least measured over predicted", "ch02_probe_small_least", 0.9, 1.1
    ),
    Judged(
        FORM, "a real question, FI exact, most measured over predicted", "ch02_probe_small_most", 0.9, 1.1
    ),
    Judged("1: the spectral form computes it", "random cases, FI exact, wrong", "ch02_wrong_ours", below=1),
    Judged(SAME, "FI exact, six coordinate systems, largest relative change", "ch02_fi_moved", below=1e-6),
    Judged(
        OTHERS_CHANGE, "Jacobian norm, six coordinate systems, most over least", "ch02_jacobian_ratio", 1.01
    ),
    Judged(APART, "FI exact, ceilings of the paper's pair", "ch02_pair_ratio", 1.1),
    Judged(APART, "FI exact, random slopes of the logits", "ch02_margin_exact", 1.1),
    Judged(ALIKE, "Jacobian norm, the same slopes", "ch02_margin_jacobian", 0.9, 1.1),
    Judged(ALIKE, "SNIP, the same slopes", "ch02_margin_snip", 0.9, 1.1),
    Judged("4: many gradients are zeroed", "saliency, weights of one matrix", "ch02_saliency_zero", 0.25),
    Judged("O5: the formula as it stands", "pixel-like cases, single precision", "ch02_over_textbook", 0),
    Judged("O5: none in the complement", "the same cases", "ch02_over_ours", below=10),
]

LIMITS = [
    Judged(SAME, "FI exact, hidden units rescaled, change of the scores", "ch03_moved_exact", below=1e-6),
    Judged(SAME, "FI cut 0.001, hidden units rescaled", "ch03_moved_cut", below=1e-6),
    Judged(SAME, "FI damped 0.0001, hidden units rescaled", "ch03_moved_damped", below=1e-6),
    Judged(OTHERS_CHANGE, "Jacobian norm, hidden units rescaled", "ch03_moved_jacobian", 0.01),
    Judged(ONLY, "SNIP, hidden units rescaled", "ch03_moved_snip", 0.01),
    Judged(ONLY, "information length, hidden units rescaled", "ch03_moved_length", 0.01),
    Judged(ONLY, "magnitude, hidden units rescaled", "ch03_moved_magnitude", 0.01),
    Judged(RANKS, "FI exact, single weights, four letters", "ch03_at_4_early_1", below=MOST),
    Judged(RANKS, "FI exact, groups of three, four letters", "ch03_at_4_early_3", below=MOST),
    Judged(RANKS, "FI exact, groups of three, top 8 and rest", "ch03_at_9_early_3", below=MOST),
    Judged(RANKS, "FI exact, rows (channels), four letters", "ch03_at_4_early_row", below=MOST),
    Judged(RANKS, "FI exact, rows, top 8 and rest", "ch03_at_9_early_row", below=MOST),
    Judged(RANKS, "FI damped 0.0001, rows", "ch03_row_at_ceiling_damped", below=MOST),
    Judged("R2: worse than random", "FI exact minus random, log P", "ch03_damage_exact", below=0),
    Judged("R2: worse than random", "FI cut 0.001 minus random, log P", "ch03_damage_cut", below=0),
    Judged("R2: worse than random", "FI damped 0.0001 minus random, log P", "ch03_damage_damped", below=0),
    Judged(FLAT, "FI exact, two classes, single weights", "ch03_at_2_early_1", 0.99),
    Judged(FLAT, "FI exact, four letters, groups of three", "ch03_at_4_early_3", 0.99),
    Judged(FLAT, "FI exact, four letters, rows", "ch03_at_4_early_row", 0.99),
    Judged("O2: the filter leads to the Jacobian norm", "FI damped 0.0001, rank correlation",
           "ch03_like_jacobian_damped", 0.9),
    Judged("O2: the filter does the damage", "FI cut 0.001 minus FI exact, accuracy", "ch03_cut_exact",
           below=0),
    Judged("O2: the filter does the damage", "FI damped 0.0001 minus FI exact, accuracy", "ch03_damped_exact",
           below=0),
    Judged(BETTER, "single weights", "ch03_weight_length", "ch03_weight_exact"),
    Judged(BETTER, "whole rows", "ch03_row_length", "ch03_row_exact"),
    Judged("O4: above the ceiling", "the printed value and probability", "ch03_v1_times", 1),
]  # fmt: skip


def _prompts() -> list[Judged]:
    """Claim 13 for every kind of prompt, group of wordings and statistic of the main table."""
    rules = []
    for kind, side in (("aggressive", {"above": 1.0}), ("safe", {"below": 1.0})):
        claim = f"13: {kind} prompts {'raise' if kind == 'aggressive' else 'lower'} it"
        for group in ("trained", "unseen", "first"):
            for name, told in {
                "ceiling": "FI exact, all pixels alike",
                "damped_mean": "FI damped 0.0001, mean",
                "damped_max": "FI damped 0.0001, maximum",
            }.items():
                setting = f"{told}, {group} wordings"
                rules.append(Judged(claim, setting, f"ch05_{kind}_{group}_{name}", **side))
        for name, told in {"top_mean": "mean", "top_max": "maximum"}.items():
            setting = f"FI exact, top 8 and rest, {told}, first wordings"
            rules.append(Judged(claim, setting, f"ch05_{kind}_first_{name}", **side))
    return rules


PROMPTS = [
    *_prompts(),
    Judged("14: outliers remain", "FI exact, median over the ceiling", "ch05_exact_median_share", below=0.1),
    Judged("14: outliers remain", "FI damped 0.0001, pictures with outliers", "ch05_outliers", MOST),
    Judged("14: two pixels flip most answers", "FI exact", "ch05_flip_exact_2_pixels", MOST),
    Judged("14: two pixels flip most answers", "FI damped 0.0001", "ch05_flip_damped_2_pixels", MOST),
    Judged("14, R2: more flips than random", "FI damped 0.0001, two pixels", "ch05_more_pixels", 0),
    Judged("14, R2: more flips than random", "FI damped 0.0001, two patches", "ch05_more_patches", 0),
    Judged("6: skewed", "FI exact, top 8 and rest, whole pixels", "ch05_held_top", SKEWED),
    Judged("6: skewed", "FI damped 0.0001, whole pixels", "ch05_held_damped", SKEWED),
    Judged("R9: a wording moves it", "FI damped 0.0001 and the odds, wordings that do",
           "ch05_wordings_missed", 0),
    Judged("R9: closeness goes with it", "FI damped 0.0001, all pairs", "ch05_close_all", 0),
    Judged("R9: closeness goes with it", "FI damped 0.0001, within a picture", "ch05_close_wordings", 0),
    Judged("R9: closeness goes with it", "FI damped 0.0001, within a wording", "ch05_close_pictures", 0),
    Judged(FLAT, "FI exact, four letters, pixels, median over the ceiling", "ch05_exact_median_share", 0.99),
]  # fmt: skip

SPARSE = [
    Judged("6: skewed", "FI exact, weights", "ch07_held_exact", SKEWED),
    Judged("6: skewed", "FI damped 0.0001, weights", "ch07_held_damped", SKEWED),
    Judged("6, R2: the top share hurts more than random", "FI exact, one percent",
           "ch07_exact_random", below=0),
    Judged("6, R2: the top share hurts more than random", "FI damped 0.0001, one percent",
           "ch07_damped_random", below=0),
    Judged("15: one percent leaves what one letter gets", "FI exact, accuracy minus the letter's",
           "ch07_above_letter_exact", below=BARELY),
    Judged("15: one percent leaves what one letter gets", "FI damped 0.0001, accuracy minus the letter's",
           "ch07_above_letter_damped", below=BARELY),
    Judged("15: one percent ends below chance", "FI exact, accuracy against 1/K, as published",
           "ch07_exact_1", below="ch07_chance"),
    Judged("15: one percent ends below chance", "FI damped 0.0001, accuracy against 1/K, as published",
           "ch07_damped_1", below="ch07_chance"),
    Judged("15: three percent costs most of the accuracy", "FI exact", "ch07_lost_exact_3", MOST),
    Judged("15: three percent costs most of the accuracy", "FI damped 0.0001", "ch07_lost_damped_3", MOST),
    Judged("16: barely a loss", "random, five percent of the weights", "ch07_lost_random_5", below=BARELY),
    Judged("17: ROUGE-1 below random's", "FI exact, widest gap", "ch07_text_gap_exact", below=0),
    Judged("17: ROUGE-1 below random's", "FI damped 0.0001, widest gap", "ch07_text_gap_damped", below=0),
    Judged("17: win rate below random's", "FI exact, widest gap", "ch07_text_win_gap_exact", below=0),
    Judged("17: win rate below random's", "FI damped 0.0001, widest gap", "ch07_text_win_gap_damped",
           below=0),
    Judged("17: most clearly at ten percent", "FI exact, its rate", "ch07_text_at_exact", 0.09, 0.11),
    Judged("17: most clearly at ten percent", "FI damped 0.0001, its rate", "ch07_text_at_damped",
           0.09, 0.11),
    Judged("R3: prunes better than Wanda", "FI exact, lowest weights", "ch07_prune_light_exact_less_wanda",
           0),
    Judged("R3: prunes better than Wanda", "FI damped 0.0001, lowest weights",
           "ch07_prune_light_damped_less_wanda", 0),
    Judged("R3: prunes better than random", "FI exact, lowest weights",
           "ch07_prune_light_exact_less_random", 0),
    Judged("R3: prunes better than random", "FI damped 0.0001, lowest weights",
           "ch07_prune_light_damped_less_random", 0),
    Judged("O2: the filter does the damage", "FI damped 0.0001 minus FI exact, accuracy", "ch07_damped_exact",
           below=0),
    Judged("O2: no further than the Jacobian norm", "FI damped 0.0001 minus Jacobian norm, accuracy",
           "ch07_damped_jacobian", -BARELY),
    Judged("O3: as good as SNIP", "information length minus SNIP, accuracy", "ch07_length_snip", -0.02, 0.02),
    Judged("O3: knows what can go", "information length minus random, lowest weights",
           "ch07_prune_light_length_less_random", 0),
]  # fmt: skip

PIXELS = [
    Judged(RANKS, "FI exact, whole pixels, four letters", "ch04_at_pixel", below=MOST),
    Judged(RANKS, "FI exact, patches, four letters", "ch04_at_patch", below=MOST),
    Judged(RANKS, "FI exact, single colour channels", "ch04_at_channel", below=MOST),
    Judged(RANKS, "FI exact, whole pixels, top 8 and rest", "ch04_at_top", below=MOST),
    Judged(RANKS, "FI exact, patches, top 8 and rest", "ch04_at_toppatch", below=MOST),
    Judged(RANKS, "FI damped 1e-06, whole pixels", "ch04_at_light", below=MOST),
    Judged(RANKS, "FI damped 0.0001, whole pixels", "ch04_at_damped", below=MOST),
    Judged("6: skewed", "FI exact, whole pixels", "ch04_held_pixel", SKEWED),
    Judged("6: skewed", "FI exact, channels summed", "ch04_held_summed", SKEWED),
    Judged("6: skewed", "FI damped 1e-06, whole pixels", "ch04_held_light", SKEWED),
    Judged("6: skewed", "FI damped 0.0001, whole pixels", "ch04_held_damped", SKEWED),
]

EMBEDDINGS = [
    Judged(RANKS, "FI exact, whole tokens, four letters", "ch06_token_at_exact", below=MOST),
    Judged(RANKS, "FI exact, whole tokens, top 8 and rest", "ch06_token_at_top", below=MOST),
    Judged(RANKS, "FI damped 0.0001, whole tokens", "ch06_token_at_damped", below=MOST),
]

QUANTIZATION = [
    Judged(
        "19: about 0.1 GB", "rows of o_proj in Qwen2-7B at 4 bit, MB", "ch08_published_attention_4", 50, 200
    ),
]

RULES: Mapping[str, list[Judged]] = {
    "02_the_measure": MEASURE,
    "03_what_fi_can_say": LIMITS,
    "04_fragile_pixels": PIXELS,
    "05_prompts_and_pixels": PROMPTS,
    "06_embedding_attacks": EMBEDDINGS,
    "07_sparsification": SPARSE,
    "08_quantization": QUANTIZATION,
}
