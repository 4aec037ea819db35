"""The gradient work: from a model and examples to class gradients, measures, and stored scores."""

from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights

__all__ = ["Scores", "score_weights"]
