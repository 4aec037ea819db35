"""The digits at the end of chapter 04."""

import numpy as np

from fichapters.ch04 import digits as lab
from fichapters.ch04 import draw_digits as draw
from fichapters.ch04.lab import INTACT, curves


def test_digits_with_ten_classes() -> None:
    digits = lab.train(60, 0, steps=60)
    squares = lab.saturation(digits).set_index("p").at_ceiling
    assert squares[1] < 0.1 and squares[4] < 0.1  # fewer dimensions than other classes
    scores = lab.scores_of(digits, ["FI exact", "Jacobian norm", "random"], 0)
    trials = lab.masked_by(digits, scores, [4, 64], 0)
    whole = trials.where(amount=64).rows()
    masked = whole[whole.measure != INTACT]
    assert (masked.groupby(["id", "fill"]).log_prob.agg(np.ptp) < 1e-5).all()
    draw.curves({fill: curves(trials.where(fill=fill), "count") for fill in ("erase", "invert")})
    assert lab.train(60, 0, steps=60).log_probs(digits.x).equal(digits.log_probs(digits.x))
