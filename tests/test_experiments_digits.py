"""The classifier of digits that chapter 11 scores."""

import torch

from fichapters.ch04.digits import train


def test_the_digits_are_learnt_and_come_out_the_same_each_time() -> None:
    digits = train(60, 0, steps=60)
    log_p = digits.log_probs(digits.x)
    assert log_p.shape == (60, 10) and torch.allclose(log_p.exp().sum(1), torch.ones(60))
    assert (log_p.argmax(1) == digits.y).double().mean() > 0.8
    assert train(60, 0, steps=60).log_probs(digits.x).equal(log_p)
