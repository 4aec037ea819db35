"""Chapter 01: one model, one question, a few weights set to zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fihelpers.answers import usual_answers
from fihelpers.evaluate.questions import Evaluator
from fihelpers.evaluate.stats import wilson
from fihelpers.models.language import LanguageModel
from fihelpers.perturb.sparsify import select, zeroed
from fihelpers.scores.store import Scores
from fihelpers.tasks import Example


class Look:
    """Asks one model the same questions again and again, whatever has been done to its weights."""

    def __init__(self, model: LanguageModel, examples: Sequence[Example]) -> None:
        self.model = model
        self.examples = list(examples)
        answers = usual_answers(model.tokenizer, lettered=bool(examples[0].options))
        self._ask = Evaluator(model, self.examples, answers)
        self._intact = self._ask()

    def typical(self) -> Example:
        """Of the questions that the intact model answers right, the one of median confidence."""
        right = np.flatnonzero(self._intact.correct.numpy())
        if len(right) == 0:
            raise ValueError(f"The model {self.model.name!r} answers none of the questions right.")
        confidence = self._intact.log_prob.numpy()[right]
        middle = right[np.argsort(confidence, kind="stable")[len(right) // 2]]
        return self.examples[middle]

    def probabilities(self, question: Example) -> list[float]:
        """P of each class for one of the questions, with the weights as they are now."""
        return self._ask().log_probs[self.examples.index(question)].exp().tolist()

    def correct(self) -> np.ndarray:
        """For each question, whether the model is right, with the weights as they are now."""
        return self._ask().correct.numpy()

    def sweep(self, scores: dict[str, Scores], shares: Sequence[float], seed: int) -> pd.DataFrame:
        """Accuracy with a Wilson interval after zeroing the top share by each score; 0 is the intact model.

        Columns: measure, rate, accuracy, low, high, seeds (always 1), n.
        """
        lines = []
        for name in ("FI exact", "FI damped 0.0001", "Jacobian norm", "random"):
            for share in (0.0, *shares):
                with zeroed(self.model.network, select(scores[name], share, seed=seed)):
                    correct = self.correct()
                low, high = wilson(int(correct.sum()), len(correct))
                lines.append((name, share, correct.mean(), low, high, 1, len(correct)))
        return pd.DataFrame(lines, columns=["measure", "rate", "accuracy", "low", "high", "seeds", "n"])
